"""The walk, forward and backward, as two operators of torch's, with what compilers and vmap need to know of them.

Where nobody watches, the functions are called themselves: an operator's first call imports the compiler, for seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vggfeat.trunk.bits import bytes_of
from vggfeat.trunk.layers import argmax_type
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import kept_of
from vggfeat.trunk.walk import Walk


def forward(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    """The trunk: taps, shallow to deep, then what the backward needs as `keep` says: "none", "bits" or "values"."""
    stages = Walk(filters, Plan.decode(code), keep).forward(x)
    return [tap for taps, _ in stages for tap in taps.values()] + [
        value for _, kept in stages for value in kept.values()
    ]


def backward(
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> Tensor:
    """Gradient with respect to the normalised images of `shape`.

    Args:
        grads: gradients of some of the taps, in their shapes.
        present: which taps, as positions shallow to deep.
        taps: those at `walk.reread(plan, keep)`.
        kept: what `trunk_forward` returned behind the taps.
        filters: as there.
        shape: of the images.
        code: as there.
        keep: as there.
    """
    plan = Plan.decode(code)
    incoming = {plan.by_depth[i]: grad for i, grad in zip(present, grads, strict=True)}
    walk = Walk(filters, plan, keep)
    image_grad = walk.backward(incoming.get, walk.kept_by_stage(taps, kept), (shape[2], shape[3]))
    return grads[0].new_zeros(tuple(shape)) if image_grad is None else image_grad


trunk_forward = torch.library.custom_op("vggfeat::trunk", forward, mutates_args=())
trunk_backward = torch.library.custom_op("vggfeat::trunk_backward", backward, mutates_args=())


# ── what counters, compilers and vmap need to know of the operators ───────────────────────────────────────────────────


def _operations(shape: Sequence[int], plan: Plan, deepest: int) -> int:
    """FLOPs of the network's convolutions up to the tap at that position, each once, for images of that shape."""
    total = taps_seen = 0
    for stage, names, (h, w) in zip(plan.stages, plan.tapped, plan.sizes(*shape[2:]), strict=True):
        if taps_seen > deepest:
            break
        layer = plan.arch.layer(stage.conv)
        total += 2 * shape[0] * h * w * layer.channels * layer.in_channels * layer.kernel**2
        taps_seen += len(names)
    return total


@register_flop_formula(torch.ops.vggfeat.trunk)
def _(x: Any, filters: Any, code: str, keep: str, *, out_shape: Any = None) -> int:
    plan = Plan.decode(code)
    return _operations(x, plan, len(plan.names) - 1)


@register_flop_formula(torch.ops.vggfeat.trunk_backward)
def _(
    grads: Any,
    present: Any,
    taps: Any,
    kept: Any,
    filters: Any,
    shape: Any,
    code: str,
    keep: str,
    *,
    out_shape: Any = None,
) -> int:
    return _operations(shape, Plan.decode(code), max(present))


def _fake_pack(shape: Sequence[int], x: Tensor, planes: tuple[int, ...] = ()) -> Tensor:
    return x.new_empty((shape[0], *planes, bytes_of(shape)), dtype=torch.uint8)


@trunk_forward.register_fake
def _(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    plan = Plan.decode(code)
    taps: list[Tensor] = []
    kept: list[Tensor] = []

    def like(c: int, h: int, w: int, dtype: torch.dtype = filters[0].dtype) -> Tensor:
        return torch.empty((x.shape[0], c, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)

    for number, (stage, (h, w)) in enumerate(zip(plan.stages, plan.sizes(*x.shape[2:]), strict=True)):
        c = plan.arch.layer(stage.conv).channels
        wants = kept_of(plan, number, keep)
        small = (c, h // 2, w // 2)
        taps += [like(*small) if kind == "pool" else like(c, h, w) for kind in stage.taps]
        if "relu" in wants and "relu" not in stage.taps:
            kept.append(like(c, h, w))
        if "sign" in wants:
            kept.append(_fake_pack((x.shape[0], c, h, w), x))
        if "argmax" in wants and "pool" not in wants:
            kept.append(_fake_pack((x.shape[0], *small), x, (3,)))
        elif "argmax" in wants:
            kept.append(like(*small, dtype=argmax_type(filters[0].dtype, x.device)))
        if "pool" in wants and "pool" not in stage.taps:
            kept.append(like(*small))
    return taps + kept


@trunk_backward.register_fake
def _(
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> Tensor:
    return torch.empty(tuple(shape), dtype=grads[0].dtype, device=grads[0].device, memory_format=torch.channels_last)


def _joined(size: int, value: Tensor, dim: int | None) -> Tensor:
    """A vmapped (B,N,…) value as one batch of B·N images; the trunk treats every image alone."""
    value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


@trunk_forward.register_vmap
def _(info: Any, dims: Any, x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> tuple[list[Tensor], Any]:
    size = info.batch_size
    values = trunk_forward(_joined(size, x, dims[0]), filters, code, keep)
    each = x.shape[1] if dims[0] == 0 else len(x)  # images of each call
    return [value.unflatten(0, (size, each)) for value in values], [0] * len(values)


@trunk_backward.register_vmap
def _(
    info: Any,
    dims: Any,
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> tuple[Tensor, Any]:
    size = info.batch_size

    def join(values: Sequence[Tensor], where: Any) -> list[Tensor]:
        where = where if isinstance(where, list | tuple) else [where] * len(values)
        return [_joined(size, value, dim) for value, dim in zip(values, where, strict=True)]

    whole = [size * shape[0], *shape[1:]]
    parts = join(taps, dims[2]), join(kept, dims[3])
    grad = trunk_backward(join(grads, dims[0]), present, *parts, filters, whole, code, keep)
    return grad.unflatten(0, (size, shape[0])), 0
