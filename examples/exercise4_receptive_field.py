"""Exercise 4: the receptive field at each depth, by the architecture and as measured.

python examples/exercise4_receptive_field.py [IMAGE PICTURE [WEIGHTS]]
"""

import sys

import vggfeat

LAYERS = ("conv1_2", "pool1", "conv2_2", "pool2", "conv3_3")


def main(image=None, picture=None, weights="bundled", arch="vgg19", layers=LAYERS, samples=4):
    print(f"{arch}, weights {weights}, {samples} noise images")
    print("layer     theory  support of the gradient  effective  share of the area")
    for name in layers:
        found = vggfeat.effective_field(name, arch, weights=weights, samples=samples)
        support = "×".join(map(str, found.support))
        share = found.effective**2 / found.theoretical**2
        print(f"{name:8} {found.theoretical:4} px {support:>21} px {found.effective:6.1f} px {share:18.0%}")
    print("The deeper the layer, the smaller the part of its square that counts (Luo et al. 2016).")
    if picture:
        print(vggfeat.plot_receptive_fields(image, arch, layers, picture, weights=weights, overwrite=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
