"""Exercise 1: VGG-11, 13, 16 and 19 side by side, with what changes from one to the next.

python examples/exercise1_architectures.py [PICTURE]
"""

import sys

import vggfeat

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


def main(picture=None):
    print(vggfeat.compare(NAMES))
    print()
    nets = [vggfeat.describe(name) for name in NAMES]
    for net, below in zip(nets[1:], nets, strict=False):
        convs = len(net.arch.convs) - len(below.arch.convs)
        field = net.arch.layers[-1].receptive_field - below.arch.layers[-1].receptive_field
        print(
            f"{below.label} to {net.label}: {convs} more convolutions, {(net.params - below.params) / 1e6:.2f} M more "
            f"parameters ({net.params / below.params - 1:.1%}), {net.macs / below.macs - 1:.0%} more MACs, "
            f"a unit of pool5 sees a square {field} px wider"
        )
    print("The parameters are in fc6, the same for all four; the work is in the convolutions.")
    if picture:
        print(vggfeat.plot_parameters(nets, picture, overwrite=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
