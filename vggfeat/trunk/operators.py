"""Forward and backward of the frozen trunk as two operators of torch's, with what compilers and vmap need to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vggfeat.trunk import layers
from vggfeat.trunk.bits import pack, unpack
from vggfeat.trunk.plan import Plan, Stage

__all__ = ["reread", "trunk_backward", "trunk_forward"]


# ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(stage: Stage, pooling: str) -> str:
    """What the backward of a stage needs.

    "sign" of the ReLU, "route" of the gradient through a max pool, "sign route" for both, or the "values" that came out
    of the ReLU. A ReLU right before a max pool needs no sign unless it was tapped: the winners' own say enough.
    """
    if "relu" not in stage.steps:
        return ""
    if "lrn" in stage.steps:
        return "values route" if "pool" in stage.steps and pooling == "max" else "values"
    if "pool" not in stage.steps or pooling == "average":
        return "sign"
    if pooling == "l2":
        return "values"
    return "sign route" if "relu" in stage.taps else "route"


def reread(plan: Plan, keep: str) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, because keeping them twice is waste."""
    kinds = [(stage, kind) for stage in plan.stages for kind in stage.taps]
    return tuple(i for i, (stage, kind) in enumerate(kinds) if _rereads(stage, kind, plan.pooling, keep))


def _rereads(stage: Stage, kind: str, pooling: str, keep: str) -> bool:
    wants = _kept(stage, pooling)
    if kind == "relu":
        return "values" in wants or ("sign" in wants and keep == "values")
    return kind == "pool" and "route" in wants and keep == "values"


@torch.library.custom_op("vggfeat::trunk", mutates_args=())
def trunk_forward(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    """The trunk: taps, shallow to deep, then what the backward needs as `keep` says: "none", "bits" or "values"."""
    plan = Plan.decode(code)
    taps: list[Tensor] = []
    kept: list[Tensor] = []
    left = list(filters)
    sound = layers.sound(x)
    x = layers.doubled(x, filters[0]).contiguous(memory_format=torch.channels_last)
    with layers.no_autocast(x.device):
        for stage in plan.stages:
            wants = _kept(stage, plan.pooling) if keep != "none" else ""
            # where the value before the ReLU is a tap, the ReLU is a step of its own
            fused = "relu" in stage.steps and not {"conv", "bn"} & set(stage.taps) and sound
            below = layers.padded(x, stage.pad, plan.padding)
            pad = stage.pad if plan.padding == "zeros" else 0
            x = layers.conv(below, left[:3], pad, relu=fused)
            del left[:3]
            if "conv" in stage.taps:
                if "bn" in stage.steps:
                    taps.append(layers.conv(below, left[:3], pad))
                    del left[:3]
                else:
                    taps.append(x)
            if "bn" in stage.taps:
                taps.append(x)
            if "relu" in stage.steps:
                x = x if fused else x.relu()
                if "relu" in stage.taps:
                    taps.append(x)
                if "values" in wants or ("sign" in wants and keep == "values"):
                    kept += [x] if "relu" not in stage.taps else []
                elif "sign" in wants:
                    kept.append(pack(x))
            if "lrn" in stage.steps:
                x = layers.lrn(x)
                if "lrn" in stage.taps:
                    taps.append(x)
            if "pool" in stage.steps:
                x, route = layers.pool(x, plan.pooling, keep if "route" in wants else "none")
                kept += [] if route is None else [route]
                if "pool" in stage.taps:
                    taps.append(x)
                elif "route" in wants and keep == "values":
                    kept.append(x)
    return taps + kept


# ── backward ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("vggfeat::trunk_backward", mutates_args=())
def trunk_backward(
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
        taps: the taps at `reread(plan, keep)`.
        kept: what `trunk_forward` returned behind the taps.
        filters: as there.
        shape: of the images.
        code: as there.
        keep: as there.
    """
    plan = Plan.decode(code)
    incoming = dict(zip(present, grads, strict=True))
    again = dict(zip(reread(plan, keep), taps, strict=True))
    left, stack = list(filters), list(kept)
    position = len(plan.names)
    sizes = plan.sizes(*shape[2:])
    flow = _Flow()
    with layers.no_autocast(grads[0].device):
        for stage, (height, width) in zip(reversed(plan.stages), reversed(sizes), strict=True):
            position -= len(stage.taps)
            at = {kind: position + i for i, kind in enumerate(stage.taps)}
            wants = _kept(stage, plan.pooling)

            def arriving(kind: str, at: dict[str, int] = at) -> Tensor | None:
                return incoming.get(at.get(kind, -1))

            def remembered(kind: str, at: dict[str, int] = at) -> Tensor:
                return again[at[kind]] if kind in at else stack.pop()

            pooled = remembered("pool") if "route" in wants and keep == "values" else None
            if "pool" in stage.steps and "route" in wants:
                route = stack.pop()
            values = packed = None
            if "values" in wants or ("sign" in wants and keep == "values"):
                values = remembered("relu")
            elif "sign" in wants:
                packed = stack.pop()

            if "pool" in stage.steps:
                flow.add(arriving("pool"))
                if flow.grad is not None:
                    if plan.pooling == "max":
                        flow.own(layers.max_pool_back(flow.grad, height, width, route, pooled))
                    else:
                        before = layers.lrn(values) if values is not None and "lrn" in stage.steps else values
                        flow.own(layers.pool_back(flow.grad, height, width, plan.pooling, before))
            if "lrn" in stage.steps:
                flow.add(arriving("lrn"))
                if flow.grad is not None:
                    assert values is not None
                    flow.own(layers.lrn_back(flow.grad, values))
            flow.add(arriving("relu"))
            if flow.grad is not None and (values is not None or packed is not None):
                flow.mask(values, packed)
            flow.add(arriving("bn"))
            aside = arriving("conv")
            double = "bn" in stage.steps and "conv" in stage.taps
            if not double:
                flow.add(aside)
            raw = left.pop() if double else None
            if double:
                del left[-2:]
            back = left.pop()
            del left[-2:]
            total = (
                None if flow.grad is None else layers.conv_back(flow.grad, back, stage.pad, plan.padding, height, width)
            )
            if double and aside is not None:
                assert raw is not None
                extra = layers.conv_back(layers.laid(aside), raw, stage.pad, plan.padding, height, width)
                total = extra if total is None else total.add_(extra)
            flow.own(total)
    if flow.grad is None:
        return grads[0].new_zeros(tuple(shape))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if layers.sound(grads[-1]) else torch.full_like(flow.grad, torch.nan)


class _Flow:
    """The gradient on its way up: added to in place once it is ours, copied while it is somebody's tap gradient."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.ours = False

    def own(self, grad: Tensor | None) -> None:
        self.grad, self.ours = grad, grad is not None

    def add(self, other: Tensor | None) -> None:
        if other is None:
            return
        if self.grad is None:
            self.grad, self.ours = layers.laid(other), False
        elif self.ours:
            self.grad.add_(other)
        else:
            self.own(self.grad + other)

    def mask(self, values: Tensor | None, packed: Tensor | None) -> None:
        """Let through only where the ReLU did."""
        assert self.grad is not None
        if values is None:
            assert packed is not None
            values = unpack(packed, self.grad.shape).to(self.grad.dtype)
        if self.ours:
            torch.ops.aten.threshold_backward.grad_input(self.grad, values, 0, grad_input=self.grad)
        else:
            self.own(torch.ops.aten.threshold_backward(self.grad, values, 0))


# ── what compilers and vmap need to know of the operators ─────────────────────────────────────────────────────────────


def _fake_pack(shape: Sequence[int], x: Tensor, planes: tuple[int, ...] = ()) -> Tensor:
    n, c, h, w = shape
    return x.new_empty((n, *planes, -(-c * h * w // 8)), dtype=torch.uint8)


@trunk_forward.register_fake
def _(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    plan = Plan.decode(code)
    taps: list[Tensor] = []
    kept: list[Tensor] = []

    def like(c: int, h: int, w: int, dtype: torch.dtype = filters[0].dtype) -> Tensor:
        return torch.empty((x.shape[0], c, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)

    for stage, (h, w) in zip(plan.stages, plan.sizes(*x.shape[2:]), strict=True):
        c = plan.arch.layer(stage.conv).channels
        wants = _kept(stage, plan.pooling) if keep != "none" else ""
        taps += [like(c, h, w) for kind in stage.taps if kind != "pool"]
        if "values" in wants or ("sign" in wants and keep == "values"):
            kept += [like(c, h, w)] if "relu" not in stage.taps else []
        elif "sign" in wants:
            kept.append(_fake_pack((x.shape[0], c, h, w), x))
        if "pool" in stage.steps:
            small = (c, h // 2, w // 2)
            if "route" in wants:
                if keep == "bits":
                    kept.append(_fake_pack((x.shape[0], *small), x, (3,)))
                else:
                    kept += [like(*small, dtype=torch.int64 if x.device.type == "cpu" else torch.uint8)]
                    kept += [like(*small)] if "pool" not in stage.taps else []
            taps += [like(*small)] if "pool" in stage.taps else []
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
    found = trunk_forward(_joined(size, x, dims[0]), filters, code, keep)
    return [value.unflatten(0, (size, -1)) for value in found], [0] * len(found)


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
    found = trunk_backward(
        join(grads, dims[0]), present, join(taps, dims[2]), join(kept, dims[3]), filters, whole, code, keep
    )
    return found.unflatten(0, (size, -1)), 0
