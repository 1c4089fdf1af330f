"""The plain loop that the well-known style-transfer tools run, written down once to measure against.

As in PyTorch's tutorial and neural-style-pt: float32, contiguous, autograd, a loss module after each layer that has
one, frozen parameters, the network cut behind the last loss, torch.optim.LBFGS with a history of 100, the image clamped
only when it is saved. The terms are the scale-free ones of `vggfeat.transfer.objective`, so that both sides minimise
the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vggfeat.arch import Arch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class GramTerm(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.target, self.loss = weight, None, 0.0

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.view(n * c, h * w)
        gram = torch.mm(flat, flat.t()) / (n * c * h * w)
        if self.target is None:
            self.target = gram.detach()
        self.loss = self.weight * (gram - self.target).square().sum() / self.target.square().sum()
        return x


class ContentTerm(GramTerm):
    def forward(self, x: Tensor) -> Tensor:
        if self.target is None:
            self.target = x.detach()
        self.loss = self.weight * (x - self.target).square().sum() / self.target.square().sum()
        return x


class PlainLoop:
    def __init__(
        self,
        arch: Arch,
        state: Mapping[str, Tensor],
        content: Tensor,
        style: Tensor,
        style_layers: Sequence[str],
        content_layers: Sequence[str],
        content_weight: float,
    ) -> None:
        self.net = nn.Sequential(Normalize())
        device = content.device
        self.terms: list[GramTerm] = []
        styles, contents = [], []
        for layer in arch.until([*style_layers, *content_layers]):
            if layer.kind == "conv":
                conv = nn.Conv2d(layer.in_channels, layer.channels, 3, padding=1)
                conv.weight.data = state[f"features.{layer.index}.weight"].clone()
                conv.bias.data = state[f"features.{layer.index}.bias"].clone()
                self.net.append(conv)
            else:
                self.net.append(nn.ReLU() if layer.kind == "relu" else nn.MaxPool2d(2))
            if layer.name in style_layers:
                styles.append(GramTerm(1 / len(style_layers)))
                self.net.append(styles[-1])
            if layer.name in content_layers:
                contents.append(ContentTerm(content_weight / len(content_layers)))
                self.net.append(contents[-1])
        self.net.requires_grad_(False).eval().to(device)
        with torch.no_grad():
            self.net(style)
            for term in contents:
                term.target = None
            self.net(content)  # sets the contents' targets, the styles keep theirs
        self.terms = [*styles, *contents]

    def loss(self, image: Tensor) -> Tensor:
        self.net(image)
        return sum(term.loss for term in self.terms)

    def value_and_grad(self, image: Tensor) -> tuple[Tensor, Tensor]:
        image = image.detach().requires_grad_()
        loss = self.loss(image)
        loss.backward()
        return loss.detach(), image.grad
