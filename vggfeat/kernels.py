"""Triton kernels for CUDA that do in few passes over memory what torch's operations need many for.

Max pooling, forward and backward in one pass each (a dozen with torch's), and the same with the argmax as bits
(`trunk/bits.py`); distances of features with their gradients, in one; products added to a gradient on its way through a
ReLU; the first convolution's input in bfloat16. Those that only training needs are in
`training/kernels.py`. `devices.triton_kernels` says where they work.

Maps are (N,C,H,W), float32 or bfloat16, and laid out channels_last; other layouts are copied.
"""

# Triton has no types, and its kernels want none
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, VALUES = 128, 2048  # per block: adjacent channels, and values in total


def columns_of(channels: int) -> int:
    """Adjacent channels of a block."""
    return min(CHANNELS, int(triton.next_power_of_2(channels)))


def empty_map(size: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map of that size, channels_last."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """The map in the layout that kernels read; itself where it already is."""
    return x.contiguous(memory_format=torch.channels_last)


def launch(kernel: Any, on: Tensor, grid: tuple[int, int], *arguments: object) -> None:
    """Run a kernel on the device of a tensor."""
    if all(grid):  # skip empty maps
        with torch.cuda.device_of(on):
            kernel[grid](*arguments)


# ── max pooling ───────────────────────────────────────────────────────────────────────────────────────────────────────


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2×2 max pooling, an odd last row or column left out.

    Returns:
        The pooled map (N,C,H//2,W//2), and its argmax: uint8, 2 · row + column in the window.
    """
    x = channels_last(x)
    y = half_map(x)
    argmax = torch.empty_like(y, dtype=torch.uint8)
    _run_pool(_max_pool, x, y, x, y, argmax)
    return y, argmax


def max_pool_backward(grad: Tensor, argmax: Tensor, height: int, width: int, pooled: Tensor | None = None) -> Tensor:
    """The gradient of each window at its maximum, and 0 elsewhere; where `pooled` is given, only where that is above 0.

    Args:
        grad: (N,C,H//2,W//2).
        argmax: of `max_pool`.
        height: H.
        width: W.
        pooled: of `max_pool`, or None.
    """
    grad, argmax = channels_last(grad), channels_last(argmax)
    pooled = None if pooled is None else channels_last(pooled)
    out = _unpooled(grad, height, width)
    masked = pooled is not None
    _run_pool(_max_pool_backward, out, grad, grad, pooled if masked else argmax, argmax, out, masked)
    return out


def half_map(x: Tensor) -> Tensor:
    """Memory for the pooled map."""
    n, channels, height, width = x.shape
    return empty_map((n, channels, height // 2, width // 2), x)


def _unpooled(grad: Tensor, height: int, width: int) -> Tensor:
    """Memory for the gradient of a pool's input, 0 where kernels do not write: in an odd last row or column."""
    n, channels, h, w = grad.shape
    out = empty_map((n, channels, height, width), grad)
    return out if (height, width) == (2 * h, 2 * w) else out.zero_()


def _run_pool(kernel: Any, large: Tensor, small: Tensor, *arguments: object) -> None:
    n, channels, h, w = small.shape
    columns = columns_of(channels)
    rows = VALUES // columns
    grid = triton.cdiv(n * h * w, rows), triton.cdiv(channels, columns)
    launch(kernel, large, grid, *arguments, n * h * w, h, w, *large.shape[2:], channels, rows, columns)


@triton.jit
def corner_of(place, h, w, height, width):
    """The pixel of the map where the window of a pooled position begins."""
    row = place // w
    return (row // h * height + row % h * 2) * width + place % w * 2


@triton.jit
def _windows(places, h, w, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block's windows: their offsets in the pooled map, which of them exist, and where each begins in the map."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    corner = corner_of(place, h, w, height, width)
    there = (place < places) & (channel < channels)
    return place.to(tl.int64) * channels + channel, there, corner.to(tl.int64) * channels + channel


@triton.jit
def _winners(x, a, there, width, channels):
    """The maxima of the windows that begin at `a`, and whether each is in the lower row and in the right column."""
    c = a + width * channels
    upper_left, upper_right = tl.load(x + a, there, 0.0), tl.load(x + a + channels, there, 0.0)
    lower_left, lower_right = tl.load(x + c, there, 0.0), tl.load(x + c + channels, there, 0.0)
    top = tl.maximum(upper_left, upper_right, tl.PropagateNan.ALL)
    bottom = tl.maximum(lower_left, lower_right, tl.PropagateNan.ALL)
    # ties go to the first, as in torch.nn.MaxPool2d
    down = bottom > top
    right = tl.where(down, lower_right > lower_left, upper_right > upper_left)
    return tl.maximum(top, bottom, tl.PropagateNan.ALL), down, right


@triton.jit
def _to_winners(value, winner, out, a, there, width, channels):
    """Write each value at its window's maximum, 0 elsewhere."""
    c = a + width * channels
    tl.store(out + a, tl.where(winner == 0, value, 0.0), there)
    tl.store(out + a + channels, tl.where(winner == 1, value, 0.0), there)
    tl.store(out + c, tl.where(winner == 2, value, 0.0), there)
    tl.store(out + c + channels, tl.where(winner == 3, value, 0.0), there)


@triton.jit
def _max_pool(x, y, argmax, places, h, w, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets, there, a = _windows(places, h, w, height, width, channels, ROWS, COLUMNS)
    maximum, down, right = _winners(x, a, there, width, channels)
    tl.store(y + offsets, maximum, there)
    tl.store(argmax + offsets, tl.where(down, 2, 0) + tl.where(right, 1, 0), there)


@triton.jit
def _max_pool_backward(
    grad,
    pooled,
    argmax,
    out,
    MASKED: tl.constexpr,
    places,
    h,
    w,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    offsets, there, a = _windows(places, h, w, height, width, channels, ROWS, COLUMNS)
    value, winner = tl.load(grad + offsets, there), tl.load(argmax + offsets, there)
    if MASKED:
        value = tl.where(tl.load(pooled + offsets, there) <= 0, 0.0, value)
    _to_winners(value, winner, out, a, there, width, channels)


# ── signs as single bits ──────────────────────────────────────────────────────────────────────────────────────────────


def pack(x: Tensor) -> Tensor:
    """One bit for each value, set where it is not 0: uint8 (N, ceil(C·H·W / 8)), as by `trunk.bits.pack`."""
    x = channels_last(x)
    out = torch.empty(len(x), triton.cdiv(x.shape[1:].numel(), 8), dtype=torch.uint8, device=x.device)
    _run_bits(_pack, x, out)
    return out


def mask(grad: Tensor, bits: Tensor) -> None:
    """Set to 0, in place, where the bit of `pack` is not set; `grad` must be laid out channels_last."""
    assert grad.is_contiguous(memory_format=torch.channels_last)
    _run_bits(_mask, grad, bits)


def _run_bits(kernel: Any, x: Tensor, bits: Tensor) -> None:
    each, count, block = x.shape[1:].numel(), bits.shape[1], VALUES // 8
    blocks = triton.cdiv(count, block)
    launch(kernel, x, (len(x) * blocks, 1), x, bits, each, count, blocks, block)


def max_pool_packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `max_pool` of a multiple of 8 channels, with the argmax as bits.

    Returns:
        The pooled map (N,C,H//2,W//2), and uint8 (N,3,bytes), each as by `pack`: whether the maximum is in the lower
        row, whether in the right column, and whether it is positive.
    """
    x = channels_last(x)
    y = half_map(x)
    planes = torch.empty(len(x), 3, y.shape[1:].numel() // 8, dtype=torch.uint8, device=x.device)
    _run_pool(_max_pool_packed, x, y, x, y, planes)
    return y, planes


def max_pool_backward_packed(grad: Tensor, planes: Tensor, height: int, width: int) -> Tensor:
    """As `max_pool_backward` where what was pooled is positive, with the bits of `max_pool_packed`."""
    grad = channels_last(grad)
    out = _unpooled(grad, height, width)
    _run_pool(_max_pool_backward_packed, out, grad, grad, planes, out)
    return out


@triton.jit
def _pack(x, out, each, count, blocks, BYTES: tl.constexpr):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    byte = (tl.program_id(0) % blocks).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    value = tl.load(x + image * each + at, (byte[:, None] < count) & (at < each), 0.0)
    tl.store(out + image * count + byte, tl.sum((value != 0).to(tl.int32) << bit, 1), byte < count)


@triton.jit
def _mask(grad, bits, each, count, blocks, BYTES: tl.constexpr):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    byte = (tl.program_id(0) % blocks).to(tl.int64) * BYTES + tl.arange(0, BYTES)[:, None]
    bit = tl.arange(0, 8)[None, :]
    at = byte * 8 + bit
    there = (byte < count) & (at < each)
    packed = tl.load(bits + image * count + byte, byte < count, 0).to(tl.int32)
    here = grad + image * each + at
    tl.store(here, tl.where((packed >> bit) & 1 != 0, tl.load(here, there), 0.0), there)


@triton.jit
def _packed_windows(places, h, w, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `_windows`, with eight channels as a last dimension, and the offsets of their bits in the first plane."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    corner = corner_of(place, h, w, height, width)
    there = (place < places) & (byte < channels // 8)
    image = place // (h * w)
    bits = (image.to(tl.int64) * 3 * h * w + place % (h * w)) * (channels // 8) + byte
    channel = byte[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    offsets = place.to(tl.int64)[:, :, None] * channels + channel
    return (
        bits,
        there,
        offsets,
        there[:, :, None] & (channel < channels),
        corner.to(tl.int64)[:, :, None] * channels + channel,
    )


@triton.jit
def _max_pool_packed(x, y, planes, places, h, w, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    bits, exists, offsets, there, a = _packed_windows(places, h, w, height, width, channels, ROWS, COLUMNS)
    maximum, down, right = _winners(x, a, there, width, channels)
    tl.store(y + offsets, maximum, there)
    bit = tl.arange(0, 8)[None, None, :]
    plane = h * w * (channels // 8)
    tl.store(planes + bits, tl.sum(down.to(tl.int32) << bit, 2), exists)
    tl.store(planes + bits + plane, tl.sum(right.to(tl.int32) << bit, 2), exists)
    tl.store(planes + bits + 2 * plane, tl.sum((maximum != 0).to(tl.int32) << bit, 2), exists)


@triton.jit
def _max_pool_backward_packed(
    grad, planes, out, places, h, w, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    bits, exists, pooled, there, a = _packed_windows(places, h, w, height, width, channels, ROWS, COLUMNS)
    bit = tl.arange(0, 8)[None, None, :]
    plane = h * w * (channels // 8)
    down = (tl.load(planes + bits, exists, 0).to(tl.int32)[:, :, None] >> bit) & 1
    right = (tl.load(planes + bits + plane, exists, 0).to(tl.int32)[:, :, None] >> bit) & 1
    alive = (tl.load(planes + bits + 2 * plane, exists, 0).to(tl.int32)[:, :, None] >> bit) & 1
    value = tl.where(alive != 0, tl.load(grad + pooled, there, 0.0), 0.0)
    _to_winners(value, 2 * down + right, out, a, there, width, channels)


# ── distances ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CRITERIA = ("mse", "l1", "charbonnier")  # by number, in the kernel
MOST_CHANNELS = 1024  # of a position, which a block holds whole


def distance_and_gradient(
    ours: Tensor,
    theirs: Tensor,
    criterion: str,
    charbonnier_eps: float,
    unit_eps: float | None,
    channel_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `functional.distance_and_gradient` without a mask.

    Args:
        ours: (N,C,h,w), at most `MOST_CHANNELS` channels.
        theirs: (N,C,h,w) or (1,C,h,w).
        criterion: one of `CRITERIA`.
        charbonnier_eps: its ε.
        unit_eps: the ε of bringing both to unit length first, None for not at all.
        channel_weights: (C,1,1) float32, or None.

    Returns:
        The distances (N,) in float32, and the gradient (N,C,h,w) in the type of `ours`.
    """
    ours, theirs = channels_last(ours), channels_last(theirs)
    n, channels, places = len(ours), ours.shape[1], ours.shape[2:].numel()
    columns = int(triton.next_power_of_2(channels))
    rows = max(1, VALUES // columns)
    blocks, gradient = triton.cdiv(places, rows), torch.empty_like(ours)
    sums = torch.zeros(n, blocks, dtype=torch.float32, device=ours.device)
    share = 1 / max(1, channels * places)
    unit, weighted = unit_eps is not None, channel_weights is not None
    weights = channel_weights.contiguous() if channel_weights is not None else sums  # which is not read then
    options = CRITERIA.index(criterion), unit, weighted, len(theirs) == 1
    eps = charbonnier_eps, unit_eps or 0.0
    sizes = share, places, blocks, channels, rows, columns
    launch(_distance, ours, (n * blocks, 1), ours, theirs, weights, gradient, sums, *options, *eps, *sizes)
    return sums.sum(1).mul_(share), gradient


@triton.jit
def _distance(
    ours,
    theirs,
    weights,
    gradient,
    sums,
    CRITERION: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
    charbonnier_eps,
    unit_eps,
    share,
    places,
    blocks,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    place = block % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    there = (place < places) & (channel < channels)
    image = (block // blocks).to(tl.int64) * places
    at = (image + place) * channels + channel
    a = tl.load(ours + at, there, 0.0).to(tl.float32)
    b = tl.load(theirs + (place.to(tl.int64) * channels + channel if SHARED else at), there, 0.0).to(tl.float32)
    if UNIT:
        factor = 1 / tl.sqrt_rn(tl.sum(a * a, 1) + unit_eps)[:, None]
        a *= factor
        b *= (1 / tl.sqrt_rn(tl.sum(b * b, 1) + unit_eps))[:, None]
    difference = a - b
    if CRITERION == 0:
        value, slope = difference * difference, 2 * difference
    elif CRITERION == 1:
        value = tl.abs(difference)
        slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    else:
        root = tl.sqrt_rn(difference * difference + charbonnier_eps * charbonnier_eps)
        value, slope = difference * difference / (root + charbonnier_eps), difference / root
    if WEIGHTED:
        weight = tl.load(weights + channel, channel < channels, 0.0)
        value *= weight
        slope *= weight
    tl.store(sums + block, tl.sum(tl.sum(value, 1), 0))
    if UNIT:  # back through y = F r: r (g - y ⟨y, g⟩)
        slope = (slope - a * tl.sum(a * slope, 1)[:, None]) * factor
    tl.store(gradient + at, slope * share, there)


# ── products, added to a gradient ─────────────────────────────────────────────────────────────────────────────────────


def add_product(x: Tensor, matrix: Tensor, onto: Tensor | None, *, masked: bool, precision: str = "ieee") -> Tensor:
    """Add x · matrix, at each position, to a gradient in place, and take that back through the ReLU that gave x.

    Args:
        x: (N,C,h,w).
        matrix: (C,C), in the type of x.
        onto: (N,C,h,w) in the type of x, laid out channels_last; None for 0, in new memory.
        masked: set it to 0 where x is not above 0.
        precision: of products of float32: "ieee", "tf32", or "tf32x3", three of these, which come to that of float32.

    From sm80 on; before, bfloat16 does not compile or is slow.
    """
    x, matrix = channels_last(x), matrix.contiguous()
    out = torch.empty_like(x) if onto is None else onto
    assert out.is_contiguous(memory_format=torch.channels_last)
    places, channels = x.numel() // x.shape[1], x.shape[1]
    columns = min(64, max(16, int(triton.next_power_of_2(channels))))  # a product of blocks takes 16 at least
    # measured on an H200 at 64 to 512 channels; loads under way take 48 kB, and consumer GPUs have 99
    rows, inner, stages = (64, 64, 3) if x.dtype == torch.bfloat16 else (128, 32, 2)
    inner = min(inner, columns)
    grid = triton.cdiv(places, rows) * triton.cdiv(channels, columns), 1
    how = onto is not None, masked, precision
    sizes = places, channels, rows, columns, inner, stages
    launch(_add_product, x, grid, x, matrix, out, *how, *sizes)
    return out


@triton.jit
def _add_product(
    x,
    matrix,
    out,
    ONTO: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    places,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    parts = tl.cdiv(channels, COLUMNS)
    place = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (place < places) & (channel < channels)
    first = place.to(tl.int64) * channels
    if ONTO:  # asked for early, so that it arrives in the meantime
        before = tl.load(out + first + channel, there, 0.0)
    if MASKED:
        own = tl.load(x + first + channel, there, 0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, channels, INNER, num_stages=STAGES):
        across = start + tl.arange(0, INNER)
        value = tl.load(x + first + across[None, :], (place < places) & (across[None, :] < channels), 0.0)
        within = (across[:, None] < channels) & (channel < channels)
        factor = tl.load(matrix + across[:, None] * channels + channel, within, 0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    if ONTO:
        total += before.to(tl.float32)
    if MASKED:
        total = tl.where(own <= 0, 0.0, total)
    tl.store(out + first + channel, total, there)


# ── the first convolution's input ─────────────────────────────────────────────────────────────────────────────────────


def split_bfloat16(x: Tensor, channels: int) -> Tensor:
    """Upper, lower and again upper halves of images (N,3,H,W) float32, and zeros: (N,channels,H,W) bfloat16."""
    x = channels_last(x)
    out = empty_map((len(x), channels, *x.shape[2:]), x, torch.bfloat16)
    launch(_split, x, (triton.cdiv(out.numel(), VALUES), 1), x, out, out.numel(), channels, VALUES)
    return out


@triton.jit
def _split(x, out, count, CHANNELS: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    channel = at % CHANNELS
    value = tl.load(x + at // CHANNELS * 3 + channel % 3, (at < count) & (channel < 9), 0.0)
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + at, tl.where((channel >= 3) & (channel < 6), low, high), at < count)
