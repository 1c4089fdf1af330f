"""The walk: forward through the stages, keeping what the backward needs, and backward to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.modes import no_autocast
from vggfeat.trunk import layers
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import ByName, ByRows, GradientAccumulator, Keep, OnTap, Rows, TapGrad, kept_of, ready
from vggfeat.trunk.strips import Held, Recompute, backward_in_strips, forward_in_strips

TapGradOf = Callable[[str, Tensor], Tensor]  # the gradient with respect to a tap, by the tap's name and value
TapGradOfRows = Callable[[str, Tensor, Rows], Tensor]  # the same of some rows of one image's tap


def reread(plan: Plan, keep: Keep, device: torch.device) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, rather than keep them twice."""
    kinds = [(number, kind) for number, stage in enumerate(plan.stages) for kind in stage.taps]
    return tuple(i for i, (number, kind) in enumerate(kinds) if kind in kept_of(plan, number, keep, device))


def kept_by_stage(
    plan: Plan, keep: Keep, device: torch.device, taps: Sequence[Tensor], kept: Sequence[Tensor]
) -> list[ByName]:
    """What `backward` needs, from two lists: the taps at `reread`, and the rest of what `forward` kept, in order."""
    again, rest = iter(taps), iter(kept)
    return [
        {name: next(again if name in stage.taps else rest) for name in kept_of(plan, number, keep, device)}
        for number, stage in enumerate(plan.stages)
    ]


def forward(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None = None
) -> list[tuple[ByName, ByName]]:
    """For each stage its taps by kind, and what else `backward` needs of it.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: see `Keep`.
        on_tap: gets every tap, shallow to deep, as it is computed; `x` is then one image. Where the first convolution
            runs in strips, its taps are passed strip by strip and not returned; with "none", none is.
    """
    return _forward(*_prepared(x, filters), filters, plan, keep, on_tap)


def _prepared(x: Tensor, filters: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Images as the first convolution takes them, and whether they are finite."""
    return layers.channels_last(layers.split_bfloat16(x, filters[0])), layers.stays_finite(x)


def _forward(
    x: Tensor, finite: bool, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None
) -> list[tuple[ByName, ByName]]:
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(x.device.type)
    by_stage: list[tuple[ByName, ByName]] = []

    def give(number: int, kind: str, part: Tensor, rows: Rows) -> None:
        assert on_tap is not None
        on_tap(plan.tapped[number][kind], part, rows)

    def given(number: int, taps: ByName) -> ByName:
        """The stage's taps that are still returned, after passing all to `on_tap`, if any."""
        if on_tap is None:
            return taps
        for kind, tap in taps.items():
            give(number, kind, tap, slice(0, tap.shape[2]))
        return {} if keep == "none" else taps

    with no_autocast(x.device):
        if in_strips:
            first = None if on_tap is None else functools.partial(give, 0)
            x, by_stage = forward_in_strips(x, finite, stages[:in_strips], first)
            by_stage = [(given(number, taps), kept) for number, (taps, kept) in enumerate(by_stage)]
        for number, stage in enumerate(stages[in_strips:], start=in_strips):
            x, taps, kept = stage.forward(x, finite, overwrite=number > 0 and stages[number - 1].hands_over)
            by_stage.append((given(number, taps), kept))
    return by_stage


def backward(
    tap_grad: Callable[[str], TapGrad],
    kept: list[ByName],
    filters: Sequence[Tensor],
    size: tuple[int, int],
    plan: Plan,
    keep: Keep,
    recompute: Recompute | None = None,
) -> Tensor | None:
    """The gradient with respect to the normalised images, in the filters' type; None where no tap has one.

    Args:
        tap_grad: gives the gradient with respect to a tap by its name, called once for each, deepest first: when
            the walk gets there, or, for stages in strips, before the first strip.
        kept: for each stage what the forward kept of it, by the names of `kept_of`; is emptied on the way, to
            free memory early.
        filters: as for `forward`.
        size: height and width of the images.
        plan: what was run.
        keep: as for `forward`.
        recompute: what the first stage's taps are recomputed from, where they were passed in strips.
    """
    device = filters[0].device
    stages, in_strips = ready(plan, filters, keep), plan.in_strips(device.type)
    sizes = plan.sizes(*size)
    flow = GradientAccumulator()
    held: list[Held] = []
    first = True  # the first gradient is the deepest tap's
    finite: Tensor | None = None  # which images' are, if not all

    def of_kind(names: dict[str, str], kind: str) -> TapGrad:
        nonlocal first, finite
        grad = tap_grad(names[kind]) if kind in names else None
        if grad is not None and first:
            grad = grad.whole() if isinstance(grad, ByRows) else grad
            first, finite = False, layers.finite_images(grad)
        return grad

    with no_autocast(device):
        for number, stage in reversed([*enumerate(stages)]):
            names = plan.tapped[number]  # by kind
            if number < in_strips:
                held.append((stage, {kind: of_kind(names, kind) for kind in reversed(names)}, kept.pop()))
            else:
                stage.backward(flow, functools.partial(of_kind, names), kept.pop(), *sizes[number])
        if held:
            flow.replace(backward_in_strips(flow.grad, held, size, recompute))
    # an image's NaN is packed as 0, so that a bad step would look like a good one; every NaN reaches the deepest tap,
    # and its gradient, unless that is of |a - b|, where NaN has the sign 0, to torch as well
    return flow.grad if flow.grad is None or finite is None else torch.where(finite, flow.grad, torch.nan)


def vjp(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: Keep
) -> tuple[dict[str, Tensor], Callable[[TapGradOf], Tensor]]:
    """The taps by name, and the pullback to the images, bypassing autograd.

    No graph holds on to what was kept: it is freed on the way, and so is each tap, once its gradient is known and the
    walk is past it. The pullback can be called once.

    Args:
        x: normalised images, as for `forward`.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: "taps" or "values".

    Returns:
        The taps, shallow to deep, and a function of `tap_grad(name, tap)`, which gives the gradient with respect to a
        tap; it returns the gradient with respect to `x`, in its type.
    """
    taps, pullback = _vjp(x, filters, plan, keep)

    def of(tap_grad: TapGradOf, name: str) -> Tensor:
        return tap_grad(name, taps.pop(name))

    return taps, lambda tap_grad: pullback(functools.partial(of, tap_grad))


def vjp_by_rows(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, on_tap: OnTap, *, keep: Keep
) -> Callable[[TapGradOfRows], Tensor]:
    """As `vjp` of one image, for functions of a tap that, like their gradient, can be computed by rows.

    Where the first convolution runs in strips, its taps, the largest of all, never exist whole: they are passed as they
    are computed, and recomputed in the backward. Only a few rows of a tap's gradient exist at a time, except for the
    deepest tap's (and that of a convolution tapped before its batch normalisation).

    Args:
        x: one normalised image, as for `forward`.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        on_tap: gets every tap, as by `forward`.
        keep: "taps" or "values".

    Returns:
        A function of `tap_grad(name, part, rows)`, which gives the gradient with respect to some rows of a tap; it
        returns the gradient with respect to `x`, in its type.
    """
    taps, pullback = _vjp(x, filters, plan, keep, on_tap)

    def of(tap_grad: TapGradOfRows, name: str) -> ByRows:
        return ByRows(functools.partial(tap_grad, name), taps.pop(name, None))

    return lambda tap_grad: pullback(functools.partial(of, tap_grad))


def _vjp(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: Keep, on_tap: OnTap | None = None
) -> tuple[dict[str, Tensor], Callable[[Callable[[str], TapGrad]], Tensor]]:
    """The taps by name, except those passed in strips, and the pullback, which can be called once."""
    prepared, finite = _prepared(x, filters)
    taps: dict[str, Tensor] = {}
    kept: list[ByName] = []
    for number, (own, besides) in enumerate(_forward(prepared, finite, filters, plan, keep, on_tap)):
        taps |= {plan.tapped[number][kind]: tap for kind, tap in own.items()}
        again = kept_of(plan, number, keep, x.device)
        kept.append(besides | {kind: tap for kind, tap in own.items() if kind in again})
    recompute = Recompute(prepared, finite) if len(taps) < len(plan.names) else None
    size, dtype = (x.shape[2], x.shape[3]), x.dtype

    def pullback(tap_grad: Callable[[str], TapGrad]) -> Tensor:
        grad = backward(tap_grad, kept, filters, size, plan, keep, recompute)
        assert grad is not None  # every tap has one
        return grad.to(dtype)

    return taps, pullback
