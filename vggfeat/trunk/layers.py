"""What a stage is made of, forward and back: convolution, pooling, local response normalisation.

Tensors are (N,C,H,W), laid out channels_last.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from vggfeat import winograd
from vggfeat.arch import LRN
from vggfeat.devices import triton_kernels
from vggfeat.trunk import direct
from vggfeat.trunk.bits import bands, bytes_of, pack, unpack
from vggfeat.trunk.filters import Filters

# values up to here overflow in no convolution: Winograd's intermediate ones are 5000 times as large at most
SAFE = 1e33
SAFE_SQUARED = 1e18  # nor, up to here, do four or five squares added
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def stays_finite(images: Tensor, bounds: Iterable[tuple[float, float]], safe: Iterable[float]) -> bool:
    """Whether no value of normalised images is NaN or infinite, or could become so inside the network.

    oneDNN's fused ReLU turns NaN into 0, so that a network that diverged would seem to have a good loss. On other
    devices the ReLU is torch's or cuDNN's, which keep NaN, and checking would stall them: the answer there is True.

    Args:
        images: (N,3,H,W).
        bounds: of each convolution, by `filters.bounds`.
        safe: which values each may give.
    """
    if images.device.type != "cpu" or not images.numel():
        return True
    low, high = torch.aminmax(images)
    largest = max(-float(low), float(high))
    # NaN is below nothing
    return largest < SAFE and all(largest * by + shift < most for (by, shift), most in zip(bounds, safe, strict=True))


def conv(x: Tensor, filters: Filters, pad: int, *, relu: bool = False, overwrite: bool = False) -> Tensor:
    """Convolution with stride 1, with `relu` and the ReLU; it may overwrite `x`."""
    if _is_winograd(filters.weight_backward):
        return winograd.convolve(x, filters.weight_backward, filters.bias, pad, relu=relu, overwrite=overwrite)
    return direct.convolve(x, filters.weight, filters.bias, pad, relu=relu)


def conv_backward(
    grad: Tensor, weight: Tensor, pad: int, padding: str, height: int, width: int, *, overwrite: bool = False
) -> Tensor:
    """Gradient with respect to a convolution's input (before its padding) of that height and width.

    `weight` is the `weight_backward` of its `Filters`; with `overwrite` the result may take the place of `grad`.
    """
    kernel = 3 if _is_winograd(weight) else weight.shape[-1]
    copies = padding != "zeros" and pad > 0  # of the input make the padding: the gradient is that of the padded input
    pads = kernel - 1 - (0 if copies else pad)
    if _is_winograd(weight):
        full = winograd.convolve(grad, weight, None, pads, transposed=True, overwrite=overwrite)
    else:
        full = direct.convolve(grad, weight, None, pads)
    if not copies:
        return full
    if full.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return _folded(full, pad, padding)  # torch's own adds in no fixed order, and refuses
    like = full.new_empty(full.shape[0], full.shape[1], height, width)
    aten = torch.ops.aten
    fold = aten.reflection_pad2d_backward if padding == "reflect" else aten.replication_pad2d_backward
    return channels_last(fold(full, like, [pad] * 4))


def _folded(full: Tensor, pad: int, padding: str) -> Tensor:
    """The gradient of a padded map added up into that of the map, whose copies the padding is made of; is changed."""
    for axis in (2, 3):
        last = full.shape[axis] - 1
        for i in range(pad):
            to = pad if padding == "replicate" else 2 * pad - i
            full.select(axis, to).add_(full.select(axis, i))
            full.select(axis, last - to).add_(full.select(axis, last - i))
    return channels_last(full[:, :, pad:-pad, pad:-pad])


def _is_winograd(weight_backward: Tensor) -> bool:
    return weight_backward.ndim == 3


def split_bfloat16(x: Tensor, weight: Tensor, *, fused: bool = False) -> Tensor:
    """What the first convolution takes: the images, or for bfloat16 their upper and lower halves, (N,9 or more,H,W).

    Eight bits of mantissa are fewer than a photograph has, and conv1_1 takes differences of neighbours. With image and
    weight as sums of two bfloat16 numbers, x w ≈ xₕwₕ + xₗwₕ + xₕwₗ is exact to 16 bits, and 9 channels cost a
    convolution unit no more than 3: it works on 16 or more at a time. With `fused`, on CUDA, it is a kernel that torch
    cannot differentiate or trace.
    """
    if weight.dtype != torch.bfloat16 or weight.shape[1] < 9:
        return x
    if fused and x.dtype == torch.float32 and (kernels := triton_kernels(x.device, x.dtype)):
        return kernels.split_bfloat16(x, weight.shape[1])  # type: ignore[no-any-return]
    high = x.to(weight.dtype)
    low = (x - high.to(x.dtype)).to(weight.dtype)
    split, channels = torch.cat([high, low, high], dim=1), weight.shape[1]
    return split if channels == 9 else F.pad(split, (0, 0, 0, 0, 0, channels - 9))


def padded(x: Tensor, pad: int, padding: str) -> Tensor:
    """`x` padded on each side, unless with zeros, which the convolution adds."""
    return x if padding == "zeros" or not pad else F.pad(x, (pad,) * 4, mode=padding)


def pool(x: Tensor, pooling: str, keep: str, finite: bool) -> tuple[Tensor, Tensor | None]:
    """The pooled tensor and, unless `keep` is "none", a max pool's argmax: packed for "bits", else a map.

    Args:
        x: what a ReLU gave, (N,C,H,W).
        pooling: one of `arch.POOLINGS`.
        keep: see above.
        finite: whether it is known to be finite, by `stays_finite`; where a window holds NaN, its maximum is NaN, but
            its argmax any.
    """
    if pooling != "max":
        return plain_pool(x, pooling), None
    kernels = triton_kernels(x.device, x.dtype)
    if kernels and keep == "bits" and x.shape[1] % 8 == 0:
        return kernels.max_pool_packed(x)  # type: ignore[no-any-return]
    if kernels and keep != "bits":
        y, argmax = kernels.max_pool(x)
        return y, argmax if keep == "values" else None
    proven = finite and x.device.type == "cpu"  # elsewhere nobody has looked
    if keep == "none" and not proven:
        return F.max_pool2d(x, 2), None
    small = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    y = torch.empty(small, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if keep == "none":
        a, b, c, d = _quarters(as_integers(x), *small[2:])
        largest = torch.maximum(a, b, out=as_integers(y))
        torch.maximum(torch.maximum(largest, c, out=largest), d, out=largest)
        return y, None
    argmax = (
        torch.empty_like(y, dtype=argmax_type(x.dtype, x.device))
        if keep == "values"
        else torch.empty((len(x), 3, bytes_of(small)), dtype=torch.uint8, device=x.device)
    )
    for images, rows, where in bands(small, x.device):
        part = y[images, :, rows]
        down, right = _winners(x[images, :, 2 * rows.start : 2 * rows.stop], part, proven)
        if keep == "values":
            torch.add(right, down, alpha=2, out=argmax[images, :, rows])
        else:
            for plane, values in enumerate((down, right, part)):
                argmax[images, plane, where] = pack(values)
    return y, argmax


def argmax_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the map of a max pool's winners: on a CPU integers as wide as the values, which are fastest to multiply."""
    return torch.uint8 if device.type == "cuda" else INTEGERS[dtype.itemsize]


def as_integers(x: Tensor) -> Tensor:
    """The bits of floats. Those of at least 0 are in the same order, and several times as fast to compare on a CPU."""
    return x.view(INTEGERS[x.itemsize])


def _winners(x: Tensor, y: Tensor, finite: bool) -> tuple[Tensor, Tensor]:
    """Max pooling of `x` into `y`, and 1 where each window's maximum is in its lower row, and in its right column."""
    a, b, c, d = _quarters(as_integers(x), *y.shape[2:])
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    if finite:
        torch.maximum(top, bottom, out=as_integers(y))
    else:
        y.copy_(F.max_pool2d(x, 2))
    # ties go to the first, as in torch.nn.MaxPool2d; where the result is no bool, comparisons are vectorised
    down = torch.gt(bottom, top, out=torch.empty_like(top))
    right_above, right_below = torch.gt(b, a, out=top), torch.gt(d, c, out=bottom)
    return down, torch.gt(right_above, down, out=right_above).bitwise_or_(right_below.bitwise_and_(down))


def plain_pool(x: Tensor, pooling: str) -> Tensor:
    """2×2 pooling in ordinary operations, an odd last row or column left out."""
    if pooling == "max":
        return F.max_pool2d(x, 2)
    if pooling == "average":
        return F.avg_pool2d(x, 2)
    square = F.avg_pool2d(x * x, 2)
    alive = square != 0  # the root's slope at 0 is infinite; the gradient there is 0
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


def max_pool_backward(grad: Tensor, height: int, width: int, argmax: Tensor, pooled: Tensor | None) -> Tensor:
    """Each gradient goes to its window's maximum, and is dropped if that was not positive."""
    if kernels := triton_kernels(grad.device, grad.dtype):
        if pooled is not None:
            return kernels.max_pool_backward(grad, argmax, height, width, pooled)  # type: ignore[no-any-return]
        if grad.shape[1] % 8 == 0:
            return kernels.max_pool_backward_packed(grad, argmax, height, width)  # type: ignore[no-any-return]
    out = _unpooled(grad, height, width)
    for images, rows, where in bands(grad.shape, grad.device):
        part = grad[images, :, rows]
        if pooled is not None:
            winners = argmax[images, :, rows]
            down, right = winners >> 1, winners & 1
            part = as_integers(torch.ops.aten.threshold_backward(part, pooled[images, :, rows], 0))
        else:
            down, right, alive = (unpack(argmax[images, i, where], part.shape) for i in range(3))
            part = as_integers(part) * alive
        _to_winners(part, down, right, out[images, :, 2 * rows.start : 2 * rows.stop])
    return out


def _to_winners(bits: Tensor, down: Tensor, right: Tensor, out: Tensor) -> None:
    """The gradient of each window to the place of its maximum in `out`, from the gradients' bits as integers.

    These times 1 or 0 are fast to compute, and leave nothing of NaN, too, where it does not belong.
    """
    a, b, c, d = _quarters(as_integers(out), *bits.shape[2:])
    bottom = bits * down
    top = bits.sub_(bottom)
    torch.mul(top, right, out=b)
    torch.sub(top, b, out=a)
    torch.mul(bottom, right, out=d)
    torch.sub(bottom, d, out=c)


def average_pool_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """Each gradient in four equal parts."""
    out = _unpooled(grad, height, width)
    share = grad / 4
    for quarter in _quarters(out, *grad.shape[2:]):
        quarter.copy_(share)
    return out


def l2_pool_backward(grad: Tensor, height: int, width: int, values: Tensor) -> Tensor:
    """Each gradient in proportion to the `values` that were pooled."""
    out = _unpooled(grad, height, width)
    pooled = plain_pool(values, "l2")
    share = torch.where(pooled != 0, grad / (4 * pooled), 0)
    for quarter, value in zip(_quarters(out, *grad.shape[2:]), _quarters(values, *grad.shape[2:]), strict=True):
        torch.mul(share, value, out=quarter)
    return out


def _unpooled(grad: Tensor, height: int, width: int) -> Tensor:
    """Memory for the gradient of a pool's input; an odd last row or column was never pooled and gets none."""
    n, c, h, w = grad.shape
    size = (n, c, height, width)
    out = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if height > 2 * h:
        out[:, :, -1].zero_()
    if width > 2 * w:
        out[:, :, :, -1].zero_()
    return out


def _quarters(x: Tensor, h: int, w: int) -> list[Tensor]:
    """The four corners of every 2×2 window, (N,C,h,w) views in reading order."""
    return [x[:, :, i : 2 * h : 2, j : 2 * w : 2] for i in (0, 1) for j in (0, 1)]


def lrn(x: Tensor) -> Tensor:
    """Local response normalisation, in float32 or better: a CPU has no bfloat16 version of its pool."""
    return F.local_response_norm(x.to(torch.promote_types(x.dtype, torch.float32)), *LRN).to(x.dtype)


def lrn_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Of y = x / d^β with d = k + α · mean of x² over the neighbouring channels."""
    size, alpha, beta, k = LRN
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x, given = grad.to(dtype), x.to(dtype), grad.dtype

    def neighbours(v: Tensor) -> Tensor:
        reach = size // 2
        return F.avg_pool3d(F.pad(v[:, None], (0, 0, 0, 0, reach, reach)), (size, 1, 1), stride=1)[:, 0]

    d = k + alpha * neighbours(x * x)
    back = neighbours(grad * x * d ** (-beta - 1))
    return channels_last((grad * d**-beta - 2 * alpha * beta * x * back).to(given))


def channels_last(x: Tensor) -> Tensor:
    """The tensor in this layout; itself where it already is."""
    return x.contiguous(memory_format=torch.channels_last)
