"""Plots of analyses, training runs and evaluations, as PNG, PDF or SVG by suffix; needs matplotlib (`vggfeat[plot]`).

Figures are separate matplotlib objects: no display, no pyplot, no global setting is touched.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggfeat.analysis import Comparison, Description, EffectiveField, Net, Stacked, effective_field, stacked_3x3
from vggfeat.arch import Arch, Layer, layer_names, parse
from vggfeat.errors import InputError, counted, optional
from vggfeat.files import PathLike, check_path, written
from vggfeat.tables import apart, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from vggfeat.image import ImageLike
    from vggfeat.training.evaluation import Evaluation
    from vggfeat.training.folder import Epoch
    from vggfeat.weights import WeightsLike

SUFFIXES = (".png", ".pdf", ".svg")
# colours that colour-blind people can tell apart (Okabe and Ito 2008)
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SKY, YELLOW, RED, GREY = "#56b4e9", "#f0e442", "#d55e00", "#777777"


def check_plot(path: PathLike, *, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Path:
    """`path`, after checking that a figure can be written there: call it before any long work.

    Raises:
        InputError: not one of `SUFFIXES`, no writable folder, or a file that must not be replaced.
        DependencyError: matplotlib is missing.
    """
    path = check_path(path, SUFFIXES, overwrite=overwrite, inputs=inputs)
    _matplotlib()
    return path


def _matplotlib() -> Any:
    return optional("matplotlib.figure", "plots need matplotlib: pip install 'vggfeat[plot]'")


def _figure(width: float, height: float) -> Figure:
    figure: Figure = _matplotlib().Figure(figsize=(width, height), layout="constrained")
    return figure


def _save(figure: Figure, path: Path, overwrite: bool) -> Path:
    with written(path, overwrite=overwrite) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")  # boxes then, as anyone can see
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=150)
    return path


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


# ── compare ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def plot_comparison(comparison: Comparison, path: PathLike, *, overwrite: bool = False) -> Path:
    """Accuracy against cost: MACs and, if measured, latency; a disc's area is the parameters.

    A ring above a disc is the same network trained by a newer recipe.

    Args:
        comparison: of `vggfeat.compare`.
        path: where to; `.png`, `.pdf` or `.svg`.
        overwrite: replace an existing file.

    Raises:
        InputError: fewer than two networks with a published accuracy, or a path that cannot be written.
        DependencyError: matplotlib is missing.
    """
    path = check_plot(path, overwrite=overwrite)
    nets = published(comparison)
    costs: list[tuple[str, list[float]]] = [("GMACs per image", [net.macs / 1e9 for net in nets])]
    if measured := [1e3 * net.measured.latency for net in nets if net.measured]:
        costs.append((f"forward of one image, ms\n{comparison.machine}", measured))
    figure = _figure(1 + 5.5 * len(costs), 5)
    panels: Any = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(panels, costs, strict=True):
        for net, cost in zip(nets, values, strict=True):
            scores = [top1 for top1, _ in net.published.values()]
            color, area = BLUE if net.name.startswith("vgg") else RED, _area(net)
            axes.scatter(cost, scores[0], s=area, color=color, alpha=0.45, linewidths=0, zorder=2)
            axes.scatter(cost, scores[0], s=9, color=color, zorder=3)
            if scores[-1] > scores[0]:
                axes.plot([cost, cost], [scores[0], scores[-1]], color=color, lw=1, ls=":", zorder=1)
                axes.scatter(cost, scores[-1], s=area, facecolors="none", edgecolors=color, zorder=2)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.8, max(values) * 1.8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axes.set_xlabel(label)
        axes.grid(True, color="#e6e6e6", zorder=0)
        axes.margins(y=0.12)
        _plain(axes)
    panels[0].set_ylabel("ImageNet top-1, one crop, %")
    figure.suptitle("Accuracy against cost (area: parameters; ring: newer training recipe)", fontsize=11)
    figure.draw_without_rendering()  # so that positions in points are known
    for axes, (_, values) in zip(panels, costs, strict=True):
        _name(axes, nets, values, figure.dpi / 72)
    return _save(figure, path, overwrite)


def published(comparison: Comparison) -> list[Net]:
    """The networks with a published accuracy, which are the ones drawn.

    Raises:
        InputError: fewer than two.
    """
    nets = [net for net in comparison.nets if net.published]
    if len(nets) < 2:
        raise InputError("accuracy against cost needs two networks with a published accuracy at this size and classes")
    return nets


def _area(net: Net) -> float:
    """Of the disc, in square points."""
    return net.params / 1e6 * 6


# where a name can stand: to the right of its disc, to the left, above, below, and in the corners
_PLACES = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.8, 0.7), (-0.8, 0.7), (0.8, -0.7), (-0.8, -0.7))


def _name(axes: Axes, nets: Sequence[Net], costs: Sequence[float], dots: float) -> None:
    """Write each name beside its disc, where it least covers other names and centres."""
    scores = [[top1 for top1, _ in net.published.values()] for net in nets]
    data = [(cost, each[0]) for each, cost in zip(scores, costs, strict=True)]
    rings = [(cost, each[-1]) for each, cost in zip(scores, costs, strict=True)]  # or the disc again
    points, above = (
        [tuple(float(v) / dots for v in axes.transData.transform(xy)) for xy in each] for each in (data, rings)
    )
    inner = [max(4, 0.7 * (_area(net) / math.pi) ** 0.5) for net in nets]  # about a square inside the disc
    taken = [(x - r, y - r, x + r, top + r) for (x, y), (_, top), r in zip(points, above, inner, strict=True)]
    left, _, right, _ = (float(edge) / dots for edge in axes.bbox.extents)
    for net, xy, (x, y) in sorted(zip(nets, data, points, strict=True), key=lambda each: -each[2][1]):
        radius, width = (_area(net) / math.pi) ** 0.5 + 3, 5.6 * len(net.name)
        best: tuple[float, tuple[float, float]] = (math.inf, (0.0, 0.0))
        for sideways, upwards in _PLACES:
            dx, dy = sideways * radius + (sideways - 1) * width / 2, upwards * radius
            x0, y0, x1, y1 = x + dx, y + dy - 5, x + dx + width, y + dy + 5
            hidden = sum(max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
                         for u0, v0, u1, v1 in taken)  # fmt: skip
            best = min(best, (hidden + 100 * (max(0, left - x0) + max(0, x1 - right)), (dx, dy)), key=lambda b: b[0])
        dx, dy = best[1]
        taken.append((x + dx, y + dy - 5, x + dx + width, y + dy + 5))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0}
        axes.annotate(net.name, xy, (dx, dy), textcoords="offset points", va="center", fontsize=9, arrowprops=line)


# ── describe ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plot_parameters(descriptions: Sequence[Description], path: PathLike, *, overwrite: bool = False) -> Path:
    """Parameters and MACs of networks, convolutions and fully connected layers stacked, as horizontal bars.

    Args:
        descriptions: of `vggfeat.describe`, of one network each.
        path: where to; `.png`, `.pdf` or `.svg`.
        overwrite: replace an existing file.

    Raises:
        InputError: no network, or a path that cannot be written.
        DependencyError: matplotlib is missing.
    """
    path = check_plot(path, overwrite=overwrite)
    if not descriptions:
        raise InputError("nothing to draw: describe at least one network")
    figure = _figure(10, 1.4 + 0.42 * len(descriptions))
    panels: Any = figure.subplots(1, 2, sharey=True)
    labels = [each.label for each in descriptions]
    names = [  # two of one network are told apart by their images
        label if labels.count(label) == 1 else f"{label}, {each.width}×{each.height}"
        for label, each in zip(labels, descriptions, strict=True)
    ]
    for axes, (key, unit, label) in zip(
        panels, (("params", 1e6, "million parameters"), ("macs", 1e9, "GMACs per image")), strict=True
    ):
        left = [0.0] * len(names)
        for kind, color, what in (("conv", BLUE, "convolutions"), ("fc", ORANGE, "fully connected")):
            widths = [each.split.get(kind, {}).get(key, 0) / unit for each in descriptions]
            if any(widths):
                axes.barh(range(len(names)), widths, left=left, color=color, height=0.7, label=what)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, each in enumerate(descriptions):
            total = getattr(each, key) / unit  # with batch normalisation, which is too little to be seen
            axes.annotate(
                f"{total:,.1f}" if total >= 100 else f"{total:.3g}",
                (left[i], i),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.12 * max(left))
        axes.locator_params(axis="x", nbins=5)
        _plain(axes)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", length=0)
    panels[1].tick_params(axis="y", length=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return _save(figure, path, overwrite)


# ── the 3×3 argument ──────────────────────────────────────────────────────────────────────────────────────────────────


def plot_stacked(stacked: Stacked, path: PathLike, *, overwrite: bool = False) -> Path:
    """A section through n stacked 3×3 convolutions, and the cost of n of them against a single one.

    Args:
        stacked: of `vggfeat.stacked_3x3`.
        path: where to; `.png`, `.pdf` or `.svg`.
        overwrite: replace an existing file.

    Raises:
        InputError: a path that cannot be written.
        DependencyError: matplotlib is missing.
    """
    path = check_plot(path, overwrite=overwrite)
    n = min(stacked.n, 6)  # more layers cannot be told apart in a section
    figure = _figure(10.5, 4.6)
    section, costs = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colors = [SKY, GREEN, ORANGE, PINK, YELLOW, RED]
    for depth in range(n + 1):  # depth 0 is the output, n the image
        y = -depth
        for x in range(-n, n + 1):
            inside = abs(x) <= depth
            face = ("#dddddd" if depth == n else colors[depth % 6]) if inside else "white"
            box = _box((x - 0.45, y - 0.2), 0.9, 0.4, face, "#555555" if inside else "#dddddd")
            section.add_patch(box)
        if depth < n:
            for sign in (-1, 1):
                section.plot([sign * (depth + 0.45), sign * (depth + 1.45)], [y - 0.2, y - 0.8], color="#555555", lw=1)
        side = 2 * depth + 1
        text = "1 output" if not depth else f"{side}×{side}" + (" of the image" if depth == stacked.n else "")
        section.text(n + 0.8, y, text, va="center", fontsize=10)
        if depth < n:
            section.text(-n - 0.8, y - 0.5, "3×3, ReLU", va="center", ha="right", fontsize=10, color=GREY)
    section.set_xlim(-n - 3.6, n + 4.8)
    section.set_ylim(-n - 0.6, 0.6)
    section.set_axis_off()
    which = f"{n}" if n == stacked.n else f"the last {n} of {stacked.n}"
    title = f"Receptive field of {which} stacked 3×3 convolution{'s' * (stacked.n > 1)}: {2 * n + 1}×{2 * n + 1}"
    section.set_title(title, fontsize=11)

    stacks = [stacked_3x3(k) for k in range(1, max(stacked.n, 2) + 1)]
    fields = [each.receptive_field for each in stacks]
    single, several = "one (2n+1)×(2n+1): (2n+1)² C², 1 ReLU", "n stacked 3×3: 9n C², n ReLUs"
    costs.plot(fields, [each.single_params for each in stacks], "o-", color=RED, label=single)
    costs.plot(fields, [each.stacked_params for each in stacks], "o-", color=BLUE, label=several)
    for each in stacks if len(stacks) <= 8 else stacks[-1:]:
        if each.saving:
            x = each.receptive_field
            costs.plot([x, x], [each.stacked_params, each.single_params], color=GREY, lw=0.8, ls=":", zorder=0)
            low = each.stacked_params < 0.08 * stacks[-1].single_params  # where the axis would strike it through
            offset, edge = (8, "bottom") if low else (-8, "top")
            costs.annotate(f"−{each.saving:.0%}", (x, each.stacked_params), (0, offset), ha="center", va=edge,
                           fontsize=9, textcoords="offset points", color=BLUE)  # fmt: skip
    costs.legend(frameon=False, loc="upper left")
    if len(fields) <= 10:
        costs.set_xticks(fields)
    costs.set_xlabel("receptive field, pixels")
    costs.set_ylabel("weights / C²  (and MACs per pixel)")
    costs.set_ylim(0, 1.22 * stacks[-1].single_params)  # room for the legend
    costs.set_title("What they cost", fontsize=11)
    costs.grid(True, color="#eeeeee")
    _plain(costs)
    return _save(figure, path, overwrite)


def _box(corner: tuple[float, float], width: float, height: float, face: str, edge: str, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=face, edgecolor=edge, **options)


# ── receptive fields ──────────────────────────────────────────────────────────────────────────────────────────────────


def plot_receptive_fields(
    image: ImageLike,
    arch: str | Arch | None,
    layers: Sequence[str] | None,
    path: PathLike,
    *,
    weights: WeightsLike = "auto",
    samples: int = 4,
    overwrite: bool = False,
) -> Path:
    """What a unit in the middle of each layer sees, drawn over an image at the image's own size.

    The architecture's squares are drawn solid, what the unit actually depends on (`vggfeat.analysis.effective_field`)
    dotted, and a panel for each layer shows the gradient itself.

    Args:
        image: a file, a PIL image or a tensor (1,3,H,W) in [0,1].
        arch: the network; None means what the weights imply, and vgg16 if nothing is measured.
        layers: names of the convolutional part, at most seven; None means the last convolution of blocks 1 to 4, and
            pool5, as far as the weights reach.
        path: where to; `.png`, `.pdf` or `.svg`.
        weights: what to measure with.
        samples: noise images to average over, see `effective_field`; 0 draws the architecture's squares alone.
        overwrite: replace an existing file.

    Raises:
        InputError: no layer or too many, a layer that the network lacks, or a path that cannot be written.
        ImageError: an image that cannot be read.
        WeightsError: weights that are unavailable or do not reach a layer.
        DependencyError: matplotlib is missing.
    """
    from vggfeat.image import as_picture

    path = check_plot(path, overwrite=overwrite)
    picture = as_picture(image)  # before the weights, which may need fetching
    loaded = None
    if samples:
        from vggfeat.weights import load

        loaded = load(weights, arch)
    arch = loaded.arch if loaded is not None else parse(arch or "vgg16")
    if layers is None:
        usual = [*{conv.name[:5]: conv.name for conv in arch.convs}.values()][:4] + ["pool5"]
        layers = loaded.served(usual) if loaded is not None else usual
    colors = [YELLOW, SKY, ORANGE, GREEN, PINK, RED, BLUE]
    layers = layer_names(layers)
    if len(layers) > len(colors):
        raise InputError(f"name one to {len(colors)} layers to draw, got {len(layers)}")
    drawn = sorted({arch.layer(name) for name in layers}, key=lambda layer: layer.index)
    fields = []
    if loaded is not None:
        fields = [effective_field(layer.name, arch, weights=loaded, samples=samples) for layer in drawn]
    reach = max(layer.receptive_field for layer in drawn)
    # a field larger than the picture shows as such, and a very tall picture does not make an endless figure
    across, down = (max(side, reach) for side in picture.size)
    columns = 2 if len(fields) <= 4 else 3
    rows = -(-len(fields) // columns)
    size, panel = 6.6, 2.35  # inches
    height = max(size * min(2.0, down / across) + 0.7, (panel + 0.2) * rows + 0.3)
    title = f"Receptive fields of {arch.name} on a {picture.width}×{picture.height} image"
    if not fields:
        figure = _figure(size, height)
        _draw_squares(figure, title, picture, drawn, fields, (across, down), colors)
        return _save(figure, path, overwrite)
    figure = _figure(size + columns * panel, height)
    sides: Any = figure.subfigures(1, 2, width_ratios=(size, columns * panel))
    left, right = sides
    _draw_squares(left, f"{title}\ndotted: the effective field", picture, drawn, fields, (across, down), colors)
    label = short(loaded.name, 40) if loaded is not None else ""
    _draw_gradients(
        right, f"Effective receptive fields: mean |gradient|\nweights {label}", fields, (rows, columns), colors
    )
    return _save(figure, path, overwrite)


def _draw_squares(
    figure: Any,
    title: str,
    picture: Image,
    layers: Sequence[Layer],
    fields: Sequence[EffectiveField],
    frame: tuple[int, int],
    colors: Sequence[str],
) -> None:
    """The receptive fields over the middle of a picture; `frame` is the area shown, in pixels across and down."""
    (wide, high), (across, down) = picture.size, frame
    axes = figure.subplots()
    axes.imshow(picture)
    for layer, field, color in itertools.zip_longest(layers, fields, colors[: len(layers)]):
        full: float = layer.receptive_field
        squares = [(full, "black", 3.2, "-", None), (full, color, 1.8, "-", f"{layer.name}: {full} px")]
        if field is not None and full > 30:  # dots would hide a small one
            squares.append((field.effective, color, 1.8, ":", None))
        for side, edge, width, style, label in squares:
            corner = ((wide - side) / 2 - 0.5, (high - side) / 2 - 0.5)
            options = {"linewidth": width, "linestyle": style, "label": label, "clip_on": False}
            axes.add_patch(_box(corner, side, side, "none", edge, **options))
    axes.set_xlim((wide - across) / 2 - 0.5, (wide + across) / 2 - 0.5)
    axes.set_ylim((high + down) / 2 - 0.5, (high - down) / 2 - 0.5)
    axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    columns = len(layers) if len(layers) <= 4 else -(-len(layers) // 2)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw_gradients(
    figure: Any, title: str, fields: Sequence[EffectiveField], grid: tuple[int, int], colors: Sequence[str]
) -> None:
    """What each unit depends on within its square, one panel per unit."""
    figure.suptitle(title, fontsize=11)
    panels: Any = figure.subplots(*grid, squeeze=False).flat
    for axes, field, color in itertools.zip_longest(panels, fields, colors[: len(fields)]):
        axes.set_axis_off()
        if field is not None:
            bright = float(field.gradient.flatten().quantile(0.995))  # single pixels stick out of the noise
            axes.imshow(field.gradient.numpy(), cmap="magma", vmin=0, vmax=bright, interpolation="nearest")
            full = field.theoretical
            axes.add_patch(_box((-0.5, -0.5), full, full, "none", color, linewidth=3, clip_on=False))
            axes.set_title(f"{field.layer}: {full} px, {field.effective:.0f} effective", fontsize=9)


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plot_training(runs: Mapping[str, Sequence[Epoch]], path: PathLike, *, overwrite: bool = False) -> Path:
    """Loss and accuracy by epoch, of one or several runs: on the test set as a line, in training dotted.

    Args:
        runs: the epochs of each run, by name, as `vggfeat.train` returns them.
        path: where to; `.png`, `.pdf` or `.svg`.
        overwrite: replace an existing file.

    Raises:
        InputError: no epoch to draw, more runs than there are colours, or a path that cannot be written.
        DependencyError: matplotlib is missing.
    """
    path = check_plot(path, overwrite=overwrite)
    colors = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY, "black", YELLOW)
    if len(runs) > len(colors):
        raise InputError(f"expected one to {len(colors)} runs, got {len(runs)}")
    if not any(runs.values()):
        raise InputError("nothing to draw: no run has an epoch")
    several = len(runs) > 1
    figure = _figure(11.5 if several else 9, 3.6)
    panels: Any = figure.subplots(1, 2, sharex=True)
    names: dict[str, Any] = {}  # lines of the legend: a colour for each run, and how its parts are drawn
    parts: dict[str, Any] = {}
    titles = ("loss (training: augmented, mixed and smoothed as set)", "accuracy, % (training: on augmented images)")
    for axes, key, title, factor in zip(panels, ("loss", "accuracy"), titles, (1, 100), strict=True):
        for (name, history), color in zip(runs.items(), colors, strict=False):
            for part, style in (("train", ":"), ("test", "-")):
                points = [(each.epoch, getattr(each, f"{part}_{key}")) for each in history]
                points = [(epoch, factor * value) for epoch, value in points if value is not None]
                if points:  # many markers would merge, and dots look like a line
                    marker = ("x" if part == "train" else "o") if len(points) <= 30 else None
                    label = f"{name}, {part}"
                    (line,) = axes.plot(
                        *zip(*points, strict=True), style, color=color, marker=marker, ms=4, label=label
                    )
                    if several:
                        (names[name],) = axes.plot([], [], color=color, lw=3)
                        (line,) = axes.plot([], [], style, color="#444444", marker=line.get_marker(), ms=4)
                    parts[part] = line
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, color="#e6e6e6")
        _plain(axes)
    if max(each.epoch for history in runs.values() for each in history) == 1:
        panels[0].set_xlim(0.5, 1.5)
        panels[0].set_xticks([1])
    labels = [f" {short(name, 24)}" for name in [*names, *parts]]  # matplotlib leaves out those that begin with _
    place: Any
    place, where = (figure, "outside right upper") if several else (panels[1], "best")
    legend = place.legend([*names.values(), *parts.values()], labels, loc=where, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(figure, path, overwrite)


def plot_confusion(evaluation: Evaluation, path: PathLike, *, overwrite: bool = False) -> Path:
    """The confusion matrix: for each true class (row), the share predicted as each class (column).

    With up to 25 classes the shares are written in, in per cent, and with up to 60 the classes are named. Of more,
    small shares are drawn darker. A class without images is grey.

    Args:
        evaluation: of `vggfeat.evaluate`.
        path: where to; `.png`, `.pdf` or `.svg`.
        overwrite: replace an existing file.

    Raises:
        InputError: a path that cannot be written.
        DependencyError: matplotlib is missing.
    """
    path = check_plot(path, overwrite=overwrite)
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    shares = [[100 * count / sum(row) if any(row) else math.nan for count in row] for row in evaluation.confusion]
    n = len(shares)
    named, written = n <= 60, n <= 25
    side = max(4.6, 1.8 + (0.42 if written else 0.2) * n) if named else max(8.0, n / 100)  # a dot for each class
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    colors = colormaps["Blues"].with_extremes(bad="#dddddd")
    norm = PowerNorm(1 if named else 0.5, vmin=0, vmax=100)
    image = axes.imshow(shares, cmap=colors, norm=norm, interpolation="nearest")
    if named:
        names, size = apart(evaluation.classes), None if written else 6
        axes.set_xticks(
            range(n), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False, fontsize=size
        )
        axes.set_yticks(range(n), names, parse_math=False, fontsize=size)
    if written:
        for i, j in itertools.product(range(n), range(n)):
            if shares[i][j] >= 0.05:
                dark = "white" if shares[i][j] > 50 else "black"
                axes.text(j, i, f"{shares[i][j]:.1f}", ha="center", va="center", fontsize=7, color=dark)
    by = "" if named else ", in the order of the report, from 0"
    axes.set(xlabel=f"predicted class{by}", ylabel=f"true class{by}")
    empty = sum(not any(row) for row in evaluation.confusion)
    grey = f"; grey: {counted(empty, 'row')} without images" if empty else ""
    axes.set_title(f"{evaluation.images:,} images, top-1 {100 * evaluation.top1:.2f} %{grey}", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    return _save(figure, path, overwrite)
