"""Muon, for filters: momentum whose step moves every direction of a filter bank alike (Jordan et al. 2024).

A gradient of a convolution's filters is ruled by a few directions, and so is what plain momentum moves. Muon replaces
the step by its polar factor, the nearest matrix all of whose singular values are equal (Jordan 2024,
https://kellerjordan.github.io/posts/muon/), by a few products of matrices. Filters keep the norm that they began with
(as in the code that goes with Jordan 2024, arXiv:2404.00498), so that `lr` is what it seems to be, the length of a step
as a share of the filters' own. Where batch normalisation follows, the norm means nothing, and weight decay would only
steer `lr` through it; where none does, it is the one freedom that is lost. (`torch.optim.Muon` takes
matrices alone, and does not keep their norm.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "polar"]

# three turns of x ← (a + b x² + c x⁴) x bring what is between 0.02 and 1 to between 0.68 and 1.21
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 3


def polar(matrix: Tensor) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ, in its own type, by Newton and Schulz's iteration; 0 for 0.

    The coefficients are Jordan's, which do not converge but get near soonest: directions that a step has little of
    come out shorter than the rest, and none much longer.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-20)  # at least as large as the largest singular value
    x = _turned(x) if x.dtype == torch.bfloat16 else _turned_once(x)
    return x.T if tall else x


def _turned(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(TURNS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _turned_once(x: Tensor) -> Tensor:
    """The same with two products of x instead of six: each turn multiplies by a polynomial in x xᵀ, which is small.

    Filters have up to nine times as many columns as rows. Bfloat16 has too few bits for it, the result is twice as far
    off: what is short in x is shorter still in x xᵀ, beside what is long.
    """
    a, b, c = COEFFICIENTS
    square = x @ x.T
    whole = factor = torch.empty(0)
    for turn in range(TURNS):
        square = factor @ square @ factor if turn else square
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        whole = factor @ whole if turn else factor
    return whole @ x


class Muon(torch.optim.Optimizer):
    """Muon for filters (K,C,h,w); Nesterov's momentum for everything else, as `torch.optim.SGD`.

    Args:
        params: parameters or groups of them.
        lr: of filters, the length of a step as a share of their norm; of the rest, as in SGD.
        momentum: decay of the sum of gradients.
        weight_decay: of what is not a filter, whose norm is kept.
        dtype: that polar factors are computed in; bfloat16 is enough where the network runs in it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the closure, if any, computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._move(value, value.grad, group)
        return loss

    def _move(self, value: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, lr, momentum = self.state[value], group["lr"], group["momentum"]
        if value.ndim != 4 and group["weight_decay"]:
            grad = grad.add(value, alpha=group["weight_decay"])
        if not state:
            state["sum"] = torch.zeros_like(value)
            state["norm"] = value.norm()
        total = torch.add(grad, state["sum"], alpha=momentum, out=state["sum"])
        step = torch.add(grad, total, alpha=momentum)
        if value.ndim != 4:
            value.sub_(step, alpha=lr)
            return
        # as (K, h·w·C): a view, since filters are laid out channels_last, and which column is which does not matter
        rows = step.permute(0, 2, 3, 1).flatten(1)
        direction = polar(rows.to(self.dtype))
        k, c, h, w = value.shape
        norm: Tensor = state["norm"]
        length = norm * -lr / torch.linalg.vector_norm(direction, dtype=norm.dtype).clamp_min(1e-20)
        value.addcmul_(direction.view(k, h, w, c).permute(0, 3, 1, 2), length)
        value.mul_(norm / value.norm().clamp_min(1e-20))
