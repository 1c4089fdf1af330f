"""How good a weight set is for style transfer, measured by the network that everybody means: Oxford's VGG-19.

Six pairs are stylised with each set at the same settings. e is the mean relative squared error of the result's Gram
matrices under Oxford's relu1_1, relu2_1, relu3_1 and relu3_4; e0 is the content image's own, e1 that of the run on
Oxford's network itself. The share log(e0/e) / log(e0/e1) is 1 where a set does as well as Oxford's, 0 where it does
nothing. The content error is relative, under relu3_3.

    python examples/bundled/score.py oxford bundled random --out pictures/
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import torch
from data import DATA, TEACHER

from vggfeat import StyleConfig, VGGFeatures, stylize
from vggfeat.functional import gram
from vggfeat.image import fit, open_image, resize, to_tensor

PAIRS = (
    ("tubingen", "starry_night"),
    ("golden_gate", "the_scream"),
    ("lion", "wave_crop"),
    ("hoovertowernight", "vg_wheat_field"),
    ("taj_mahal", "vg_la_cafe"),
    ("tubingen", "shipwreck"),
)
STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu3_4")
CONTENT = "relu3_3"


def opened(path: Path | str) -> torch.Tensor:
    """The picture at 384 pixels."""
    image = open_image(path)
    return to_tensor(resize(image, *fit(*image.size, 384)))


class Judge:
    """Oxford's network."""

    def __init__(self) -> None:
        self.features = VGGFeatures((*STYLE, CONTENT), weights=str(TEACHER), precision="float32")

    def __call__(self, picture: Path | str, content: Path | str, style: Path | str) -> tuple[float, float]:
        """Style error and content error of a picture."""
        with torch.no_grad():
            mine, kept, goal = (self.features(opened(path)) for path in (picture, content, style))
        relative = [float((gram(mine[n]) - gram(goal[n])).norm() ** 2 / gram(goal[n]).norm() ** 2) for n in STYLE]
        away = float((mine[CONTENT] - kept[CONTENT]).norm() ** 2 / kept[CONTENT].norm() ** 2)
        return sum(relative) / len(relative), away


@click.command()
@click.argument("sets", nargs=-1, required=True)
@click.option("--arch", default=None, help="Of a set that does not say.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--layers", default=",".join(STYLE), show_default=True)
@click.option("--content-layers", default=CONTENT, show_default=True)
def main(sets: tuple[str, ...], arch: str | None, out: Path, layers: str, content_layers: str) -> None:
    """Score weight sets ("oxford" is the judge's own); the first named is measured against."""
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    table = csv.writer(sys.stdout)
    table.writerow(["content", "style", "set", "e0/e", "share", "content error"])
    shares: dict[str, list[float]] = {name: [] for name in sets}
    for content, style in PAIRS:
        paths = DATA / "photos" / f"{content}.jpg", DATA / "paintings" / f"{style}.jpg"
        before, _ = judge(paths[0], *paths)
        best = None
        for name in sets:
            weights = str(TEACHER) if name == "oxford" else name
            config = StyleConfig(
                size=384,
                weights=weights,
                arch=arch if name != "oxford" else None,
                style_layers=tuple(layers.split(",")),
                content_layers=tuple(content_layers.split(",")),
            )
            picture = out / f"{content}-{style}-{Path(name).stem}.png"
            if not picture.exists():
                stylize(*map(str, paths), config).save(picture)
            after, away = judge(picture, *paths)
            gain = torch.log(torch.tensor(before / after))
            best = gain if best is None else best
            shares[name].append(float(gain / best))
            row = [content, style, Path(name).stem, f"{before / after:.1f}", f"{shares[name][-1]:.3f}", f"{away:.3f}"]
            table.writerow(row)
            sys.stdout.flush()
    for name, values in shares.items():
        table.writerow(
            ["mean", "", Path(name).stem, "", f"{sum(values) / len(values):.3f}", f"least {min(values):.3f}"]
        )


if __name__ == "__main__":
    main()
