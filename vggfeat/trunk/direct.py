"""Convolutions as the device's own library does them: oneDNN on a CPU, cuDNN on CUDA, with the ReLU on the way out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from vggfeat.devices import bfloat16_is_fast, emulates, has_onednn

LARGEST = 1 << 31  # values cuDNN can count in a map; torch splits larger ones if the ReLU is not fused
SMALL_MAP = 1024  # positions; on a larger map the convolution takes many times as long as reordering its weight
LARGE_WEIGHT = 9 << 16  # values: of a 3×3 kernel for 256 channels in and out

_reordered = WeakTensorKeyDictionary()  # by weight, the same in oneDNN's own layout


def benefits_from_reordering(weight: Tensor) -> bool:
    """Whether to `reorder` a frozen 3×3 weight that is used on small maps, and is not yet."""
    return (
        weight.numel() >= LARGE_WEIGHT
        and weight.device.type == "cpu"
        and _onednn_takes(weight)
        and not emulates(weight.dtype, weight.device)
        and weight not in _reordered
    )


def reorder(weight: Tensor) -> None:
    """Keep a 3×3 weight in oneDNN's own layout too, as long as it lives.

    Otherwise oneDNN reorders it at every use, which on a map of 4×4 takes up to twice as long as convolving.
    """
    ones, images = [1, 1], [1, weight.shape[1], 8, 8]  # the layout is the same for other sizes, or it is reordered then
    _reordered[weight] = torch.ops.mkldnn._reorder_convolution_weight(weight, ones, ones, ones, 1, images)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, *, relu: bool = False) -> Tensor:
    """A convolution with stride 1, and its ReLU.

    Args:
        x: (N,C,H,W).
        weight: (K,C,h,w).
        bias: (K,) or None.
        pad: zeros on each side.
        relu: apply it.

    Returns:
        (N,K,H+2·pad-h+1,W+2·pad-w+1).
    """
    if emulates(x.dtype, x.device):
        # the same numbers: products of bfloat16 are exact in float32, and in hardware too the sum is rounded once
        wide = convolve(x.float(), weight.float(), None if bias is None else bias.float(), pad, relu=relu)
        return wide.to(x.dtype)
    if _onednn_takes(x):
        attr = "relu" if relu else "none"
        ones, pads = [1, 1], [pad, pad]
        weight = _reordered.get(weight, weight)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pads, ones, ones, 1, attr, [], "")  # type: ignore[no-any-return]
    if relu and _cudnn_takes(x, weight):
        # unfused, bias and ReLU pass over the map twice each
        try:
            return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, [1, 1], [pad, pad], [1, 1], 1)  # type: ignore[no-any-return]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it has no such kernel for this device, type or shape
            pass
    y = F.conv2d(x, weight, bias, padding=pad)
    return y.relu_() if relu else y


def _onednn_takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and has_onednn()


def _cudnn_takes(x: Tensor, weight: Tensor) -> bool:
    values = len(x) * x.shape[2] * x.shape[3] * max(weight.shape[:2])
    return (
        x.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()
        and not (torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled())  # it ignores both
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bfloat16_is_fast(x.device)))
        and 0 < values < LARGEST
    )
