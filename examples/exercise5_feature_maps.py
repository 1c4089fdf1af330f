"""Exercise 5: what the layers make of an image: how many units respond, and their strongest maps.

python examples/exercise5_feature_maps.py [--image FILE] [--picture FILE] [--weights W] [--layers NAMES] [--size PX]
"""

from pathlib import Path

from console import command, last_of_each_block

import vggfeat
from vggfeat.visualize import Sheet, maps

CONTENT = Path(__file__).with_name("content.jpg")


def main(image=CONTENT, picture=None, weights="bundled", arch=None, layers=(), size=256):
    pixels = vggfeat.image.open_image(image)
    pixels = vggfeat.image.resize(pixels, *vggfeat.image.fit(*pixels.size, size))
    weights = vggfeat.weights.load(weights, arch)
    layers = tuple(dict.fromkeys(layers or ("relu1_1", *last_of_each_block(weights, "relu"))))
    taps = vggfeat.VGGFeatures(layers, weights=weights)(vggfeat.image.to_tensor(pixels))
    print(f"{weights.arch.name}, weights {weights.label}, {pixels.width}×{pixels.height}")
    print("layer    channels     map  units that respond  silent channels")
    shares = []
    for name, tap in taps.items():
        _, channels, height, width = tap.shape
        silent = int((tap.amax((0, 2, 3)) == 0).sum())
        side = f"{width}×{height}"
        shares.append(float((tap > 0).float().mean()))
        print(f"{name:8} {channels:8} {side:>7} {shares[-1]:19.0%} {silent:16}")
    print(f"The deeper, the coarser the maps; {min(shares):.0%} to {max(shares):.0%} of a layer's units respond.")
    if picture:
        rows = [maps(pixels, name, count=8, tile=96, size=None, weights=weights) for name in layers]
        tiles = [tile.resize(vggfeat.image.fit(*pixels.size, 96)) for row in rows for tile in row.tiles]
        labels = [f"{name} {label}" for name, row in zip(layers, rows, strict=True) for label in row.labels]
        print(Sheet(tiles, labels, "The strongest maps of each layer", columns=8).save(picture, overwrite=True))


if __name__ == "__main__":
    command(main, __doc__)
