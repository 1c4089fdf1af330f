"""Which device is used, what the processor at hand does fast, and what it cannot do at all."""

from __future__ import annotations

import functools

import torch

from vggfeat.errors import InputError, first_line
from vggfeat.modes import constant_when_traced

__all__ = ["bfloat16_is_fast", "emulates", "has_onednn", "multiplies_bfloat16", "resolve"]


def resolve(device: str | torch.device) -> torch.device:
    """A device that is there, by name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: it is not.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise InputError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error
    if found.type == "meta":
        raise InputError("device 'meta' holds no values: choose cpu or cuda")
    return found


def has_onednn() -> bool:
    """Whether this torch can use oneDNN's kernels."""
    return bool(torch.backends.mkldnn.is_available())


@functools.cache
def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16 on a CPU, sm80 and up on CUDA."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return has_onednn() and any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return False


@constant_when_traced
@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 on this CPU at all; on x86 it wants AVX-512 or AVX-NE-CONVERT for that.

    Where it does not, torch's own convolutions take eight times as long as in float32, matrix products a hundred times.
    """
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has no fast matrix product for that type: torch makes it in loops there."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()
