"""Muon, for filters: momentum whose step moves every direction of a filter bank alike (Jordan et al. 2024).

A gradient of a convolution's filters is dominated by a few directions, and so is plain momentum's step. Muon replaces
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

# three iterations of x ← (a + b x² + c x⁴) x bring values between 0.02 and 1 to between 0.68 and 1.21
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


def polar_factor(matrix: Tensor) -> Tensor:
    """About U Vᵀ of matrices U S Vᵀ (…,K,L), in their own type, by Newton and Schulz's iteration; 0 for 0.

    The coefficients are Jordan's, which do not converge but come close fastest: directions of small singular values
    come out shorter than the others, and none much longer.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-20)  # at least the largest of S
    x = _newton_schulz(x) if x.dtype == torch.bfloat16 else _newton_schulz_on_gram(x)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    (a, b, c), product = COEFFICIENTS, _product_of(x)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = product(x, product(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_on_gram(x: Tensor) -> Tensor:
    """The same with two products of x instead of six: an iteration multiplies by a polynomial in x xᵀ, which is small.

    Filters have up to nine times as many columns as rows. Bfloat16 is too coarse for it, with twice the error:
    small singular values are smaller still in x xᵀ, beside large ones.
    """
    (a, b, c), product = COEFFICIENTS, _product_of(x)
    square = x @ x.mT
    whole = factor = torch.empty(0)
    for iteration in range(ITERATIONS):
        square = factor @ square @ factor if iteration else square
        factor = product(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor @ whole if iteration else factor
    return whole @ x


def _product_of(x: Tensor) -> Callable[..., Tensor]:
    """Adds the product of two matrices, or of each two, to a third."""
    return torch.addmm if x.ndim == 2 else torch.baddbmm


class Muon(torch.optim.Optimizer):
    """Muon for filters (K,C,h,w); Nesterov's momentum for everything else, as `torch.optim.SGD`.

    Args:
        params: parameters or groups of them.
        lr: of filters, the length of a step as a share of their norm; of the rest, as in SGD.
        momentum: decay of the sum of gradients.
        weight_decay: of all but filters, whose norm is kept.
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
            if values := [value for value in group["params"] if value.grad is not None]:
                self._move(values, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _move(self, values: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        grads: list[Any] = [value.grad for value in values]
        for i, value in enumerate(values):
            if value.ndim != 4 and weight_decay:
                grads[i] = grads[i].add(value, alpha=weight_decay)
            if not self.state[value]:
                self.state[value] = {"sum": torch.zeros_like(value), "norm": value.norm()}
        # all at once: on a GPU the time goes into launching, not adding
        sums = [self.state[value]["sum"] for value in values]
        torch._foreach_mul_(sums, momentum)
        torch._foreach_add_(sums, grads)
        steps = torch._foreach_add(grads, sums, alpha=momentum)
        pairs = list(zip(values, steps, strict=True))
        if others := [pair for pair in pairs if pair[0].ndim != 4]:
            rest, moves = map(list, zip(*others, strict=True))
            torch._foreach_mul_(moves, lr)
            torch._foreach_sub_(rest, moves)
        alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for value, step in pairs:
            if value.ndim == 4:  # a CPU takes them one by one, while they are in its caches
                key = (value.shape, value.dtype, value.device) if value.is_cuda else id(value)
                alike.setdefault(key, []).append((value, step))
        for group in alike.values():
            filters, moves = map(list, zip(*group, strict=True))
            self._move_filters(filters, moves, lr)

    def _move_filters(self, filters: list[Tensor], steps: list[Tensor], lr: float | Tensor) -> None:
        """Move filters of one shape."""
        # as (K, h·w·C): a view, since filters are laid out channels_last, and which column is which does not matter
        rows = [step.permute(0, 2, 3, 1).flatten(1).to(self.dtype) for step in steps]
        direction = polar_factor(rows[0] if len(rows) == 1 else torch.stack(rows)).view(len(rows), *rows[0].shape)
        norms = torch.stack([self.state[value]["norm"] for value in filters])
        length = torch.linalg.vector_norm(direction, dim=(1, 2), dtype=norms.dtype).clamp_min(1e-20)
        moves = direction * (norms * lr / length)[:, None, None]
        k, c, h, w = filters[0].shape
        torch._foreach_sub_(filters, list(moves.view(-1, k, h, w, c).permute(0, 1, 4, 2, 3)))
        back = norms / torch.stack(torch._foreach_norm(filters)).clamp_min(1e-20)
        for value, factor in zip(filters, back, strict=True):
            value.mul_(factor)
