"""Time to a picture: what the saved file is worth, against the plain loop's; 512×384, Oxford's conv1_1 … conv3_4.

The objective is always the scale-free one in float32, of the picture as it is saved: clamped, in 8 bits.

python -m tests.bench.picture [--steps 500] [--size 512] [--device cuda]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tests.bench.harness import DATA, WEIGHTS, machine, settle
from tests.bench.peer import PlainLoop
from vggfeat import StyleConfig, StyleStep, VGGFeatures, stylize
from vggfeat.image import fit, open_image, resize, to_pil, to_tensor
from vggfeat.transfer.objective import Objective
from vggfeat.weights import load

LAYERS = {"style_layers": ("relu1_1", "relu2_1", "relu3_1", "relu3_4"), "content_layers": ("relu3_3",)}


def plain_run(loop: PlainLoop, content: Tensor, steps: int, marks: set[int]) -> tuple[float, dict[int, Tensor]]:
    """neural-style-pt's way: torch.optim.LBFGS, history 100, unbounded. Seconds and the tensors at the marks."""
    image = content.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([image], max_iter=steps, max_eval=10**9, tolerance_change=-1, tolerance_grad=-1)
    kept: dict[int, Tensor] = {}
    count = 0

    def closure() -> Tensor:
        nonlocal count
        if count in marks:
            kept[count] = image.detach().clone()
        optimizer.zero_grad()
        # torch's first step is as long as the gradient is large: the tools' own weights are of this order, and with
        # weights of order 1 the loop would spend its first hundreds of steps creeping
        loss = 1000 * loop.loss(image)
        loss.backward()
        count += 1
        return loss

    start = time.perf_counter()
    optimizer.step(closure)
    settle(content.device)
    seconds = time.perf_counter() - start
    kept[steps] = image.detach().clone()
    return seconds, kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu", help="of both sides")
    parser.add_argument("--out", type=Path, help="folder for both pictures")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(machine())
    config = StyleConfig(
        weights=str(WEIGHTS),
        size=args.size,
        precision=args.precision,
        device=args.device,
        content_weight=0.02,
        **LAYERS,
    )
    files = DATA / "photos/tubingen.jpg", DATA / "paintings/starry_night.jpg"
    content, style = (
        to_tensor(resize(image, *fit(image.width, image.height, args.size))).to(args.device)
        for image in map(open_image, files)
    )
    weights = load(WEIGHTS)
    features = VGGFeatures((*config.style_layers, *config.content_layers), weights=weights)
    judge = Objective(features, config, content, [style])

    def value(image: Tensor) -> float:
        with torch.no_grad():
            return float(sum(judge.terms(image).values()))

    def saved(image: Tensor) -> float:
        return value(to_tensor(to_pil(image.clamp(0, 1))).to(args.device))

    loop = PlainLoop(
        weights.arch, weights.state, content, style, config.style_layers, config.content_layers, config.term_weights[1]
    )
    assert abs(float(loop.loss(content)) / value(content) - 1) < 1e-3, "the two sides minimise different things"
    seconds, kept = plain_run(loop, content, args.steps, {25, 50, 100, 200})
    print(f"plain loop: {args.steps} steps in {seconds:.1f} s; content image itself {saved(content):.4f}")
    for count, image in kept.items():
        print(f"  after {count:3} steps: tensor {value(image):.4f}, saved {saved(image):.4f}")
    if args.out:
        to_pil(kept[args.steps].clamp(0, 1)).save(args.out / "plain.png")

    frames: list[tuple[float, int, Image.Image]] = []
    start = time.perf_counter()
    paused = 0.0

    def watch(step: StyleStep) -> None:
        nonlocal paused
        now = time.perf_counter()
        if step.scale == step.scales:
            frames.append((now - start - paused, step.step, step.image()))
        paused += time.perf_counter() - now

    result = stylize(*files, config, callback=watch)
    ours = [(when, step, value(to_tensor(picture).to(args.device))) for when, step, picture in frames]
    final = value(to_tensor(result.image).to(args.device))
    share = final / saved(kept[args.steps])
    print(f"vggfeat: default run {result.elapsed:.1f} s, saved {final:.4f}, {share:.2f} of the plain loop's")
    for when, step, worth in ours:
        if step in (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60, 80, 100):
            print(f"  {when:6.2f} s, last scale's step {step:3}: saved {worth:.4f}")
    goals = {f"the plain loop's saved picture after {args.steps} steps": (saved(kept[args.steps]), seconds)}
    if 100 in kept:
        reached = (1.03 * value(kept[100]), seconds * 100 / args.steps)
        goals["the plain loop's tensor after 100 steps, plus 3 %"] = reached
    for name, (goal, there) in goals.items():
        when = next((when for when, _, worth in ours if worth <= goal), None)
        print(
            f"{name} ({goal:.4f}, {there:.1f} s): " + (f"{when:.2f} s, 1/{there / when:.0f}" if when else "not reached")
        )
    if args.out:
        result.save(args.out / "vggfeat.png", overwrite=True)


if __name__ == "__main__":
    main()
