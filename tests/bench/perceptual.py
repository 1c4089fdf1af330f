"""PerceptualLoss, forward and backward, against piq.ContentLoss and lpips.LPIPS: VGG-16, noise, random weights.

python -m tests.bench.perceptual [--device cuda] [--batch 4] [--size 256]        (pip install piq lpips)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import lpips
import piq
import torch
import torchvision

from tests.bench.harness import alternate, report
from vggfeat import LPIPS, PerceptualLoss


def step(loss: Callable[..., torch.Tensor], image: torch.Tensor, target: object) -> Callable[[], None]:
    def run() -> None:
        loss(image.detach().requires_grad_(), target).sum().backward()

    return run


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


if __name__ == "__main__":
    main()
