"""Exercise 1: VGG-11, 13, 16 and 19 side by side, with what changes from one to the next.

python examples/exercise1_architectures.py [--plot FILE]
"""

from console import command

import vggfeat
from vggfeat.arch import BLOCKS, parse

NAMES = ("vgg11", "vgg13", "vgg16", "vgg19")


def configurations():
    """The chapter's configuration table, and the paper's Table 1: channels × convolutions of each block."""
    print(
        "config  block 1  block 2  block 3  block 4  block 5  weight layers       parameters  of them fully connected"
    )
    for config in BLOCKS:
        net, arch = vggfeat.describe(config), parse(config)
        counts = [sum(conv.name.startswith(f"conv{block}_") for conv in arch.convs) for block in range(1, 6)]
        blocks = "  ".join(f"{channels:>5}×{count}" for channels, count in zip(arch.channels, counts, strict=True))
        print(
            f"{config:6}  {blocks}  {len(arch.convs) + 3:13} {net.params:16,} {net.split['fc']['params_share']:24.1%}"
        )
    print("A-LRN normalises after its first convolution; C's third of blocks 3 to 5 are 1×1.")


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
