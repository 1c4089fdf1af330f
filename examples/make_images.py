"""Draw the example images: ``content.jpg``, a lake town at dusk, and ``style.jpg``, a field of swirling brush strokes.

Both are computed from fixed seeds with numpy and Pillow alone, so they can be shipped under the project's own licence.

python examples/make_images.py [FOLDER] [--overwrite]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, SHORE = 512, 384, 262
WALLS = np.array([(214, 178, 140), (196, 122, 92), (226, 206, 178), (178, 160, 156), (216, 156, 84), (168, 92, 76)])
ROOFS = np.array([(158, 78, 56), (126, 66, 58), (98, 76, 82), (176, 96, 60)])
# x, base, width, height and depth of the houses, the back row first; width and height of single trees by x
HOUSES = [(x, 242, 22, h, 28) for x, h in ((88, 28), (146, 26), (262, 24), (316, 36), (376, 28))]
HOUSES += [(50, 259, 28, 27, 32), (114, 259, 26, 38, 28), (167, 259, 29, 26, 30), (236, 259, 28, 32, 34)]
HOUSES += [(302, 259, 26, 43, 22), (353, 259, 29, 29, 34), (424, 259, 25, 35, 26)]
TREES = {12: (32, 56), 36: (16, 74), 229: (9, 36), 299: (8, 30), 418: (15, 62), 486: (34, 44), 508: (40, 58)}
# x, y and radius of the whirls, those with a negative radius turning the other way; the colours of the paint
WHIRLS = [(352, 132, 64), (122, 96, -46), (214, 270, -52), (446, 304, 40), (44, 262, 34), (246, 30, 28)]
PAINT_AT = (0.0, 0.2, 0.38, 0.5, 0.62, 0.78, 0.93)
PAINT = [(13, 22, 62), (28, 58, 136), (24, 118, 142), (120, 182, 178), (244, 232, 190), (232, 172, 54), (208, 72, 36)]


def fractal(rng, width, height, cells, octaves=6, stretch=1.0, gain=0.5):
    """Return fractal noise in [0, 1]: `cells` bumps across the width, each `stretch` times wider than high."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        shape = (int(cells * 2**octave * stretch * height / width) + 3, int(cells * 2**octave) + 3)
        grid = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
        total += gain**octave * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    low, high = np.percentile(total, (0.5, 99.5))
    return np.clip((total - low) / (high - low), 0, 1)


def relight(field, strength, dy, dx):
    """Shade a height field by its slope over (dy, dx) pixels: 0.5 is flat, 1 faces the light."""
    padded = np.pad(field, 30, mode="reflect")[30 - dy :, 30 - dx :][: field.shape[0], : field.shape[1]]
    return np.clip(0.5 + strength * (field - padded), 0, 1)


def ramp(values, stops, colours):
    """Map numbers to RGB by linear interpolation between colour stops."""
    return np.stack([np.interp(values, stops, channel) for channel in np.array(colours, float).T], -1)


def to_image(rgb):
    """Turn an array of RGB numbers from 0 to 255 into an image."""
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


class LakeTown:
    """A town on a lake, drawn back to front at three times its final size; lengths are in final pixels."""

    def __init__(self, seed, scale=3):
        self.rng, self.s, self.w, self.h = np.random.default_rng(seed), scale, WIDTH * scale, HEIGHT * scale
        self.y, self.x = np.mgrid[: self.h, : self.w].astype(np.float32) / scale
        self.grain = fractal(self.rng, self.w, self.h, 40, octaves=5, gain=0.8)

    def fill(self, points, top, bottom=None, grain=0.35, courses=0.0):
        """Fill a polygon (or a box, if given two corners) with a weathered gradient and, if asked, courses of tiles."""
        if len(points) == 2:
            points = [(points[i][0], points[j][1]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        points = np.array(points, float) * self.s
        (x0, y0), (x1, y1) = np.maximum(points.min(0).astype(int), 0), np.ceil(points.max(0)).astype(int) + 1
        y, x, grit = (array[y0:y1, x0:x1] for array in (self.y, self.x, self.grain))
        patch = ramp(np.linspace(0, 1, len(y)), (0, 1), (top, top if bottom is None else bottom))[:, None]
        patch = patch * (1 + grain * (2 * grit[..., None] - 1))
        if courses:
            joint = (y / courses % 1 < 0.3) | ((x / courses * 0.6 + np.floor(y / courses) % 2 / 2) % 1 < 0.13)
            patch *= np.where(joint, 0.8, 1.05)[..., None]
        mask = Image.new("L", patch.shape[1::-1])
        ImageDraw.Draw(mask).polygon((points - (x0, y0)).ravel().tolist(), fill=255)
        self.image.paste(to_image(patch), (x0, y0), mask)

    def sky(self):
        """Paint a graded sky, the glow of a low sun and clouds lit from its side."""
        t, away = self.y / SHORE, np.hypot((self.x - 372) / 1.5, self.y - 196)
        dusk = np.array([(38, 62, 118), (84, 112, 164), (168, 160, 182), (240, 184, 140), (252, 206, 140)])
        rgb = ramp(t, (0, 0.25, 0.48, 0.68, 0.85), dusk) + np.exp(-away / 55)[..., None] * (95, 62, 18)
        cloud = fractal(self.rng, self.w, self.h, 3, octaves=8, stretch=2.6, gain=0.55)
        lit = relight(cloud, 9, -24, -18) * np.exp(-away / 330)
        tint = ramp(lit, (0, 0.4, 0.8), [(86, 88, 128), (206, 146, 146), (255, 216, 170)])
        cover = np.clip((cloud - 0.5 + 0.1 * np.sin(t * 9)) * 3.4, 0, 1) * np.clip(1.12 - t * 0.54, 0, 0.95)
        self.image = to_image(rgb + (tint - rgb) * cover[..., None])

    def mountains(self):
        """Lay five ridges over each other, from hazy and snow-capped to near, dark and wooded."""
        rgb = np.asarray(self.image).astype(np.float32)
        for i, base in enumerate((168, 188, 208, 226, 243)):
            profile = fractal(self.rng, self.w, 8, 3 + 1.3 * i, octaves=9, gain=0.5)[4]
            crest = base - (92 - 15 * i) * (np.abs(profile - 0.15) - 0.3)
            crest -= (34 - 4 * i) * np.cos((self.x[0] - 130 + 95 * i) / 75)
            crest -= (i > 2) * 4 * np.abs(np.sin(self.x[0] * 1.1 + 9 * profile)) * self.grain[i]
            depth = self.y - crest
            rock = fractal(self.rng, self.w, self.h, 9 + 8 * i, octaves=7, stretch=0.7, gain=0.62)
            slope = relight(rock, 3.2, 7, -11)
            body = ramp(slope, (0, 1), np.array([(46, 58, 92), (190, 138, 118)]) * (1, 1 + i / 25, 1) * (1 - i / 7))
            if i < 2:
                snow = np.clip((rock * 46 - depth + 4) / 7, 0, 1)[..., None]
                body += (ramp(slope, (0.2, 0.8), [(120, 132, 178), (255, 226, 204)]) - body) * snow
            fog = np.clip(0.5 - 0.12 * i + depth / 190 * (1.3 - i / 4), 0, 0.88)[..., None]
            body += ((226, 178, 160) - body) * fog
            rgb += (body - rgb) * np.clip(depth * self.s, 0, 1)[..., None]
        self.image = to_image(rgb)

    def tree(self, x, base, width, height):
        """Dab leaves into a crown, dark at the lower left and warm at the upper right."""
        draw, tall = ImageDraw.Draw(self.image), height > 3 * width
        draw.line([x * self.s, base * self.s, x * self.s, (base - height / 2) * self.s], (40, 28, 26), 5)
        lumps = self.rng.normal(0, 0.38, (9, 2)) * (0.5 if tall else 1, 0.8)
        for k in range(int(14 * width + 5 * height)):
            u, v = lumps[k % 9] + self.rng.normal(0, 0.22, 2)
            u *= 0.75 - 0.6 * v if tall else 1
            light = 0.42 + 0.4 * u + 0.35 * v + self.rng.normal(0, 0.16)
            colour = ramp(light, (0, 0.55, 1), [(14, 24, 32), (48, 66, 46), (176, 142, 74)])
            centre = np.array((x + u * width / 2, base - height * (0.55 + v * 0.45)))
            leaf = self.rng.uniform(0.5, 1.3) * np.array((1, 0.8))
            draw.ellipse([*(centre - leaf) * self.s, *(centre + leaf) * self.s], tuple(colour.astype(int)))

    def house(self, x, base, w, h, depth, wall, roof):
        """Paint a gabled house: a shaded front, a long side and a tiled roof that take the light, and windows."""
        mid, right, end, eave, ridge = x + w / 2, x + w, x + w + depth, base - h, base - h - w * 0.62
        self.fill([(right, eave), (end, base)], wall * 1.08, wall * 0.72)
        self.fill([(x, base), (x, eave), (mid, ridge), (right, eave), (right, base)], wall * 0.86, wall * 0.52)
        self.fill([(mid + depth * 0.62, ridge - 6), (mid + depth * 0.62 + 4, ridge + 4)], (150, 92, 76))
        slope = [(mid, ridge), (mid + depth, ridge), (end + 2, eave + 2), (right + 2, eave + 2)]
        self.fill(slope, roof * 1.25, roof * 0.8, 0.45, courses=2.2)
        edge = [(x - 2, eave + 2), (mid, ridge - 1), (right + 2, eave + 2), (right + 1, eave + 3.5)]
        self.fill([*edge, (mid, ridge + 2), (x - 2, eave + 4)], roof * 0.5)
        columns = [*np.arange(x + 4, right - 6, 8), *np.arange(right + 4, end - 5, 8.5)]
        windows = [(column, y) for column in columns for y in np.arange(eave + 5, base - 8, 11)]
        for left, top in [(mid - 2, eave - w * 0.2), *windows]:
            glass = ((255, 222, 130), (250, 158, 62)) if self.rng.random() < 0.55 else ((66, 82, 118), (34, 42, 66))
            self.fill([(left - 0.6, top - 0.6), (left + 4.6, top + 6.8)], (58, 44, 44))
            for pane in (left, left + 2.2):
                self.fill([(pane, top), (pane + 1.8, top + 6)], *glass, 0.15)

    def church(self, x, base):
        """Paint a stone tower with arched windows and a copper spire."""
        for left, tone, copper in ((x, 0.62, (38, 60, 71)), (x + 13, 1.12, (140, 158, 136))):
            stone, mid, right = np.array((190, 160, 142)) * tone, left + 6.5, left + 13
            self.fill([(left, base - 96), (right, base)], stone, stone * 0.7, 0.4, 3.5)
            for y, light in ((base - 86, (250, 190, 102)), (base - 56, (40, 36, 50))):
                self.fill(np.array([(-2, 12), (-2, 2), (0, -1), (2, 2), (2, 12)]) + (mid, y), (44, 38, 56), light)
                self.fill([(left - 1.5, y - 12), (right + 1.5, y - 9)], stone * 0.66)
            self.fill([(left - 1, base - 98), (x + 13, base - 160), (right + 1, base - 98)], copper, courses=3)

    def town(self):
        """Place the trees, the two rows of houses, the church between them and the quay."""
        for x in range(-10, WIDTH, 9):
            self.tree(x, SHORE - 3 - 10 * self.rng.random(), 22, self.rng.uniform(16, 32))
        for k, house in enumerate(HOUSES):
            self.house(*house, WALLS[k * 5 % 6] * (0.82 if k < 5 else 1), ROOFS[k * 3 % 4])
            if k == 4:
                self.church(204, SHORE - 6)
                for x in (42, 102, 233, 298, 350, 420, 482):
                    self.tree(x, SHORE - 4, 27, self.rng.uniform(34, 44))
        for x, size in TREES.items():
            self.tree(x, SHORE - 2, *size)
        self.fill([(0, SHORE - 4), (WIDTH, SHORE + 4)], (128, 108, 100), (60, 52, 58), 0.5, courses=2.6)

    def lake(self):
        """Mirror the shore in water whose ripples widen towards the viewer."""
        source, top = np.asarray(self.image).astype(np.float32), (SHORE + 2) * self.s
        y, x = self.y[top:], self.x[top:]
        far = (y - SHORE - 1) / (HEIGHT - SHORE - 2)
        noise = fractal(self.rng, self.w, self.h, 26, octaves=5, stretch=5, gain=0.6)
        column = WIDTH / 2 + (x - WIDTH / 2) * (1 - 0.62 * far)
        ripple = noise[(0.98 * far**0.45 * (self.h - 1)).astype(int), (column * self.s).astype(int)] - 0.5
        rows = np.clip(top - 4 - 640 * far + ripple * 190 * far**0.8, 0, top - 1).astype(int)
        rgb = source[rows, np.clip((x + ripple * 20 * far) * self.s, 0, self.w - 1).astype(int)]
        mix = (0.14 + 0.34 * far + 0.5 * np.clip(-ripple, 0, 1) * far)[..., None]
        rgb = rgb * (1 - mix) * 0.96 + ramp(far, (0, 1), [(84, 92, 122), (22, 44, 76)]) * mix
        glitter = np.exp(-(((x - 412) / (26 + 50 * far)) ** 2)) * np.clip(ripple * 5 - 0.35, 0, 1)
        self.image.paste(to_image(rgb + glitter[..., None] * (130, 92, 48)), (0, top))

    def reeds(self):
        """Grow reeds in the near corners."""
        draw, t = ImageDraw.Draw(self.image), np.linspace(0, 1, 9)
        for k in range(700):
            reach, edge, side = (36, 0, 1) if k % 3 else (20, WIDTH, -1)
            away = self.rng.exponential(reach)
            length, lean = self.rng.uniform(20, 86) * np.exp(-away / reach / 3), self.rng.normal(9, 9)
            colour = ramp(self.rng.random() ** 1.6, (0, 0.6, 1), [(12, 20, 26), (58, 62, 38), (204, 160, 84)])
            blade = np.stack([edge + side * (away - 8 + lean * t**2), HEIGHT + 3 - length * t], 1) * self.s
            draw.line(blade.ravel().tolist(), tuple(colour.astype(int)), int(self.rng.integers(2, 5)))

    def render(self):
        """Draw everything, add bloom and a vignette and reduce to the final size."""
        for step in (self.sky, self.mountains, self.town, self.lake, self.reeds):
            step()
        rgb = np.asarray(self.image).astype(np.float32)
        glow = to_image(rgb - 150).filter(ImageFilter.GaussianBlur(7 * self.s))
        vignette = 1.06 - 0.3 * (((self.x - 270) / 420) ** 2 + ((self.y - 210) / 340) ** 2)
        rgb = (rgb + 0.45 * np.asarray(glow)) * vignette[..., None]
        return to_image(rgb).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def paint_strokes(seed, scale=2):
    """Paint long bristly strokes, broad ones first, along a flow of curl noise and a few whirls."""
    rng, w, h = np.random.default_rng(seed), WIDTH * scale, HEIGHT * scale
    y, x = np.mgrid[:h, :w].astype(np.float32) / scale
    stream, tone = 90 * fractal(rng, w, h, 2.5, octaves=2, gain=0.3) + 0.3 * y, np.zeros((h, w))
    for cx, cy, radius in WHIRLS:
        away = np.hypot(x - cx, y - cy) / abs(radius)
        stream += 2.2 * radius * np.exp(-((away / 1.3) ** 2) / 2)
        tone = np.maximum(tone, 1.02 * np.exp(-(away**1.3)))
    band = 0.5 + 0.5 * np.sin(stream / 7 + 4 * fractal(rng, w, h, 3, octaves=3))
    tone = np.clip(tone + 0.48 * band * (1 - 0.75 * tone), 0, 1)
    flow = np.stack([np.gradient(stream, axis=0), -np.gradient(stream, axis=1)], -1)
    flow /= np.linalg.norm(flow, axis=-1, keepdims=True) + 1e-6
    image, relief = to_image(ramp(tone, PAINT_AT, PAINT)), Image.new("L", (w, h), 90)
    draw, draw_relief = ImageDraw.Draw(image), ImageDraw.Draw(relief)
    for count, length, width in ((900, 110, 15), (1500, 84, 10), (1400, 60, 7), (700, 40, 5)):
        paths, headings = [rng.uniform(-30, (w + 30, h + 30), (count, 2))], []
        for _ in range(14):
            column, row = np.clip(paths[-1].astype(int), 0, (w - 1, h - 1)).T
            headings.append(flow[row, column])
            paths.append(paths[-1] + headings[-1] * length * scale / 14)
        paths, normals = np.stack(paths[:-1], 1), np.stack(headings, 1)[..., ::-1] * (-1, 1)
        column, row = np.clip(paths[:, 7].astype(int), 0, (w - 1, h - 1)).T
        accent = np.where(rng.random(count) < 0.05, rng.uniform(-0.5, 0.5, count), rng.normal(0, 0.05, count))
        colours = ramp(tone[row, column] + accent, PAINT_AT, PAINT)
        taper = np.sin(np.linspace(0.25, np.pi - 0.12, 14))[:, None] ** 0.4 * width * scale / 2
        for path, normal, colour in zip(paths, normals, colours, strict=True):
            thick, load = rng.uniform(60, 130), colour + rng.normal(0, 9, 3)
            for across in np.arange(-1, 1.001, 3.4 / (width * scale)):
                part = slice(rng.integers(0, 3), 14 - rng.integers(0, 4))
                bristle = (path + normal * taper * across)[part].ravel().tolist()
                tint = load + rng.normal(0, 10) + rng.normal(0, 5, 3) + 14 * across
                draw.line(bristle, tuple(np.clip(tint, 0, 255).astype(int)), 3)
                draw_relief.line(bristle, int(thick + 45 * across**4 + rng.uniform(0, 60)), 3)
    height = np.asarray(relief.filter(ImageFilter.GaussianBlur(0.9))).astype(np.float32)
    light = (np.gradient(height, axis=0) + 0.8 * np.gradient(height, axis=1))[..., None]
    rgb = np.asarray(image) * (1 + np.clip(light, -28, 28) / 75) + np.clip(light - 12, 0, 30)
    return to_image(rgb).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="default: the folder of this script")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args()
    content, style = options.folder / "content.jpg", options.folder / "style.jpg"
    for path in (content, style):
        if path.exists() and not options.overwrite:
            parser.error(f"{path} already exists; pass --overwrite or another folder")
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the folder {options.folder}: {error.strerror}")
    LakeTown(seed=7).render().save(content, quality=90)
    paint_strokes(seed=3).save(style, quality=90)
