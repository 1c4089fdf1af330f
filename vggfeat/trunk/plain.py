"""The trunk in ordinary operations: for second derivatives, for export, and to test against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from vggfeat.trunk.filters import Filters, by_stage
from vggfeat.trunk.layers import lrn, padded, plain_pool, split_bfloat16
from vggfeat.trunk.plan import Plan


def plain(x: Tensor, filters: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The taps, shallow to deep, by ordinary operations.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the same plan.
        plan: what to run.
    """
    taps: list[Tensor] = []
    x = split_bfloat16(x, filters[0])

    def conv(x: Tensor, own: Filters, pad: int) -> Tensor:
        pad_by_conv = pad if plan.padding == "zeros" else 0
        return F.conv2d(padded(x, pad, plan.padding), own.weight, own.bias, padding=pad_by_conv)

    for stage, (folded, unfolded) in zip(plan.stages, by_stage(plan, filters), strict=True):
        below, x = x, conv(x, folded, stage.pad)
        if "conv" in stage.taps:
            taps.append(x if unfolded is None else conv(below, unfolded, stage.pad))
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
