"""Losses, forward and backward, against piq.ContentLoss, lpips.LPIPS and plain modules: noise, random weights.

Content and style of three layers of VGG-19 are what image restoration trains with; the plain side runs the network
once, as BasicSR does.

python -m tests.bench.perceptual [--device cuda] [--batch 4] [--size 256]        (pip install piq lpips)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import lpips
import piq
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from tests.bench.harness import alternate, report
from tests.bench.peer import Normalize
from vggfeat import LPIPS, CombinedLoss, PerceptualLoss, StyleLoss
from vggfeat.functional import gram

LAYERS = {"conv1_2": 2, "conv2_2": 7, "conv3_4": 16}  # and their places in torchvision's VGG-19


def step(loss: Callable[..., torch.Tensor], image: torch.Tensor, target: object) -> Callable[[], None]:
    def run() -> None:
        loss(image.detach().requires_grad_(), target).sum().backward()

    return run


def plain(net: torch.nn.Module, weights: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Content and style by modules and autograd, the network cut behind the last layer."""
    normalize = Normalize().to(next(net.parameters()).device)

    def taps(x: Tensor) -> list[Tensor]:
        x, found = normalize(x), []
        for index, module in enumerate(net.features[: max(LAYERS.values()) + 1]):
            x = x.relu() if isinstance(module, torch.nn.ReLU) else module(x)  # not in place: what is tapped stays
            found += [x] if index in LAYERS.values() else []
        return found

    def loss(image: Tensor, target: Tensor) -> Tensor:
        ours, theirs = taps(image), taps(target.detach())
        content = sum(F.l1_loss(a, b) for a, b in zip(ours, theirs, strict=True))
        style = sum(F.l1_loss(gram(a), gram(b)) for a, b in zip(ours, theirs, strict=True))
        return weights[0] * content + weights[1] * style

    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    device, shape = args.device, (args.batch, 3, args.size, args.size)
    warmup = 2 if device == "cpu" else 8  # on CUDA ours is captured at the sixth call
    torch.set_num_threads(2)
    torch.manual_seed(0)
    image, target = torch.rand(shape).to(device), torch.rand(shape).to(device)
    net = torchvision.models.vgg16()

    peer = piq.ContentLoss(net.features, layers=["15"]).to(device)
    sides = {"piq.ContentLoss, relu3_3": step(peer, image, target)}
    for precision in ("float32", "bfloat16"):
        ours = PerceptualLoss(["relu3_3"], weights=net.state_dict(), precision=precision)
        sides[f"vggfeat, relu3_3, {precision}"] = step(ours, image, target)
        sides[f"vggfeat, relu3_3, {precision}, encoded target"] = step(ours, image, ours.encode(target))
    report(
        f"PerceptualLoss([relu3_3]), {args.batch}×3×{args.size}×{args.size}",
        alternate(sides, 9, warmup),
        "piq.ContentLoss, relu3_3",
    )

    peer = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).to(device)
    sides = {"lpips.LPIPS(net='vgg')": step(peer, image, target)}
    for precision in ("float32", "bfloat16"):
        ours = LPIPS(weights=net.state_dict(), precision=precision, input_range=(-1, 1))
        sides[f"vggfeat.LPIPS, {precision}"] = step(ours, image, target)
    report(f"LPIPS, {args.batch}×3×{args.size}×{args.size}", alternate(sides, 7, warmup), "lpips.LPIPS(net='vgg')")

    net = torchvision.models.vgg19().requires_grad_(False).to(device)
    sides = {"plain modules": step(plain(net, [1.0, 100.0]), image, target)}
    for precision in ("float32", "bfloat16"):
        options = {"criterion": "l1", "weights": net.state_dict(), "precision": precision}
        content, style = PerceptualLoss([*LAYERS], **options), StyleLoss([*LAYERS], **options)
        sides[f"vggfeat.CombinedLoss, {precision}"] = step(CombinedLoss([content, style], [1.0, 100.0]), image, target)
    report(f"content and style, {args.batch}×3×{args.size}×{args.size}", alternate(sides, 7, warmup), "plain modules")


if __name__ == "__main__":
    main()
