"""The walk: forward through the stages, keeping what the way back needs, and back to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.modes import no_autocast
from vggfeat.trunk import layers
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import ByName, ByRows, Flow, Keep, OnTap, Rows, TapGrad, kept_of, ready
from vggfeat.trunk.strips import Held, Recompute, back_in_strips, forward_in_strips

__all__ = ["TapGradOf", "TapGradOfRows", "backward", "forward", "reread", "vjp", "vjp_by_rows"]

TapGradAt = Callable[[int], TapGrad]  # the gradient with respect to a tap, by its position
TapGradOf = Callable[[str, Tensor], Tensor]  # the same by the tap's name and value
TapGradOfRows = Callable[[str, Tensor, Rows], Tensor]  # the same of some rows of one image's tap


def reread(plan: Plan, keep: Keep, device: torch.device) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, because keeping them twice is waste."""
    kinds = [(number, kind) for number, stage in enumerate(plan.stages) for kind in stage.taps]
    return tuple(i for i, (number, kind) in enumerate(kinds) if kind in kept_of(plan, number, keep, device))


def forward(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The taps, shallow to deep, and what `backward` needs besides.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: see `Keep`.
        on_tap: is given every tap, shallow to deep, as it is made; `x` is one image then. Where the first convolution
            goes strip by strip, its taps are given so and not returned; with "none", none is.
    """
    return _forward(*_prepared(x, filters), filters, plan, keep, on_tap)


def _prepared(x: Tensor, filters: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Images as the first convolution takes them, and whether they are finite."""
    return layers.channels_last(layers.split_bfloat16(x, filters[0])), layers.all_finite(x)


def _forward(
    x: Tensor, finite: bool, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None
) -> tuple[list[Tensor], list[Tensor]]:
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(x.device.type)
    found: list[tuple[ByName, ByName]] = []

    def give(number: int, kind: str, part: Tensor, rows: Rows) -> None:
        assert on_tap is not None
        on_tap(plan.tapped[number][kind], part, rows)

    def given(number: int, taps: ByName) -> ByName:
        """What is left of a stage's taps once they were given to `on_tap`, if there is one."""
        if on_tap is None:
            return taps
        for kind, tap in taps.items():
            give(number, kind, tap, slice(0, tap.shape[2]))
        return {} if keep == "none" else taps

    with no_autocast(x.device):
        if in_strips:
            first = None if on_tap is None else functools.partial(give, 0)
            x, found = forward_in_strips(x, finite, stages[:in_strips], first)
            found = [(given(number, taps), kept) for number, (taps, kept) in enumerate(found)]
        for number, stage in enumerate(stages[in_strips:], start=in_strips):
            x, taps, kept = stage.forward(x, finite, overwrite=number > 0 and stages[number - 1].hands_over)
            found.append((given(number, taps), kept))
    return (
        [value for taps, _ in found for value in taps.values()],
        [value for _, kept in found for value in kept.values()],
    )


def backward(
    tap_grad: TapGradAt,
    again: dict[int, Tensor],
    kept: list[Tensor],
    filters: Sequence[Tensor],
    size: tuple[int, int],
    plan: Plan,
    keep: Keep,
    recompute: Recompute | None = None,
) -> Tensor | None:
    """The gradient with respect to the normalised images, in the filters' type; None where no tap has one.

    Args:
        tap_grad: gives the gradient with respect to a tap, asked for once each, deepest first: when the walk gets
            there, or, of stages that go strip by strip, before the first strip.
        again: the taps at `reread`, by position. This and `kept` are emptied on the way, so that memory is free early.
        kept: of `forward`.
        filters: those that `forward` had.
        size: height and width of the images.
        plan: what was run.
        keep: what `forward` was told.
        recompute: what the first stage's taps are recomputed from, where they were given strip by strip.
    """
    device = filters[0].device
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(device.type)
    sizes = plan.sizes(*size)
    position = len(plan.names)
    flow = Flow()
    held: list[Held] = []
    finite: bool | None = None  # as the first gradient to come is, the deepest tap's

    def arriving(at: dict[str, int], kind: str) -> TapGrad:
        nonlocal finite
        grad = tap_grad(at[kind]) if kind in at else None
        if grad is not None and finite is None:
            grad = grad.whole() if isinstance(grad, ByRows) else grad
            finite = layers.all_finite(grad)
        return grad

    with no_autocast(device):
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
            flow.own(back_in_strips(flow.grad, held, size, recompute))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if flow.grad is None or finite else torch.full_like(flow.grad, torch.nan)


def vjp(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: Keep
) -> tuple[dict[str, Tensor], Callable[[TapGradOf], Tensor]]:
    """The taps by name, and the way back to the images, for a gradient that is wanted now.

    No graph holds on to what was kept: it is let go on the way, as each tap is once its gradient was asked for and the
    walk is past it. The way back can be taken once.

    Args:
        x: normalised images, as for `forward`.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: "taps" or "values".

    Returns:
        The taps, shallow to deep, and a function of `tap_grad(name, tap)`, which gives the gradient with respect to a
        tap; it returns the gradient with respect to `x`, in its type.
    """
    taps, back = _vjp(x, filters, plan, keep)

    def at(tap_grad: TapGradOf, position: int) -> Tensor:
        name = plan.by_depth[position]
        return tap_grad(name, taps.pop(name))

    return taps, lambda tap_grad: back(functools.partial(at, tap_grad))


def vjp_by_rows(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, on_tap: OnTap, *, keep: Keep
) -> Callable[[TapGradOfRows], Tensor]:
    """As `vjp` of one image, for what can be told of a tap, and its gradient, from some rows at a time.

    Where the first convolution goes strip by strip, its taps, the largest there are, are never whole: they are given as
    they are made, and recomputed on the way back. Of a tap's gradient a few rows are there at a time, but for the
    deepest tap's (and that of a convolution tapped beside its batch normalisation).

    Args:
        x: one normalised image, as for `forward`.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        on_tap: is given every tap, as by `forward`.
        keep: "taps" or "values".

    Returns:
        A function of `tap_grad(name, part, rows)`, which gives the gradient with respect to some rows of a tap; it
        returns the gradient with respect to `x`, in its type.
    """
    taps, back = _vjp(x, filters, plan, keep, on_tap)

    def at(tap_grad: TapGradOfRows, position: int) -> ByRows:
        name = plan.by_depth[position]
        return ByRows(functools.partial(tap_grad, name), taps.pop(name, None))

    return lambda tap_grad: back(functools.partial(at, tap_grad))


def _vjp(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None = None
) -> tuple[dict[str, Tensor], Callable[[TapGradAt], Tensor]]:
    """The taps by name but those that were given strip by strip, and the way back, which can be taken once."""
    prepared, finite = _prepared(x, filters)
    found, kept = _forward(prepared, finite, filters, plan, keep, on_tap)
    lacking = len(plan.by_depth) - len(found)  # the first so many were not returned
    taps = dict(zip(plan.by_depth[lacking:], found, strict=True))
    again = {i: found[i - lacking] for i in reread(plan, keep, x.device) if i >= lacking}
    recompute = Recompute(prepared, finite) if lacking else None
    size, dtype = (x.shape[2], x.shape[3]), x.dtype

    def back(tap_grad: TapGradAt) -> Tensor:
        grad = backward(tap_grad, again, kept, filters, size, plan, keep, recompute)
        assert grad is not None  # every tap has one
        return grad.to(dtype)

    return taps, back
