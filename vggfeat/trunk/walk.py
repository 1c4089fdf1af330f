"""The walk: forward through the stages, keeping what the way back needs, and back to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.trunk import layers
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import ByName, Flow, kept_of, ready
from vggfeat.trunk.strips import Held, back_in_strips, forward_in_strips

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
        keep: "none" keeps nothing, "values" what came out of the ReLUs, "bits" single bits instead, and "taps" bits
            but for ReLUs that are taps: for callers that hold those anyway. Stages that go strip by strip keep bits.
    """
    sound = layers.sound(x)
    x = layers.doubled(x, filters[0]).contiguous(memory_format=torch.channels_last)
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(x.device.type)
    found: list[tuple[ByName, ByName]] = []
    with layers.no_autocast(x.device):
        if in_strips:
            x, found = forward_in_strips(x, sound, stages[:in_strips])
        for stage in stages[in_strips:]:
            x, taps, kept = stage.forward(x, sound)
            found.append((taps, kept))
    return (
        [value for taps, _ in found for value in taps.values()],
        [value for _, kept in found for value in kept.values()],
    )


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
        slope: of a tap, asked for once each, deepest first: when the walk gets there, or, of stages that go strip by
            strip, before the first strip.
        again: the taps at `reread`, by position. This and `kept` are emptied on the way, so that memory is free early.
        kept: of `forward`.
        filters: as there.
        size: height and width of the images.
        plan: as there.
        keep: as there.
    """
    device = filters[0].device
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(device.type)
    sizes = plan.sizes(*size)
    position = len(plan.names)
    flow = Flow()
    held: list[Held] = []
    sound: bool | None = None  # whether the first gradient to come, the deepest tap's, is made of numbers

    def arriving(at: dict[str, int], kind: str) -> Tensor | None:
        nonlocal sound
        found = slope(at[kind]) if kind in at else None
        if found is not None and sound is None:
            sound = layers.sound(found)
        return found

    with layers.no_autocast(device):
        for number, stage in reversed([*enumerate(stages)]):
            taps = stage.stage.taps
            position -= len(taps)
            at = {kind: position + i for i, kind in enumerate(taps)}
            memory = {name: again.pop(at[name]) if name in at else kept.pop() for name in reversed(stage.keeps)}
            if number < in_strips:
                held.append((stage, {kind: arriving(at, kind) for kind in reversed(taps)}, memory))
            else:
                stage.back(flow, functools.partial(arriving, at), memory, *sizes[number])
        if held:
            flow.own(back_in_strips(flow.grad, held, size))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if flow.grad is None or sound else torch.full_like(flow.grad, torch.nan)


def there_and_back(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str
) -> tuple[dict[str, Tensor], Callable[[Slope], Tensor]]:
    """The taps by name, and the way back to the images, for a gradient that is wanted now.

    No graph holds on to what was kept: it is let go on the way, as each tap is once its gradient was asked for and the
    walk is past it. The way back can be gone once.

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
