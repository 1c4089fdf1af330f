"""3×3 convolutions on a CPU with a quarter of the multiplications: Winograd's F(4×4, 3×3) as matrix products.

A tile of 4×4 outputs sees 6×6 inputs. Both are polynomials' values in disguise, and a product of polynomials needs one
multiplication for each point that it is evaluated at: 36 for a tile and a pair of channels instead of 144 (Winograd
1980; Lavin and Gray 2016, arXiv:1509.09308). Everything here, the changes to points and back included, is a product of
matrices, which a CPU's BLAS does at its full rate, a band of tiles at a time, so that it stays in the caches.

The points are 0, ±⅔, ±3/2 and ∞, with which a convolution's error is 1.1 to 2.2 times oneDNN's (with ±½ and ±2 it is
1.6 to 2.9 times). They are their own reciprocals, and turning a kernel round takes each point to its reciprocal, which
is why one set of transformed weights serves forward and backward.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import torch
from torch import Tensor

from vggfeat.processor import multiplies_bfloat16

__all__ = ["convolve", "pays", "transformed"]

TILE = 4
POINT = 2 / 3
TURNED = [5, 3, 4, 1, 2, 0]  # where each of the points 0, p, -p, 1/p, -1/p, ∞ goes when a kernel is turned round
WORKSPACE = 1 << 18  # values for each thread in each half of the workspace, 1 MB: as many tiles at a time as fit,
LEAST = 48  # but no fewer for each thread, since for every band all weights come past once


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Bᵀ (6,6), G (6,3), Aᵀ (4,6) of the points, in float64: y = Aᵀ [(G g) · (Bᵀ d)] for six inputs d and a kernel g.

    With m(x) = x (x² - p²) (x² - q²) of the finite points and q = 1/p, row by row: Bᵀ has m(x) / (x - a), G the powers
    of a over that polynomial's value at a, Aᵀ the powers of a; for ∞ they have m(x) and the highest powers alone.
    Each row of G is scaled, and that of Bᵀ by the inverse, such that a turned kernel's row is another one's as it is.
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
def _bases(turned: bool) -> tuple[Tensor, Tensor]:
    """Bᵀ and Aᵀ in float32, for turned kernels with the points where the weights have them."""
    to_points, _, back = _matrices()
    if turned:
        to_points, back = to_points[TURNED], back[:, TURNED]
    return to_points.float().contiguous(), back.float().contiguous()


def transformed(weight: Tensor) -> Tensor:
    """Weights (K,C,3,3) at the points of a tile, G g Gᵀ, as (36,C,K)."""
    _, of_kernel, _ = _matrices()
    found = torch.einsum("ia,kcab,jb->ijck", of_kernel, weight.double(), of_kernel)
    return found.flatten(0, 1).to(weight.dtype).contiguous()


def pays(device: torch.device, dtype: torch.dtype, channels: int, outputs: int, height: int, width: int) -> bool:
    """Whether `convolve` is faster than a direct convolution, for a 3×3 kernel and maps of that size."""
    return (
        device.type == "cpu"
        and (dtype == torch.float32 or dtype == torch.bfloat16 and not multiplies_bfloat16())
        and min(channels, outputs) >= 64 < max(channels, outputs)  # below, the changes cost what the products save
        and min(height, width) >= 16
        and _products_serve()
    )


def _products_serve() -> bool:
    """Whether products of float32 matrices are fast, and not of factors rounded by the user's wish: too coarse."""
    backends: Any = torch.backends
    exact = backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
    return exact and torch.backends.mkl.is_available()  # elsewhere products of many matrices may be slow


# looked at while a graph is traced, not traced: torch.compiler.assume_constant_result without importing the compiler
_products_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]

_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """Two halves of at least `size` values each, kept for the next call: new memory comes page by page, slowly."""
    found: Tensor | None = getattr(_kept, "workspace", None)
    if found is None or found.shape[1] < size:
        with torch.inference_mode(False):  # what is made inside it can be written to there alone
            found = torch.zeros(2, size, dtype=torch.float32, device="cpu")
        _kept.workspace = found
    return found


def _room(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def convolve(
    x: Tensor, tiles: Tensor, bias: Tensor | None, pad: int, *, relu: bool = False, turned: bool = False
) -> Tensor:
    """A convolution with a 3×3 kernel and stride 1, to rounding, laid out channels_last.

    Args:
        x: (N,C,H,W), float32, or bfloat16 to be computed in float32 and rounded at the end.
        tiles: of `transformed`, float32.
        bias: (K,) or None.
        pad: zeros on each side.
        relu: apply it.
        turned: with the kernel turned round and its channels exchanged, as the gradient wants it.
    """
    to_points, back = _bases(turned)
    if turned:
        tiles = tiles.transpose(1, 2)
    n, c, h, w = x.shape
    k = tiles.shape[2]
    height, width = h + 2 * pad - 2, w + 2 * pad - 2
    down, across = -(-height // TILE), -(-width // TILE)
    fits = max(LEAST, WORKSPACE // (36 * max(c, k))) * torch.get_num_threads()
    rows = min(down, max(1, fits // across))  # of tiles, at a time
    count = rows * across
    images, out = x.permute(0, 2, 3, 1), x.new_empty(n, height, width, k)  # channels last

    band = tiles.new_zeros(TILE * rows + 2, TILE * across + 2, c)
    line, pixel, _ = band.stride()
    windows = band.as_strided((6, 6, rows, across, c), (line, pixel, TILE * line, TILE * pixel, 1))
    # one tile more where their number is even: matrices a power of two apart take each other's place in the cache
    padded = count | 1
    one, two = _workspace(36 * padded * max(c, k))
    inputs, halfway, at_points = (_room(where, 6, 6, padded * c) for where in (one, two, one))
    products, partly, outputs = _room(two, 36, padded, k), _room(one, 4, 6, padded * k), _room(two, 4, 4, padded * k)
    gathered = inputs.view(6, 6, padded, c)[:, :, :count].view(6, 6, rows, across, c)
    found = outputs.view(4, 4, padded, k)[:, :, :count].view(4, 4, rows, across, k)
    found = found.permute(2, 0, 3, 1, 4)  # as in `out`, row by row
    aside = x.new_empty(TILE * rows, TILE * across, k)

    for image, result in zip(images, out, strict=True):
        for top in range(0, height, TILE * rows):
            first, last = max(0, top - pad), min(h, top + TILE * rows + 2 - pad)
            above = first - (top - pad)
            band[:above].zero_()
            band[above : above + last - first, pad : pad + w] = image[first:last]
            band[above + last - first :].zero_()
            gathered.copy_(windows)
            torch.mm(to_points, inputs.view(6, -1), out=halfway.view(6, -1))
            torch.bmm(to_points.expand(6, 6, 6), halfway, out=at_points)
            torch.bmm(at_points.view(36, padded, c), tiles, out=products)
            torch.mm(back, products.view(6, -1), out=partly.view(4, -1))
            torch.bmm(back.expand(4, 4, 6), partly, out=outputs)
            here = result[top : top + TILE * rows]
            target = here if here.shape == aside.shape else aside  # where tiles hang over the border, it is cut off
            laid = target.view(rows, 4, across, 4, k)
            if bias is None:
                laid.copy_(found)
            else:
                torch.add(found, bias, out=laid)
            if target is aside:
                here.copy_(aside[: len(here), :width])
            if relu:
                here.relu_()
    return out.permute(0, 3, 1, 2)
