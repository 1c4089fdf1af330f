"""Exercise 3: the filters of the first layer, and what kind of pattern each looks for.

python examples/exercise3_filters.py [PICTURE [WEIGHTS]]
"""

import sys
from collections import Counter

import vggfeat
from vggfeat.visualize import filters

KINDS = ("brightness", "colour blob", "edge or spot in brightness", "edge or spot in colour")


def kind(w):
    """The kind that holds most of a filter's energy: w (3,3,3) is colours by rows by columns."""
    grey, flat = w.mean(0, keepdim=True), w.mean((1, 2), keepdim=True)
    mean = w.mean()
    parts = (mean, flat - mean, grey - mean, w - grey - flat + mean)  # they add up to w, and their energies to its
    energies = [float(part.expand_as(w).square().sum()) for part in parts]
    return KINDS[energies.index(max(energies))]


def main(picture=None, weights="bundled", arch="vgg19"):
    loaded = vggfeat.weights.load(weights, arch)
    counts = Counter(map(kind, loaded.state["features.0.weight"]))
    print(f"conv1_1 of {arch}, weights {loaded.label}")
    for name in KINDS:
        print(f"{name:27} {counts[name]:3}")
    print("Trained filters fall into brightness edges of every direction and colour blobs; random ones are mixtures.")
    if picture:
        print(filters(weights=loaded).save(picture, overwrite=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
