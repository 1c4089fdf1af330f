"""`vggstyle CONTENT STYLE...`: every field of StyleConfig is a flag, with its default."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vggfeat
from vggfeat.errors import counted
from vggfeat.transfer.config import StyleConfig
from vggfeat_cli.options import json_option, quiet_option, settings
from vggfeat_cli.run import FAILED, INTERRUPTED, Target, finish, print_result, progress_bar

if TYPE_CHECKING:
    from vggfeat.transfer.stylize import StyleStep


@click.command("vggstyle", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("content", type=click.Path())
@click.argument("style", type=click.Path(), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="PNG, JPEG, WebP or TIFF file.  [default: CONTENT-STYLE.png, numbered if taken]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output file.")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="Save the run in this file after each scale, once a minute and on Ctrl-C; the same command resumes it. "
    "Removed when the picture is done.",
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Also save the picture every so many steps of each scale, as OUTPUT-1-0010 for scale 1, step 10.",
)
@json_option
@quiet_option
@settings(StyleConfig)
@click.version_option(vggfeat.__version__)
def command(
    content: str,
    style: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    checkpoint: str | None,
    save_every: int | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Paint CONTENT in the style of STYLE (one image, or several to blend).

    Ctrl-C stops early and saves the best picture so far.
    """
    config = StyleConfig(**values)
    from vggfeat.files import free_name, same_file
    from vggfeat.image import check_output, save_image

    name = output or "-".join(Path(path).stem for path in (content, *style)) + ".png"
    resumed = Path(checkpoint).stat().st_mtime_ns if checkpoint is not None and Path(checkpoint).exists() else None

    def target() -> Target:  # as of now: another file may come in its place while the run goes on
        if resumed is None:
            return Target(output, name, overwrite)
        # what the run itself left when it was interrupted is replaced; what else is there is not, nor in the way
        return Target(None, name, overwrite or _is_unfinished(Path(name), config, resumed))

    inputs = (content, *style, *config.init_files)
    planned = target()
    check_output(planned.path(), overwrite=planned.overwrite, inputs=inputs)
    if checkpoint is not None and same_file(checkpoint, planned.path()):
        raise vggfeat.InputError(f"--checkpoint and the picture are both {checkpoint}: give them two names")
    with _Bar(disable=quiet) as bar:

        def on_step(step: StyleStep) -> None:
            nonlocal save_every
            bar(step)
            if not save_every or step.step % save_every:
                return
            path = target().path()
            path = path.with_name(f"{path.stem}-{step.scale}-{step.step:04}{path.suffix}")
            replaces = overwrite and not any(same_file(path, each) for each in (*inputs, checkpoint or ""))
            try:
                save_image(step.image(), path if replaces else free_name(path), overwrite=replaces)
            except vggfeat.ImageError as error:
                bar.say(f"{error}; no more pictures along the way")
                save_every = None

        result = vggfeat.stylize(content, list(style), config, callback=on_step, checkpoint=checkpoint)
    written, trouble = target().save(result)
    if as_json:
        summary = {"output": str(written), "content": content, "style": list(style)} | result.to_dict()
        unheard = print_result(json.dumps(summary, indent=2))
    else:
        unheard = print_result(str(written))
    seconds = f"{result.elapsed:.1f} s"
    size = f"{result.image.width}×{result.image.height}"
    steps = counted(len(result.history), "step")
    click.echo(f"{size}, {steps}, {seconds}, {result.arch} in {result.precision}", err=True)
    if output is not None and resumed is not None and written != Path(output):
        click.echo(f"{output} already exists: the picture is {written}", err=True)
    for each in filter(None, (trouble, unheard)):
        click.echo(f"vggstyle: {each}; the picture is in {written}", err=True)
    if result.failure:
        click.echo(
            f"vggstyle: {result.failure}; the picture is that of a coarser scale: lower --size or --tile", err=True
        )
        return FAILED
    if result.interrupted:
        on = f"; the same command resumes from {checkpoint}" if checkpoint and Path(checkpoint).exists() else ""
        click.echo(f"vggstyle: interrupted; this is the best picture so far{on}", err=True)
        return INTERRUPTED
    if trouble:
        return FAILED
    if checkpoint is not None:  # the picture is where it should be
        Path(checkpoint).unlink(missing_ok=True)
    return FAILED if unheard else 0


def _is_unfinished(path: Path, config: StyleConfig, since: int) -> bool:
    """Whether a picture is what a run with these settings left at an interruption, no earlier than `since` (ns)."""
    from vggfeat.image import read_settings

    try:
        settings = read_settings(path) or {}
    except vggfeat.ImageError:  # none, or none that can be read
        return False
    same = settings.get("config") == json.loads(json.dumps(config.to_dict()))
    return same and settings.get("interrupted") is True and path.stat().st_mtime_ns >= since


class _Bar:
    """The progress bar: scale, step, losses, time left."""

    def __init__(self, disable: bool) -> None:
        self.quiet, self.begun = disable, False
        self.bar = progress_bar(1.0, disable, named=True)  # hidden in a log, where a line per scale suffices
        self.bar.set_description_str("loading")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line, file=sys.stderr)

    def __call__(self, step: StyleStep) -> None:
        if not self.begun:  # before the wait, not after it
            self.say(f"weights: {step.weights}")
        if not self.begun and (step.scale, step.step) != (1, 1):
            scale = f"scale {step.scale if step.step > 1 else step.scale - 1}/{step.scales}"
            self.say(f"resuming after step {step.step - 1} of {scale}" if step.step > 1 else f"resuming after {scale}")
        self.begun = True
        if self.bar.disable and not self.quiet and step.step == 1:
            click.echo(f"scale {step.scale}/{step.scales} {step.width}×{step.height}, {step.steps} steps", err=True)
        where = f"scale {step.scale}/{step.scales} {step.width}×{step.height} step {step.step}/{step.steps}"
        self.bar.set_description_str(where, refresh=False)
        self.bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in step.losses.items() if v), refresh=False)
        self.bar.update(step.progress - self.bar.n)


def main() -> None:
    """Entry point."""
    finish(command)
