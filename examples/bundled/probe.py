"""What the layers of a weight set know: a linear classifier on the mean of each pool, for the bundled and random sets.

Caltech-101 at 128 px, tested on the fifth that `deep.py` never saw, and CIFAR-10 at 64 px, tested on its test images.
The bundled set was trained with labels of the rest of both; the random one has the same shape and saw nothing.

    python examples/bundled/probe.py bundled random
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from deep import labelled
from torch import Tensor
from torch.nn import functional as F

from vggfeat import VGGFeatures
from vggfeat.weights import load

POOLS = ("pool1", "pool2", "pool3", "pool4", "pool5")


def means(net: VGGFeatures, images: Tensor, side: int) -> dict[str, Tensor]:
    """The mean over positions of each pool, (N,C)."""
    found: dict[str, list[Tensor]] = {name: [] for name in POOLS}
    with torch.no_grad():
        for batch in images.split(100):
            x = batch.float() / 255
            x = x if x.shape[-1] == side else F.interpolate(x, size=side, mode="bilinear", align_corners=False)
            for name, value in net.taps(x).items():
                found[name].append(value.float().mean((2, 3)))
    return {name: torch.cat(values) for name, values in found.items()}


def probe(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> float:
    """Top-1 on `test` of a logistic regression on standardised features, weight decay 1e-4."""
    std, mean = torch.std_mean(train, dim=0)
    train, test = ((x - mean) / (std + 1e-6) for x in (train, test))
    linear = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(train), labels) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((linear(test).argmax(1) == answers).float().mean())


@click.command()
@click.argument("sets", nargs=-1, required=True)
@click.option("--count", default=10000, show_default=True, help="Images to train a probe on, at most.")
def main(sets: tuple[str, ...], count: int) -> None:
    """Probe weight sets."""
    print("| set | images |", " | ".join(POOLS), "|")
    arch = load("bundled").arch
    for name in sets:
        weights = load(name, arch) if name == "random" else load(name)
        net = VGGFeatures(POOLS, weights=weights, precision="auto")
        for data, side in (("caltech", 128), ("cifar", 64)):
            images, labels, test, answers = labelled(data)
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
            train, held = means(net, images[chosen], side), means(net, test, side)
            scores = [probe(train[p], labels[chosen], held[p], answers) for p in POOLS]
            print(f"| {Path(name).stem} | {data} |", " | ".join(f"{100 * s:.1f} %" for s in scores), "|", flush=True)


if __name__ == "__main__":
    main()
