"""The trunk in ordinary operations: for second derivatives, for export, and to test against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from vggfeat.trunk.layers import doubled, lrn, padded, plain_pool
from vggfeat.trunk.plan import Plan

__all__ = ["plain"]


def plain(x: Tensor, filters: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The taps, shallow to deep, by ordinary operations.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the same plan.
        plan: what to run.
    """
    taps: list[Tensor] = []
    left = list(filters)
    x = doubled(x, filters[0])

    def conv(x: Tensor, pad: int) -> Tensor:
        weight, bias, _ = left[:3]
        del left[:3]
        return F.conv2d(padded(x, pad, plan.padding), weight, bias, padding=pad if plan.padding == "zeros" else 0)

    for stage in plan.stages:
        below, x = x, conv(x, stage.pad)
        if "conv" in stage.taps:
            taps.append(conv(below, stage.pad) if "bn" in stage.steps else x)
        for step in stage.steps:
            if step == "relu":
                x = F.relu(x)
            elif step == "lrn":
                x = lrn(x)
            elif step == "pool":
                x = plain_pool(x, plan.pooling)
            if step in stage.taps:
                taps.append(x)
    return taps
