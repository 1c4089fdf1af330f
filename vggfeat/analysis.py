"""What a VGG is made of and what it costs: layer tables, comparisons, the 3×3 argument, receptive fields.

`describe` and `stacked_3x3` compute from plain data and need no torch. All sizes are of float32; MB are 10⁶ bytes; a
MAC is one multiplication with its addition, and FLOPs are twice the MACs (the papers and torchvision count MACs).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggfeat.arch import ARCHS, Arch, parse, unit_of
from vggfeat.errors import DependencyError, InputError, nearest
from vggfeat.tables import Column, Report, Table, mega

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vggfeat.weights import Weights, WeightsLike

__all__ = [
    "ACCURACY",
    "Comparison",
    "Description",
    "EffectiveField",
    "Measured",
    "Net",
    "Row",
    "Stacked",
    "compare",
    "describe",
    "effective_field",
    "stacked_3x3",
]

FLOAT, INDEX = 4, 8  # bytes of a float32 value and of an int64
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}  # values that each keeps for a parameter
GRID = 7  # side of what the paper's fc6 looks at

COUNTED = Path(__file__).with_name("assets") / "torchvision.json"  # written by `python -m tests.counted`

# top-1 and top-5 in per cent on ImageNet's validation set, one 224 px crop, of torchvision's IMAGENET1K_V1 weights;
# repeated here (and compared in the tests) because VGGs are compared without torchvision, too
ACCURACY: dict[str, tuple[float, float]] = {
    "vgg11": (69.020, 88.628),
    "vgg11_bn": (70.370, 89.810),
    "vgg13": (69.928, 89.246),
    "vgg13_bn": (71.586, 90.374),
    "vgg16": (71.592, 90.382),
    "vgg16_bn": (73.360, 91.516),
    "vgg19": (72.376, 90.876),
    "vgg19_bn": (74.218, 91.842),
}


# ── describe ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """One layer, for one image.

    Attributes:
        name: as in `arch.names`; `input`, `avgpool` and `drop…` besides.
        kind: `input`, `conv`, `bn`, `relu`, `lrn`, `pool`, `avgpool`, `fc` or `dropout`.
        shape: of the output, (C,H,W) or (C,).
        params: learnt numbers, biases (and BN's shifts) included.
        weights: learnt numbers without biases (and BN's shifts).
        macs: multiplications with addition, of convolutions and linear layers alone.
        output_bytes: of the output.
        saved_bytes: what autograd keeps of this layer until the backward of a training step: its output where some
            backward needs it, and what only this layer knows (int64 winners of a pool, a dropout's mask).
        kept_bytes: what our frozen trunk keeps of it instead (`keep="bits"`, for a tap further down).
        receptive_field: side of the square of image pixels that one output sees, whether or not the image has them.
        stride: distance of neighbouring outputs in image pixels; None where it is not one number.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    weights: int
    macs: int
    output_bytes: int
    saved_bytes: int
    kept_bytes: int
    receptive_field: int
    stride: int | None

    @property
    def flops(self) -> int:
        """Twice the MACs."""
        return 2 * self.macs


@dataclass(frozen=True)
class Description(Report):
    """A VGG layer by layer, its totals, and the memory that it takes; see `describe`.

    Attributes:
        arch: the network.
        height: of the image in pixels.
        width: of the image in pixels.
        batch: images at a time.
        rows: the layers, shallow to deep, for one image.
    """

    arch: Arch
    height: int
    width: int
    batch: int
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """What to call it in a table: `vgg16_bn`, `vgg16 slim`, `vgg16 ×0.5`."""
        return _label(self.arch)

    @property
    def params(self) -> int:
        """Learnt numbers."""
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        """MACs of one image's forward."""
        return sum(row.macs for row in self.rows)

    @property
    def flops(self) -> int:
        """FLOPs of one image's forward."""
        return 2 * self.macs

    @property
    def training_flops(self) -> int:
        """FLOPs of one image's forward and backward: three forwards, less the gradient of the image."""
        return 3 * self.flops - next(row.flops for row in self.rows if row.macs)

    @property
    def activation_bytes(self) -> int:
        """Of one image: itself and the outputs of convolutions, pools and fully connected layers, as papers count."""
        return sum(row.output_bytes for row in self.rows if row.kind in ("input", "conv", "pool", "fc"))

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps for the backward of a training step with the whole batch, as counted on a CPU.

        The mask of a dropout is four bytes a value there (CUDA has one), and BN keeps mean and deviation of the batch.
        """
        statistics = 2 * FLOAT * sum(row.shape[0] for row in self.rows if row.kind == "bn")
        return self.batch * sum(row.saved_bytes for row in self.rows) + statistics

    @property
    def index_bytes(self) -> int:
        """The part of `saved_bytes` that is int64 positions of the pools' winners."""
        return self.batch * sum(INDEX * math.prod(row.shape) for row in self.rows if row.kind == "pool")

    @property
    def kept_bytes(self) -> int:
        """What our frozen trunk keeps of the whole batch for a tap at pool5, `keep="bits"`, the images included."""
        return self.batch * sum(row.kept_bytes for row in self.rows)

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once in a forward without gradient: the images, one layer's input and its output.

        Local response normalisation has two more values of its size alive.
        """
        image = self.rows[0].output_bytes
        peak = below = 0
        for row in self.rows[1:]:
            here = row.output_bytes * (3 if row.kind == "lrn" else 1)
            peak, below = max(peak, image + below + here), row.output_bytes
        return self.batch * peak

    @property
    def split(self) -> dict[str, dict[str, float]]:
        """Parameters and MACs of the convolutions, of batch normalisation, and of the fully connected layers."""
        found: dict[str, dict[str, float]] = {}
        for kind in ("conv", "bn", "fc"):
            rows = [row for row in self.rows if row.kind == kind]
            if rows:
                params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
                shares = {"params_share": params / self.params, "macs_share": macs / self.macs}
                found[kind] = {"params": params, "macs": macs} | shares
        return found

    @property
    def memory(self) -> dict[str, int]:
        """Bytes, with the batch; workspace of the convolutions and the framework itself come on top.

        `weights` (with BN's running statistics and counters), `inference` (weights and `peak_bytes`), for each
        optimiser its fixed part (`sgd_fixed`: weights, gradients, and what it keeps), and with `saved_bytes` the whole
        (`sgd`).
        """
        params = FLOAT * self.params
        buffers = sum(2 * FLOAT * row.shape[0] + INDEX for row in self.rows if row.kind == "bn")
        found = {"parameters": params, "buffers": buffers, "weights": params + buffers}
        found["inference"] = found["weights"] + self.peak_bytes
        for name, state in OPTIMIZERS.items():
            found[f"{name}_fixed"] = buffers + (2 + state) * params
            found[name] = found[f"{name}_fixed"] + self.saved_bytes
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers; counts in units, sizes in bytes."""
        totals = ("params", "macs", "flops", "training_flops", "activation_bytes")
        whole = ("peak_bytes", "saved_bytes", "index_bytes", "kept_bytes")
        return {
            "arch": self.arch.name,
            "config": self.arch.config,
            "batch_norm": self.arch.batch_norm,
            "head": self.arch.head,
            "width": self.arch.width,
            "num_classes": self.arch.num_classes,
            "input_size": [self.height, self.width],
            "batch": self.batch,
            "layers": [asdict(row) | {"shape": list(row.shape), "flops": row.flops} for row in self.rows],
            "totals": {name: getattr(self, name) for name in totals}
            | {"weights_without_biases": sum(row.weights for row in self.rows)},
            "split": self.split,
            "memory": self.memory | {name: getattr(self, name) for name in whole},
        }

    def tables(self) -> list[Table]:
        """Layers, the split, memory."""
        count = "{:,}".format
        sparse: Callable[[int], str] = lambda value: count(value) if value else ""  # noqa: E731
        mb: Callable[[int], str] = lambda value: mega(value, 3) if value else ""  # noqa: E731
        layers = Table(
            f"{self.label}: {self.arch.num_classes if self.arch.head else 'no'} classes, one image of "
            f"{self.width}×{self.height}, float32",
            [
                Column("name", "layer", left=True),
                Column("shape", "output", left=True),
                Column("params", "params", sparse),
                Column("weights", "without biases", sparse),
                Column("macs", "M MACs", lambda value: mega(value) if value else ""),
                Column("flops", "M FLOPs", lambda value: mega(value) if value else ""),
                Column("output_bytes", "output MB", mb),
                Column("saved_bytes", "autograd MB", mb),
                Column("kept_bytes", "trunk MB", mb),
                Column("receptive_field", "field px"),
                Column("stride", "stride"),
            ],
            [
                (row.name, "×".join(map(str, row.shape)), row.params, row.weights, row.macs, row.flops)
                + (row.output_bytes, row.saved_bytes, row.kept_bytes, row.receptive_field, row.stride)
                for row in self.rows
            ],
        )
        share = "{:.2%}".format
        names = {"conv": "convolutions", "bn": "batch norm", "fc": "fully connected"}
        parts = [(names[kind], *(part[key] for key in _SPLIT)) for kind, part in self.split.items()]
        split = Table(
            f"Where it is; forward {mega(self.flops / 1e3)} G FLOPs, with backward {mega(self.training_flops / 1e3)} G",
            [
                Column("part", "", left=True),
                Column("params", "params", count),
                Column("params_share", "share", share),
                Column("macs", "G MACs", lambda value: mega(value / 1e3, 3)),
                Column("macs_share", "share", share),
            ],
            [*parts, ("all", self.params, 1.0, self.macs, 1.0)],
        )
        memory = self.memory
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        lines: list[tuple[str, float]] = [
            ("activations, one image: input, conv, pool, fc", self.activation_bytes),
            ("weights", memory["weights"]),
            (f"inference, {images}: weights and the most alive at once", memory["inference"]),
            (f"autograd saves for backward, {images}", self.saved_bytes),
            ("  of it int64 positions of pools' winners", self.index_bytes),
            (f"our frozen trunk keeps, {images}", self.kept_bytes),
            *((f"training with {name}, fixed part", memory[f"{name}_fixed"]) for name in OPTIMIZERS),
            *((f"training with {name}, {images}", memory[name]) for name in OPTIMIZERS),
        ]
        return [layers, split, Table("What it takes", [_WHAT, Column("bytes", "MB", mega)], lines)]


_SPLIT = ("params", "params_share", "macs", "macs_share")
_WHAT = Column("what", "", left=True)


def describe(
    arch: str | Arch,
    *,
    num_classes: int = 1000,
    input_size: int | tuple[int, int] = 224,
    batch: int = 1,
    head: str | None = "paper",
    width: float = 1.0,
) -> Description:
    """A VGG layer by layer: shapes, parameters, MACs, memory, receptive fields. Computed, not run; no torch is needed.

    >>> vgg16 = describe("vgg16")
    >>> f"{vgg16.params:,} parameters, {vgg16.macs / 1e9:.3f} G MACs"
    '138,357,544 parameters, 15.470 G MACs'

    Args:
        arch: a name such as `vgg16_bn` or `D`, or an `Arch`, which says for itself what the other options say.
        num_classes: outputs of the head.
        input_size: side of a square image in pixels, or (height, width); at least 32.
        batch: images at a time, for the memory.
        head: `paper`, `slim`, or None for the convolutions alone.
        width: factor on every channel count.

    Raises:
        InputError: an unknown architecture or head, or a number that is too small.
    """
    if not isinstance(arch, Arch):
        named = parse(arch)
        arch = Arch(named.config, named.batch_norm, unit_of(width), head, num_classes)
    height, width_px = (input_size, input_size) if isinstance(input_size, int) else input_size
    least = arch.layers[-1].stride
    if min(height, width_px) < least:
        raise InputError(f"images of {width_px}×{height} are too small for pool5: at least {least} pixels on each side")
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    rows = (*_trunk_rows(arch, height, width_px), *_head_rows(arch, height, width_px))
    return Description(arch, height, width_px, batch, rows)


def _row(name: str, kind: str, shape: tuple[int, ...], field: int, stride: int | None, **values: int) -> Row:
    counts = dict.fromkeys(("params", "weights", "macs", "saved_bytes", "kept_bytes"), 0) | values
    return Row(name, kind, shape, output_bytes=FLOAT * math.prod(shape), receptive_field=field, stride=stride, **counts)


def _trunk_rows(arch: Arch, height: int, width: int) -> Iterable[Row]:
    """The convolutional part.

    What autograd saves is what the backward formulas of PyTorch name: a convolution's, BN's and pool's input, a ReLU's
    output, a pool's winners. What the trunk keeps is the rule of `trunk._kept`.
    """
    image = FLOAT * 3 * height * width
    yield _row("input", "input", (3, height, width), 1, 1, saved_bytes=image, kept_bytes=image)
    for layer, following in zip(arch.layers, [*arch.layers[1:], None], strict=True):
        after = following.kind if following else "avgpool" if arch.head == "paper" else ""
        if layer.kind == "pool":
            height, width = height // 2, width // 2
        plane = height * width
        values = layer.channels * plane
        params = weights = macs = kept = saved = 0
        # who reads this output and keeps it; global pooling is a mean, which keeps nothing
        if layer.kind == "relu" or after in ("conv", "bn", "lrn", "pool", "avgpool"):
            saved = FLOAT * values
        if layer.kind == "conv":
            weights = layer.channels * layer.in_channels * layer.kernel**2
            params, macs = weights + layer.channels, weights * plane
        elif layer.kind == "bn":
            weights, params = layer.channels, 2 * layer.channels
        elif layer.kind == "relu":
            kept = {"lrn": FLOAT * values, "pool": 0}.get(after, -(-values // 8))
        elif layer.kind == "lrn":  # x² with two channels of zeros on each side, the denominator and its power
            saved += FLOAT * (values + 4 * plane + 2 * values)
        elif layer.kind == "pool":
            saved += INDEX * values
            kept = 3 * -(-values // 8)
        yield Row(
            layer.name,
            layer.kind,
            (layer.channels, height, width),
            params,
            weights,
            macs,
            FLOAT * values,
            saved,
            kept,
            layer.receptive_field,
            layer.stride,
        )


def _head_rows(arch: Arch, height: int, width: int) -> Iterable[Row]:
    if arch.head is None:
        return
    last = arch.layers[-1]
    height, width = height // last.stride, width // last.stride
    whole = last.receptive_field + (max(height, width) - 1) * last.stride
    if arch.head == "slim":
        sizes = [last.channels, arch.num_classes]
        yield _row("avgpool", "avgpool", (last.channels, 1, 1), whole, None)
    else:
        sizes = [last.channels * GRID**2, arch.hidden, arch.hidden, arch.num_classes]
        side = max(height, width)  # a bin of the adaptive pool reaches over so many of `side`
        reach = max(-(-(i + 1) * side // GRID) - i * side // GRID for i in range(GRID))
        field = last.receptive_field + (reach - 1) * last.stride
        stride = last.stride * side // GRID if height == width and side % GRID == 0 else None
        shape = (last.channels, GRID, GRID)
        yield _row("avgpool", "avgpool", shape, field, stride, saved_bytes=FLOAT * math.prod(shape))
    linear = [name for name in arch.head_names if name.startswith("fc")]
    for name, inputs, outputs in zip(linear, sizes[:-1], sizes[1:], strict=True):
        number = name[2:]
        if arch.head == "slim":
            yield _dropout("drop", inputs, whole)
        weights = inputs * outputs
        yield _row(name, "fc", (outputs,), whole, None, params=weights + outputs, weights=weights, macs=weights)
        if name != linear[-1]:
            yield _row(f"relu{number}", "relu", (outputs,), whole, None, saved_bytes=FLOAT * outputs)
            yield _dropout(f"drop{number}", outputs, whole)


def _dropout(name: str, values: int, field: int) -> Row:
    """The next layer keeps its input; the mask, scaled, is as large."""
    return _row(name, "dropout", (values,), field, None, saved_bytes=2 * FLOAT * values)


def _label(arch: Arch) -> str:
    """`vgg16_bn`, `vgg16 slim`, `vgg16 ×0.5`, `vgg19 without head 48/96/192/176/176`."""
    scale = "/".join(map(str, arch.blocks)) if arch.blocks else f"×{arch.width:g}" if arch.width != 1 else ""
    head = {"paper": "", "slim": " slim", None: " without head"}[arch.head]
    return f"{arch.name}{head} {scale}".rstrip()


# ── compare ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    """What a network took on this machine.

    Attributes:
        latency: seconds, forward of one image, the median of several.
        throughput: images a second, forward of the batch.
        memory: peak bytes of that forward, weights included; None where it cannot be told.
        train_throughput: images a second, forward and backward of the batch.
        train_memory: peak bytes of that, weights and gradients included.
    """

    latency: float
    throughput: float
    memory: int | None
    train_throughput: float
    train_memory: int | None


@dataclass(frozen=True)
class Net:
    """One network of a comparison.

    Attributes:
        name: as asked for.
        input_size: side of the image in pixels.
        params: learnt numbers, those of auxiliary heads left out.
        macs: MACs of one image's forward.
        activation_bytes: of one image: itself and the outputs of convolutions, pools, linear layers and attention.
        saved_bytes: what autograd keeps of one image for the backward of a training step; None where the network cannot
            be trained on a single image.
        published: top-1 and top-5 accuracy on ImageNet in per cent by weight set, oldest recipe first; empty where none
            is known for this size and number of classes.
        measured: what it took here, where that was asked for.
    """

    name: str
    input_size: int
    params: int
    macs: int
    activation_bytes: int
    saved_bytes: int | None
    published: dict[str, tuple[float, float]]
    measured: Measured | None = None


@dataclass(frozen=True)
class Comparison(Report):
    """Networks side by side; see `compare`.

    Attributes:
        nets: in the order asked for.
        batch: images at a time where it was measured.
        machine: what it was measured on; empty where it was not.
    """

    nets: tuple[Net, ...]
    batch: int
    machine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers; counts in units, sizes in bytes, times in seconds, accuracies in per cent."""
        nets = [asdict(net) | {"flops": 2 * net.macs} for net in self.nets]
        return {"nets": nets, "batch": self.batch, "machine": self.machine}

    def tables(self) -> list[Table]:
        """One table."""
        percent, rate = "{:.2f}".format, "{:,.1f}".format
        columns = [
            Column("name", "network", left=True),
            Column("input_size", "px"),
            Column("params", "M params", mega),
            Column("macs", "G MACs", lambda value: mega(value / 1e3, 3)),
            Column("activation_bytes", "activations MB", mega),
            Column("saved_bytes", "autograd MB", mega),
            Column("top1", "top-1 %", percent),
            Column("top5", "top-5 %", percent),
            Column("best_top1", "best recipe %", percent),
        ]
        rows: list[tuple[Any, ...]] = []
        for net in self.nets:
            scores = list(net.published.values())
            first, best = (scores[0], scores[-1][0]) if scores else ((None, None), None)
            rows.append((net.name, net.input_size, net.params, net.macs, net.activation_bytes, net.saved_bytes))
            rows[-1] += (*first, best)
        title = "Networks, one image, float32"
        if self.machine:
            title += f"; measured with {self.batch} images (latency: 1) on {self.machine}"
            columns += [
                Column("latency", "latency ms", lambda value: f"{1e3 * value:.1f}"),
                Column("throughput", "images/s", rate),
                Column("memory", "peak MB", lambda value: mega(value, 0)),
                Column("train_throughput", "train images/s", rate),
                Column("train_memory", "train peak MB", lambda value: mega(value, 0)),
            ]
            empty = (None,) * 5
            rows = [
                row + (tuple(asdict(net.measured).values()) if net.measured else empty)
                for row, net in zip(rows, self.nets, strict=True)
            ]
        return [Table(title, columns, rows)]


def compare(
    names: Iterable[str | Arch],
    *,
    num_classes: int = 1000,
    input_size: int | None = None,
    measure: bool = False,
    batch: int = 8,
    device: str | None = None,
    seconds: float = 1.0,
    callback: Callable[[str], None] | None = None,
) -> Comparison:
    """VGGs and any classifiers of torchvision side by side: size, cost, published accuracy, and what they take here.

    VGGs are computed as `describe` does; other networks are built without memory (torch's meta device) and counted
    while they run there (`torch.utils.flop_counter`). What that gives at the usual size and for 1000 classes is kept
    in `assets/torchvision.json`, so that it need not be counted again.

    Args:
        names: a VGG's name (or `Arch`), or a name that `torchvision.models.list_models` has, such as `resnet50`.
        num_classes: outputs.
        input_size: side of the image in pixels; None means what each network's published weights were tested at.
        measure: run each network, randomly initialised, for latency, throughput and peak memory.
        batch: images at a time when measured.
        device: where to measure; None means a CUDA device where there is one.
        seconds: how long to repeat each of the three timings, at least three times.
        callback: told each network's name before it is looked at.

    Raises:
        InputError: no name, an unknown one, or a size or batch that the network cannot take.
        DependencyError: a network of torchvision's where torchvision is missing or broken.
    """
    names = list(names)
    if not names:
        raise InputError("nothing to compare: name at least one network, such as 'vgg16'")
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    builders = [_builder(name, num_classes, input_size) for name in names]  # all names are good before work begins
    nets = []
    machine = ""
    for label, look, build in builders:
        if callback:
            callback(label)
        net = look()
        if measure:
            place = _device(device)
            machine = _machine(place)
            net = replace(net, measured=_measure(build, net.input_size, batch, place, seconds))
        nets.append(net)
    return Comparison(tuple(nets), batch, machine)


_Builder = tuple[str, Callable[[], Net], Callable[[], "nn.Module"]]


def _builder(name: str | Arch, num_classes: int, input_size: int | None) -> _Builder:
    """What to call the network, what tells its costs, and what builds it."""
    try:
        arch = name if isinstance(name, Arch) else replace(parse(name), num_classes=num_classes)
    except InputError:
        if not isinstance(name, str) or num_classes < 1:
            raise
        return _torchvision_builder(name, num_classes, input_size)
    size = 224 if input_size is None else input_size
    report = describe(arch, input_size=size)

    def build() -> nn.Module:
        from vggfeat.network import VGG

        return VGG(arch)

    paper = arch == parse(arch.name) and size == 224  # what the published accuracies are of
    published = {"IMAGENET1K_V1": ACCURACY[arch.name]} if paper and arch.name in ACCURACY else {}
    costs = (report.params, report.macs, report.activation_bytes, report.saved_bytes)
    return report.label, lambda: Net(report.label, size, *costs, published), build


@functools.cache
def _counted() -> dict[str, Net]:
    """Torchvision's classifiers at their own size and 1000 classes, counted once: importing torch takes seconds."""
    nets = json.loads(COUNTED.read_text())
    return {net["name"]: Net(**net | {"published": {k: tuple(v) for k, v in net["published"].items()}}) for net in nets}


def _torchvision_builder(name: str, num_classes: int, input_size: int | None) -> _Builder:
    net = _counted().get(name)
    if net is not None and num_classes == 1000 and input_size in (None, net.input_size):
        return name, lambda: net, functools.partial(_torchvision_net, name, num_classes)
    return _uncounted(name, num_classes, input_size)


def _uncounted(name: str, num_classes: int, input_size: int | None) -> _Builder:
    models = _torchvision_models(name)
    known = models.list_models(module=models)
    if name not in known:
        ours = [f"{vgg}{bn}" for vgg in ARCHS for bn in ("", "_bn")]
        raise InputError(f"unknown network {name!r}: {nearest(name, dict.fromkeys([*ours, *known]))}")
    weights = [entry for entry in models.get_model_weights(name) if entry.name.startswith("IMAGENET1K_V")]
    own = weights[0].transforms.keywords["crop_size"] if weights else 224
    size = own if input_size is None else input_size
    if size < 1:
        raise InputError(f"images need at least 1 pixel on each side, got {size}")
    published = {}
    for entry in weights:
        score = entry.meta["_metrics"]["ImageNet-1K"]
        if num_classes == 1000 and entry.transforms.keywords["crop_size"] == size:
            published[entry.name] = (score["acc@1"], score["acc@5"])
    build = functools.partial(_torchvision_net, name, num_classes)
    return name, lambda: _count(name, build, size, published), build


def _torchvision_net(name: str, num_classes: int) -> nn.Module:
    models = _torchvision_models(name)
    with warnings.catch_warnings():  # GoogLeNet and Inception speak of a default that will change
        warnings.simplefilter("ignore", FutureWarning)
        net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    for child, _ in list(net.named_children()):
        if child.lower().startswith("aux"):  # heads that help training and are not in the published counts
            setattr(net, child, None)
            net.aux_logits = False  # type: ignore[assignment]
    return net


def _torchvision_models(name: str) -> Any:
    try:
        from torchvision import models
    except (ImportError, RuntimeError, AttributeError) as error:  # built for another torch: RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DependencyError(
            f"{name!r} is no VGG ({', '.join(ARCHS)}, '_bn' behind), and torchvision, which may know it, does not work "
            f"here ({reason}): install the torchvision that belongs to your torch"
        ) from error
    return models


def _count(name: str, build: Callable[[], nn.Module], size: int, published: dict[str, tuple[float, float]]) -> Net:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Outputs(TorchDispatchMode):
        """Adds up the bytes that layers with arithmetic or pooling give."""

        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if any(part in func.__name__ for part in ("convolution", "mm", "max_pool", "avg_pool2d", "attention")):
                first = out[0] if isinstance(out, tuple) else out
                if "adaptive" not in func.__name__:
                    self.total += first.numel() * first.element_size()
            return out

    try:
        with torch.device("meta"):
            net = build().eval()
    except NotImplementedError:  # RegNets compute their widths with tensors, whose values a meta tensor lacks
        net = build().to("meta").eval()
    image = torch.empty(1, 3, size, size, device="meta")
    counter, outputs = FlopCounterMode(display=False), Outputs()  # type: ignore[no-untyped-call]
    try:
        with counter, outputs:  # with gradient: without, attention takes a way that the counter does not know
            net(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot take images of {size}×{size}: {reason}") from error
    try:
        saved: int | None = saved_for_backward(net.train(), image)
    except ValueError:  # BN of a single value
        saved = None
    params = sum(p.numel() for p in net.parameters())
    activations = image.numel() * image.element_size() + outputs.total
    return Net(name, size, params, counter.get_total_flops() // 2, activations, saved, published)


def saved_for_backward(net: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps after `net(images)`: every storage once, parameters and buffers left out.

    Works on the meta device too, where nothing is computed.
    """
    from torch.autograd.graph import saved_tensors_hooks

    own = {value.untyped_storage()._cdata for value in [*net.parameters(), *net.buffers()]}
    found: dict[int, Tensor] = {}  # which keeps them alive, so that no two have the same address

    def pack(value: Tensor) -> Tensor:
        found.setdefault(value.untyped_storage()._cdata, value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        net(images)
    return sum(value.untyped_storage().nbytes() for key, value in found.items() if key not in own)


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _machine(device: torch.device) -> str:
    import torch

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{kind}{threads}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class PeakMemory:
    """The peak of memory, in bytes, since `reset`, above what was in use when the gauge was made.

    On CUDA what torch's allocator gave out; on Linux the process's resident memory; elsewhere unknown (None).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = 0
        self.known = device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")
        gc.collect()
        self.reset()
        self.base = self.read() or 0

    def reset(self) -> None:
        """Forget earlier peaks."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.known:
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # what was freed and not given back would hide what comes
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # a container may forbid it
                self.known = False

    def read(self) -> int | None:
        """The peak, or None where it cannot be told."""
        import torch

        if not self.known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        return 1024 * int(kilobytes) - self.base


def _measure(build: Callable[[], nn.Module], size: int, batch: int, device: torch.device, seconds: float) -> Measured:
    import torch
    from torch.nn import functional as F

    gauge = PeakMemory(device)
    net = build().to(device)
    images = torch.rand(batch, 3, size, size, device=device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)

    def train() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), targets).backward()

    net.eval()
    with torch.inference_mode():
        latency = _seconds(lambda: net(images[:1]), device, seconds)
        gauge.reset()
        forward = _seconds(lambda: net(images), device, seconds)
        memory = gauge.read()
    net.train()
    gauge.reset()
    step = _seconds(train, device, seconds)
    return Measured(latency, batch / forward, memory, batch / step, gauge.read())


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median of a run's times, warmed up once."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(timed())
    return statistics.median(times)


# ── the 3×3 argument ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stacked(Report):
    """1 to `n` stacked 3×3 convolutions against one large one that sees as much; see `stacked_3x3`.

    Attributes:
        n: how many 3×3 convolutions are stacked.
    """

    n: int

    @property
    def receptive_field(self) -> int:
        """Side of what one output sees, of the stack and of the one convolution alike: each 3×3 adds two pixels."""
        return 2 * self.n + 1

    @property
    def stacked_params(self) -> int:
        """Weights of the stack in units of C², C channels in and out; as many MACs a pixel."""
        return self.n * 3**2

    @property
    def single_params(self) -> int:
        """Weights of the one large convolution in units of C²."""
        return self.receptive_field**2

    @property
    def saving(self) -> float:
        """The share of the large convolution's weights that the stack does without."""
        return 1 - self.stacked_params / self.single_params

    @property
    def nonlinearities(self) -> int:
        """ReLUs in the stack, where the large convolution has one."""
        return self.n

    def to_dict(self) -> dict[str, Any]:
        """One entry for each stack of 1 to `n`."""
        names = ("n", "receptive_field", "stacked_params", "single_params", "saving", "nonlinearities")
        return {"stacks": [{name: getattr(stack, name) for name in names} for stack in self._upwards()]}

    def _upwards(self) -> list[Stacked]:
        return [Stacked(n) for n in range(1, self.n + 1)]

    def tables(self) -> list[Table]:
        """One table."""
        columns = [
            Column("n", "stacked 3×3"),
            Column("kernel", "or one", lambda side: f"{side}×{side}"),
            Column("receptive_field", "field px"),
            Column("stacked_params", "weights / C²"),
            Column("single_params", "of the one"),
            Column("saving", "fewer", "{:.1%}".format),
            Column("nonlinearities", "ReLUs"),
            Column("single_nonlinearities", "of the one"),
        ]
        rows = [
            (s.n, s.receptive_field, s.receptive_field)
            + (s.stacked_params, s.single_params, s.saving, s.nonlinearities, 1)
            for s in self._upwards()
        ]
        return [Table("Stacked 3×3 convolutions against one that sees as much, C channels in and out", columns, rows)]


def stacked_3x3(n: int) -> Stacked:
    """Why VGG stacks 3×3 convolutions: n of them see what one (2n+1)×(2n+1) sees (paper, section 2.3).

    >>> print(stacked_3x3(3))
    Stacked 3×3 convolutions against one that sees as much, C channels in and out
    stacked 3×3  or one  field px  weights / C²  of the one  fewer  ReLUs  of the one
              1     3×3         3             9           9   0.0%      1           1
              2     5×5         5            18          25  28.0%      2           1
              3     7×7         7            27          49  44.9%      3           1

    Raises:
        InputError: n outside 1 to 50.
    """
    if not 1 <= n <= 50:
        raise InputError(f"n must be from 1 to 50, got {n}")
    return Stacked(n)


# ── receptive fields ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EffectiveField:
    """What a unit in the middle of a layer depends on, as measured; see `effective_field`.

    Attributes:
        layer: its name.
        theoretical: side of the square that the architecture lets it see, in pixels.
        support: (height, width) of the box around every pixel whose gradient is not 0.
        effective: root of the number of pixels that count, in pixels: those with more than 4.55 % of the largest
            gradient (two standard deviations of a Gaussian; Luo et al. 2016, section 3).
        gradient: mean absolute gradient (theoretical, theoretical) of the square, its largest value 1.
    """

    layer: str
    theoretical: int
    support: tuple[int, int]
    effective: float
    gradient: Tensor


def effective_field(
    layer: str,
    arch: str | Arch | None = None,
    *,
    weights: WeightsLike | Weights = "auto",
    samples: int = 8,
    seed: int = 0,
) -> EffectiveField:
    """Measure a layer's receptive field: the gradient of a unit in the middle, averaged over random images.

    Luo et al. 2016, "Understanding the effective receptive field" (arXiv:1701.04128): the gradient of all channels
    together at one place, its magnitude averaged over noise images and colours. A max pool lets one pixel of each
    window through, so a single image shows less than the whole square.

    Args:
        layer: a name of the convolutional part, such as `conv3_3`.
        arch: the network; None means what the weights imply.
        weights: as in `VGGFeatures`; `"auto"` is ImageNet's where they can be had, else others, see
            `vggfeat.weights.load`.
        samples: images of uniform noise.
        seed: of the noise.

    Raises:
        InputError: a layer that the convolutional part lacks, or no samples.
        WeightsError: weights that cannot be had or do not reach the layer.
    """
    import torch

    from vggfeat.features import VGGFeatures

    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    features = VGGFeatures([layer], arch, weights)
    found = features.arch.layer(layer)
    field, stride = found.receptive_field, found.stride
    middle = math.ceil(field / stride / 2)  # units on each side, so that the image has the whole square
    side = stride * (2 * middle + 1)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(side, side)
    for _ in range(samples):
        image = torch.rand(1, 3, side, side, generator=generator).requires_grad_()
        unit = features(image)[layer][0, :, middle, middle].sum()
        total += torch.autograd.grad(unit, image)[0][0].abs().mean(0)
    rows, columns = (total.amax(1) > 0).nonzero(), (total.amax(0) > 0).nonzero()
    if not len(rows):
        raise InputError(f"no gradient reaches the image from the middle of {layer}: try more samples")
    support = (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1)
    start = (side - field) // 2
    square = (total / total.max())[start : start + field, start : start + field]
    return EffectiveField(layer, field, support, float((square > 1 - _TWO_SIGMA).sum()) ** 0.5, square)


_TWO_SIGMA = math.erf(2 / math.sqrt(2))
