"""What a step of a style transfer takes of memory, whole and by tiles, against the plain loop: VGG-19, float32.

python -m tests.bench.large [WIDTH HEIGHT]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from tests.bench.harness import machine
from tests.bench.peer import PlainLoop
from vggfeat import StyleConfig, VGGFeatures
from vggfeat.analysis import PeakMemory
from vggfeat.transfer.objective import Objective
from vggfeat.weights import load

SIDES = ("plain", "0", "512", "256")


def one(side: str, width: int, height: int) -> None:
    """In a process of its own: peak bytes over the network and its targets, and the seconds of a step."""
    torch.manual_seed(0)
    config, weights = StyleConfig(), load("random", "vgg19")
    content, style, image = (torch.rand(1, 3, height, width) for _ in range(3))
    layers = (*config.style_layers, *config.content_layers)
    if side == "plain":
        terms = (config.style_layers, config.content_layers, config.term_weights[1])
        work = PlainLoop(weights.arch, weights.state, content, style, *terms)
    else:
        features = VGGFeatures(layers, weights=weights)  # signs as bits, as `stylize` keeps them in float32
        work = Objective(features, config, content, [style], int(side))
    gauge = PeakMemory(torch.device("cpu"))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work.value_and_grad(image)
        times.append(time.perf_counter() - start)
    print(gauge.read(), min(times))


def main() -> None:
    if len(sys.argv) > 3:
        return one(sys.argv[3], int(sys.argv[1]), int(sys.argv[2]))
    width, height = map(int, sys.argv[1:3] or (1024, 768))
    print(f"{machine()}\none step at {width}×{height}, float32, medians of three processes")
    found: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side, each in found.items():
            command = [sys.executable, "-m", "tests.bench.large", str(width), str(height), side]
            peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            each.append((int(peak), float(seconds)))
    base, pace = (statistics.median(values) for values in zip(*found["plain"], strict=True))
    for side, each in found.items():
        peak, seconds = (statistics.median(values) for values in zip(*each, strict=True))
        name = {"plain": "plain loop", "0": "whole"}.get(side, f"tiles of {side}")
        print(f"  {name:14} {peak / 1e6:8.0f} MB  1/{base / peak:.1f}   {seconds:6.2f} s  {pace / seconds:.2f}×")


if __name__ == "__main__":
    main()
