"""Exercise 3: the filters of the first layer, and what kind of pattern each looks for.

python examples/exercise3_filters.py [--picture FILE] [--weights W] [--arch NAME]
"""

import math
from collections import Counter

from console import command

import vggfeat
from vggfeat.visualize import filters

KINDS = ("brightness", "colour blob", "edge or spot in brightness", "edge or spot in colour", "a mixture")
DIRECTIONS = ("vertical", "one diagonal", "horizontal", "the other diagonal")
SPOT = "no clear way"
MOST = 0.75  # share of its energy that decides a filter's kind; in a random one, 16/27 is colour's on average


def kind(w):
    """Which part holds most of a filter's energy; w (3,3,3) is colours by rows by columns."""
    grey, flat = w.mean(0, keepdim=True), w.mean((1, 2), keepdim=True)
    mean = w.mean()
    parts = (mean, flat - mean, grey - mean, w - grey - flat + mean)  # they add up to w, and their energies to w's
    energies = [float(part.expand_as(w).square().sum()) for part in parts]
    return KINDS[energies.index(max(energies))] if max(energies) >= MOST * sum(energies) else KINDS[-1]


def direction(w):
    """Which way the edge in a filter's brightness runs, across the steepest rise; a spot has none."""
    grey = w.mean(0) - w.mean()
    right, down = float((grey[:, 2] - grey[:, 0]).sum()), float((grey[2] - grey[0]).sum())
    rise = (right**2 + down**2) / 6  # the energy of the best plane through the nine values
    if rise < MOST * float(grey.square().sum()):
        return SPOT
    return DIRECTIONS[round(math.atan2(down, right) / (math.pi / 4)) % 4]


def main(picture=None, weights="bundled", arch=None):
    loaded = vggfeat.weights.load(weights, arch)
    weight = loaded.state["features.0.weight"]
    counts = Counter(map(kind, weight))
    print(f"conv1_1 of {loaded.arch.name}, weights {loaded.label}")
    for name in KINDS:
        print(f"{name:27} {counts[name]:3}")
    edges = Counter(direction(w) for w in weight if kind(w) == KINDS[2])
    print("edges in brightness run: " + ", ".join(f"{name} {edges[name]}" for name in (*DIRECTIONS, SPOT)))
    plain = len(weight) - counts[KINDS[-1]]
    print(f"{plain} of {len(weight)} filters are of one kind; of random ones about one in nine is.")
    if picture:
        print(filters(weights=loaded).save(picture, overwrite=True))


if __name__ == "__main__":
    command(main, __doc__)
