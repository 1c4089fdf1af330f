"""The trainable convolution, faster on a CPU: in float32 by Winograd's algorithm, on the smallest maps as a product.

A VGG on 32×32 images spends most of its time at maps of 16×16 to 2×2, where oneDNN's convolutions are slow and their
weight gradients slower (`python -m tests.bench.training`): they block over space, of which there is little. A matrix
product has the whole batch as its rows instead. In float32 it works on tiles of 4×4 outputs (`winograd.py`), with a
quarter of the multiplications, on maps of any size with enough tiles; elsewhere, as in bfloat16, which is too coarse
for a tile's transforms, on the windows of maps of at most 4×4 laid out side by side. A map of 2×2 is a single row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggfeat import winograd
from vggfeat.devices import emulates
from vggfeat.modes import exporting, in_forward_mode, in_functorch, is_batched, needs_composite_ops, no_autocast

SMALLEST, SMALL = 2, 4  # sides: up to 2 one matrix maps a whole map to a whole map, up to 4 the windows are laid out
ROWS = 128  # with fewer, the work around the product costs more than it saves
MIN_TILES = 256  # with fewer, transforming the weights costs more than it saves


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`; a 3×3 convolution with stride and padding 1 uses `convolve`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fits = self.kernel_size == (3, 3) and self.padding == (1, 1) and self.stride == (1, 1) == self.dilation
        if fits and self.groups == 1 and self.padding_mode == "zeros":
            return convolve(input, weight, bias)
        return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.conv2d(x, weight, bias, padding=1)` gives, to rounding, by the fastest way for its type and shape.

    Args:
        x: (N,C,H,W).
        weight: (K,C,3,3).
        bias: (K,) or None.
    """
    if prefers_winograd(x, weight):
        return _WinogradConv.apply(x, weight, bias)  # type: ignore[no-any-return]
    return conv_as_product(x, weight, bias) if prefers_matmul(x) else F.conv2d(x, weight, bias, padding=1)


def prefers_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3×3 convolution of (N,C,H,W) is faster by Winograd's algorithm; by shape alone, so that runs repeat."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.ndim != 4:  # such as torch.fx's proxies
        return False
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu") or needs_composite_ops():
        return False
    n, c, height, width = x.shape
    tiles = n * -(-height // winograd.TILE) * -(-width // winograd.TILE)
    filled = n * height * width / (winograd.TILE**2 * max(tiles, 1))  # tiles hanging over the border waste work
    return tiles >= MIN_TILES and filled > 0.5 and winograd.is_supported(x.device, x.dtype, c, weight.shape[0])


class _WinogradConv(torch.autograd.Function):
    """A 3×3 convolution with padding 1 by Winograd's algorithm, and both gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return winograd.convolve(x, winograd.transformed(weight), bias, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # a second derivative is wanted, or many first ones at once
        if torch.is_grad_enabled() or in_functorch() or is_batched(grad):
            return _torchs_gradients(ctx, grad, x, weight)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = winograd.convolve(grad, winograd.transformed(weight), None, 1, transposed=True)
        if ctx.needs_input_grad[1]:
            to_weight = winograd.weight_gradient(x, grad, 1)
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum((0, 2, 3))
        return to_x, to_weight, to_bias


def _torchs_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can themselves be differentiated: torch knows the derivatives of its own convolutions."""
    sides = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # stride, padding, dilation, whether transposed, …, groups
    wanted = (*ctx.needs_input_grad, False)[:3]
    grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], *sides, wanted
    )
    return grads[: len(ctx.needs_input_grad)]


def prefers_matmul(x: Tensor) -> bool:
    """Whether a 3×3 convolution of (N,C,H,W) is faster as a product; decided by shape, for reproducible runs."""
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.ndim != 4 or in_forward_mode():
        return False
    if exporting():  # an exported graph serves any batch
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if emulates(dtype, x.device):
        return False
    side = max(x.shape[2:])
    return (
        side <= SMALLEST and x.shape[0] >= ROWS // 4 or side <= SMALL and x.shape[0] * x.shape[2] * x.shape[3] >= ROWS
    )


def conv_as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.conv2d(x, weight, bias, padding=1)` gives, as a matrix product, to rounding.

    Args:
        x: (N,C,H,W), H and W at least 1.
        weight: (K,C,3,3).
        bias: (K,) or None.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if max(x.shape[2:]) > SMALLEST:
        y: Tensor = _Windows.apply(x, weight)
    else:
        n, _, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(n, -1)  # (N,HWC)
        y = (rows @ _whole_map(weight, h, w).t()).view(n, h, w, -1).permute(0, 3, 1, 2)
    return y if bias is None else y + bias[:, None, None]


def _whole_map(weight: Tensor, h: int, w: int) -> Tensor:
    """The (HWK,HWC) matrix of a 3×3 convolution with padding 1 on maps of at most 2×2, where each output sees all."""
    taps = weight.permute(0, 2, 3, 1)  # (K,3,3,C), with adjacent channels
    # output (i,j) sees input (y,x) through tap (y-i+1, x-j+1)
    return torch.cat([taps[:, 1 - i : 1 - i + h, 1 - j : 1 - j + w].flatten(1) for i in range(h) for j in range(w)])


def _windows(x: Tensor) -> Tensor:
    """(N,C,H,W) to the rows (NHW, 9C) of its 3×3 windows, zeros beyond the border."""
    n, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()  # (N,H+2,W+2,C)
    image, row, pixel, _ = padded.stride()
    # three neighbours in a row are adjacent: each window is three runs of 3C numbers
    return padded.as_strided((n, h, w, 3, 3 * c), (image, row, pixel, row, 1)).reshape(n * h * w, 9 * c)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """The windows of (N,C,H,W) times (9C,K), as (N,K,H,W)."""
    n, _, h, w = x.shape
    return (_windows(x) @ matrix).view(n, h, w, -1).permute(0, 3, 1, 2)


class _Windows(torch.autograd.Function):
    """A 3×3 convolution with padding 1 as a product of windows and weights, like both gradients."""

    generate_vmap_rule = True  # but no jvp: with one, torch.compile could not trace it

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight.permute(0, 2, 3, 1).flatten(1).t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # a second derivative is wanted, or many first ones at once
            return _torchs_gradients(ctx, grad, x, weight)
        to_x = to_weight = None
        with no_autocast(x.device):  # a backward may run inside it though its forward did not
            if ctx.needs_input_grad[0]:
                # taps flipped, and stacked vertically so that each is copied row by row
                to_x = _product(grad, torch.cat([weight[:, :, 2 - i, 2 - j] for i in range(3) for j in range(3)]))
            if ctx.needs_input_grad[1]:
                columns = grad.permute(1, 0, 2, 3).flatten(1)  # (K,NHW)
                k, c = weight.shape[:2]
                to_weight = (columns @ _windows(x)).view(k, 3, 3, c).permute(0, 3, 1, 2)
        return to_x, to_weight
