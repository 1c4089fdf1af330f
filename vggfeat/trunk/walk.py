"""The walk: forward through the stages, keeping what the way back needs, and back to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.trunk import layers
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import ByName, ByRows, Flow, Rows, Slope, kept_of, ready
from vggfeat.trunk.strips import Held, Remade, back_in_strips, forward_in_strips

__all__ = [
    "Seen",
    "SlopeAt",
    "SlopeOf",
    "SlopeOfRows",
    "backward",
    "forward",
    "reread",
    "there_and_back",
    "there_and_back_by_rows",
]

SlopeAt = Callable[[int], Slope]  # the gradient with respect to a tap, by its position
SlopeOf = Callable[[str, Tensor], Tensor]  # the same by the tap's name and value
SlopeOfRows = Callable[[str, Tensor, Rows], Tensor]  # the same of some rows of one image's tap
Seen = Callable[[str, Tensor, Rows], object]  # is shown some rows of one image's tap


def reread(plan: Plan, keep: str, device: torch.device) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, because keeping them twice is waste."""
    kinds = [(number, kind) for number, stage in enumerate(plan.stages) for kind in stage.taps]
    return tuple(i for i, (number, kind) in enumerate(kinds) if kind in kept_of(plan, number, keep, device))


def forward(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: str, seen: Seen | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The taps, shallow to deep, and what `backward` needs besides.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: "none" keeps nothing, "values" what came out of the ReLUs, "bits" single bits instead, and "taps" bits
            but for ReLUs that are taps: for callers that hold those anyway. Stages that go strip by strip keep bits.
        seen: is shown every tap, shallow to deep, as it is made; `x` is one image then. Where the first convolution
            goes strip by strip, its taps are shown so and not returned; with "none", none is.
    """
    return _forward(*_taken(x, filters), filters, plan, keep, seen)


def _taken(x: Tensor, filters: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Images as the first convolution takes them, and whether they are numbers all the way."""
    return layers.doubled(x, filters[0]).contiguous(memory_format=torch.channels_last), layers.sound(x)


def _forward(
    x: Tensor, sound: bool, filters: Sequence[Tensor], plan: Plan, keep: str, seen: Seen | None
) -> tuple[list[Tensor], list[Tensor]]:
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(x.device.type)
    found: list[tuple[ByName, ByName]] = []

    def show(number: int, kind: str, part: Tensor, rows: Rows) -> None:
        assert seen is not None
        seen(plan.tapped[number][kind], part, rows)

    def showed(number: int, taps: ByName) -> ByName:
        """What is left of a stage's taps once they were shown, if there is anyone to show them to."""
        if seen is None:
            return taps
        for kind, tap in taps.items():
            show(number, kind, tap, slice(0, tap.shape[2]))
        return {} if keep == "none" else taps

    with layers.no_autocast(x.device):
        if in_strips:
            first = None if seen is None else functools.partial(show, 0)
            x, found = forward_in_strips(x, sound, stages[:in_strips], first)
            found = [(showed(number, taps), kept) for number, (taps, kept) in enumerate(found)]
        for number, stage in enumerate(stages[in_strips:], start=in_strips):
            x, taps, kept = stage.forward(x, sound, spare=number > 0 and stages[number - 1].passes_on)
            found.append((showed(number, taps), kept))
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
    remade: Remade | None = None,
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
        remade: what the first stage's taps are made of again, where they were shown strip by strip.
    """
    device = filters[0].device
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(device.type)
    sizes = plan.sizes(*size)
    position = len(plan.names)
    flow = Flow()
    held: list[Held] = []
    sound: bool | None = None  # whether the first gradient to come, the deepest tap's, is made of numbers

    def arriving(at: dict[str, int], kind: str) -> Slope:
        nonlocal sound
        found = slope(at[kind]) if kind in at else None
        if found is not None and sound is None:
            found = found.whole() if isinstance(found, ByRows) else found
            sound = layers.sound(found)
        return found

    with layers.no_autocast(device):
        for number, stage in reversed([*enumerate(stages)]):
            taps = stage.stage.taps
            position -= len(taps)
            at = {kind: position + i for i, kind in enumerate(taps)}
            keeps = [name for name in reversed(stage.keeps) if name not in at or at[name] in again]
            memory = {name: again.pop(at[name]) if name in at else kept.pop() for name in keeps}
            if number < in_strips:
                held.append((stage, {kind: arriving(at, kind) for kind in reversed(taps)}, memory))
            else:
                stage.back(flow, functools.partial(arriving, at), memory, *sizes[number])
        if held:
            flow.own(back_in_strips(flow.grad, held, size, remade))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if flow.grad is None or sound else torch.full_like(flow.grad, torch.nan)


def there_and_back(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str
) -> tuple[dict[str, Tensor], Callable[[SlopeOf], Tensor]]:
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
    taps, back = _there(x, filters, plan, keep)

    def at(slope: SlopeOf, position: int) -> Tensor:
        name = plan.ran[position]
        return slope(name, taps.pop(name))

    return taps, lambda slope: back(functools.partial(at, slope))


def there_and_back_by_rows(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, seen: Seen, *, keep: str
) -> Callable[[SlopeOfRows], Tensor]:
    """As `there_and_back` of one image, for what can be told of a tap, and its gradient, from some rows at a time.

    Where the first convolution goes strip by strip, its taps, the largest there are, are never whole: they are shown as
    they are made, and made again on the way back. Of a tap's gradient a few rows are there at a time, but for the
    deepest tap's (and that of a convolution tapped beside its batch normalisation).

    Args:
        x: as for `forward`, one image.
        filters: as there.
        plan: as there.
        seen: as there.
        keep: "taps" or "values", as there.

    Returns:
        A function of `slope(name, part, rows)`, the gradient with respect to some rows of a tap, which goes back.
    """
    taps, back = _there(x, filters, plan, keep, seen)

    def at(slope: SlopeOfRows, position: int) -> ByRows:
        name = plan.ran[position]
        return ByRows(functools.partial(slope, name), taps.pop(name, None))

    return lambda slope: back(functools.partial(at, slope))


def _there(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: str, seen: Seen | None = None
) -> tuple[dict[str, Tensor], Callable[[SlopeAt], Tensor]]:
    """The taps by name but those that were shown strip by strip, and the way back, which can be gone once."""
    taken, sound = _taken(x, filters)
    found, kept = _forward(taken, sound, filters, plan, keep, seen)
    lacking = len(plan.ran) - len(found)  # the first so many were not returned
    taps = dict(zip(plan.ran[lacking:], found, strict=True))
    again = {i: found[i - lacking] for i in reread(plan, keep, x.device) if i >= lacking}
    remade = Remade(taken, sound) if lacking else None
    size, dtype = (x.shape[2], x.shape[3]), x.dtype

    def back(slope: SlopeAt) -> Tensor:
        grad = backward(slope, again, kept, filters, size, plan, keep, remade)
        assert grad is not None  # every tap has one
        return grad.to(dtype)

    return taps, back
