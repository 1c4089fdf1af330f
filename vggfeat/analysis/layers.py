"""A VGG layer by layer: shapes, parameters, MACs, memory and receptive fields, computed without torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vggfeat.arch import Arch, channels_at, parse
from vggfeat.errors import InputError, whole_number
from vggfeat.tables import Column, Report, Table, mega

FLOAT, INDEX = 4, 8  # bytes of a float32 value and of an int64
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}  # values that each keeps per parameter
GRID = 7  # side of the paper's fc6 input


@dataclass(frozen=True)
class Row:
    """One layer, for one image.

    Attributes:
        name: as in `arch.names`; `input`, `avgpool` and `drop…` besides.
        kind: `input`, `conv`, `bn`, `relu`, `lrn`, `pool`, `avgpool`, `fc` or `dropout`.
        shape: of the output, (C,H,W) or (C,).
        params: trainable parameters, biases (and BN's shifts) included.
        weights: trainable parameters without biases (and BN's shifts).
        macs: multiply-adds, of convolutions and linear layers only.
        output_bytes: of the output.
        saved_bytes: what autograd keeps of this layer until the backward of a training step: its output where some
            backward needs it, and what is specific to the layer (a pool's int64 winners, a dropout's mask).
        kept_bytes: what our frozen trunk keeps of it instead (`keep="bits"`, for a tap further down).
        receptive_field: side of the square of image pixels that one output sees, whether or not the image has them.
        stride: distance of neighbouring outputs in image pixels; None if it is not one number.
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


@dataclass(frozen=True, repr=False)
class Description(Report):
    """A VGG layer by layer, its totals, and the memory it takes; see `describe`.

    Attributes:
        arch: the network.
        height: of the image in pixels.
        width: of the image in pixels.
        batch: images at a time.
        layers: shallow to deep, for one image.
    """

    arch: Arch
    height: int
    width: int
    batch: int
    layers: tuple[Row, ...]

    @property
    def label(self) -> str:
        """What to call it in a table: `vgg16_bn`, `vgg16 slim`, `vgg16 ×0.5`, `vgg19 without head`."""
        arch, width = self.arch, self.arch.width
        scale = "/".join(map(str, arch.channels)) if width is None else f"×{width:g}" if width != 1 else ""
        head = {"paper": "", "slim": " slim", None: " without head"}[arch.head]
        return f"{arch.name}{head} {scale}".rstrip()

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(row.params for row in self.layers)

    @property
    def macs(self) -> int:
        """MACs of one image's forward."""
        return sum(row.macs for row in self.layers)

    @property
    def flops(self) -> int:
        """FLOPs of one image's forward."""
        return 2 * self.macs

    @property
    def training_flops(self) -> int:
        """FLOPs of one image's forward and backward: three forwards, less the gradient of the image."""
        return 3 * self.flops - next(row.flops for row in self.layers if row.macs)

    @property
    def activation_bytes(self) -> int:
        """Of one image: itself and the outputs of convolutions, pools and fully connected layers, as papers count."""
        return sum(row.output_bytes for row in self.layers if row.kind in ("input", "conv", "pool", "fc"))

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps for the backward of a training step with the whole batch, as counted on a CPU.

        A dropout's mask is four bytes a value there (one on CUDA), and BN keeps mean and deviation of the batch.
        """
        statistics = 2 * FLOAT * sum(row.shape[0] for row in self.layers if row.kind == "bn")
        return self.batch * sum(row.saved_bytes for row in self.layers) + statistics

    @property
    def index_bytes(self) -> int:
        """The part of `saved_bytes` that is int64 positions of the pools' winners."""
        return self.batch * sum(INDEX * math.prod(row.shape) for row in self.layers if row.kind == "pool")

    @property
    def kept_bytes(self) -> int:
        """What our frozen trunk keeps of the whole batch for a tap at pool5, `keep="bits"`, the images included."""
        return self.batch * sum(row.kept_bytes for row in self.layers)

    @property
    def peak_bytes(self) -> int:
        """The most memory live at once in a forward without gradient: the images, one layer's input and its output.

        Local response normalisation has two more tensors of its size live.
        """
        image = self.layers[0].output_bytes
        peak = below = 0
        for row in self.layers[1:]:
            here = row.output_bytes * (3 if row.kind == "lrn" else 1)
            peak, below = max(peak, image + below + here), row.output_bytes
        return self.batch * peak

    @property
    def split(self) -> dict[str, dict[str, float]]:
        """Parameters and MACs of the convolutions, of batch normalisation, and of the fully connected layers."""
        parts: dict[str, dict[str, float]] = {}
        for kind in ("conv", "bn", "fc"):
            rows = [row for row in self.layers if row.kind == kind]
            if rows:
                params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
                shares = {"params_share": params / self.params, "macs_share": macs / self.macs}
                parts[kind] = {"params": params, "macs": macs} | shares
        return parts

    @property
    def memory(self) -> dict[str, int]:
        """Bytes for the batch; the convolutions' workspace and the framework itself come on top.

        `weights` (with BN's running statistics and counters), `inference` (weights and `peak_bytes`), each optimiser's
        fixed part (`sgd_fixed`: weights, gradients, and its state), and the whole with `saved_bytes` (`sgd`).
        """
        params = FLOAT * self.params
        buffers = sum(2 * FLOAT * row.shape[0] + INDEX for row in self.layers if row.kind == "bn")
        sizes = {"parameters": params, "buffers": buffers, "weights": params + buffers}
        sizes["inference"] = sizes["weights"] + self.peak_bytes
        for name, state in OPTIMIZERS.items():
            sizes[f"{name}_fixed"] = buffers + (2 + state) * params
            sizes[name] = sizes[f"{name}_fixed"] + self.saved_bytes
        return sizes

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
            "channels": list(self.arch.channels),
            "num_classes": self.arch.num_classes,
            "input_size": [self.height, self.width],
            "batch": self.batch,
            "layers": [asdict(row) | {"shape": list(row.shape), "flops": row.flops} for row in self.layers],
            "totals": {name: getattr(self, name) for name in totals}
            | {"weights_without_biases": sum(row.weights for row in self.layers)},
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
            f"3×{self.height}×{self.width}, float32",
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
                for row in self.layers
            ],
        )
        share = "{:.2%}".format
        names = {"conv": "convolutions", "bn": "batch norm", "fc": "fully connected"}
        columns = [
            Column("part", "part", left=True),
            Column("params", "params", count),
            Column("params_share", "share", share),
            Column("macs", "G MACs", lambda value: mega(value / 1e3, 3)),
            Column("macs_share", "share", share),
        ]
        parts = [(names[kind], *(part[column.key] for column in columns[1:])) for kind, part in self.split.items()]
        split = Table(
            f"Parameters and MACs by part; forward {mega(self.flops / 1e3)} G FLOPs, "
            f"forward + backward {mega(self.training_flops / 1e3)} G FLOPs",
            columns,
            [*parts, ("all", self.params, 1.0, self.macs, 1.0)],
        )
        memory = self.memory
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        lines: list[tuple[str, float]] = [
            ("activations, one image: input, conv, pool, fc", self.activation_bytes),
            ("weights", memory["weights"]),
            (f"inference, {images}: weights and peak activations", memory["inference"]),
            (f"autograd saves for backward, {images}", self.saved_bytes),
            ("  of which int64 max-pool indices", self.index_bytes),
            (f"frozen trunk saves for backward, {images}", self.kept_bytes),
            *((f"training with {name}, fixed part", memory[f"{name}_fixed"]) for name in OPTIMIZERS),
            *((f"training with {name}, {images}", memory[name]) for name in OPTIMIZERS),
        ]
        return [layers, split, Table("Memory", [Column("what", "what", left=True), Column("bytes", "MB", mega)], lines)]


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
        arch: a name such as `vgg16_bn` or `D`, or an `Arch`, which overrides `num_classes`, `head` and `width`.
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
        arch = Arch(named.config, named.batch_norm, channels_at(width), head, num_classes)
    try:
        height, width_px = map(operator.index, input_size if isinstance(input_size, Iterable) else (input_size,) * 2)
    except (TypeError, ValueError) as error:
        raise InputError(f"input_size must be a number of pixels, or (height, width), got {input_size!r}") from error
    least = arch.layers[-1].stride
    if min(height, width_px) < least:
        raise InputError(f"images of {width_px}×{height} are too small for pool5: at least {least} pixels on each side")
    batch = whole_number("batch", batch)
    rows = (*_trunk_rows(arch, height, width_px), *_head_rows(arch, height, width_px))
    return Description(arch, height, width_px, batch, rows)


def _row(name: str, kind: str, shape: tuple[int, ...], field: int, stride: int | None, **values: int) -> Row:
    counts = dict.fromkeys(("params", "weights", "macs", "saved_bytes", "kept_bytes"), 0) | values
    return Row(name, kind, shape, output_bytes=FLOAT * math.prod(shape), receptive_field=field, stride=stride, **counts)


def _trunk_rows(arch: Arch, height: int, width: int) -> Iterable[Row]:
    """The convolutional part.

    What autograd saves follows PyTorch's backward formulas: a convolution's, BN's and pool's input, a ReLU's output, a
    pool's winners. What the trunk keeps follows `kept_of` in `trunk/stage.py`.
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
        # kept by whoever reads this output; global pooling is a mean, which keeps nothing
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
        shape, counts = (layer.channels, height, width), {"params": params, "weights": weights, "macs": macs}
        field, stride = layer.receptive_field, layer.stride
        yield _row(layer.name, layer.kind, shape, field, stride, saved_bytes=saved, kept_bytes=kept, **counts)


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
        # the most rows or columns that a bin of the adaptive pool covers
        reach = max(-(-(i + 1) * side // GRID) - i * side // GRID for side in (height, width) for i in range(GRID))
        field = last.receptive_field + (reach - 1) * last.stride
        stride = last.stride * height // GRID if height == width and height % GRID == 0 else None
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
    """Two tensors of its size: the next layer's input, and the scaled mask."""
    return _row(name, "dropout", (values,), field, None, saved_bytes=2 * FLOAT * values)
