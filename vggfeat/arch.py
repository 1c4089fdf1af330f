"""The VGG configurations as plain data: layers by name, channels, strides, receptive fields. No torch here.

Source: Simonyan & Zisserman 2015 (arXiv:1409.1556), Table 1. A layer name means one thing everywhere in vggfeat:
`convB_I` is the convolution's own output, `bnB_I` the value after batch normalisation, `reluB_I` after the ReLU,
`poolB` after the pool; `fc6 relu6 fc7 relu7 fc8` are the paper's classifier and `fc` the slim one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from vggfeat.errors import InputError, check_choice, nearest, whole_number

POOLINGS = ("max", "average", "l2")
PADDINGS = ("zeros", "reflect", "replicate")
HEADS = {"paper": ("fc6", "relu6", "fc7", "relu7", "fc8"), "slim": ("fc",)}  # by layer; slim follows global pooling
HEAD_NAMES = frozenset(name for names in HEADS.values() for name in names)
INITS = ("kaiming", "paper")  # how weights to be trained are drawn

# convolutions in each of the five blocks, and the kernel of those that are not 3×3
BLOCKS: dict[str, tuple[int, int, int, int, int]] = {
    "A": (1, 1, 2, 2, 2),
    "A-LRN": (1, 1, 2, 2, 2),
    "B": (2, 2, 2, 2, 2),
    "C": (2, 2, 3, 3, 3),
    "D": (2, 2, 3, 3, 3),
    "E": (2, 2, 4, 4, 4),
}
POINTWISE = {"C": frozenset({"conv3_3", "conv4_3", "conv5_3"})}
LRN_AFTER = {"A-LRN": "conv1_1"}  # local response normalisation follows this convolution's ReLU
# size, alpha, beta, k. Krizhevsky et al. 2012: n = 5, alpha = 1e-4, beta = 0.75, k = 2; torch divides alpha by n, the
# paper does not
LRN = (5, 5e-4, 0.75, 2.0)
BLOCK_CHANNELS = (64, 128, 256, 512, 512)
HIDDEN = 4096
MIN_SIDE = 2**5  # pixels that an image needs at least on each side, for five pools

# common names; the letter of the paper's table works too, and "_bn" after either
ARCHS = {"vgg11": "A", "vgg11-lrn": "A-LRN", "vgg13": "B", "vgg16-c": "C", "vgg16": "D", "vgg19": "E"}


@dataclass(frozen=True)
class Layer:
    """One named layer.

    Attributes:
        name: `conv3_1`, `bn3_1`, `relu3_1`, `lrn1_1` or `pool3`.
        kind: `conv`, `bn`, `relu`, `lrn` or `pool`.
        index: position in the network's `features`, so that `features.{index}.weight` is its state-dict key.
        in_channels: channels in.
        channels: channels out.
        kernel: side of the kernel in pixels of the layer's own input.
        stride: distance of neighbouring outputs, in image pixels.
        receptive_field: side of the square of image pixels that one output sees.
    """

    name: str
    kind: str
    index: int
    in_channels: int
    channels: int
    kernel: int
    stride: int
    receptive_field: int


@dataclass(frozen=True)
class Arch:
    """A VGG as data.

    Attributes:
        config: column of the paper's Table 1, a key of `BLOCKS`.
        batch_norm: batch normalisation after each convolution.
        channels: of each of the five blocks; `scaled` and `channels_at` keep the paper's proportions.
        head: `paper` (three fully connected layers on 7×7), `slim` (global average pool and one layer), or None.
        num_classes: outputs of the head.

    Raises:
        InputError: an unknown configuration or head, or an impossible number.
    """

    config: str = "D"
    batch_norm: bool = False
    channels: tuple[int, ...] = BLOCK_CHANNELS
    head: str | None = "paper"
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.channels, tuple) or len(self.channels) != 5:
            raise InputError(f"channels must be a tuple of five counts, got {self.channels}")
        channels = tuple(whole_number(f"channels of block {i}", count) for i, count in enumerate(self.channels, 1))
        object.__setattr__(self, "channels", channels)
        check_choice("VGG configuration", self.config, BLOCKS)
        if self.batch_norm and self.config in LRN_AFTER:
            raise InputError(f"configuration {self.config} has no batch-normalised form; use A with batch_norm=True")
        if self.head is not None:
            check_choice("head", self.head, HEADS, " (or None for no classifier)")
        object.__setattr__(self, "num_classes", whole_number("num_classes", self.num_classes))
        # computed now, since torch.compile cannot follow a cached property's first use (it takes a lock in Python 3.11)
        _ = self.layers, self.convs, self.names, self._by_name

    @property
    def name(self) -> str:
        """`vgg16`, `vgg16_bn`, …: the name that `parse` reads back."""
        name = next(name for name, config in ARCHS.items() if config == self.config)
        return name + "_bn" * self.batch_norm

    @property
    def width(self) -> float | None:
        """Channels of every block relative to the paper's; None if in other proportions."""
        return self.channels[0] / 64 if self.channels == scaled(self.channels[0]) else None

    @property
    def hidden(self) -> int:
        """Width of fc6 and fc7, in the paper's proportion to the first block."""
        return HIDDEN // 64 * self.channels[0]

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The convolutional part, shallow to deep."""
        layers: list[Layer] = []
        stride = field = 1
        channels = 3

        def add(name: str, kind: str, out: int, kernel: int = 1) -> None:
            layers.append(Layer(name, kind, len(layers), channels, out, kernel, stride, field))

        for block, count in enumerate(BLOCKS[self.config], start=1):
            out = self.channels[block - 1]
            for i in range(1, count + 1):
                here = f"{block}_{i}"
                kernel = 1 if f"conv{here}" in POINTWISE.get(self.config, ()) else 3
                field += (kernel - 1) * stride
                add(f"conv{here}", "conv", out, kernel)
                channels = out
                if self.batch_norm:
                    add(f"bn{here}", "bn", out)
                add(f"relu{here}", "relu", out)
                if LRN_AFTER.get(self.config) == f"conv{here}":
                    add(f"lrn{here}", "lrn", out)
            field += stride  # a 2×2 window reaches one step further …
            stride *= 2  # … and moves by two
            add(f"pool{block}", "pool", out, kernel=2)
        return tuple(layers)

    @functools.cached_property
    def convs(self) -> tuple[Layer, ...]:
        """The convolutions, shallow to deep."""
        return tuple(layer for layer in self.layers if layer.kind == "conv")

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the head's layers."""
        return HEADS[self.head] if self.head else ()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every layer name that can be tapped, shallow to deep."""
        return tuple(layer.name for layer in self.layers) + self.head_names

    @functools.cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> Layer:
        """The convolutional-part layer of that name.

        Raises:
            InputError: the network has no such layer, or it is one of the head's.
        """
        if name in self._by_name:
            return self._by_name[name]
        self.check([name])
        raise InputError(f"{name} is one of the head's layers, not of the convolutional part's")

    def check(self, names: Iterable[str]) -> None:
        """Check that the network has these layers.

        Raises:
            InputError: a name that no VGG has, or one that this VGG lacks.
        """
        for name in names:
            if name in self.names:
                continue
            if isinstance(name, str) and name in _every_name():
                raise InputError(f"{self.name} has no layer {name!r}; it has {', '.join(self.names)}")
            theirs = {f"{prefix}{layer.index}": layer.name for layer in self.layers for prefix in ("features.", "")}
            hint = f"{self.name}'s is {theirs[str(name)]}" if str(name) in theirs else nearest(name, self.names)
            raise InputError(f"unknown layer {name!r}: {hint}")

    def until(self, names: Iterable[str]) -> tuple[Layer, ...]:
        """The convolutional layers that the deepest of `names` needs, itself included; all of them for a head layer."""
        last = max(self.names.index(name) for name in names)
        return self.layers[: last + 1]


def layer_names(layers: Iterable[str]) -> list[str]:
    """Layers as they were asked for, checked to be a list of names.

    Raises:
        InputError: it is not, such as a single name, whose letters would pass for names.
    """
    if isinstance(layers, str):
        raise InputError(f"layers is a list of names: write [{layers!r}]")
    if isinstance(layers, Mapping | Set):
        hint = ": for weights by layer write layers=[*w], layer_weights=w" if isinstance(layers, Mapping) else ""
        raise InputError(f"layers is a list of names, got a {type(layers).__name__}{hint}")
    names = [*layers] if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"layers is a list of names such as 'relu3_3', got {layers!r}")
    if not names:
        raise InputError("no layer asked for: name at least one, such as 'relu3_3'")
    return names


def scaled(first: int) -> tuple[int, ...]:
    """Channels of the five blocks in the paper's proportions, 1 2 4 8 8, given the first."""
    return tuple(count // 64 * first for count in BLOCK_CHANNELS)


def check_names(names: Iterable[str], arch: str | Arch | None) -> None:
    """Check that a network, or where it is None any VGG, has these layers; those of whichever classifier are taken.

    Raises:
        InputError: an unknown network, or a layer that it lacks.
    """
    if arch is not None:
        parse(arch).check(name for name in names if name not in HEAD_NAMES)
        return
    for name in names:
        if name not in _every_name():
            raise InputError(f"unknown layer {name!r}: {nearest(name, _every_name(), parse('vgg19').names)}")


@functools.cache
def _every_name() -> tuple[str, ...]:
    archs = [parse(name) for name in ARCHS] + [parse("vgg19_bn"), Arch(head="slim")]
    return tuple(sorted({name for arch in archs for name in arch.names}))


def channels_at(width: float) -> tuple[int, ...]:
    """Channels of the five blocks at a relative width; the first is rounded, and at least 1.

    Raises:
        InputError: a width that is not a positive number.
    """
    try:
        fits = 0 < width <= 64
    except TypeError:  # no number
        fits = False
    if not fits:
        raise InputError(f"width must be a positive number of at most 64, got {width!r}")
    return scaled(max(1, round(64 * width)))


def parse(name: str | Arch) -> Arch:
    """The architecture of that name: `vgg16`, `vgg16_bn`, or a letter of the paper's table (`D`, `D_bn`, `A-LRN`).

    Raises:
        InputError: an unknown name.
    """
    if isinstance(name, Arch):
        return name
    if not isinstance(name, str):
        hint = "; give its .arch" if hasattr(name, "arch") else ""
        raise InputError(f"an architecture is a name such as 'vgg16', got {type(name).__name__}{hint}")
    plain = name[:-3] if name.lower().endswith("_bn") else name
    config = ARCHS.get(plain.lower(), plain.upper())
    if config not in BLOCKS:
        raise InputError(f"unknown architecture {name!r} ('_bn' adds batch norm): {nearest(name, [*ARCHS, *BLOCKS])}")
    return Arch(config, batch_norm=plain != name)
