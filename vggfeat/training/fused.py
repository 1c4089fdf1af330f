"""A network as it is trained on CUDA: batch normalisation, ReLU and max pool in one, by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vggfeat import kernels
from vggfeat.network import VGG
from vggfeat.training.kernels import batch_norm_relu, batch_norm_relu_backward


class Fused(nn.Module):
    """Computes what `net` does, to rounding, gradients and running statistics included.

    Before a batch normalisation in training mode, a convolution's bias is left out: it affects only the running
    mean. Images are (N,3,H,W), channels_last, on CUDA, as are the filters.
    """

    def __init__(self, net: VGG) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(N,3,H,W) to logits (N,num_classes)."""
        modules = list(self.net.features)
        while modules:
            module = modules.pop(0)
            if modules and isinstance(modules[0], nn.BatchNorm2d) and modules[0].training:
                assert isinstance(module, nn.Conv2d)
                x = F.conv2d(x, module.weight, None, padding=module.padding)
                norm, _ = modules.pop(0), modules.pop(0)  # the ReLU
                pool = bool(modules) and isinstance(modules[0], nn.MaxPool2d) and not any(s % 2 for s in x.shape[2:])
                if pool:
                    modules.pop(0)
                x = _BatchNormRelu.apply(x, norm.weight, norm.bias, norm, module.bias, pool)
            elif isinstance(module, nn.MaxPool2d):
                x = _MaxPool.apply(x)
            else:
                x = module(x)
        return self.net.classifier(self.net.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class _BatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, conv_bias: Tensor, pool: bool
    ) -> Tensor:
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        moved = norm.running_mean, norm.running_var
        y, stats = batch_norm_relu(x, weight, bias, *moved, conv_bias, norm.momentum, norm.eps, pool)
        ctx.save_for_backward(x, stats)
        ctx.pool = pool
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stats = ctx.saved_tensors
        return (*batch_norm_relu_backward(grad, x, stats, ctx.pool), None, None, None)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, argmax = kernels.max_pool(x)
        ctx.save_for_backward(argmax)
        ctx.size = x.shape[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (argmax,) = ctx.saved_tensors
        return kernels.max_pool_backward(grad, argmax, *ctx.size)
