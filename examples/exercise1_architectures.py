"""Exercise 1: VGG-11, 13, 16 and 19 side by side, with what changes from one to the next.

python examples/exercise1_architectures.py [--plot FILE]
"""

from console import command

import vggfeat
from vggfeat.arch import BLOCKS, parse

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


# top-1/top-5 errors on ImageNet in the paper's Table 3, at one scale, without scale jitter
PAPER = {"A": "29.6/10.4", "A-LRN": "29.7/10.5", "B": "28.7/9.9", "C": "28.1/9.4", "D": "27.0/8.8", "E": "27.3/9.0"}


def configurations():
    """The chapter's configuration table, and the paper's Table 1: channels × convolutions of each block."""
    print(
        "config  block 1  block 2  block 3  block 4  block 5  layers   parameters  fully connected  paper's errors, %"
    )
    for config in BLOCKS:
        net, arch = vggfeat.describe(config), parse(config)
        counts = [sum(conv.name.startswith(f"conv{block}_") for conv in arch.convs) for block in range(1, 6)]
        blocks = "  ".join(f"{channels:>5}×{count}" for channels, count in zip(arch.channels, counts, strict=True))
        share = net.split["fc"]["params_share"]
        print(f"{config:6}  {blocks}  {sum(counts) + 3:6} {net.params:12,} {share:16.1%}  {PAPER[config]:>17}")
    print("A-LRN normalises after its first convolution; C's third of blocks 3 to 5 are 1×1. Errors: top-1/top-5.")


def main(plot=None):
    configurations()
    print()
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
    print("Most parameters are in fc6, the same for all four; the work is in the convolutions.")
    if plot:
        print(vggfeat.plot_parameters(nets, plot, overwrite=True))


if __name__ == "__main__":
    command(main, __doc__)
