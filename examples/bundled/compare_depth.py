"""Do the deep blocks of the bundled weights help a style transfer? A measure that is stated here, before it was taken.

Six pairs of photograph and painting by which nothing was chosen: those of `score.py`, the paintings moved on by two.
Each is stylised twice with the bundled weights, at 384 px:

- default: `vggstyle`'s own layers (style relu1_1 … relu5_1, content relu4_2) and its content weight;
- shallow: style relu1_1 relu2_1 relu3_1, content relu3_3, with the content weight, found by bisection, at which
  Oxford's relu3_3 says that it is as far from the photograph as the default's picture is, within 10 %.

The measure is "long" of `score.py`: the relative squared error, against the painting, of the covariances of Oxford's
relu3_1 with itself 16, 32 and 64 pixels away. The claim is that the default is better; it holds if "long" is lower for
the default in at least five of the six pairs. "coarse" of `score.py` is given beside it.

    python examples/bundled/compare_depth.py --out pictures/
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
from data import DATA
from score import PAIRS, SIZE, Judge

from vggfeat import StyleConfig, stylize
from vggfeat.image import check_output

SHALLOW = {"style_layers": ("relu1_1", "relu2_1", "relu3_1"), "content_layers": ("relu3_3",)}
NEAR, TRIES = 0.1, 8
MOVED = [(PAIRS[i][0], PAIRS[(i + 2) % len(PAIRS)][1]) for i in range(len(PAIRS))]


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--weights", default="bundled", show_default=True)
def main(out: Path, weights: str) -> None:
    """Stylise and compare."""
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    table = csv.writer(sys.stdout)
    table.writerow(["content", "style", "layers", "content weight", "content error", "long", "coarse e0/e"])
    wins = 0
    for content, style in MOVED:
        paths = DATA / "photos" / f"{content}.jpg", DATA / "paintings" / f"{style}.jpg"
        before = judge.coarse(*paths)

        def made(name: str, paths=paths, **settings: object) -> Path:
            picture = check_output(out / f"{paths[0].stem}-{paths[1].stem}-{name}.png", overwrite=True)
            config = StyleConfig(size=SIZE, weights=weights, **settings)  # type: ignore[arg-type]
            stylize(*map(str, paths), config).save(picture, overwrite=True)
            return picture

        full = made("default")
        goal = judge.content(full, paths[0])
        weight, low, high = 0.02, 0.0, float("inf")
        for _ in range(TRIES):
            shallow = made("shallow", content_weight=weight, **SHALLOW)
            error = judge.content(shallow, paths[0])
            if abs(error / goal - 1) <= NEAR:
                break
            low, high = (weight, high) if error > goal else (low, weight)  # more weight, less error
            weight = (low * high) ** 0.5 if low > 0 and high < float("inf") else weight * (4 if error > goal else 0.25)
        long = {}
        for name, picture, used in (("default", full, StyleConfig().term_weights[1]), ("shallow", shallow, weight)):
            long[name] = judge.long(picture, paths[1])
            figures = judge.content(picture, paths[0]), long[name], before / judge.coarse(picture, paths[1])
            table.writerow([content, style, name, f"{used:.4g}", *(f"{value:.3f}" for value in figures)])
        wins += long["default"] < long["shallow"]
        sys.stdout.flush()
    print(f"long is lower for the default in {wins} of {len(MOVED)} pairs")


if __name__ == "__main__":
    main()
