"""The trunk as autograd sees it: gradients to the images only, and their derivatives by ordinary operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vggfeat.modes import in_forward_mode, in_functorch, is_batched, is_watched, no_autocast
from vggfeat.trunk import operators
from vggfeat.trunk.plain import plain
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.walk import reread


def run(x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str = "bits") -> list[Tensor]:
    """The taps in the order of `plan.by_depth`; gradients flow to `x` only.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: from `Trunk.filters` for the same plan.
        plan: what to run.
        keep: what to save for the backward: "bits" (a tenth of autograd's memory or less) or "values" (faster).
    """
    if in_forward_mode():  # forward-mode derivatives need ordinary operations
        taps: Sequence[Tensor] = plain(x, filters, plan)
    elif torch.is_grad_enabled() and (x.requires_grad or in_functorch()):  # inside vmap, x does not say
        taps = _Trunk.apply(x, plan.code, keep, len(plan.names), reread(plan, keep), *filters)
    else:
        taps = _walk_forward(x, filters, plan.code, "none")
    return list(taps[: len(plan.names)])  # what is kept follows them


def _walk_forward(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    forward = operators.trunk_forward if is_watched(x) else operators.forward
    values: list[Tensor] = forward(x, filters, code, keep)
    return values


class _Trunk(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, code: str, keep: str, count: int, again: tuple[int, ...], *filters: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_walk_forward(x, filters, code, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.code, ctx.keep, ctx.count, again, *filters = inputs
        taps, kept = output[: ctx.count], output[ctx.count :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.split = (len(again), len(kept))
        ctx.save_for_backward(x, *[taps[i] for i in again], *kept, *filters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        nothing = (None,) * (4 + len(rest) - sum(ctx.split))
        present = [i for i, grad in enumerate(grads[: ctx.count]) if grad is not None]
        if not present:
            return (None, *nothing)
        if is_batched(*grads):
            return (_ordinary_gradient(x, rest[sum(ctx.split) :], Plan.decode(ctx.code), present, grads), *nothing)
        # called directly where possible: torch.compile of torch 2.13 gives `apply` in a backward one argument too many
        back: Any = _TrunkBackward.apply if torch.is_grad_enabled() else _TrunkBackward.forward
        return (back(x, ctx.code, ctx.keep, ctx.split, present, *[grads[i] for i in present], *rest), *nothing)


def _ordinary_gradient(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, present: list[int], grads: Sequence[Tensor | None]
) -> Tensor:
    """The images' gradient by autograd, for tap gradients that the operators cannot take."""
    again = torch.is_grad_enabled()  # the gradient is to be differentiated in its turn
    with torch.enable_grad(), no_autocast(x.device):
        leaf = x if again else x.detach().requires_grad_()
        taps = plain(leaf, filters, plan)
        chosen, given = [taps[i] for i in present], [grads[i] for i in present]
        to_x: Tensor = torch.autograd.grad(chosen, leaf, given, create_graph=again)[0]
    return to_x


class _TrunkBackward(torch.autograd.Function):
    """The backward as a function of its own, so that it can be differentiated in turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        code: str,
        keep: str,
        split: tuple[int, int],
        present: list[int],
        *rest: Tensor,
    ) -> Tensor:
        n, (again, kept) = len(present), split
        grads, rest = rest[:n], rest[n:]
        taps, rest = rest[:again], rest[again:]
        back = operators.trunk_backward if is_watched(x, *grads) else operators.backward
        to_x: Tensor = back(grads, present, taps, rest[:kept], rest[kept:], list(x.shape), code, keep)
        return to_x.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.code, _, split, ctx.present, *rest = inputs
        n = len(ctx.present)
        ctx.nothing = (None,) * (len(rest) - n)
        ctx.save_for_backward(x, *rest[:n], *rest[n + sum(split) :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # second derivatives are rare: recompute with ordinary operations, which can be differentiated repeatedly
        n = len(ctx.present)
        x, *rest = ctx.saved_tensors
        plan = Plan.decode(ctx.code)

        def taps(x: Tensor) -> list[Tensor]:
            values = plain(x, rest[n:], plan)
            return [values[i] for i in ctx.present]

        def first(x: Tensor, grads: list[Tensor]) -> Tensor:
            to_x: Tensor = torch.func.vjp(taps, x)[1](grads)[0]
            return to_x

        with no_autocast(x.device):
            of_x, of_grads = torch.func.vjp(first, x, rest[:n])[1](grad)
        return (of_x, None, None, None, None, *of_grads, *ctx.nothing)
