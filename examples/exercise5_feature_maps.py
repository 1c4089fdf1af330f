"""Exercise 5: what the layers make of an image: how many units respond, and their strongest maps.

python examples/exercise5_feature_maps.py [IMAGE PICTURE [WEIGHTS]]
"""

import sys
from pathlib import Path

import vggfeat
from vggfeat.visualize import Sheet, maps

LAYERS = ("relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2")
CONTENT = Path(__file__).with_name("content.jpg")


def main(image=CONTENT, picture=None, weights="bundled", arch="vgg19", size=256):
    pixels = vggfeat.image.open_image(image)
    pixels = vggfeat.image.resize(pixels, *vggfeat.image.fit(*pixels.size, size))
    weights = vggfeat.weights.load(weights, arch)
    taps = vggfeat.VGGFeatures(LAYERS, weights=weights)(vggfeat.image.to_tensor(pixels))
    print(f"{arch}, weights {weights.label}, {pixels.width}×{pixels.height}")
    print("layer    channels     map  units that respond  silent channels")
    for name, tap in taps.items():
        _, channels, height, width = tap.shape
        silent = int((tap.amax((0, 2, 3)) == 0).sum())
        side = f"{width}×{height}"
        print(f"{name:8} {channels:8} {side:>7} {(tap > 0).float().mean():19.0%} {silent:16}")
    print("The deeper, the coarser the maps and the more of them; about half of all units respond to an image.")
    if picture:
        rows = [maps(pixels, name, count=8, tile=96, size=None, weights=weights) for name in LAYERS]
        tiles = [tile.resize((96, 96 * pixels.height // pixels.width)) for row in rows for tile in row.tiles]
        labels = [f"{name} {label}" for name, row in zip(LAYERS, rows, strict=True) for label in row.labels]
        print(Sheet(tiles, labels, "The strongest maps of each layer", columns=8).save(picture, overwrite=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
