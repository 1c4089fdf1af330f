"""How good a weight set is for style transfer, measured by the network that everybody means: Oxford's VGG-19.

Six pairs are stylised with each set at the same settings. e is the mean relative squared error of the result's Gram
matrices under Oxford's relu1_1, relu2_1, relu3_1 and relu3_4; e0 is the content image's own, e1 that of the run on
Oxford's network itself. The share log(e0/e) / log(e0/e1) is 1 where a set does as well as Oxford's, 0 where it does
nothing. The content error is relative, under relu3_3. "coarse" is e0/e of pictures reduced to a half and a quarter:
what there is of large strokes and shapes, which shallow layers cannot see at full size. "long" is the relative squared
error of the covariances of Oxford's relu3_1 with itself 4, 8 and 16 cells further right and down, 16 to 64 pixels away
(after Berger and Memisevic 2017, arXiv:1606.01286): whether the strokes go together as they do in the painting.

    python examples/bundled/score.py oxford bundled random --out pictures/
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import click
import torch
from data import DATA, TEACHER

from vggfeat import StyleConfig, VGGFeatures, stylize
from vggfeat.functional import gram
from vggfeat.image import check_output, fit, open_image, resize, to_tensor

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


SIZE = 384


def opened(path: Path | str, size: int = SIZE) -> torch.Tensor:
    """The picture with a long side of `size`."""
    image = open_image(path)
    return to_tensor(resize(image, *fit(*image.size, size)))


class Judge:
    """Oxford's network."""

    def __init__(self) -> None:
        self.features = VGGFeatures((*STYLE, CONTENT), weights=str(TEACHER), precision="float32")

    @torch.no_grad()
    def style(self, picture: Path | str, style: Path | str, size: int = SIZE) -> float:
        """Style error of a picture."""
        mine, goal = (self.features(opened(path, size)) for path in (picture, style))
        relative = [float((gram(mine[n]) - gram(goal[n])).norm() ** 2 / gram(goal[n]).norm() ** 2) for n in STYLE]
        return sum(relative) / len(relative)

    def coarse(self, picture: Path | str, style: Path | str) -> float:
        """The same of the picture at a half and at a quarter of its size, added up."""
        return self.style(picture, style, SIZE // 2) + self.style(picture, style, SIZE // 4)

    @torch.no_grad()
    def long(self, picture: Path | str, style: Path | str) -> float:
        """Error of the covariances over a distance."""
        found = []
        for path in (picture, style):
            x = self.features(opened(path))["relu3_1"][0]
            x = x - x.mean((1, 2), keepdim=True)
            pairs = [(x[:, :, d:], x[:, :, :-d]) for d in (4, 8, 16)] + [(x[:, d:], x[:, :-d]) for d in (4, 8, 16)]
            found.append(torch.stack([a.flatten(1) @ b.flatten(1).T / a[0].numel() for a, b in pairs]))
        mine, goal = found
        return float((mine - goal).norm() ** 2 / goal.norm() ** 2)

    @torch.no_grad()
    def content(self, picture: Path | str, content: Path | str) -> float:
        """Content error of a picture."""
        mine, kept = (self.features(opened(path))[CONTENT] for path in (picture, content))
        return float((mine - kept).norm() ** 2 / kept.norm() ** 2)


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
    table.writerow(["content", "style", "set", "e0/e", "share", "content error", "coarse e0/e", "long"])
    shares: dict[str, list[float]] = {name: [] for name in sets}
    for content, style in PAIRS:
        paths = DATA / "photos" / f"{content}.jpg", DATA / "paintings" / f"{style}.jpg"
        before, coarse = judge.style(*paths), judge.coarse(*paths)
        best = None
        for name in sets:
            weights = str(TEACHER) if name == "oxford" else name
            config = StyleConfig(
                size=SIZE,
                content_weight=0.02,
                weights=weights,
                arch=arch if name != "oxford" else None,
                style_layers=tuple(layers.split(",")),
                content_layers=tuple(content_layers.split(",")),
            )
            picture = check_output(out / f"{content}-{style}-{Path(name).stem}.png")
            stylize(*map(str, paths), config).save(picture)
            after, away = judge.style(picture, paths[1]), judge.content(picture, paths[0])
            gain = math.log(before / after)
            best = gain if best is None else best
            shares[name].append(gain / best)
            row = [content, style, Path(name).stem, f"{before / after:.1f}", f"{shares[name][-1]:.3f}", f"{away:.3f}"]
            row.append(f"{coarse / judge.coarse(picture, paths[1]):.1f}")
            row.append(f"{judge.long(picture, paths[1]):.3f}")
            table.writerow(row)
            sys.stdout.flush()
    for name, values in shares.items():
        table.writerow(
            ["mean", "", Path(name).stem, "", f"{sum(values) / len(values):.3f}", f"least {min(values):.3f}"]
        )


if __name__ == "__main__":
    main()
