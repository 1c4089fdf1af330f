"""One step of a style transfer, value and gradient: VGG-19 to relu5_1, Gatys' layers, against the plain loop.

On a GPU ours is replayed as `stylize` replays it.

python -m tests.bench.style_step [--device cuda --width 1024 --height 1024]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from tests.bench.harness import alternate, report
from tests.bench.peer import PlainLoop
from vggfeat import StyleConfig, VGGFeatures
from vggfeat.arch import parse
from vggfeat.cuda_graphs import MIN_STEPS, captured_and_checked
from vggfeat.transfer.objective import Objective
from vggfeat.transfer.stylize import _together
from vggfeat.weights import load


def convolutions(height: int, width: int) -> float:
    """FLOPs of the forward and the input gradient's convolutions."""
    total = 0
    for layer in parse("vgg19").until(["relu5_1"]):
        if layer.kind == "conv":
            area = (height // layer.stride) * (width // layer.stride)
            total += 2 * 2 * 9 * layer.in_channels * layer.channels * area
    return total


def rate(height: int, width: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of this machine's best 3×3 convolution of VGG, on the third block's maps; on a GPU one after the other."""
    x = torch.randn(1, 256, height // 4, width // 4, dtype=dtype, device=device)
    w = torch.randn(256, 256, 3, 3, dtype=dtype, device=device)
    x, w = (value.to(memory_format=torch.channels_last) for value in (x, w))
    count = 1 if device == "cpu" else 50

    def convolve() -> None:
        for _ in range(count):
            F.conv2d(x, w, padding=1)

    with torch.no_grad():
        times = alternate({"conv": convolve}, runs=15)["conv"]
    return 2 * 9 * 256 * 256 * (height // 4) * (width // 4) * count / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=384)
    args = parser.parse_args()
    size = (args.height, args.width)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    weights = load("random", "vgg19")
    content, style, image = (torch.rand(1, 3, *size).to(args.device) for _ in range(3))
    config = StyleConfig()

    def step(features: VGGFeatures) -> Callable[[], object]:
        objective = Objective(features, config, content, [style])
        evaluate = captured_and_checked(lambda image: _together(*objective.value_and_grad(image)), image, MIN_STEPS)
        return lambda: evaluate(image)

    plain = PlainLoop(
        weights.arch, weights.state, content, style, config.style_layers, config.content_layers, config.term_weights[1]
    )
    sides = {"plain loop, float32": lambda: plain.value_and_grad(image)}
    for precision in ("float32", "bfloat16"):
        for keep in ("values", "bits"):
            layers = (*config.style_layers, *config.content_layers)
            features = VGGFeatures(layers, weights=weights, precision=precision, keep=keep)
            sides[f"vggfeat, {precision}, keep={keep}"] = step(features)
        features = VGGFeatures(layers, weights="bundled", precision=precision, keep="values")
        sides[f"vggfeat, {precision}, bundled weights"] = step(features)
    times = alternate(sides, runs=9)
    report(f"style step, VGG-19 to relu5_1, {args.width}×{args.height}", times, "plain loop, float32")
    for precision in ("float32", "bfloat16"):
        speed = rate(*size, getattr(torch, precision), args.device)
        limit = convolutions(*size) / speed
        share = limit / statistics.median(times[f"vggfeat, {precision}, keep=values"])
        took = f"{limit * 1e3:.1f} ms, {share:.0%} of a step"
        print(f"  convolutions alone, {precision} at {speed / 1e12:.2f} TFLOP/s: {took}")


if __name__ == "__main__":
    main()
