"""Exercise 7: a slim VGG. Global pooling instead of fc6 and fc7, and fewer channels.

python examples/exercise7_slim.py [--plot FILE] [--measure]
"""

from console import command

import vggfeat

VARIANTS = {
    "paper's head": {},
    "slim": {"head": "slim"},
    "half": {"width": 0.5},
    "slim, half": {"head": "slim", "width": 0.5},
}


def main(plot=None, arch="vgg16_bn", classes=10, size=32, measure=False):
    common = {"num_classes": classes, "input_size": size}
    nets = [vggfeat.describe(arch, **common, **options) for options in VARIANTS.values()]
    print(f"{arch} for {classes} classes, {size}×{size} pixels")
    print("variant           params  fully connected   M MACs  training with momentum, 128 images")
    for name, net in zip(VARIANTS, nets, strict=True):
        big = vggfeat.describe(net.arch, input_size=size, batch=128)
        share, memory = net.split["fc"]["params_share"], big.memory["momentum"] / 1e6
        print(f"{name:13} {net.params:11,} {share:16.1%} {net.macs / 1e6:8.1f} {memory:32.0f} MB")
    if measure:
        print()
        print(vggfeat.compare([net.arch for net in nets], input_size=size, measure=True, batch=128))
    if plot:
        print(vggfeat.plot_parameters(nets, plot, overwrite=True))


if __name__ == "__main__":
    command(main, __doc__)
