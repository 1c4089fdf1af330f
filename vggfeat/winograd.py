"""3×3 convolutions on a CPU with a quarter of the multiplications: Winograd's F(4×4, 3×3) as matrix products.

A tile of 4×4 outputs sees 6×6 inputs. To convolve them is to multiply polynomials, which takes one multiplication for
each point that these are evaluated at (Toom and Cook): 36 for a tile and a pair of channels instead of 144 (Winograd
1980; Lavin and Gray 2016, arXiv:1509.09308). Everything here, the transforms to points and back included, is a product
of matrices, which a CPU's BLAS does at its full rate, a band of tiles at a time, so that it stays in the caches. The
same multiplications, with the output's gradient for the kernel, give the weight's gradient.

The points are 0, ±⅔, ±3/2 and ∞, with which a convolution's error is 1.1 to 2.2 times oneDNN's (with ±½ and ±2 it is
1.6 to 2.9 times). They are their own reciprocals, and flipping a kernel takes each point to its reciprocal, which is
why one set of transformed weights works forward and backward.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vggfeat.devices import emulates
from vggfeat.modes import constant_when_traced, no_autocast

TILE = 4
POINT = 2 / 3
FLIPPED = [5, 3, 4, 1, 2, 0]  # where each of the points 0, p, -p, 1/p, -1/p, ∞ goes when a kernel is flipped
# tiles of a band for each thread: a buffer of the workspace takes 1 MB with 64 channels and 9 MB with 512, with fewer
# tiles less, but every band reads all weights once
BAND = 128
SUMMED = 256  # tiles of a band for a weight's gradient, since every band reads and writes all of it once


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Bᵀ (6,6), G (6,3), Aᵀ (4,6) of the points, in float64: y = Aᵀ [(G g) · (Bᵀ d)] for six inputs d and a kernel g.

    With m(x) = x (x² - p²) (x² - q²) of the finite points and q = 1/p, row by row: Bᵀ has m(x) / (x - a), G the powers
    of a over that polynomial's value at a, Aᵀ the powers of a; for ∞ they have m(x) and the highest powers alone.
    Each row of G is scaled, and that of Bᵀ by the inverse, so that flipping a kernel just permutes the rows.
    """
    p, q = POINT, 1 / POINT
    both = p * p + q * q
    rows = [[1, 0, -both, 0, 1, 0]]
    kernel: list[list[float]] = [[1, 0, 0]]
    powers: list[list[float]] = [[1, 0, 0, 0]]
    for a, other, scale in ((p, q, p), (-p, q, p), (q, p, -q), (-q, p, -q)):
        value = 2 * a * a * (a * a - other * other) / scale
        rows.append([v / scale for v in (0, -a * other * other, -other * other, a, 1, 0)])
        kernel.append([v / value for v in (1, a, a * a)])
        powers.append([1, a, a * a, a**3])
    rows.append([0, 1, 0, -both, 0, 1])
    kernel.append([0, 0, 1])
    powers.append([0, 0, 0, 1])
    to_points, of_kernel, back = (torch.tensor(m, dtype=torch.float64, device="cpu") for m in (rows, kernel, powers))
    return to_points, of_kernel, back.T


@functools.cache
def _bases(transposed: bool) -> tuple[Tensor, Tensor]:
    """Bᵀ and Aᵀ in float32, for flipped kernels with the points in the weights' order."""
    to_points, _, back = _matrices()
    if transposed:
        to_points, back = to_points[FLIPPED], back[:, FLIPPED]
    return to_points.float().contiguous(), back.float().contiguous()


@functools.cache
def _kernel_basis(dtype: torch.dtype) -> Tensor:
    """G for both directions at once, (36,9)."""
    _, of_kernel, _ = _matrices()
    return torch.kron(of_kernel, of_kernel).to(dtype)


def transformed(weight: Tensor) -> Tensor:
    """Weights (K,C,3,3) at the points of a tile, G g Gᵀ, as (36,C,K)."""
    k, c = weight.shape[:2]
    with no_autocast(weight.device):  # a backward may run inside of it, though its forward did not
        points = _kernel_basis(weight.dtype) @ weight.permute(2, 3, 0, 1).reshape(9, -1)
    return points.view(36, k, c).transpose(1, 2)


def is_faster(device: torch.device, dtype: torch.dtype, channels: int, outputs: int, height: int, width: int) -> bool:
    """Whether `convolve` is faster than a direct convolution, for frozen weights and an image's map of that size."""
    # below, transforms cost what products save
    return max(channels, outputs) > 64 and min(height, width) >= 16 and is_supported(device, dtype, channels, outputs)


def is_supported(device: torch.device, dtype: torch.dtype, channels: int, outputs: int) -> bool:
    """Whether `convolve` can be used, and is faster with enough tiles."""
    return (
        device.type == "cpu"
        and (dtype == torch.float32 or emulates(dtype, device))
        and min(channels, outputs) >= 64
        and _products_serve()
    )


@constant_when_traced
def _products_serve() -> bool:
    """Whether float32 matrix products are fast, and exact: users may allow rounded factors, which are too coarse."""
    backends: Any = torch.backends
    exact = backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
    return exact and torch.backends.mkl.is_available()  # elsewhere products of many matrices may be slow


_kept = threading.local()


def _workspace(count: int, size: int) -> Tensor:
    """`count` buffers of `size` values, kept for the next call: new memory is slow to page in."""
    workspace: Tensor | None = getattr(_kept, "workspace", None)
    if workspace is None or workspace.numel() < count * size:
        with torch.inference_mode(False):  # inference tensors are read-only outside that mode
            workspace = torch.zeros(count * size, dtype=torch.float32, device="cpu")
        _kept.workspace = workspace
    return workspace[: count * size].view(count, size)


def _view(memory: Tensor, *shape: int) -> Tensor:
    """The beginning of a buffer in that shape."""
    return memory[: math.prod(shape)].view(shape)


@dataclass(frozen=True)
class _Bands:
    """How maps are cut into tiles, and the tiles into bands: rows of tiles of an image, or several images whole.

    Attributes:
        images: of the batch.
        down: rows of tiles of an image.
        across: tiles of a row.
        several: images of a band.
        rows: rows of tiles of a band, in each of its images.
    """

    images: int
    down: int
    across: int
    several: int
    rows: int

    @staticmethod
    def of(images: int, height: int, width: int, fits: int) -> _Bands:
        """For outputs of that size and at most `fits` tiles at a time, or one row: as few as can be, of one size."""
        down, across = -(-height // TILE), -(-width // TILE)
        several, rows = _part_size(images, fits // (down * across)), _part_size(down, fits // across)
        return _Bands(images, down, across, several, rows)

    @property
    def count(self) -> int:
        """Tiles of a band."""
        return self.several * self.rows * self.across

    @property
    def padded(self) -> int:
        """One more where their number is even: matrices a power of two apart evict each other from the cache."""
        return self.count | 1

    def __iter__(self) -> Iterator[tuple[slice, int]]:
        """The images of each band, and the output row that it begins with."""
        for first in range(0, self.images, self.several):
            for top in range(0, self.down, self.rows):
                yield slice(first, first + self.several), TILE * top


def _part_size(count: int, most: int) -> int:
    """The size of a part where `count` is cut into as few parts of at most `most` as possible; at least 1."""
    return math.ceil(count / math.ceil(count / max(1, most))) if count else 1


def _along_both_axes(matrix: Tensor, values: Tensor, halfway: Tensor, out: Tensor) -> None:
    """A matrix (m,k) along the rows and along the columns of tiles (k,k,n), to (m,m,n) by way of (k,m,n).

    Both as batches of products with long rows: as a single product of rows further apart, the first of the two
    takes half as long again.
    """
    m, k = matrix.shape
    torch.bmm(matrix.expand(k, m, k), values.transpose(0, 1), out=halfway)  # for each column, along the rows
    torch.bmm(matrix.expand(m, m, k), halfway.transpose(0, 1), out=out)


class _Inputs:
    """Reads images a band at a time, as 6×6 windows around the tiles, at their points: Bᵀ d B."""

    def __init__(self, images: Tensor, pad: int, bands: _Bands, to_points: Tensor, one: Tensor, two: Tensor) -> None:
        self.images, self.pad, self.to_points = images, pad, to_points
        c, padded = images.shape[3], bands.padded
        self.band = one.new_zeros(bands.several, TILE * bands.rows + 2, TILE * bands.across + 2, c)
        image, line, pixel, _ = self.band.stride()
        size, steps = (bands.several, bands.rows, bands.across, c), (image, TILE * line, TILE * pixel, 1)
        self.windows = self.band.as_strided((6, 6, *size), (line, pixel, *steps))
        self.inputs, self.halfway = (_view(where, 6, 6, padded * c) for where in (one, two))
        self.gathered = self.inputs.view(6, 6, padded, c)[:, :, : bands.count].view(6, 6, *size)
        self.points = self.inputs.view(36, padded, c)

    def read(self, which: slice, top: int) -> Tensor:
        """The band's (36,tiles,C), in the first buffer; read an image's bands top to bottom."""
        group, lines = self.images[which], self.band.shape[1]
        height, width = group.shape[1:3]
        band = self.band[: len(group)]
        if top:  # two lines were read before; `out` may overwrite them
            band[:, :2] = band[:, -2:]
        else:
            band[:, : self.pad].zero_()
        above = 2 if top else self.pad
        first = top + above - self.pad
        last = max(first, min(height, top + lines - self.pad))
        band[:, above : above + last - first, self.pad : self.pad + width] = group[:, first:last]
        band[:, above + last - first :].zero_()
        self.gathered.copy_(self.windows)
        _along_both_axes(self.to_points, self.inputs, self.halfway, self.inputs)
        return self.points


def convolve(
    x: Tensor,
    transformed_weight: Tensor,
    bias: Tensor | None,
    pad: int,
    *,
    relu: bool = False,
    transposed: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """A convolution with a 3×3 kernel and stride 1, to rounding, laid out channels_last.

    Args:
        x: (N,C,H,W), float32, or bfloat16 to be computed in float32 and rounded at the end.
        transformed_weight: of `transformed`, float32.
        bias: (K,) or None.
        pad: zeros on each side.
        relu: apply it.
        transposed: with the kernel flipped and its channels exchanged, as the input's gradient needs it.
        overwrite: `x` is no longer needed: the output may take its place, where it fits.

    Returns:
        (N,K,H+2·pad-2,W+2·pad-2) in the type of `x`.
    """
    to_points, back = _bases(transposed)
    if transposed:
        transformed_weight = transformed_weight.transpose(1, 2)
    images = x.permute(0, 2, 3, 1)  # (N,H,W,C)
    n, h, w, c = images.shape
    k = transformed_weight.shape[2]
    height, width = h + 2 * pad - 2, w + 2 * pad - 2
    bands = _Bands.of(n, height, width, BAND * torch.get_num_threads())
    one, two = _workspace(2, 36 * bands.padded * max(c, k))
    inputs = _Inputs(images, pad, bands, to_points, one, two)
    # each in a buffer that has been read by then: (36,tiles,K) to (6,4,tiles·K) to (4,4,tiles·K)
    products, halfway = _view(two, 36, bands.padded, k), _view(one, 6, 4, bands.padded * k)
    outputs = _view(two, 4, 4, bands.padded * k)
    size = (bands.several, bands.rows, bands.across, k)
    values = outputs.view(4, 4, bands.padded, k)[:, :, : bands.count].view(4, 4, *size)
    values = values.permute(2, 3, 0, 4, 1, 5)  # (images,rows,4,across,4,K), as they lie in `out`
    fitting = overwrite and images.shape == (n, height, width, k) and images.is_contiguous()
    shape, layout = (n, k, height, width), torch.channels_last
    result = x if fitting else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    out = result.permute(0, 2, 3, 1)
    beyond = x.new_empty(bands.several, TILE * bands.rows, TILE * bands.across, k)
    for which, top in bands:
        torch.bmm(inputs.read(which, top), transformed_weight, out=products)
        _along_both_axes(back, products.view(6, 6, -1), halfway, outputs)
        here = out[which, top : top + beyond.shape[1]]
        target = here if here.shape == beyond.shape else beyond  # where tiles hang over the border, it is cut off
        by_tile = target.view(bands.several, bands.rows, 4, bands.across, 4, k)
        if bias is None:
            by_tile.copy_(values)
        else:
            torch.add(values, bias, out=by_tile)
        if target is beyond:
            here.copy_(beyond[: here.shape[0], : here.shape[1], :width])
        if relu:
            here.relu_()
    return result


def weight_gradient(x: Tensor, grad: Tensor, pad: int) -> Tensor:
    """Gradient (K,C,3,3) of a convolution's weight: Gᵀ [Σ (Bᵀ d B) · (A y Aᵀ)] G over all tiles.

    It is the transpose of `convolve` as a map of its weight.

    Args:
        x: what was convolved, (N,C,H,W), float32.
        grad: gradient of the output, (N,K,H+2·pad-2,W+2·pad-2), float32.
        pad: zeros on each side of x.
    """
    to_points, back = _bases(False)
    n, c = x.shape[:2]
    k, height, width = grad.shape[1:]
    bands = _Bands.of(n, height, width, SUMMED)
    one, two, three = _workspace(3, 36 * bands.padded * max(c, k))
    inputs = _Inputs(x.permute(0, 2, 3, 1), pad, bands, to_points, one, two)
    # (4,4,tiles·K) to (4,6,tiles·K) to (6,6,tiles·K)
    given, halfway = _view(two, 4, 4, bands.padded * k), _view(three, 4, 6, bands.padded * k)
    at_points = _view(two, 6, 6, bands.padded * k)
    gathered = given.view(4, 4, bands.padded, k)[:, :, : bands.count]
    gathered = gathered.view(4, 4, bands.several, bands.rows, bands.across, k)
    beyond = grad.new_zeros(bands.several, TILE * bands.rows, TILE * bands.across, k)
    images = grad.permute(0, 2, 3, 1)  # (N,H,W,K)
    total = grad.new_zeros(36, k, c)
    for which, top in bands:
        points = inputs.read(which, top)  # (36,tiles,C)
        here = images[which, top : top + beyond.shape[1]]
        if here.shape != beyond.shape:  # tiles hang over the border, or the last images are fewer: zeros there
            beyond[: here.shape[0], : here.shape[1], :width] = here
            beyond[here.shape[0] :].zero_()
            beyond[:, here.shape[1] :].zero_()
            here = beyond
        by_tile = here.unflatten(2, (bands.across, 4)).unflatten(1, (bands.rows, 4))  # (images,rows,4,across,4,K)
        gathered.copy_(by_tile.permute(2, 4, 0, 1, 3, 5))
        _along_both_axes(back.T, given, halfway, at_points)
        theirs = at_points.view(36, bands.padded, k)
        total.baddbmm_(theirs[:, : bands.count].transpose(1, 2), points[:, : bands.count])
    with no_autocast(total.device):
        taps = _kernel_basis(torch.float32).T @ total.view(36, -1)
    gradient = taps.view(3, 3, k, c).permute(2, 3, 0, 1)
    return gradient.contiguous(memory_format=torch.channels_last)  # as the weights are laid out in training
