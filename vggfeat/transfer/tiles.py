"""Large pictures in tiles, so that memory depends on the tile and not on the picture.

What a style transfer minimises is made of sums over positions. A tile is read with a margin as wide as its positions
see, and only its own positions count: summed over the tiles, values and gradients are those of the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggfeat.arch import Arch
from vggfeat.devices import emulates
from vggfeat.features import CUSTOM_BACKWARD_DEVICES

# a step's peak memory in outputs of the first convolution, with some margin: measured on a CPU were 3 (max pooling) to
# 5.5 (l2, padded by replication) in float32, 6 to 9 in bfloat16, which keeps values, and 10 to 15 by autograd, for
# which it is doubled; a GPU has no strips, and the walk without them took 4 to 6.5
MAPS, IN_STRIPS = 9, 6
IMAGES = 30  # float32, of the whole picture: what the optimiser and the steps around it take
SHARE = 0.7  # of the free memory that a step may take
LEAST = 256  # pixels of a side


@dataclass(frozen=True)
class Span:
    """What a tile reads along one side of the picture, and which part of that counts; in pixels.

    Attributes:
        start: the first that is read.
        stop: where reading ends.
        first: the first that counts.
        last: where counting ends; None means that it goes on to the end of the picture.
    """

    start: int
    stop: int
    first: int
    last: int | None

    def part(self, positions: slice, stride: int) -> Span:
        """The same for some positions of a layer on what was read."""
        start, stop = (self.start + each * stride for each in (positions.start, positions.stop))
        first = min(max(self.first, start), stop)
        if self.last is not None:
            return Span(start, stop, first, min(max(self.last, first), stop))
        to_the_end = positions.stop == (self.stop - self.start) // stride
        return Span(start, stop, first, None if to_the_end else stop)

    def counts(self, stride: int, offset: int = 0) -> slice:
        """Which positions of a layer count, numbered from pixel `offset` on."""
        return slice((self.first - offset) // stride, None if self.last is None else (self.last - offset) // stride)


@dataclass(frozen=True)
class Tile:
    """A part of a picture; a classifier's values (N,C), which have no positions, belong to the picture as a whole."""

    rows: Span
    columns: Span

    def read(self, image: Tensor) -> Tensor:
        """The part of an image (N,C,H,W) that is read; a view."""
        return image[:, :, self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def part(self, rows: slice, stride: int) -> Tile:
        """Some rows of a layer on what was read, as a tile of their own."""
        return Tile(self.rows.part(rows, stride), self.columns)

    def own(self, tap: Tensor, stride: int) -> Tensor:
        """Of a layer's values on what was read (N,C,h,w), those that count; a view."""
        if tap.ndim == 2:
            return tap
        return tap[:, :, self.rows.counts(stride, self.rows.start), self.columns.counts(stride, self.columns.start)]

    def of(self, whole: Tensor, stride: int) -> Tensor:
        """The same positions of a layer's values on the whole picture; a view."""
        return whole if whole.ndim == 2 else whole[:, :, self.rows.counts(stride), self.columns.counts(stride)]


def tiles(arch: Arch, layers: Sequence[str], height: int, width: int, side: int) -> list[Tile]:
    """The tiles of a picture, of about `side` pixels without what is around them; a single one where that is enough.

    Args:
        arch: the network.
        layers: of its convolutional part, the ones whose positions are summed over.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        side: 0 means a single tile.
    """
    if not side:
        return [Tile(Span(0, height, 0, None), Span(0, width, 0, None))]
    summed = [arch.layer(name) for name in layers]
    stride = max(layer.stride for layer in summed)
    # a position at stride s sees its own s pixels and as many more on each side
    reach = max((layer.receptive_field - layer.stride) // 2 for layer in summed)
    around = math.ceil(reach / stride) * stride  # so that every layer's positions lie where they lie in the picture
    spans = [_spans(length, side, stride, around) for length in (height, width)]
    return [Tile(*pair) for pair in itertools.product(*spans)]


def _spans(length: int, side: int, stride: int, around: int) -> list[Span]:
    step = math.ceil(length / math.ceil(length / side) / stride) * stride
    # a remainder below one position belongs to the tile before
    cuts = [*range(0, length - stride + 1, step), length]
    return [
        Span(max(0, first - around), min(length, last + around), first, None if last == length else last)
        for first, last in itertools.pairwise(cuts)
    ]


def side_for(
    arch: Arch, layers: Sequence[str], height: int, width: int, dtype: torch.dtype, device: torch.device, memory: int
) -> int:
    """The side of tiles with which a step fits into the memory that is free; 0 where the whole picture does.

    Args:
        arch: the network.
        layers: that are summed over.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        dtype: what the network computes in.
        device: where.
        memory: bytes that are free.
    """
    if any(name in arch.head_names for name in layers):
        return 0  # a classifier sees the picture as a whole
    itemsize = 4 if emulates(dtype, device) else dtype.itemsize
    maps = MAPS if device.type in CUSTOM_BACKWARD_DEVICES else 2 * MAPS
    if device.type == "cpu" and itemsize > 2:
        maps = IN_STRIPS
    channels = arch.layer("conv1_1").channels
    free, each = SHARE * memory, maps * itemsize * channels
    # cuDNN counts a map's values in 32 bits, or is slow
    densest = max(layer.channels / layer.stride**2 for layer in arch.convs)
    most = int((2**31 - 1) / densest) if device.type == "cuda" else math.inf
    if height * width <= min(free / each, most):
        return 0
    pixels = min(most, max(0.0, free - IMAGES * 12 * height * width) / each)
    around = 2 * max(arch.layer(name).receptive_field // 2 for name in layers)
    return max(LEAST, int(math.sqrt(pixels)) - around)
