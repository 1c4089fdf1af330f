"""Triton kernels for training on CUDA: batch normalisation with ReLU and pool, Muon's passes over filters, crops.

Training-mode batch normalisation with its ReLU reads and writes a map three times forward and five times backward
(torch: five and eight), and where a max pool follows that is part of it: the full map is not written at all, and in the
backward the winners are found again. Sums and statistics are float32, in a fixed order. `devices.triton_kernels` says
where all of this works.
"""

# Triton has no types, and its kernels want none
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vggfeat.kernels import VALUES, channels_last, columns_of, corner_of, half_map, launch

# Sums are made by PROGRAMS programs, enough to keep a GPU's memory busy, of blocks of BLOCK bytes, of which STAGES are
# on their way at a time: measured on an H200, at sizes of 2 to 65 MB
PROGRAMS, BLOCK, STAGES = 132, 8192, 4


# ── batch normalisation, ReLU and pool ────────────────────────────────────────────────────────────────────────────────


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    conv_bias: Tensor | None,
    momentum: float,
    eps: float,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    """ReLU of `F.batch_norm(..., training=True)` (Ioffe and Szegedy 2015, algorithm 1), and its 2×2 max pool.

    Args:
        x: (N,C,H,W), more than one value of each channel.
        weight: (C,) float32, as are the next four.
        bias: (C,).
        running_mean: updated in place.
        running_var: updated in place, with the unbiased variance.
        conv_bias: of the preceding convolution, where `x` lacks it: it affects only the running mean.
        momentum: of the running statistics.
        eps: added to the variance.
        pool: whether a max pool follows; H and W are even then.

    Returns:
        The result in x's type, and for the backward (4,C): scale and shift of the normalisation, mean and 1/σ.
    """
    x = channels_last(x)
    stats = weight.new_empty(4, x.shape[1])
    sums, rows = _sums(_moments, x, x), _rows(x)
    moved = running_mean, running_var, weight if conv_bias is None else conv_bias
    _over_sums(_statistics, sums, sums, x, weight, bias, *moved, stats, conv_bias is not None, momentum, eps, rows)
    y = half_map(x) if pool else torch.empty_like(x)
    _over_map(_normalise, y, x, stats, y, pool, *y.shape[2:])
    return y, stats


def batch_norm_relu_backward(grad: Tensor, x: Tensor, stats: Tensor, pool: bool = False) -> tuple[Tensor, ...]:
    """Gradients with respect to x, weight and bias, from that with respect to the result.

    Args:
        grad: as the result.
        x: of `batch_norm_relu`.
        stats: that it gave.
        pool: as there.
    """
    grad, x = channels_last(grad), channels_last(x)
    out, totals, share = torch.empty_like(x), stats.new_empty(2, x.shape[1]), 1 / max(1, _rows(x))
    block = BLOCK // 4 if pool else BLOCK  # of the gradient, and of each of four quarters of x
    sums = _sums(_moments_backward, grad, grad, x, stats, pool, *grad.shape[2:], block=block)
    _over_sums(_totals, sums, sums, totals)
    _over_map(_normalise_backward, grad, grad, x, stats, totals, out, share, pool, *grad.shape[2:])
    return out, totals[1], totals[0]


def _rows(x: Tensor) -> int:
    """Values of each channel."""
    return len(x) * x.shape[2:].numel()


def _sums(kernel: Any, x: Tensor, *arguments: object, block: int = BLOCK) -> Tensor:
    """Two sums for each channel, over some rows of the map each: (parts,2,C)."""
    channels, rows, columns = x.shape[1], _rows(x), columns_of(x.shape[1])
    blocks, lines = triton.cdiv(channels, columns), block // x.element_size() // columns
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(rows, lines)))
    out = torch.empty(parts, 2, channels, dtype=torch.float32, device=x.device)
    sizes = triton.cdiv(rows, parts), rows, channels, lines, columns
    launch(kernel, x, (parts, blocks), *arguments, out, *sizes, STAGES)
    return out


def _over_sums(kernel: Any, sums: Tensor, *arguments: object) -> None:
    parts, _, channels = sums.shape
    launch(kernel, sums, (triton.cdiv(channels, 8), 1), *arguments, parts, channels, 256, 8)


def _over_map(kernel: Any, x: Tensor, *arguments: object) -> None:
    channels, rows, columns = x.shape[1], _rows(x), columns_of(x.shape[1])
    block = VALUES // columns
    grid = triton.cdiv(rows, block), triton.cdiv(channels, columns)
    launch(kernel, x, grid, *arguments, rows, channels, block, columns)


@triton.jit
def _put(out, channel, channels, first, second):
    """Two numbers for each channel, one row below the other."""
    tl.store(out + channel, first, channel < channels)
    tl.store(out + channels + channel, second, channel < channels)


@triton.jit
def _stats(stats, channel, channels):
    there = channel < channels
    factor = tl.load(stats + channel, there, 0.0)[None, :]
    summand = tl.load(stats + channels + channel, there, 0.0)[None, :]
    mean = tl.load(stats + 2 * channels + channel, there, 0.0)[None, :]
    return factor, summand, mean, tl.load(stats + 3 * channels + channel, there, 0.0)[None, :]


@triton.jit
def _window(x, row, channel, h, w, there, channels):
    """The four values of pooled positions, and the offsets of the first and of the one below it."""
    a = corner_of(row, h, w, 2 * h, 2 * w).to(tl.int64) * channels + channel
    c = a + 2 * w * channels
    upper_left = tl.load(x + a, there, 0.0).to(tl.float32)
    upper_right = tl.load(x + a + channels, there, 0.0).to(tl.float32)
    lower_left = tl.load(x + c, there, 0.0).to(tl.float32)
    lower_right = tl.load(x + c + channels, there, 0.0).to(tl.float32)
    return upper_left, upper_right, lower_left, lower_right, a, c


@triton.jit
def _winners(first, second, third, fourth, arriving, factor, summand):
    """What of the gradient arrives at each of a window's four values through ReLU and pool."""
    first, second = first * factor + summand, second * factor + summand
    third, fourth = third * factor + summand, fourth * factor + summand
    top, bottom = tl.maximum(first, second), tl.maximum(third, fourth)
    down, right, lower_right = bottom > top, second > first, fourth > third
    arriving = tl.where(tl.maximum(top, bottom) <= 0, 0.0, arriving)
    upper, lower = tl.where(down, 0.0, arriving), tl.where(down, arriving, 0.0)
    return (
        tl.where(right, 0.0, upper),
        tl.where(right, upper, 0.0),
        tl.where(lower_right, 0.0, lower),
        tl.where(lower_right, lower, 0.0),
    )


@triton.jit
def _moments(x, out, each, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """Sums over `each` rows of x minus its first row, and of the square: without that shift, they would cancel."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pivot = tl.load(x + channel, channel < channels, 0.0).to(tl.float32)[None, :]
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)[:, None]
        there = (row < last) & (channel[None, :] < channels)
        away = tl.load(x + row.to(tl.int64) * channels + channel[None, :], there, 0.0).to(tl.float32) - pivot
        away = tl.where(there, away, 0.0)
        total += away
        square += away * away
    _put(out + tl.program_id(0) * 2 * channels, channel, channels, tl.sum(total, 0), tl.sum(square, 0))


@triton.jit
def _moments_backward(
    grad,
    x,
    stats,
    POOL: tl.constexpr,
    h,
    w,
    out,
    each,
    rows,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over `each` rows of the gradient that passes pool and ReLU, and of its product with the normalised x."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor, summand, mean, inverse = _stats(stats, channel, channels)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, each, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)[:, None]
        there = (row < last) & (channel[None, :] < channels)
        at = row.to(tl.int64) * channels + channel[None, :]
        arriving = tl.load(grad + at, there, 0.0).to(tl.float32)
        if POOL:
            x1, x2, x3, x4, _, _ = _window(x, row, channel[None, :], h, w, there, channels)
            g1, g2, g3, g4 = _winners(x1, x2, x3, x4, arriving, factor, summand)
            total += (g1 + g2) + (g3 + g4)
            away = g1 * (x1 - mean) + g2 * (x2 - mean) + (g3 * (x3 - mean) + g4 * (x4 - mean))
        else:
            value = tl.load(x + at, there, 0.0).to(tl.float32)
            through = tl.where(value * factor + summand <= 0, 0.0, arriving)
            total += through
            away = through * (value - mean)
        product += away * inverse
    _put(out + tl.program_id(0) * 2 * channels, channel, channels, tl.sum(total, 0), tl.sum(product, 0))


@triton.jit
def _both(sums, channel, parts, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The two sums of all parts."""
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        there = (part < parts) & (channel[None, :] < channels)
        at = part * 2 * channels + channel[None, :]
        first += tl.load(sums + at, there, 0.0)
        second += tl.load(sums + at + channels, there, 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _totals(sums, totals, parts, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first, second = _both(sums, channel, parts, channels, ROWS, COLUMNS)
    _put(totals, channel, channels, first, second)


@triton.jit
def _statistics(
    sums,
    x,
    weight,
    bias,
    running_mean,
    running_var,
    before,
    stats,
    LACKS: tl.constexpr,
    momentum,
    eps,
    rows,
    parts,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    away, square = _both(sums, channel, parts, channels, ROWS, COLUMNS)
    away = away / rows
    variance = tl.maximum(square / rows - away * away, 0.0, tl.PropagateNan.ALL)
    mean = tl.load(x + channel, there, 0.0).to(tl.float32) + away
    inverse = 1 / tl.sqrt_rn(variance + eps)
    factor = tl.load(weight + channel, there, 0.0) * inverse
    _put(stats, channel, channels, factor, tl.load(bias + channel, there, 0.0) - mean * factor)
    _put(stats + 2 * channels, channel, channels, mean, inverse)
    if LACKS:
        mean += tl.load(before + channel, there, 0.0)
    old = tl.load(running_mean + channel, there, 0.0)
    tl.store(running_mean + channel, old + momentum * (mean - old), there)
    old = tl.load(running_var + channel, there, 0.0)
    tl.store(running_var + channel, old + momentum * (variance * (rows / (rows - 1)) - old), there)


@triton.jit
def _normalise(x, stats, y, POOL: tl.constexpr, h, w, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor, summand, _, _ = _stats(stats, channel, channels)
    there = (row < rows) & (channel[None, :] < channels)
    at = row.to(tl.int64) * channels + channel[None, :]
    if POOL:
        x1, x2, x3, x4, _, _ = _window(x, row, channel[None, :], h, w, there, channels)
        top = tl.maximum(x1 * factor + summand, x2 * factor + summand, tl.PropagateNan.ALL)
        bottom = tl.maximum(x3 * factor + summand, x4 * factor + summand, tl.PropagateNan.ALL)
        value = tl.maximum(top, bottom, tl.PropagateNan.ALL)
    else:
        value = tl.load(x + at, there, 0.0).to(tl.float32) * factor + summand
    tl.store(y + at, tl.where(value <= 0, 0.0, value), there)


@triton.jit
def _normalise_backward(
    grad,
    x,
    stats,
    totals,
    out,
    share,
    POOL: tl.constexpr,
    h,
    w,
    rows,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor, summand, mean, inverse = _stats(stats, channel, channels)
    # means over the map of the gradient, and of its product with the normalised x
    total = tl.load(totals + channel, channel < channels, 0.0)[None, :] * share
    product = tl.load(totals + channels + channel, channel < channels, 0.0)[None, :] * share
    there = (row < rows) & (channel[None, :] < channels)
    at = row.to(tl.int64) * channels + channel[None, :]
    arriving = tl.load(grad + at, there, 0.0).to(tl.float32)
    if POOL:
        x1, x2, x3, x4, a, c = _window(x, row, channel[None, :], h, w, there, channels)
        g1, g2, g3, g4 = _winners(x1, x2, x3, x4, arriving, factor, summand)
        slope = inverse * product
        tl.store(out + a, factor * (g1 - total - (x1 - mean) * slope), there)
        tl.store(out + a + channels, factor * (g2 - total - (x2 - mean) * slope), there)
        tl.store(out + c, factor * (g3 - total - (x3 - mean) * slope), there)
        tl.store(out + c + channels, factor * (g4 - total - (x4 - mean) * slope), there)
    else:
        value = tl.load(x + at, there, 0.0).to(tl.float32)
        through = tl.where(value * factor + summand <= 0, 0.0, arriving)
        tl.store(out + at, factor * (through - total - (value - mean) * inverse * product), there)


# ── Muon ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def add_momentum(grads: list[Tensor], sums: list[Tensor], momentum: float, dtype: torch.dtype) -> Tensor:
    """Add gradients to their decayed sums, in place; returns Nesterov's steps, (n,K,h·w·C) in `dtype`.

    Args:
        grads: (K,C,h,w) float32, channels_last, all of one shape.
        sums: the same.
        momentum: decay of the sums.
        dtype: of the steps.
    """
    k, count = len(grads[0]), grads[0].numel()
    steps = torch.empty(len(grads), k, count // k, dtype=dtype, device=grads[0].device)
    for grad, total, step in zip(grads, sums, steps, strict=True):
        launch(_momentum, grad, (triton.cdiv(count, VALUES), 1), grad, total, step, momentum, count, VALUES)
    return steps


def move(filters: list[Tensor], directions: Tensor, lengths: Tensor, norms: Tensor) -> None:
    """Move filters, in place, against directions, by so much, and scale them back to their norms.

    Args:
        filters: (K,C,h,w) float32, channels_last, all of one shape.
        directions: (n,K,h·w·C), of any length.
        lengths: (n,) float32, of the steps.
        norms: (n,) float32.
    """
    count, directions = filters[0].numel(), directions.contiguous()
    parts = min(PROGRAMS, triton.cdiv(count, VALUES))
    sums = torch.empty(len(filters), parts, 3, dtype=torch.float32, device=directions.device)
    each = triton.cdiv(triton.cdiv(count, parts), VALUES) * VALUES  # aligned, so that loads are wide
    for i, (value, direction) in enumerate(zip(filters, directions, strict=True)):
        launch(_products, value, (parts, 1), value, direction, sums[i], each, count, VALUES, STAGES)
        to = lengths[i], norms[i], parts, int(triton.next_power_of_2(parts))
        launch(_move, value, (triton.cdiv(count, VALUES), 1), value, direction, sums[i], *to, count, VALUES)
    torch.autograd.graph.increment_version(filters)  # as an operation of torch's in place would


@triton.jit
def _momentum(grad, total, step, momentum, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    there = at < count
    value = tl.load(grad + at, there, 0.0)
    added = tl.load(total + at, there, 0.0) * momentum + value
    tl.store(total + at, added, there)
    tl.store(step + at, value + momentum * added, there)


@triton.jit
def _products(x, direction, out, each, count, N: tl.constexpr, STAGES: tl.constexpr):
    """Sums over `each` values: x², x · direction, direction²."""
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, count)
    own = tl.zeros((N,), tl.float32)
    mixed = tl.zeros((N,), tl.float32)
    other = tl.zeros((N,), tl.float32)
    for start in tl.range(0, each, N, num_stages=STAGES):
        at = first + start + tl.arange(0, N)
        there = at < last
        value = tl.load(x + at, there, 0.0)
        along = tl.load(direction + at, there, 0.0).to(tl.float32)
        own += value * value
        mixed += value * along
        other += along * along
    out += tl.program_id(0) * 3
    tl.store(out, tl.sum(own, 0))
    tl.store(out + 1, tl.sum(mixed, 0))
    tl.store(out + 2, tl.sum(other, 0))


@triton.jit
def _move(x, direction, sums, length, norm, parts, PARTS: tl.constexpr, count, N: tl.constexpr):
    part = tl.arange(0, PARTS)
    there = part < parts
    own = tl.sum(tl.load(sums + 3 * part, there, 0.0), 0)
    mixed = tl.sum(tl.load(sums + 3 * part + 1, there, 0.0), 0)
    other = tl.sum(tl.load(sums + 3 * part + 2, there, 0.0), 0)
    pace = tl.load(length) / tl.maximum(tl.sqrt_rn(other), 1e-20)  # without a direction nothing moves
    left = own - 2 * pace * mixed + pace * (pace * other)  # of |x - pace · direction|²
    back = tl.load(norm) / tl.maximum(tl.sqrt_rn(left), 1e-20)
    at = tl.program_id(0) * N + tl.arange(0, N)
    there = at < count
    along = tl.load(direction + at, there, 0.0).to(tl.float32)
    tl.store(x + at, (tl.load(x + at, there, 0.0) - pace * along) * back, there)


# ── crops ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def crops(pixels: Tensor, drawn: Tensor, size: int, cutout: int, zeros: bool, mean: Tensor, std: Tensor) -> Tensor:
    """Crops of images in memory, mirrored, blanked in part and normalised: (n,3,size,size) float32, channels_last.

    Args:
        pixels: (N,H,W,3) uint8.
        drawn: (6,n) int64: of each crop the image's number, its first row and column, whether it is mirrored, and the
            first row and column of the blanked square in it.
        size: of the crops; where they are beyond the image's border it is reflected.
        cutout: side of the blanked square.
        zeros: whether crops are 0 beyond the border instead.
        mean: (3,) float32, in the units of the pixels.
        std: (3,), likewise.
    """
    n, (height, width) = drawn.shape[1], pixels.shape[1:3]
    out = torch.empty(n, size, size, 3, dtype=torch.float32, device=pixels.device)
    grid = n, triton.cdiv(3 * size * size, 1024)
    launch(_crops, out, grid, pixels, drawn, mean, std, out, n, height, width, size, cutout, zeros, 1024)
    return out.permute(0, 3, 1, 2)


@triton.jit
def _reflected(line, side):
    line = side - 1 - tl.abs(side - 1 - tl.abs(line))
    return tl.minimum(tl.maximum(line, 0), side - 1)


@triton.jit
def _crops(pixels, drawn, mean, std, out, n, height, width, size, cutout, ZEROS: tl.constexpr, N: tl.constexpr):
    own = drawn + tl.program_id(0)
    number, top, left = tl.load(own), tl.load(own + n), tl.load(own + 2 * n)
    mirrored, blank_top, blank_left = tl.load(own + 3 * n), tl.load(own + 4 * n), tl.load(own + 5 * n)
    at = tl.program_id(1) * N + tl.arange(0, N)
    there = at < 3 * size * size
    channel, column, row = at % 3, at // 3 % size, at // 3 // size
    blank = (row >= blank_top) & (row < blank_top + cutout) & (column >= blank_left) & (column < blank_left + cutout)
    y = top + row
    x = left + tl.where(mirrored != 0, size - 1 - column, column)
    if ZEROS:
        blank = blank | (y < 0) | (y >= height) | (x < 0) | (x >= width)
    place = (number * height + _reflected(y, height)) * width + _reflected(x, width)
    value = tl.load(pixels + place * 3 + channel, there, 0).to(tl.float32)
    value = tl.div_rn(value - tl.load(mean + channel, there, 0.0), tl.load(std + channel, there, 1.0))
    tl.store(out + tl.program_id(0).to(tl.int64) * 3 * size * size + at, tl.where(blank, 0.0, value), there)
