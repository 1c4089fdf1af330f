"""The walk: forward through the stages, keeping what the way back needs, and back to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.trunk import layers
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.step import Flow, Named, Step, cut, kept_of, steps
from vggfeat.trunk.strips import Rows, Strip, inside, length, stages_in_strips, strips

__all__ = ["Slope", "SlopeAt", "backward", "forward", "reread", "there_and_back"]

SlopeAt = Callable[[int], Tensor | None]  # the gradient with respect to a tap, by its position; None where it is 0
Slope = Callable[[str, Tensor], Tensor]  # the same by the tap's name and value


def reread(plan: Plan, keep: str, device: torch.device) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, because keeping them twice is waste."""
    kinds = [(number, kind) for number, stage in enumerate(plan.stages) for kind in stage.taps]
    return tuple(i for i, (number, kind) in enumerate(kinds) if kind in kept_of(plan, number, keep, device))


def forward(x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: str) -> tuple[list[Tensor], list[Tensor]]:
    """The taps, shallow to deep, and what `backward` needs besides.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: "none" keeps nothing, "values" what came out of the ReLUs (but bits in the first block, which goes strip
            by strip, on a CPU), "bits" single bits instead, and "taps" bits but for ReLUs that are taps: for callers
            that hold those anyway.
    """
    sound = layers.sound(x)
    x = layers.doubled(x, filters[0]).contiguous(memory_format=torch.channels_last)
    every, block = steps(plan, filters, keep), stages_in_strips(plan, x.device)
    found: list[tuple[Named, Named]] = []
    with layers.no_autocast(x.device):
        if block:
            x, found = _in_strips(x, sound, plan, every[:block])
        for step in every[block:]:
            x, taps, kept = step.forward(x, sound)
            found.append((taps, kept))
    return (
        [value for taps, _ in found for value in taps.values()],
        [value for _, kept in found for value in kept.values()],
    )


def _in_strips(x: Tensor, sound: bool, plan: Plan, block: Sequence[Step]) -> tuple[Tensor, list[tuple[Named, Named]]]:
    """What comes out of the first block, and each stage's taps and what is kept besides."""
    found: list[tuple[Named, Named]] = [({}, {}) for _ in block]
    out: Named = {}
    images, _, height, width = x.shape
    for strip in strips(plan, images, height, width):
        seen = strip.seen(1, len(block))
        y = cut(x[strip.which], seen[0])
        for step, below, here, whole in zip(block, seen, seen[1:], found, strict=False):
            y, *parts = step.forward(y, sound, inside(here, below), inside(strip.rows, here))
            for named, those in zip(whole, parts, strict=True):
                for name, part in those.items():
                    strip.put(named, name, part)
        strip.put(out, "pool", y)
    return out["pool"], found


def backward(
    slope: SlopeAt,
    again: dict[int, Tensor],
    kept: list[Tensor],
    filters: Sequence[Tensor],
    size: tuple[int, int],
    plan: Plan,
    keep: str,
) -> Tensor | None:
    """The gradient with respect to the normalised images, in the filters' type; None where no tap has one.

    Args:
        slope: of a tap, asked for once each, deepest first, when the walk gets there, and for all of a block that goes
            strip by strip before it begins.
        again: the taps at `reread`, by position. This and `kept` are emptied on the way, so that memory is free as
            soon as it may be.
        kept: of `forward`.
        filters: as there.
        size: height and width of the images.
        plan: as there.
        keep: as there.
    """
    device = filters[0].device
    every, block = steps(plan, filters, keep), stages_in_strips(plan, device)
    sizes = plan.sizes(*size)
    position = len(plan.names)
    flow = Flow()
    sound: bool | None = None  # whether the first gradient to come, the deepest tap's, is made of numbers
    held: list[tuple[Step, dict[str, Tensor | None], Named]] = []

    def asked(position: int) -> Tensor | None:
        nonlocal sound
        found = slope(position)
        if found is not None and sound is None:
            sound = layers.sound(found)
        return found

    with layers.no_autocast(device):
        for number in reversed(range(len(every))):
            step, (height, width) = every[number], sizes[number]
            position -= len(step.stage.taps)
            at = {kind: position + i for i, kind in enumerate(step.stage.taps)}
            memory = {name: again.pop(at[name]) if name in at else kept.pop() for name in reversed(step.wants)}
            if number >= block:
                step.back(flow, functools.partial(_arriving, asked, at), memory, height, width)
            else:
                held.append((step, {kind: asked(at[kind]) for kind in reversed(at)}, memory))
        if held:
            flow.own(_back_in_strips(flow.grad, plan, held, size))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if flow.grad is None or sound else torch.full_like(flow.grad, torch.nan)


def _arriving(asked: SlopeAt, at: dict[str, int], kind: str) -> Tensor | None:
    return asked(at[kind]) if kind in at else None


def _back_in_strips(
    grad: Tensor | None,
    plan: Plan,
    block: Sequence[tuple[Step, dict[str, Tensor | None], Named]],
    size: tuple[int, int],
) -> Tensor | None:
    """The first block back.

    Args:
        grad: of what came out of it.
        plan: that it is of.
        block: deepest first, each step, the gradients of its taps by their kinds, and what was kept of it.
        size: height and width of the images.
    """
    given = next(
        (each for each in (grad, *(value for _, taps, _ in block for value in taps.values())) if each is not None), None
    )
    if given is None:
        return None
    height, width = size
    shape, layout = (len(given), 3, height, width), torch.channels_last
    out = torch.empty(shape, dtype=given.dtype, device=given.device, memory_format=layout)
    # where a border was made by reflection, its gradient goes to the row after the first
    reach = 2 if plan.padding == "reflect" else 1
    for strip in strips(plan, len(given), height, width):
        *seen, here = strip.seen_back(reach, len(block))
        flow = Flow()
        flow.add(None if grad is None else strip.part("pool", grad, here))
        for step, slopes, memory in block:
            arriving = functools.partial(_arriving_part, strip, slopes, here)
            kept = {name: strip.part(name, value, here) for name, value in memory.items()}
            step.back(flow, arriving, kept, length(here), width)
            below = seen.pop()
            if flow.grad is not None:
                flow.grad = cut(flow.grad, inside(below, here))
            here = below
        assert flow.grad is not None
        out[strip.which, :, strip.rows] = flow.grad
    return out


def _arriving_part(strip: Strip, slopes: dict[str, Tensor | None], rows: Rows, kind: str) -> Tensor | None:
    slope = slopes.get(kind)
    return None if slope is None else strip.part(kind, slope, rows)


def there_and_back(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str
) -> tuple[dict[str, Tensor], Callable[[Slope], Tensor]]:
    """The taps by name, and the way back to the images, for a gradient that is wanted now.

    No graph holds on to what was kept: it is let go on the way, as each tap is once its gradient was asked for. The way
    back can be gone once.

    Args:
        x: as for `forward`.
        filters: as there.
        plan: as there.
        keep: "taps" or "values", as there.

    Returns:
        The taps, shallow to deep, and a function of `slope(name, tap)`, the gradient with respect to a tap.
    """
    found, kept = forward(x, filters, plan, keep)
    taps = dict(zip(plan.ran, found, strict=True))
    again = {i: found[i] for i in reread(plan, keep, x.device)}
    size, dtype = (x.shape[2], x.shape[3]), x.dtype

    def back(slope: Slope) -> Tensor:
        def at(position: int) -> Tensor:
            name = plan.ran[position]
            return slope(name, taps.pop(name))

        grad = backward(at, again, kept, filters, size, plan, keep)
        assert grad is not None  # every tap has one
        return grad.to(dtype)

    return taps, back
