"""The subcommands of `vggfeat` that make pictures: filters, maps, dream, invert, distance, cam."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import vggfeat
from vggfeat.errors import counted, nearest
from vggfeat_cli.options import Values, device_option, json_option, quiet_option
from vggfeat_cli.reports import SUFFIXES, check_outputs, finish_report
from vggfeat_cli.run import FAILED, INTERRUPTED, Target, print_result, progress_bar

Command = Callable[..., Any]


class _Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer releases of click
    """Comma-separated whole numbers and ranges: `3,8,16-31`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        numbers: list[int] = []
        for part in str(value).split(","):
            if not (match := re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)):
                self.fail(f"expected numbers such as 3,8,16-31, got {value!r}", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if not 0 <= last - first < 10000:
                self.fail(f"expected a rising range of at most 10000, got {part!r}", param, ctx)
            numbers += range(first, last + 1)
        return numbers


def _class_numbers(said: str, weights: str, arch: str | None) -> list[int]:
    """Names by what a run recorded, which may look like numbers; else numbers."""
    from vggfeat.weights import load, run_metadata

    names = run_metadata(weights).get("classes") or []
    parts = [said] if said in names else [part.strip() for part in said.split(",")]
    if lacking := [part for part in parts if part not in names]:
        if names and any(re.search(r"[^\d-]", part) for part in lacking):
            raise vggfeat.InputError(f"the weights have no class {lacking[0]!r}: {nearest(lacking[0], names)}")
        try:
            return _Numbers().convert(said, None, None)  # type: ignore[no-any-return]
        except click.BadParameter as error:
            load(weights, arch)  # that there are none goes first
            raise click.BadParameter(error.message, param_hint="'--class'") from error
    return [names.index(part) for part in parts]


def _count(default: int) -> Callable[[Command], Command]:
    return click.option("--count", default=default, show_default=True, help="How many, if none are named.")


def _layer(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--layer", default=default, show_default=True, help="Which layer; `vggfeat describe ARCH` lists them."
    )


def _size(default: int | None, what: str = "Long side of the image in pixels.") -> Callable[[Command], Command]:
    return click.option("--size", type=int, default=default, show_default=default is not None, help=what)


def _colors(default: str) -> Callable[[Command], Command]:
    return click.option("--colors", default=default, show_default=True, help="grey, or the name of a colour map.")


def _order(default: str) -> Callable[[Command], Command]:
    orders, what = click.Choice(["first", "strongest"]), "Order of the channels."
    return click.option("--order", type=orders, default=default, show_default=True, help=what)


_channels = click.option("--channel", "channels", type=_Numbers(), help="Which channels, such as 3,8,16-31.")
_seed = click.option("--seed", default=0, show_default=True, help="Seed of the noise.")


def _common(command: Command) -> Command:
    """What every picture command has."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing output file."),
        click.option(
            "-o",
            "--output",
            type=click.Path(),
            help="PNG, JPEG, WebP, TIFF, PDF or SVG file.  [default: named after what it shows; of distance, none]",
        ),
        click.option(
            "--arch",
            help="Network: vgg16, vgg19, ….  [default: the weights' own; of published ones vgg16, for invert vgg19]",
        ),
        click.option(
            "--weights",
            default="auto",
            show_default=True,
            help="imagenet, caffe, bundled, random, auto, a .pth, .safetensors or .h5 file, or a run's folder.",
        ),
    ):
        command = option(command)
    return command


@click.command("filters")
@click.argument("images", nargs=-1, type=click.Path())
@_layer("conv1_1")
@_channels
@_count(64)
@_order("first")
@click.option("--patches", type=int, help="Patches per channel.  [default: 9]")
@_size(None, "Long side of IMAGES in pixels.  [default: 512]")
@_common
def filters(
    images: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    patches: int | None,
    size: int | None,
    **options: Any,
) -> int:
    """The first layer's filters, or what drives a layer most.

    The filters are in colour; with IMAGES, the patches in them that drive any layer's channels most.
    """
    given = {name: value for name, value in (("patches", patches), ("size", size)) if value is not None}
    if given and not images:
        raise vggfeat.InputError("--patches and --size are for IMAGES: name some")
    target = _target(output, f"filters-{options['layer']}.png", overwrite, images)
    from vggfeat.visualize import filters

    sheet = filters(images=list(images), **(options | given))
    return _saved(sheet, target, sheet.settings["weights"])


@click.command("maps")
@click.argument("image", type=click.Path())
@_layer("relu3_1")
@_channels
@_count(64)
@_order("strongest")
@click.option(
    "--scale",
    type=click.Choice(["each", "shared"]),
    default="each",
    show_default=True,
    help="Colour range: for each map, or shared by all.",
)
@_colors("viridis")
@click.option("--tile", default=128, show_default=True, help="Long side of a map on the sheet.")
@_size(512)
@_common
def maps(image: str, output: str | None, overwrite: bool, **options: Any) -> int:
    """A layer's feature maps of IMAGE."""
    target = _target(output, f"{Path(image).stem}-maps-{options['layer']}.png", overwrite, [image])
    from vggfeat.visualize import maps

    sheet = maps(image, **options)
    return _saved(sheet, target, sheet.settings["weights"])


@click.command("dream")
@click.option("--layer", help="Which layer.  [default: relu3_1; with --class the classifier's last]")
@_channels
@click.option(
    "--class",
    "classes",
    help="Classes instead: numbers such as 281,285, or of a run's their names; needs a classifier.",
)
@_count(9)
@click.option("--unit", is_flag=True, help="The middle unit instead of the whole channel.")
@click.option(
    "--parametrization",
    type=click.Choice(["fourier", "pixels"]),
    default="fourier",
    show_default=True,
    help="How the image is represented: by frequencies, or as blurred pixels.",
)
@_size(128, "Side of the pictures in pixels.")
@click.option("--steps", default=200, show_default=True, help="Steps of the optimiser.")
@click.option("--jitter", default=8, show_default=True, help="Largest random shift in pixels, at most size / 8.")
@_seed
@device_option
@quiet_option
@_common
def dream(output: str | None, overwrite: bool, classes: str | None, quiet: bool, **options: Any) -> int:
    """Images that excite channels, units or classes most.

    Ctrl-C stops early and saves the pictures as they stand.
    """
    if classes is not None:
        for other, field in (("--channel", "channels"), ("--layer", "layer")):
            if options[field] is not None:
                raise vggfeat.InputError(f"give {other} or --class, not both")
        options |= {"channels": _class_numbers(classes, options["weights"], options["arch"]), "layer": "fc8"}
    from vggfeat.arch import HEAD_NAMES
    from vggfeat.visualize import dream
    from vggfeat.weights import load, run_metadata

    options["layer"] = options["layer"] or inspect.signature(dream).parameters["layer"].default
    target = _target(output, f"dream-{'classes' if classes is not None else options['layer']}.png", overwrite)
    options["names"] = run_metadata(options["weights"]).get("classes")
    options["weights"] = load(options["weights"], options["arch"], classifier=options["layer"] in HEAD_NAMES)
    if classes is not None and options["weights"].arch.head == "slim":
        options["layer"] = "fc"
    with progress_bar(options["steps"], quiet) as bar:
        result = dream(**options, callback=lambda _: bar.update())
    for label, start, end in zip(result.labels, result.start, result.activations, strict=True):
        click.echo(f"{options['layer']} {label}: {start + 0.0:.4g} → {end:.4g}", err=True)
    return _saved(result, target, result.sheet.settings["weights"], result.interrupted)


@click.command("invert")
@click.argument("image", type=click.Path())
@click.option(
    "--layer",
    "layers",
    multiple=True,
    help="Which layer, or several, comma-separated; repeat it for more pictures.  [default: relu3_1; with --gram "
    "relu1_1 to relu5_1, as far as the weights reach]",
)
@click.option("--gram", is_flag=True, help="From Gram matrices: texture synthesis.")
@click.option("--compare", is_flag=True, help="Show the original beside it.")
@_size(256, "Long side of the picture in pixels.")
@click.option("--steps", default=200, show_default=True, help="Steps at the finest scale; half as many at others.")
@click.option("--tv-weight", type=float, help="Weight of the total variation.  [default: 1; with --gram 0]")
@_seed
@device_option
@quiet_option
@_common
def invert(
    image: str,
    layers: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    compare: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """IMAGE recovered from noise, or its texture.

    From a layer's features, or from Gram matrices.

    Ctrl-C stops early and saves what there is.
    """
    kind = "texture" if options["gram"] else "inverted"
    target = _target(output, f"{Path(image).stem}-{kind}.png", overwrite, [image])
    from vggfeat.visualize import Inversion, Sheet, invert

    groups: list[Any] = [[name.strip() for name in group.split(",") if name.strip()] for group in layers] or [None]
    results: list[Inversion] = []
    interrupted = False
    for group in groups:
        try:
            with progress_bar(1.0, quiet) as bar:
                results.append(invert(image, group, **options, callback=lambda step: bar.update(step.progress - bar.n)))
        except KeyboardInterrupt:  # before this one's first step
            if not results:
                raise
            interrupted = True
            break
        click.echo(f"{', '.join(results[-1].layers)}: error {results[-1].error:.4g}", err=True)
        if interrupted := results[-1].result.interrupted:
            break
    picture: Inversion | Sheet = results[0]
    if compare or len(groups) > 1:
        tiles, labels = [results[0].original], [Path(image).name]
        for result in results:
            tiles.append(result.image)
            several = f"{result.layers[0]} … {result.layers[-1]}"
            labels.append(
                f"{several if len(result.layers) > 2 else ', '.join(result.layers)}: error {result.error:.3g}"
            )
        settings = {"picture": "invert", "runs": [result.result.to_dict() for result in results]}
        kind = "Textures" if options["gram"] else "Inverted features"
        title = f"{kind}, weights {results[0].result.weights}"
        picture = Sheet(tiles, labels, title, columns=min(4, len(tiles)), settings=settings)
    return _saved(picture, target, results[0].result.weights, interrupted)


@click.command("distance")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--layers",
    "--layer",
    "layers",
    multiple=True,
    type=Values(str),
    help="Which layers, comma-separated.  [default: the last ReLU of each block, as far as the weights reach]",
)
@click.option("--lpips", is_flag=True, help="LPIPS, with its learned weights, on VGG-16 and its own layers.")
@_size(None, "Long side to resize both images to, in pixels.")
@_colors("turbo")
@json_option
@_common
def distance(
    a: str,
    b: str,
    layers: tuple[tuple[str, ...], ...],
    output: str | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """The perceptual distance of images A and B.

    In total and by layer; with -o, a heat map. Of two folders, the distances of all images of the same names, if need
    be without their suffixes; with -o, as a table: .csv, .json, .md or text.
    """
    chosen = [*itertools.chain.from_iterable(layers)] or None
    if Path(a).is_dir() and Path(b).is_dir():
        return _distances(a, b, chosen, "json" if as_json else None, output, overwrite, options)
    target = _target(output, "", overwrite, [a, b]) if output else None
    from vggfeat.visualize import distance

    result = distance(a, b, chosen, **options)
    written, trouble = target.save(result) if target else (None, "")
    if as_json:
        summary = {key: result.sheet.settings[key] for key in ("total", "lpips", "layers", "arch", "weights")}
        click.echo(json.dumps(summary | ({"output": str(written)} if written else {}), indent=2))
    else:
        for name, value in {"total": result.total, **result.layers}.items():
            click.echo(f"{name:8} {value:.6g}")
        click.echo(f"weights: {result.sheet.settings['weights']}", err=True)
        if written:
            click.echo(str(written))
    return _ended(written, trouble)


def _distances(
    a: str,
    b: str,
    layers: list[str] | None,
    form: str | None,
    output: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> int:
    if output is not None and Path(output).suffix.lower() not in (*SUFFIXES, ".txt", ""):
        raise vggfeat.InputError(f"two folders give a table, not a picture: name {output} .csv, .json, .md or .txt")
    check_outputs(output, None, overwrite)
    from vggfeat.visualize import distances

    if options.pop("colors") != "turbo":
        raise vggfeat.InputError("--colors is for the heat map of two images")
    with progress_bar(1.0, quiet=False) as bar:
        report = distances(a, b, layers, **options, callback=lambda done, count: bar.update(done / count - bar.n))
    if report.unpaired:
        named = ", ".join(report.unpaired[:3]) + (", …" if len(report.unpaired) > 3 else "")
        click.echo(f"{counted(len(report.unpaired), 'image')} without a partner: {named}", err=True)
    finish_report(report, form, output, overwrite)
    return 0


@click.command("cam")
@click.argument("image", type=click.Path())
@click.option("--class", "chosen", help="Which class: its number, or of a run's its name.  [default: the top one]")
@click.option("--layer", help="Which layer.  [default: the last ReLU before the classifier]")
@_size(None, "Long side of the image in pixels.  [default: 224; for a run, such that the shorter is as trained]")
@_colors("turbo")
@_common
def cam(image: str, output: str | None, overwrite: bool, chosen: str | None, **options: Any) -> int:
    """Where the classifier sees a class in IMAGE (Grad-CAM).

    It needs weights with a classifier: imagenet, a run's folder, or a file with one.
    """
    target = _target(output, f"{Path(image).stem}-cam.png", overwrite, [image])
    from vggfeat.visualize import cam

    options["size"] = "auto" if options["size"] is None else options["size"]
    if chosen is not None:
        options["class_index"], *more = _class_numbers(chosen, options["weights"], options["arch"])
        if more:
            raise vggfeat.InputError(f"--class is one class, got {chosen!r}")
    result = cam(image, **options)
    name = "" if result.class_name is None else f" {result.class_name}"
    click.echo(f"class {result.class_index}{name}: {100 * result.probability:.1f} %", err=True)
    return _saved(result, target, result.sheet.settings["weights"])


def _target(output: str | None, name: str, overwrite: bool, inputs: Sequence[str] = ()) -> Target:
    """Where to write, checked to be free and writable before any work."""
    from vggfeat.visualize import check_sheet

    target = Target(output, name, overwrite)
    check_sheet(target.path(), overwrite=overwrite, inputs=inputs)
    return target


def _saved(picture: Any, target: Target, weights: str, interrupted: bool = False) -> int:
    """Save the picture, print where it is, and return the exit status."""
    written, trouble = target.save(picture)
    click.echo(f"weights: {weights}", err=True)
    trouble = print_result(str(written)) or trouble
    return _ended(written, trouble, interrupted)


def _ended(written: Path | None, trouble: str, interrupted: bool = False) -> int:
    if trouble:
        click.echo(f"vggfeat: {trouble}; the picture is in {written}", err=True)
        return FAILED
    if interrupted:
        click.echo("vggfeat: interrupted; this is what there is so far", err=True)
        return INTERRUPTED
    return 0


COMMANDS = (filters, maps, dream, invert, distance, cam)
