"""One step of a style transfer, value and gradient: VGG-19 to relu5_1, Gatys' layers, 512×384, against the plain loop.

python -m tests.bench.style_step
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.bench.harness import alternate, report
from tests.bench.peer import PlainLoop
from vggfeat import StyleConfig, VGGFeatures
from vggfeat.arch import parse
from vggfeat.transfer.objective import Objective
from vggfeat.weights import load


def convolutions(height: int, width: int, dtype: torch.dtype) -> float:
    """FLOPs of the forward and the input gradient's convolutions."""
    total = 0
    for layer in parse("vgg19").until(["relu5_1"]):
        if layer.kind == "conv":
            area = (height // layer.stride) * (width // layer.stride)
            total += 2 * 2 * 9 * layer.in_channels * layer.channels * area
    return total


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's best 3×3 convolution of VGG."""
    x = torch.randn(1, 256, 96, 128, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        times = alternate({"conv": lambda: F.conv2d(x, w, padding=1)}, runs=15)["conv"]
    return 2 * 9 * 256 * 256 * 96 * 128 / sorted(times)[len(times) // 2]


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    weights = load("random", "vgg19")
    content, style, image = (torch.rand(1, 3, 384, 512) for _ in range(3))
    config = StyleConfig()
    plain = PlainLoop(
        weights.arch, weights.state, content, style, config.style_layers, config.content_layers, config.term_weights[1]
    )
    sides = {"plain loop, float32": lambda: plain.value_and_grad(image)}
    for precision in ("float32", "bfloat16"):
        for keep in ("values", "bits"):
            layers = (*config.style_layers, *config.content_layers)
            features = VGGFeatures(layers, weights=weights, precision=precision, keep=keep)
            objective = Objective(features, config, content, [style])
            sides[f"vggfeat, {precision}, keep={keep}"] = lambda objective=objective: objective.value_and_grad(image)
        features = VGGFeatures(layers, weights="bundled", precision=precision, keep="values")
        objective = Objective(features, config, content, [style])
        sides[f"vggfeat, {precision}, bundled weights"] = lambda objective=objective: objective.value_and_grad(image)
    for dtype in (torch.float32, torch.bfloat16):
        speed = rate(dtype)
        limit = convolutions(384, 512, dtype) / speed
        print(f"convolutions alone at this machine's {dtype} rate of {speed / 1e12:.2f} TFLOP/s: {limit * 1e3:.0f} ms")
    report("style step, VGG-19 to relu5_1, 512×384", alternate(sides, runs=9), "plain loop, float32")


if __name__ == "__main__":
    main()
