"""`vggfeat describe`, `compare`, `stacked`, `fields`: what a VGG is made of and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

import vggfeat
from vggfeat_cli.options import Values
from vggfeat_cli.reports import (
    check_outputs,
    finish_report,
    format_option,
    output_option,
    overwrite_option,
    plot_option,
)


class _Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer releases of click
    """A side in pixels, or HEIGHTxWIDTH."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            sides = [int(side) for side in value.lower().replace("×", "x").split("x")]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2):
            self.fail(f"expected a number of pixels, or HEIGHTxWIDTH, got {value!r}", param, ctx)
        return sides[0] if len(sides) == 1 else tuple(sides)


@click.command()
@click.argument("arch")
@click.option("--size", type=_Size(), default=224, show_default=True, help="Side of the image, or HEIGHTxWIDTH.")
@click.option("--classes", type=int, help="Outputs.  [default: 1000]")
@click.option("--head", type=click.Choice(["paper", "slim", "none"]), default="paper", show_default=True)
@click.option("--width", type=float, default=1.0, show_default=True, help="Factor on every channel count.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images at a time, for the memory figures.")
@format_option
@output_option
@overwrite_option
def describe(
    arch: str,
    size: int | tuple[int, int],
    classes: int | None,
    head: str,
    width: float,
    batch: int,
    form: str | None,
    output: str | None,
    overwrite: bool,
) -> None:
    """Show ARCH layer by layer.

    Shapes, parameters, MACs, memory, receptive fields. ARCH is vgg11, vgg13, vgg16 or vgg19, with or without _bn, or a
    column of the paper's table: A, A-LRN, B, C, D, E.
    """
    if classes is not None and head == "none":
        raise vggfeat.InputError("--classes needs a head: leave out --head none")
    check_outputs(output, None, overwrite)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    options |= {"input_size": size, "batch": batch, "head": None if head == "none" else head, "width": width}
    report = vggfeat.describe(arch, **options)
    finish_report(report, form, output, overwrite)


@click.command()
@click.argument("networks", nargs=-1)
@click.option(
    "--size", "input_size", type=int, help="Side of the image.  [default: as the published weights were tested]"
)
@click.option("--classes", type=int, default=1000, show_default=True, help="Outputs.")
@click.option("--measure", is_flag=True, help="Run them: latency, throughput and peak memory on this machine.")
@click.option("--batch", type=int, help="Images at a time when measuring.  [default: 8]")
@click.option("--device", help="Where to measure.  [default: auto: cuda, else the CPU]")
@plot_option
@format_option
@output_option
@overwrite_option
def compare(
    networks: tuple[str, ...],
    input_size: int | None,
    classes: int,
    measure: bool,
    batch: int | None,
    device: str | None,
    plot: str | None,
    form: str | None,
    output: str | None,
    overwrite: bool,
) -> None:
    """Show NETWORKS side by side.

    VGGs, and any torchvision classifier. Without a name: vgg16, resnet50, efficientnet_b0.
    """
    measuring = {name: value for name, value in (("batch", batch), ("device", device)) if value is not None}
    if measuring and not measure:
        raise vggfeat.InputError(f"--{next(iter(measuring))} says how to measure: add --measure")
    check_outputs(output, plot, overwrite)
    tell: Callable[[str], None] | None = (lambda name: click.echo(f"measuring {name}", err=True)) if measure else None
    names = networks or ("vgg16", "resnet50", "efficientnet_b0")
    options: dict[str, Any] = {"num_classes": classes, "input_size": input_size}
    if plot is not None:
        from vggfeat.plots import published

        published(vggfeat.compare(names, **options))  # before measuring and writing: whether there is enough to draw
    report = vggfeat.compare(names, **options | measuring, measure=measure, callback=tell)
    finish_report(report, form, output, overwrite)
    if plot is not None:
        from vggfeat.plots import plot_comparison

        plot_comparison(report, plot, overwrite=overwrite)


@click.command()
@click.argument("n", type=int, default=3)
@plot_option
@format_option
@output_option
@overwrite_option
def stacked(n: int, plot: str | None, form: str | None, output: str | None, overwrite: bool) -> None:
    """Show why VGG stacks 3×3 convolutions.

    N of them, by default 3, against one (2N+1)×(2N+1).
    """
    check_outputs(output, plot, overwrite)
    report = vggfeat.stacked_3x3(n)
    if plot is not None:
        from vggfeat.plots import plot_stacked

        plot_stacked(report, plot, overwrite=overwrite)
    finish_report(report, form, output, overwrite)


@click.command()
@click.argument("image", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="PNG, PDF or SVG file.")
@click.option("--arch", help="Network: vgg16, vgg19, ….  [default: the weights' own; vgg16 with --samples 0]")
@click.option(
    "--layers",
    "--layer",
    "layers",
    type=Values(str),
    help="At most seven, comma-separated.  [default: the last convolution of blocks 1 to 4, and pool5, as far as the "
    "weights reach]",
)
@click.option("--weights", help="What to measure the effective fields with.  [default: auto]")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Noise images to average over (up to 16 times as many for small fields); 0 for none.",
)
@overwrite_option
def fields(
    image: str,
    output: str,
    arch: str | None,
    layers: tuple[str, ...] | None,
    weights: str | None,
    samples: int,
    overwrite: bool,
) -> None:
    """Draw over IMAGE what a unit of each layer sees.

    Its receptive field, and the effective one: what it actually depends on.
    """
    from vggfeat.image import open_image
    from vggfeat.plots import check_plot, plot_receptive_fields

    if weights is not None and not samples:
        raise vggfeat.InputError("--weights says what to measure with: leave --samples above 0")
    check_plot(output, overwrite=overwrite, inputs=[image])
    picture = open_image(image)  # before the weights, which may need fetching
    options: dict[str, Any] = {"samples": samples}
    if samples:
        from vggfeat.weights import load

        options["weights"] = load("auto" if weights is None else weights, arch)
    written = plot_receptive_fields(picture, arch, layers, output, **options, overwrite=overwrite)
    if samples:
        click.echo(f"weights: {options['weights'].label}", err=True)
    click.echo(str(written))


COMMANDS = (describe, compare, stacked, fields)
