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

from vggfeat.cuda_graphs import side_by_side
from vggfeat.devices import triton_kernels

# three iterations of x ← (a + b x² + c x⁴) x bring values between 0.02 and 1 to between 0.68 and 1.21
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


def polar_direction(matrix: Tensor) -> Tensor:
    """About ‖matrix‖ U Vᵀ of matrices U S Vᵀ (…,K,L), not in float16, by Newton and Schulz's iteration; 0 for 0.

    The coefficients are Jordan's, which do not converge but come close fastest: directions of small singular values
    come out shorter than the others, and none much longer.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    square = x @ x.mT
    # 1 / ‖x‖², and ‖x‖ is at least the largest of S
    scale = 1 / square.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).unsqueeze(-1).clamp_min(1e-37)
    x = (_newton_schulz if x.dtype == torch.bfloat16 else _newton_schulz_on_gram)(x, square.mul_(scale), scale)
    return x.mT if tall else x


def _newton_schulz(x: Tensor, square: Tensor, scale: Tensor) -> Tensor:
    for iteration in range(ITERATIONS):
        x = _polynomial((x @ x.mT).mul_(scale) if iteration else square) @ x
    return x


def _newton_schulz_on_gram(x: Tensor, square: Tensor, scale: Tensor) -> Tensor:
    """The same with two products of x instead of six: all polynomials first, in x xᵀ, which is small.

    Filters have up to nine times as many columns as rows. Bfloat16 is too coarse for it, with twice the error:
    small singular values are smaller still in x xᵀ, beside large ones.
    """
    whole = factor = _polynomial(square)
    for _ in range(ITERATIONS - 1):
        square = factor @ square @ factor
        factor = _polynomial(square)
        whole = factor @ whole
    return whole @ x


def _polynomial(square: Tensor) -> Tensor:
    """The sum a + b · square + c · square², of one matrix or of several."""
    a, b, c = COEFFICIENTS
    product = torch.addmm if square.ndim == 2 else torch.baddbmm
    factor: Tensor = product(square, square, square, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


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
        for value in values:
            if not self.state[value]:
                self.state[value] = {"sum": torch.zeros_like(value), "norm": value.norm()}
        alike: dict[Any, list[Tensor]] = {}
        for value in values:  # a CPU takes filters one by one, while they are in its caches; a GPU, few kernels
            key = (value.shape, value.dtype, value.device) if value.is_cuda else id(value)
            alike.setdefault(key if value.ndim == 4 else None, []).append(value)
        with side_by_side(values[0].device) as part:  # most kernels are too small to fill a GPU
            for key, group in alike.items():
                with part():
                    if key is None:
                        self._move_others(group, lr, momentum, weight_decay)
                    else:
                        self._move_filters(group, lr, momentum)

    def _move_others(self, values: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        grads = _grads(values)
        if weight_decay:
            grads = [grad.add(value, alpha=weight_decay) for grad, value in zip(grads, values, strict=True)]
        steps = _steps(grads, self._sums(values), momentum)
        torch._foreach_mul_(steps, lr)
        torch._foreach_sub_(values, steps)

    def _move_filters(self, filters: list[Tensor], lr: float | Tensor, momentum: float) -> None:
        """Move filters of one shape."""
        grads, sums = _grads(filters), self._sums(filters)
        norms = torch.stack([self.state[value]["norm"] for value in filters])
        if kernels := _kernels_for(filters, grads, sums):
            steps = kernels.add_momentum(grads, sums, momentum, self.dtype)
            kernels.move(filters, polar_direction(steps), norms * lr, norms)
            return
        # as (K, h·w·C): a view, since filters are laid out channels_last, and which column is which does not matter
        rows = [step.permute(0, 2, 3, 1).flatten(1).to(self.dtype) for step in _steps(grads, sums, momentum)]
        direction = polar_direction(rows[0] if len(rows) == 1 else torch.stack(rows)).view(len(rows), *rows[0].shape)
        length = torch.linalg.vector_norm(direction, dim=(1, 2), dtype=norms.dtype).clamp_min(1e-20)
        moves = direction * (norms * lr / length)[:, None, None]
        k, c, h, w = filters[0].shape
        torch._foreach_sub_(filters, list(moves.view(-1, k, h, w, c).permute(0, 1, 4, 2, 3)))
        back = norms / torch.stack(torch._foreach_norm(filters)).clamp_min(1e-20)
        for value, factor in zip(filters, back, strict=True):
            value.mul_(factor)

    def _sums(self, values: list[Tensor]) -> list[Tensor]:
        return [self.state[value]["sum"] for value in values]


def _grads(values: list[Tensor]) -> list[Tensor]:
    return [value.grad for value in values]  # type: ignore[misc]


def _steps(grads: list[Tensor], sums: list[Tensor], momentum: float) -> list[Tensor]:
    """Nesterov's steps, after adding gradients to their decayed sums."""
    torch._foreach_mul_(sums, momentum)
    torch._foreach_add_(sums, grads)
    return list(torch._foreach_add(grads, sums, alpha=momentum))


def _kernels_for(*tensors: list[Tensor]) -> Any:
    """The module `training.kernels` where it can take these filters, else None."""
    each = [value for values in tensors for value in values]
    if not triton_kernels(each[0].device, torch.float32):
        return None
    if not all(v.dtype == torch.float32 and v.is_contiguous(memory_format=torch.channels_last) for v in each):
        return None
    from vggfeat.training import kernels

    return kernels
