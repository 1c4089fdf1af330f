"""The first block a strip at a time: which rows of each of its maps belong to a strip, and where they are.

About half of all values that a VGG makes it makes in its first block, in maps of the image's size that no cache holds.
Some rows of them fit. So a strip of rows is taken from the image to the first pool before the next one is begun, and
back likewise, and these maps never exist as a whole, unless they are tapped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vggfeat.trunk.plan import Plan

__all__ = ["Rows", "Strip", "inside", "length", "stages_in_strips", "strips"]

Rows = slice  # of a map, with both ends

VALUES = 1 << 20  # of one map of a strip, for each thread, so that what is made of it stays in the caches
MULTIPLE = 8  # of rows: no window of the pool is cut
POOLED = ("pool", "route")  # of the size that the pool leaves


def stages_in_strips(plan: Plan, device: torch.device) -> int:
    """How many stages go strip by strip: the first block's on a CPU. Others take as much as there is at a time."""
    return plan.block if device.type == "cpu" else 0


@dataclass(frozen=True)
class Strip:
    """Some rows of one image, or all rows of some images.

    Values of a stage are known by what they are of: a kind of layer, "sign" or "route" (`step.kept_of`).

    Attributes:
        which: the images.
        rows: of the maps before the pool.
        images: how many there are in all.
        height: of the maps, in all.
    """

    which: slice
    rows: Rows
    images: int
    height: int

    def grown(self, by: int) -> Rows:
        """With so many rows more on each side, as far as the map goes."""
        return slice(max(0, self.rows.start - by), min(self.height, self.rows.stop + by))

    def seen(self, reach: int, convolutions: int) -> list[Rows]:
        """The rows that these are made of in each map: of the image, then of what each convolution makes.

        Args:
            reach: of a convolution, in rows.
            convolutions: how many there are.
        """
        return [self.grown(reach * left) for left in reversed(range(convolutions + 1))]

    def seen_back(self, reach: int, convolutions: int) -> list[Rows]:
        """The rows whose gradients those of these are made of in each map: of the image, then of each convolution's."""
        *rows, last = (self.grown(reach * passed) for passed in range(convolutions + 1))
        return [
            *rows,
            slice(last.start // 2 * 2, min(self.height, -(-last.stop // 2) * 2)),
        ]  # cut no window of the pool

    def part(self, name: str, value: Tensor, rows: Rows) -> Tensor:
        """Some rows of the strip's images, of a map (N,C,H,W) or of its bits (N,…,bytes); a view."""
        place, lines = self._place(name, rows)
        axis = 2 if value.ndim == 4 else -1
        each = value.shape[axis] // lines  # 1, or the bytes of a row
        return value[self.which].narrow(axis, each * place.start, each * length(place))

    def put(self, named: dict[str, Tensor], name: str, part: Tensor) -> None:
        """Put a map of the strip's own rows, or their bits, where they belong in those of all."""
        place, lines = self._place(name, self.rows)
        axis = 2 if part.ndim == 4 else -1
        each = part.shape[axis] // length(place)
        shape = [self.images, *part.shape[1:]]
        shape[axis] = each * lines
        if list(part.shape) == shape:
            named[name] = part
            return
        if name not in named:
            layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
            named[name] = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        self.part(name, named[name], self.rows).copy_(part)

    def _place(self, name: str, rows: Rows) -> tuple[Rows, int]:
        """The rows of what is of that name, and how many it has in all."""
        if name in POOLED:
            return slice(rows.start // 2, rows.stop // 2), self.height // 2
        return rows, self.height


def strips(plan: Plan, images: int, height: int, width: int) -> Iterator[Strip]:
    """The strips of a plan's first block.

    Args:
        plan: whose.
        images: how many there are.
        height: of them, in pixels.
        width: likewise.
    """
    row = width * max(plan.arch.layer(stage.conv).channels for stage in plan.stages[: plan.block])
    fits = VALUES * torch.get_num_threads()
    together = max(1, fits // max(1, row * height))
    rows = MULTIPLE * math.ceil(height / math.ceil(row * height / fits) / MULTIPLE)
    cuts = [*range(0, max(1, height - MULTIPLE // 2), rows), height]  # a few rows are no strip of their own
    for image in range(0, max(1, images), together):
        for start, stop in itertools.pairwise(cuts):
            yield Strip(slice(image, min(images, image + together)), slice(start, stop), images, height)


def inside(rows: Rows, of: Rows) -> Rows:
    """Rows as counted from the first of others that they are among."""
    return slice(rows.start - of.start, rows.stop - of.start)


def length(rows: Rows) -> int:
    """How many."""
    return int(rows.stop - rows.start)
