"""Signs as single bits: what the backward needs to know of a ReLU, in a thirty-second of a float32's memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vggfeat.devices import triton_kernels

BAND = 1 << 20  # values at a time on a CPU, so that intermediates stay in its caches
# eight bytes of 0 or 1 times this number have their eight bits side by side in the topmost byte
_GATHER = 0x0102040810204080
_SELECT = struct.unpack("<q", bytes(1 << i for i in range(8)))[0]  # byte i has bit i
_SPREAD = 0x0101010101010101


def bands(shape: Sequence[int], device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images, of rows and of their bits' bytes, part by part of (N,C,H,W); just one except on a CPU.

    A part is some rows of an image, or as many whole images as fit in `BAND`.
    """
    n, c, h, w = shape
    together = max(1, n) if device.type != "cpu" else BAND // max(1, c * h * w)
    if together:
        for image in range(0, n, together):
            yield slice(image, min(n, image + together)), slice(0, h), slice(0, bytes_of(shape))
        return
    rows = 8 * max(1, BAND // (8 * c * w))  # so that their bits fill bytes
    for image in range(n):
        for top in range(0, h, rows):
            here = (1, c, min(rows, h - top), w)
            start = top * w * c // 8
            yield slice(image, image + 1), slice(top, top + here[2]), slice(start, start + bytes_of(here))


def bytes_of(shape: Sequence[int]) -> int:
    """How many bytes the bits of each image of values (N,C,H,W) take."""
    return -(-math.prod(shape[1:]) // 8)


def pack(x: Tensor) -> Tensor:
    """One bit for each value, set where it is not 0: (N,C,H,W) channels_last to uint8 (N, ceil(C·H·W / 8)).

    Values are bool, integers or out of a ReLU: none is below 0. NaN sets it, so that no bad step looks like a good one.
    """
    if x.device.type != "cpu":
        kernels = triton_kernels(x.device, x.dtype)
        return kernels.pack(x) if kernels else _pack(x)
    packed = x.new_empty((len(x), bytes_of(x.shape)), dtype=torch.uint8)
    for images, rows, where in bands(x.shape, x.device):
        packed[images, where] = _pack(x[images, :, rows])
    return packed


def _pack(x: Tensor) -> Tensor:
    flat = x.to(torch.bool).permute(0, 2, 3, 1).flatten(1)  # a fifth of a comparison's time
    if flat.shape[1] % 8:
        flat = F.pad(flat, (0, 8 - flat.shape[1] % 8))
    if flat.storage_offset() % 8:  # bools off an 8-byte boundary cannot be viewed as int64
        flat = flat.clone()
    return flat.view(torch.int64).mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`: uint8 (N,C,H,W), channels_last, 1 where the bit was set, else 0."""
    n, c, h, w = shape
    spread = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_SELECT).view(torch.uint8).clamp_(max=1)
    return spread[:, : c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)
