"""The walk: forward through the stages, keeping what the way back needs, and back to the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggfeat.trunk import layers
from vggfeat.trunk.bits import bands, pack, unpack
from vggfeat.trunk.plan import Plan, Stage

__all__ = ["Slope", "SlopeAt", "backward", "forward", "kept_of", "reads_relu", "reread", "there_and_back"]

SlopeAt = Callable[[int], Tensor | None]  # the gradient with respect to a tap, by its position; None where it is 0
Slope = Callable[[str, Tensor], Tensor]  # the same by the tap's name and value


# ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_of(stage: Stage, pooling: str) -> str:
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
    if kind == "relu":
        return reads_relu(stage, pooling, keep)
    return kind == "pool" and "route" in kept_of(stage, pooling) and keep == "values"


def reads_relu(stage: Stage, pooling: str, keep: str) -> bool:
    """Whether the backward reads what came out of the ReLU; if not, it makes do with what `kept_of` says as bits."""
    wants = kept_of(stage, pooling)
    as_it_is = keep == "values" or (keep == "taps" and "relu" in stage.taps)
    return keep != "none" and ("values" in wants or ("sign" in wants and as_it_is))


def forward(x: Tensor, filters: Sequence[Tensor], plan: Plan, keep: str) -> tuple[list[Tensor], list[Tensor]]:
    """The taps, shallow to deep, and what `backward` needs besides.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: "none" keeps nothing, "values" what came out of the ReLUs, "bits" single bits instead, and "taps" bits
            but for ReLUs that are taps: for callers that hold those anyway.
    """
    taps: list[Tensor] = []
    kept: list[Tensor] = []
    left = list(filters)
    sound = layers.sound(x)
    x = layers.doubled(x, filters[0]).contiguous(memory_format=torch.channels_last)
    with layers.no_autocast(x.device):
        for stage in plan.stages:
            wants = kept_of(stage, plan.pooling) if keep != "none" else ""
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
                if reads_relu(stage, plan.pooling, keep):
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
    return taps, kept


# ── backward ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        slope: of a tap, asked for once each, deepest first, when the walk gets there.
        again: the taps at `reread(plan, keep)`, by position. This and `kept` are emptied on the way, so that memory
            is free as soon as it may be.
        kept: of `forward`.
        filters: as there.
        size: height and width of the images.
        plan: as there.
        keep: as there.
    """
    left = list(filters)
    position = len(plan.names)
    flow = _Flow()

    def through(grad: Tensor | None, stage: Stage, height: int, width: int) -> Tensor | None:
        """Back through the last convolution that is left."""
        back = left.pop()
        del left[-2:]
        return (
            None if grad is None else layers.conv_back(layers.laid(grad), back, stage.pad, plan.padding, height, width)
        )

    with layers.no_autocast(filters[0].device):
        for stage, (height, width) in zip(reversed(plan.stages), reversed(plan.sizes(*size)), strict=True):
            position -= len(stage.taps)
            at = {kind: position + i for i, kind in enumerate(stage.taps)}
            wants = kept_of(stage, plan.pooling)

            def remembered(kind: str, at: dict[str, int] = at) -> Tensor:
                return again.pop(at[kind]) if kind in at else kept.pop()

            def arriving(kind: str, at: dict[str, int] = at) -> Tensor | None:
                return flow.seen(slope(at[kind])) if kind in at else None

            pooled = remembered("pool") if "route" in wants and keep == "values" else None
            route = kept.pop() if "pool" in stage.steps and "route" in wants else None
            values = packed = None
            if reads_relu(stage, plan.pooling, keep):
                values = remembered("relu")
            elif "sign" in wants:
                packed = kept.pop()

            if "pool" in stage.steps:
                flow.add(arriving("pool"))
                if flow.grad is not None:
                    if plan.pooling == "max":
                        assert route is not None
                        flow.own(layers.max_pool_back(flow.grad, height, width, route, pooled))
                    else:
                        before = layers.lrn(values) if values is not None and "lrn" in stage.steps else values
                        flow.own(layers.pool_back(flow.grad, height, width, plan.pooling, before))
                route = pooled = None
            if "lrn" in stage.steps:
                flow.add(arriving("lrn"))
                if flow.grad is not None:
                    assert values is not None
                    flow.own(layers.lrn_back(flow.grad, values))
            flow.add(arriving("relu"))
            if flow.grad is not None and (values is not None or packed is not None):
                flow.mask(values, packed)
            values = packed = None
            flow.add(arriving("bn"))
            if "bn" in stage.steps and "conv" in stage.taps:  # tapped beside the stream, by a convolution of its own
                aside = through(arriving("conv"), stage, height, width)
                flow.own(through(flow.grad, stage, height, width))
                flow.add(aside)
                del aside
            else:
                flow.add(arriving("conv"))
                flow.own(through(flow.grad, stage, height, width))
    # where values were NaN the signs say 0, and a bad step would pass for a good one; all of it ends in the deepest tap
    return flow.grad if flow.grad is None or flow.sound else torch.full_like(flow.grad, torch.nan)


def there_and_back(
    x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str
) -> tuple[dict[str, Tensor], Callable[[Slope], Tensor]]:
    """The taps by name, and the way back to the images, for a gradient that is wanted now.

    No graph holds on to what was kept: it is let go on the way, as each tap is once its gradient was asked for. The way
    back can be gone once.

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
    again = {i: found[i] for i in reread(plan, keep)}
    size, dtype = (x.shape[2], x.shape[3]), x.dtype

    def back(slope: Slope) -> Tensor:
        def at(position: int) -> Tensor:
            name = plan.ran[position]
            return slope(name, taps.pop(name))

        grad = backward(at, again, kept, filters, size, plan, keep)
        assert grad is not None  # every tap has one
        return grad.to(dtype)

    return taps, back


class _Flow:
    """The gradient on its way up: added to in place once it is ours, copied while it is somebody's tap gradient."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.ours = False
        self.sound: bool | None = None  # whether the first gradient to come, the deepest tap's, is made of numbers

    def seen(self, grad: Tensor | None) -> Tensor | None:
        if grad is not None and self.sound is None:
            self.sound = layers.sound(grad)
        return grad

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
        if values is not None:
            if self.ours:
                torch.ops.aten.threshold_backward.grad_input(self.grad, values, 0, grad_input=self.grad)
            else:
                self.own(torch.ops.aten.threshold_backward(self.grad, values, 0))
            return
        assert packed is not None
        if not self.ours:
            self.own(self.grad.clone())
        for images, rows, where in bands(self.grad.shape, self.grad.device):
            part = self.grad[images, :, rows]
            signs = unpack(packed[images, where], part.shape).to(part.dtype)
            torch.ops.aten.threshold_backward.grad_input(part, signs, 0, grad_input=part)
