"""Exercise 4: the receptive field at each depth, in theory and as measured.

python examples/exercise4_receptive_field.py [--image FILE --plot FILE] [--weights W] [--layers NAMES] [--samples N]
"""

import itertools
from pathlib import Path

from console import command, last_of_each_block

import vggfeat
from vggfeat.errors import whole_number

CONTENT = Path(__file__).with_name("content.jpg")


def main(image=CONTENT, plot=None, weights="bundled", arch=None, layers=(), samples=4):
    weights = vggfeat.weights.load(weights, arch)
    layers = layers or last_of_each_block(weights, "conv")
    for name in layers:
        weights.arch.layer(name)  # raises, before the table's head
    weights.require(layers)
    whole_number("samples", samples)
    print(f"{weights.arch.name}, weights {weights.label}, {samples} noise images, for small fields more")
    print("layer     theory  support of the gradient  effective  share of the area")
    shares = []
    for name in layers:
        field = vggfeat.effective_field(name, weights=weights, samples=samples)
        support = "×".join(map(str, field.support))
        shares.append(share := field.effective**2 / field.theoretical**2)
        print(f"{name:8} {field.theoretical:4} px {support:>21} px {field.effective:6.1f} px {share:18.0%}")
    if len(shares) > 1 and all(deeper < share for share, deeper in itertools.pairwise(shares)):
        print("The deeper the layer, the smaller the part of its square that counts (Luo et al. 2016).")
    if plot:
        print(
            vggfeat.plot_receptive_fields(image, None, layers, plot, weights=weights, samples=samples, overwrite=True)
        )


if __name__ == "__main__":
    command(main, __doc__)
