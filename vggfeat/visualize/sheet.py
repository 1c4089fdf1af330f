"""Pictures side by side: colours, labels, and files. Every function of `vggfeat.visualize` ends in a `Sheet`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from vggfeat.errors import InputError, check_choice, counted, optional
from vggfeat.image import FORMATS, check_output, fit, new_image_file, save_image
from vggfeat.tables import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vggfeat.weights import Weights

VECTOR = (".pdf", ".svg")
MARGIN, GAP, SMALL, LARGE = 12, 6, 13, 18  # pixels; the last two are letter heights
DPI = 100
LONGEST = 60  # letters of a label
NARROW = 320  # pixels that a title may be wide, or as wide as the pictures under it
FONT = "DejaVuSans.ttf"


@dataclass(frozen=True, repr=False)
class Sheet:
    """Pictures in rows, with labels above them and a title.

    Attributes:
        tiles: the pictures; a single one without label and title is the whole sheet.
        labels: one for each tile, or none at all.
        title: above everything, in lines as wide as the tiles.
        columns: how many tiles side by side; None makes the sheet about square, or nearly as wide as its title.
        settings: stored in the file, as JSON; PDF and SVG hold none.

    Raises:
        InputError: no picture, or another number of labels.
    """

    tiles: Sequence[Image.Image]
    labels: Sequence[str] = ()
    title: str = ""
    columns: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tiles or len(self.labels) not in (0, len(self.tiles)):
            raise InputError(
                f"a sheet has a label for each picture, or none: got {len(self.labels)} for {len(self.tiles)}"
            )

    def __repr__(self) -> str:
        width, height = (max(sides) for sides in zip(*(tile.size for tile in self.tiles), strict=True))
        return f"Sheet({self.title!r}, {counted(len(self.tiles), 'tile')} of at most {width}×{height} pixels)"

    @property
    def image(self) -> Image.Image:
        """The sheet as one picture."""
        picture, texts = self._layout()
        draw = ImageDraw.Draw(picture)
        for x, y, text, height, anchor in texts:
            draw.text((x, y), text, "black", _font(height), anchor)
        return picture

    def figure(self) -> Figure:
        """The sheet as a matplotlib figure, with real text; nothing global is touched, nothing needs closing.

        Raises:
            DependencyError: matplotlib is missing.
        """
        matplotlib = _matplotlib()
        picture, texts = self._layout()
        width, height = picture.size
        figure: Figure = matplotlib.Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.imshow(picture, interpolation="none", extent=(0, width, height, 0), aspect="auto")
        for x, y, text, size, anchor in texts:
            where = "left" if anchor[0] == "l" else "center"
            axes.text(x, y, text, fontsize=size * 72 / DPI * 0.85, ha=where, va="center", parse_math=False)
        return figure

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a PNG, JPEG, WebP, TIFF, PDF or SVG file by the suffix, whole or not at all.

        Raises:
            ImageError: the file cannot be written.
            DependencyError: PDF and SVG need matplotlib.
        """
        path = check_sheet(path, overwrite=overwrite)
        if path.suffix.lower() not in VECTOR:
            return save_image(self.image, path, settings=self.settings or None, overwrite=overwrite)
        figure = self.figure()
        with new_image_file(path, overwrite=overwrite) as file:
            figure.savefig(file, format=path.suffix.lower()[1:])
        return path

    def _layout(self) -> tuple[Image.Image, list[tuple[int, int, str, int, str]]]:
        """The tiles on a background, and the texts: x, y of the anchor, the words, height, Pillow's anchor."""
        if len(self.tiles) == 1 and not self.title and not any(self.labels):
            return self.tiles[0].copy(), []
        labels = [_drawable(short(label, LONGEST)) for label in self.labels] or [""] * len(self.tiles)
        title = _drawable(short(self.title, 2 * LONGEST))
        head = SMALL + GAP if any(labels) else 0
        wide = max(
            max(t.width, math.ceil(_font(SMALL).getlength(label))) for t, label in zip(self.tiles, labels, strict=True)
        )
        high = max(tile.height for tile in self.tiles) + head
        count, title_width = len(self.tiles), math.ceil(_font(LARGE).getlength(title))
        room = math.ceil((title_width + GAP) / (wide + GAP))  # tiles side by side under the title
        columns = min(self.columns or max(_across(count, high / wide), room), count)
        rows = math.ceil(count / columns)
        if self.columns is None:
            columns = math.ceil(count / rows)  # so that the last row is about as full as the others
        grid = columns * (wide + GAP) - GAP
        lines = _lines(title, max(grid, NARROW))
        top = MARGIN + len(lines) * (LARGE + GAP) + (GAP if lines else 0)
        width = 2 * MARGIN + max(grid, *(math.ceil(_font(LARGE).getlength(line)) for line in lines), 0)
        picture = Image.new("RGB", (width, top + rows * (high + GAP) - GAP + MARGIN), "white")
        texts = [(MARGIN, MARGIN + LARGE // 2 + i * (LARGE + GAP), line, LARGE, "lm") for i, line in enumerate(lines)]
        for i, (tile, label) in enumerate(zip(self.tiles, labels, strict=True)):
            x, y = MARGIN + i % columns * (wide + GAP), top + i // columns * (high + GAP)
            picture.paste(tile, (x + (wide - tile.width) // 2, y + head))
            if label:
                texts.append((x + wide // 2, y + SMALL // 2, label, SMALL, "mm"))
        return picture, texts


@functools.lru_cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, from matplotlib or the system; Pillow's own font has only ASCII letters."""
    spec = importlib.util.find_spec("matplotlib")  # without importing it
    folders = spec.submodule_search_locations or [] if spec else []
    for place in (*(Path(folder, "mpl-data", "fonts", "ttf", FONT) for folder in folders), FONT):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(str(place), height)
    return ImageFont.load_default(height)


def _lines(title: str, width: int) -> list[str]:
    """A title broken between words into lines of at most so many pixels; a longer word is a line of its own."""
    lines: list[str] = []
    for word in title.split():
        if lines and _font(LARGE).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _drawable(text: str) -> str:
    """A line of text in letters that the font has; if need be without accents, or with question marks."""
    font = _font(SMALL)
    if isinstance(font, ImageFont.FreeTypeFont) and font.getname()[0] == "DejaVu Sans":
        return "".join(each if _is_in_dejavu(each) else "?" for each in text)
    plain = [each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each)]
    return "".join(each if each.isascii() else "?" for each in plain)


@functools.cache
def _is_in_dejavu(letter: str) -> bool:
    font = _font(SMALL)
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))  # the box in place of what it lacks


def _across(count: int, tall: float) -> int:
    """How many of `count` tiles, each `tall` times as high as wide, to put side by side for a roughly square sheet.

    A number up to a third larger or smaller than the best is preferred if it fills every row.
    """
    best = max(1, round(math.sqrt(count * tall)))
    near = [n for n in range(1, count + 1) if count % n == 0 and 0.74 <= n / best <= 1.34]
    return min(near, key=lambda n: (abs(n - best), -n), default=best)


def check_sheet(
    path: str | os.PathLike[str], *, overwrite: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """`path`, after checking that a `Sheet` can be written there: call it before any long work.

    Raises:
        ImageError: unknown suffix, no writable folder, or a file that must not be replaced.
        DependencyError: PDF and SVG need matplotlib.
    """
    path = check_output(path, overwrite=overwrite, inputs=inputs, formats=(*FORMATS, *VECTOR))
    if path.suffix.lower() in VECTOR:
        _matplotlib()
    return path


def _matplotlib() -> Any:
    return optional("matplotlib.figure", "PDF and SVG need matplotlib: pip install 'vggfeat[plot]', or write a .png")


# ── colours ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def palette(name: str) -> Tensor:
    """256 colours (256,3) in [0,1] by name: `grey`, or one of kornia's, such as `viridis`, `turbo`, `plasma`.

    Raises:
        InputError: an unknown name.
        DependencyError: no kornia.
    """
    if name == "grey":
        return torch.linspace(0, 1, 256, dtype=torch.float32, device="cpu")[:, None].expand(-1, 3)
    color = optional("kornia.color", "colour maps need kornia, which does not work here: pip install kornia, or grey")
    names = [str(each) for each in color.ColorMapType.list()]
    check_choice("colours", name, ["grey", *names])
    with torch.device("cpu"):
        colors: Tensor = color.ColorMap(name, num_colors=256, dtype=torch.float32).colors.T.clone()
    return colors


def colored(values: Tensor, colors: str) -> Tensor:
    """Values (N,h,w) in [0,1] as RGB (N,3,h,w)."""
    return palette(colors)[(values.clamp(0, 1) * 255).round().long()].movedim(-1, 1)


def overlay(image: Tensor, heat: Tensor, colors: str = "turbo") -> Tensor:
    """Heat (H,W) in [0,1] over the greyed image (1,3,H,W), more opaque where stronger: (1,3,H,W).

    Grey, which would not show over grey, instead lights the image where the heat is.
    """
    if colors == "grey":
        return image * (0.15 + 0.85 * heat.clamp(0, 1).sqrt())
    grey = image.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.7 + 0.15
    opacity = 0.75 * heat.clamp(0, 1).sqrt()
    return torch.lerp(grey, colored(heat[None], colors), opacity)


def net_label(weights: Weights) -> str:
    """A network and its weights, as titles name them: `vgg19 (bundled)`."""
    return f"{weights.arch.name} ({short(weights.name)})"


def spread(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h,w) at the size of the image (H,W), bilinear; a whole multiple keeps the mean."""
    return F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """A small picture with its pixels as squares, a large one reduced: its long side near `side`, at least 1 pixel."""
    long = max(picture.size)
    if long >= side:
        return picture.resize(fit(*picture.size, side), Image.Resampling.BOX)
    times = max(1, round(side / long))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
