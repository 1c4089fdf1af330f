"""The first block strip by strip: some rows of the image up to the first pool, then the next; backward, too.

About half of a VGG's activations are in its first block, in maps of the image's size. Where these are too large for a
processor's caches, they are computed a few rows at a time, which fit; they then never exist as a whole, unless they are
kept as values or tapped (and those of the first convolution not even as taps, where some rows at a time suffice).
Small images are computed whole, several together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import (
    ByName,
    ByRows,
    GradientAccumulator,
    OnTap,
    Product,
    ReadyStage,
    Rows,
    TapGrad,
    cut,
    length,
)

BYTES = 4 << 20  # of one map of a strip, for each thread
ROWS = 32  # a strip has a multiple of it; each convolution computes up to two more on either side and discards them
POOLED = ("pool", "argmax")  # of the size of the pool's output


class Held(NamedTuple):
    """What the backward of a stage needs: the stage, its taps' gradients by kind, what it kept."""

    stage: ReadyStage
    tap_grads: dict[str, TapGrad]
    kept: ByName


@dataclass(frozen=True)
class Recompute:
    """What the taps of the first convolution are recomputed from in the backward: it is by far the cheapest.

    Attributes:
        image: as the first convolution takes it.
        finite: whether all that comes of it is, by `layers.stays_finite`.
    """

    image: Tensor
    finite: bool


def forward_in_strips(
    x: Tensor, finite: bool, stages: Sequence[ReadyStage], on_tap: OnTap | None = None
) -> tuple[Tensor, list[tuple[ByName, ByName]]]:
    """The first block's output, and for each stage the taps and what else is kept.

    Args:
        x: as the first convolution takes it, (N,C,H,W).
        finite: whether everything is, by `layers.stays_finite`.
        stages: of the block.
        on_tap: gets the first stage's taps, by their kind; they are then not returned.
    """
    by_stage: list[tuple[ByName, ByName]] = [({}, {}) for _ in stages]
    out: ByName = {}
    images, _, height, width = x.shape
    for strip in _strips(stages[0].plan, x.dtype, images, height, width):
        reads = strip.reads(len(stages))
        y = cut(x[strip.images], reads[0])
        for stage, below, here, whole in zip(stages, reads[:-1], reads[1:], by_stage, strict=True):
            y, taps, kept = stage.forward(y, finite, _relative(here, below), _relative(strip.rows, here))
            if on_tap is not None and stage is stages[0]:
                for kind, part in taps.items():
                    on_tap(kind, part, strip.of(kind, strip.rows)[0])
                taps = {}
            for named, those in zip(whole, (taps, kept), strict=True):
                for name, part in those.items():
                    strip.write(named, name, part)
        if "pool" not in taps | kept:
            strip.write(out, "pool", y)
    taps, kept = by_stage[-1]
    return (taps | kept | out)["pool"], by_stage


def backward_in_strips(
    grad: Tensor | None, held: Sequence[Held], size: tuple[int, int], recompute: Recompute | None = None
) -> Tensor | None:
    """The gradient with respect to the first block's input; None where there is none.

    Args:
        grad: with respect to its output.
        held: of each stage, deepest first.
        size: height and width of the images.
        recompute: what the first stage's taps are recomputed from, where they were not returned.
    """
    given = [grad, *(tap_grad for each in held for tap_grad in each.tap_grads.values())]
    images = next((len(each) if isinstance(each, Tensor) else 1 for each in given if each is not None), None)
    if images is None:
        return None
    height, width = size
    first, grads = held[-1].stage, ByName()
    # where a border was made by reflection, its gradient goes to the row after the first
    reach = 2 if first.plan.padding == "reflect" else 1
    for strip in _strips(first.plan, first.folded.weight.dtype, images, height, width):
        *reads, here = strip.reads_back(len(held), reach)
        flow = GradientAccumulator()
        flow.add(None if grad is None else strip.read("pool", grad, here))
        for stage, tap_grads, memory in held:  # what was kept of the whole
            taps = strip.recomputed(stage, recompute, here) if recompute is not None and stage is first else {}
            arriving = {kind: strip.tap_grad(kind, each, taps.get(kind), here) for kind, each in tap_grads.items()}
            kept = {name: strip.read(name, value, here) for name, value in memory.items()}
            kept |= {kind: tap for kind, tap in taps.items() if kind in stage.keeps}
            stage.backward(flow, arriving.get, kept, length(here), width)
            below = reads.pop()
            if flow.grad is not None:
                flow.grad = cut(flow.grad, _relative(below, here))
            here = below
        assert flow.grad is not None
        strip.write(grads, "image", flow.grad)
    return grads["image"]


@dataclass(frozen=True)
class _Strip:
    """Some rows of one image, or all rows of some images.

    Its maps are named by the kind of layer that they come from, packed bits as "sign" or "argmax" (`stage.kept_of`).

    Attributes:
        images: which.
        rows: of the maps before the pool.
        count: how many images there are in all.
        height: how many rows.
    """

    images: slice
    rows: Rows
    count: int
    height: int

    def _grown(self, by: int, rows: Rows | None = None) -> Rows:
        """Its own rows, or others, extended by so many on each side within the map."""
        rows = rows or self.rows
        return slice(max(0, rows.start - by), min(self.height, rows.stop + by))

    def reads(self, convolutions: int) -> list[Rows]:
        """The rows that its own depend on, in each map: of the image, then after each convolution."""
        return [self._grown(left) for left in reversed(range(convolutions + 1))]

    def reads_back(self, convolutions: int, reach: int) -> list[Rows]:
        """The rows that its own rows' gradients depend on, in each map: of the image, then after each convolution.

        Args:
            convolutions: how many there are.
            reach: how many rows further a convolution's gradient sees.
        """
        *rows, last = (self._grown(reach * passed) for passed in range(convolutions + 1))
        # no window of the pool is cut in two
        return [*rows, slice(last.start // 2 * 2, min(self.height, math.ceil(last.stop / 2) * 2))]

    def recomputed(self, first: ReadyStage, recompute: Recompute, rows: Rows) -> ByName:
        """The first stage's taps in some rows, recomputed."""
        below = self._grown(1, rows)
        image = cut(recompute.image[self.images], below)
        return replace(first, keeps=()).forward(image, recompute.finite, _relative(rows, below))[1]

    def tap_grad(self, kind: str, grad: TapGrad, tap: Tensor | None, rows: Rows) -> Tensor | None:
        """The gradient with respect to some rows of a tap, given as `tap` or read."""
        assert not isinstance(grad, Product)  # off the CPU, where nothing runs in strips
        if not isinstance(grad, ByRows):
            return None if grad is None else self.read(kind, grad, rows)
        if tap is None:
            assert grad.tap is not None
            tap = self.read(kind, grad.tap, rows)
        return grad.of(tap, self.of(kind, rows)[0])

    def read(self, name: str, value: Tensor, rows: Rows) -> Tensor:
        """Some rows of its images, from a map (N,C,H,W) or from its bits (N,…,bytes); a view."""
        rows, lines = self.of(name, rows)
        axis = 2 if value.ndim == 4 else -1
        each = value.shape[axis] // lines  # 1, or the bytes of a row
        return value[self.images].narrow(axis, each * rows.start, each * length(rows))

    def write(self, wholes: ByName, name: str, part: Tensor) -> None:
        """Put its own rows of a map, or their bits, where they belong in those of all images."""
        rows, lines = self.of(name, self.rows)
        axis = 2 if part.ndim == 4 else -1
        shape = [self.count, *part.shape[1:]]
        shape[axis] = part.shape[axis] // length(rows) * lines
        if list(part.shape) == shape:
            wholes[name] = part
            return
        if name not in wholes:
            layout = torch.channels_last if part.ndim == 4 else torch.contiguous_format
            wholes[name] = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        self.read(name, wholes[name], self.rows).copy_(part)

    def of(self, name: str, rows: Rows) -> tuple[Rows, int]:
        """These rows in the map of that name, and how many it has in all."""
        if name in POOLED:
            return slice(rows.start // 2, rows.stop // 2), self.height // 2
        return rows, self.height


def _strips(plan: Plan, dtype: torch.dtype, count: int, height: int, width: int) -> Iterator[_Strip]:
    """The strips of so many images of that size, in pixels, for maps of that type."""
    row = width * max(plan.arch.layer(stage.conv).channels for stage in plan.stages[: plan.in_strips("cpu")])
    fits = BYTES // dtype.itemsize * torch.get_num_threads()
    together = max(1, fits // (row * height))
    rows = ROWS * math.ceil(height / math.ceil(row * height / fits) / ROWS)
    cuts = [*range(0, max(1, height - ROWS // 2), rows), height]  # a few rows are no strip of their own
    for first in range(0, max(1, count), together):
        for start, stop in itertools.pairwise(cuts):
            yield _Strip(slice(first, min(count, first + together)), slice(start, stop), count, height)


def _relative(rows: Rows, to: Rows) -> Rows:
    """Rows relative to the first of `to`, which contains them."""
    return slice(rows.start - to.start, rows.stop - to.start)
