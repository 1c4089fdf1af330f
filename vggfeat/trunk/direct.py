"""Convolutions as the device's own library does them: oneDNN on a CPU, cuDNN on CUDA, with the ReLU on the way out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vggfeat.devices import bfloat16_is_fast, emulates, has_onednn

LARGEST = 1 << 31  # values cuDNN can count in a map; torch splits larger ones if the ReLU is not fused


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, *, relu: bool = False) -> Tensor:
    """A convolution with stride 1, and its ReLU.

    Args:
        x: (N,C,H,W).
        weight: (K,C,h,w).
        bias: (K,) or None.
        pad: zeros on each side.
        relu: apply it.
    """
    if emulates(x.dtype, x.device):
        # the same numbers: products of bfloat16 are exact in float32, and in hardware too the sum is rounded once
        wide = convolve(x.float(), weight.float(), None if bias is None else bias.float(), pad, relu=relu)
        return wide.to(x.dtype)
    if _onednn_takes(x):
        attr = "relu" if relu else "none"
        ones, pads = [1, 1], [pad, pad]
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
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and has_onednn()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


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
