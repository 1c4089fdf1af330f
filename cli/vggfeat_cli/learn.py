"""`vggfeat train` and `vggfeat evaluate`: every field of TrainConfig is a flag; a recipe sets those not given."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vggfeat
from vggfeat.errors import counted
from vggfeat.settings import PRECISIONS
from vggfeat.training.config import ARCH, RECIPES, TrainConfig, Views, recipe
from vggfeat_cli.options import device_option, json_option, quiet_option, settings
from vggfeat_cli.reports import (
    check_outputs,
    finish_report,
    format_option,
    output_option,
    overwrite_option,
    plot_option,
)
from vggfeat_cli.run import INTERRUPTED, keep_memory, progress_bar

if TYPE_CHECKING:
    from vggfeat.training.loop import TrainResult, TrainStep


@click.command(context_settings={"max_content_width": 100})
@click.argument("data", type=click.Path())
@click.option("--test", type=click.Path(), help="The test set, instead of one that DATA may hold.")
@click.option(
    "--recipe",
    "name",
    type=click.Choice([*RECIPES]),
    default="fast",
    show_default=True,
    help="Sets every flag not given; the values are printed at the start.",
)
@click.option("-o", "--output", type=click.Path(), help="Folder of the run.  [default: ARCH-RECIPE, or WEIGHTS-RECIPE]")
@click.option("--resume", is_flag=True, help="Resume the run in the --output folder.")
@click.option("--plot", type=click.Path(), help="Draw loss and accuracy: PNG, PDF or SVG.")
@click.option("--overwrite", is_flag=True, help="Replace an existing plot.")
@json_option
@quiet_option
@settings(TrainConfig, defaults=False)
def train(
    data: str,
    test: str | None,
    name: str,
    output: str | None,
    resume: bool,
    plot: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Train a classifier on DATA.

    DATA is CIFAR's folder or .tar.gz, a folder of class folders, or of train, val and test folders of them, or a zip.
    Where there is a val folder, the run is tested on that one.

    Ctrl-C saves a checkpoint; the same command with the run's folder as --output and --resume continues.

    \b
    In several processes:
    torchrun --nproc-per-node 2 -m vggfeat.training DATA …
    """
    keep_memory()
    config = recipe(name, **{key: value for key, value in values.items() if value is not None})
    first = os.environ.get("RANK", "0") == "0"  # the one of torchrun's processes that prints
    from vggfeat.files import free_name

    if resume and not output:
        raise vggfeat.InputError("--resume needs the run's folder: name it with --output")
    if first:
        # a resumed run may have its plot already
        check_outputs(None, plot, overwrite=overwrite or resume, inputs=[each for each in (data, test) if each])
    begun = config.arch or Path(str(config.weights or ARCH)).stem
    folder = Path(output) if output else free_name(Path(f"{begun}-{name}"))
    said = "  ".join(f"{key}={value}" for key, value in config.to_dict().items() if value is not None)
    lines = [f"recipe {name}: {said}"]  # printed with the run's first line, once there is sure to be one

    def announce(text: str) -> None:
        while lines:
            click.echo(lines.pop(), err=True)
        click.echo(text, err=True)

    quiet = quiet or not first
    with progress_bar(config.epochs, quiet, named=True) as bar:  # hidden in a log, where a line per epoch suffices
        tell = functools.partial(_tell, bar, quiet)
        try:
            result = vggfeat.train(
                data, config, test=test, folder=folder, resume=resume, callback=tell, announce=announce
            )
        except KeyboardInterrupt:  # a second one, or one of several processes
            rest = f"--resume continues from what was saved in {folder}" if folder.exists() else "nothing was written"
            click.echo(f"vggfeat train: interrupted; {rest}", err=True)
            return INTERRUPTED
    if not first:
        return 0
    if plot is not None and result.history:
        _plot(result, plot, overwrite)
    return _report(result, config, as_json)


def _tell(bar: Any, quiet: bool, step: TrainStep) -> None:
    """Move the bar, and print a line for a finished epoch."""
    bar.set_description_str(f"epoch {step.epoch}/{step.epochs} step {step.step}/{step.steps}", refresh=False)
    bar.set_postfix_str(f"loss {step.loss:.4f} lr {step.lr:.2g}", refresh=False)
    bar.update(step.epoch - 1 + step.step / step.steps - bar.n)
    if (done := step.finished) is not None and not quiet:
        test = "" if done.test_accuracy is None else f"  test {100 * done.test_accuracy:.2f} %"
        skipped = f"  {done.skipped} images left out" if done.skipped else ""
        bar.write(
            f"epoch {done.epoch}/{step.epochs}  loss {done.train_loss:.4f}  train {100 * done.train_accuracy:.2f} %"
            f"{test}  {done.seconds:.0f} s  {done.images_per_second:.0f} images/s{skipped}",
            file=sys.stderr,
        )


def _plot(result: TrainResult, plot: str, overwrite: bool) -> None:
    from vggfeat.files import free_name
    from vggfeat.plots import plot_training

    target = Path(plot) if overwrite else free_name(Path(plot))  # a file that appeared meanwhile stays
    plot_training({result.net.arch.name: result.history}, target, overwrite=overwrite)
    if target != Path(plot):
        click.echo(f"{plot} already exists: the plot is {target}", err=True)


def _report(result: TrainResult, config: TrainConfig, as_json: bool) -> int:
    """Print where the run is and how it ended, and return the exit status."""
    if as_json:
        summary = {
            "folder": str(result.folder),
            "interrupted": result.interrupted,
            "config": config.to_dict(),
            "history": [vars(epoch) for epoch in result.history],
        }
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo(str(result.folder))
    if result.interrupted:
        click.echo("vggfeat train: interrupted; the same command with --output and --resume goes on", err=True)
        return INTERRUPTED
    last = result.history[-1] if result.history else None
    if last is not None and last.test_accuracy is not None:
        click.echo(f"test accuracy {100 * last.test_accuracy:.2f} % after {counted(last.epoch, 'epoch')}", err=True)
    return 0


@click.command(context_settings={"max_content_width": 100})
@click.argument("weights", type=click.Path())
@click.argument("data", type=click.Path())
@click.option("--arch", help="Network, if the weights do not say.")
@settings(Views)
@click.option("--batch-size", type=int, default=256, show_default=True, help="Images at a time.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Precision of the network.",
)
@device_option
@click.option(
    "--bad-images",
    type=click.Choice(TrainConfig.CHOICES["bad_images"]),
    default="fail",
    show_default=True,
    help="What to do with an image that cannot be read.",
)
@click.option("--workers", type=int, default=2, show_default=True, help="Processes that read images.")
@plot_option
@format_option
@output_option
@overwrite_option
def evaluate(
    weights: str,
    data: str,
    plot: str | None,
    form: str | None,
    output: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Test WEIGHTS on DATA.

    Overall and per-class accuracy; --plot draws the confusion matrix.

    WEIGHTS are a run's folder, a file, imagenet or caffe.

    DATA is CIFAR's folder or .tar.gz, a folder of class folders or a zip of one; its test folder or, without one, its
    val folder, if it has one; for a run with --holdout and its own images, the held-out ones.
    """
    file = Path(weights.removeprefix("caffe:"))
    check_outputs(output, plot, overwrite, inputs=(str(file / "weights.safetensors" if file.is_dir() else file), data))
    keep_memory()
    views = Views(**{field.name: options.pop(field.name) for field in dataclasses.fields(Views)})
    report = vggfeat.evaluate(weights, data, views, **options)
    finish_report(report, form, output, overwrite)
    if plot is not None:
        from vggfeat.plots import plot_confusion

        plot_confusion(report, plot, overwrite=overwrite)


COMMANDS = (train, evaluate)
