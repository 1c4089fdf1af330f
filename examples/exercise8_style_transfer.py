"""Exercise 8: Gatys' style transfer on the shipped pictures, from coarse to fine, and its effect on the objective.

A step's objective is that of the picture before the step.

python examples/exercise8_style_transfer.py [--content FILE] [--style FILE] [--picture FILE] [--size PX] [--steps N]
"""

from itertools import groupby
from pathlib import Path

from console import command

import vggfeat
from vggfeat.files import free_name

HERE = Path(__file__).parent


def main(
    content=HERE / "content.jpg", style=HERE / "style.jpg", picture="painted.png", size=256, steps=20, weights="auto"
):
    picture = vggfeat.image.check_output(free_name(picture))
    result = vggfeat.stylize(content, style, vggfeat.StyleConfig(size=size, steps=steps, weights=weights))
    print(f"{result.arch}, {steps} steps at the finest scale, weights {result.weights}")
    print("scale        pixels  objective at first step  at last step  of which style  content")
    for scale, group in groupby(result.history, key=lambda step: step["scale"]):
        steps = list(group)
        first, last = steps[0], steps[-1]
        pixels = f"{first['width']}×{first['height']}"
        print(f"{scale:5} {pixels:>13} {first['total']:24.4f} {last['total']:13.4f}", end="")
        print(f" {last['style']:15.4f} {last['content']:8.4f}")
    saved = result.losses.get("total", float("nan"))  # after Ctrl-C there may be none
    print(f"As saved, in 8 bits: {saved:.4f}. Each finer scale starts from the picture before it.")
    print(result.save(picture))
    return result


if __name__ == "__main__":
    command(main, __doc__)
