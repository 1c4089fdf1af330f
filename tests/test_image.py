"""vggfeat.image: each expectation is worked out by hand or comes from a file format, never from the code's output."""

import errno
import io
import math
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from vggfeat import files, image as vi
from vggfeat.errors import ImageError, InputError, RunError, quiet

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]
LOSSLESS = [".png", ".tif"]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SETTINGS = {"content": "Müller 画 🎨.jpg", "steps": 500, "lr": 0.1, "layers": ["relu1_1"], "tv": None}


def pixels(image):
    """The rows of an image as lists of tuples."""
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def picture(rows, mode="RGB"):
    image = Image.new(mode, (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            image.putpixel((x, y), value)
    return image


def png(width, height, data=b"\0", depth=8, colour=2, chunks=()):
    """A PNG file made without Pillow."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.fixture
def scene():
    """A smooth picture that JPEG and WebP keep well."""
    ramp = torch.linspace(0.1, 0.9, 32)
    return torch.stack([ramp.expand(24, 32), ramp.flip(0).expand(24, 32), torch.full((24, 32), 0.5)])[None]


def one_line(info):
    return "\n" not in str(info.value) and len(str(info.value)) > 30


# Reading ----------------------------------------------------------------------------------------------------------


# The stored 2x2 pixels, rows of letters, and what each EXIF orientation makes of them (EXIF 2.3, tag 0x0112:
# "row 0 is the visual ..., column 0 is the visual ...").
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, ["RG", "BW"]),
        (2, ["GR", "WB"]),  # top, right: mirrored
        (3, ["WB", "GR"]),  # bottom, right: half a turn
        (4, ["BW", "RG"]),  # bottom, left: upside down
        (5, ["RB", "GW"]),  # left, top: transposed
        (6, ["BR", "WG"]),  # right, top: row 0 is the right column
        (7, ["WG", "BR"]),  # right, bottom
        (8, ["GW", "RB"]),  # left, bottom
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation(tmp_path, orientation, upright, kind):
    colours = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}
    picture([[RED, GREEN], [BLUE, WHITE]]).save(tmp_path / "a", kind, exif=exif(orientation))
    assert pixels(vi.open_image(tmp_path / "a")) == [[colours[letter] for letter in row] for row in upright]


def test_orientation_of_a_jpeg_is_applied_once_and_swaps_the_sides(tmp_path):
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 16))  # left half white; orientation 6 puts it at the top
    stored.save(tmp_path / "a.jpg", exif=exif(6), quality=100)
    image = vi.open_image(tmp_path / "a.jpg")
    assert image.size == (16, 32)
    assert image.getpixel((8, 4))[0] > 250 and image.getpixel((8, 28))[0] < 5
    tensor = vi.to_tensor(image)
    assert tensor.shape == (1, 3, 32, 16)
    assert tensor[0, 0, 4, 8] > 0.98 and tensor[0, 0, 28, 8] < 0.02


@pytest.mark.parametrize(
    "junk", [b"Exif\0\0garbage garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02a\0\0\0"]
)
def test_damaged_exif_does_not_cost_the_picture(tmp_path, junk):
    picture([[RED, GREEN]]).save(tmp_path / "a.png", exif=junk)
    assert pixels(vi.open_image(tmp_path / "a.png")) == [[RED, GREEN]]


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    picture([[RED, GREEN]]).save(tmp_path / "a.png")

    def no_memory(image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(MemoryError):
        vi.open_image(tmp_path / "a.png")


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    # v * 255 / 65535 = v / 257: 32768 / 257 = 127.502, 128 / 257 = 0.498, 129 / 257 = 0.502
    values, grey = [0, 128, 129, 257, 32768, 65535], [0, 0, 1, 1, 128, 255]
    (tmp_path / "a.png").write_bytes(png(6, 1, b"\0" + struct.pack(">6H", *values), depth=16, colour=0))
    picture([values], "I;16").save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 6 1 65535\n" + struct.pack(">6H", *values))
    big_endian = picture([values], "I;16B")
    big_endian.save(tmp_path / "b.tif")
    for name in ["a.png", "a.tif", "a.pgm", "b.tif"]:
        assert pixels(vi.open_image(tmp_path / name)) == [[(g, g, g) for g in grey]], name


def test_sixteen_bit_grey_in_memory(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 2570, 65535))
    with Image.open(tmp_path / "a.pgm") as image:
        for each in (image, image.copy(), image.crop((0, 0, 2, 1))):  # of which Pillow forgets the format
            assert pixels(vi.as_picture(each)) == [[(10, 10, 10), WHITE]]


def test_transparent_value_of_sixteen_bit_grey_becomes_white(tmp_path):
    data = png(2, 1, b"\0" + struct.pack(">2H", 1000, 2570), 16, 0, [(b"tRNS", struct.pack(">H", 1000))])
    (tmp_path / "a.png").write_bytes(data)
    assert pixels(vi.open_image(tmp_path / "a.png")) == [[WHITE, (10, 10, 10)]]  # 2570 / 257 = 10


def test_floating_tiff_runs_from_0_to_1(tmp_path):
    picture([[0.0, 0.25, 0.5, 1.0]], "F").save(tmp_path / "a.tif")  # 63.75, 127.5
    assert [p[0] for p in pixels(vi.open_image(tmp_path / "a.tif"))[0]] == [0, 64, 128, 255]


@pytest.mark.parametrize(("mode", "value"), [("F", 1.5), ("F", -0.1), ("F", float("nan")), ("I", 200), ("I", 65536)])
def test_values_of_unknown_range_are_refused(tmp_path, mode, value):
    picture([[0, value]], mode).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: (expected F pixels in 0\.\.1, got|32-bit integers)"):
        vi.open_image(tmp_path / "a.tif")


def test_alpha_is_composited_over_white(tmp_path):
    # 255 - alpha + colour * alpha / 255; for black at alpha 51 = 0.2: 204
    picture([[(0, 0, 0, 51), (255, 0, 0, 0), (1, 2, 3, 255)]], "RGBA").save(tmp_path / "rgba.png")
    assert pixels(vi.open_image(tmp_path / "rgba.png")) == [[(204, 204, 204), WHITE, (1, 2, 3)]]
    picture([[(0, 51), (7, 0), (9, 255)]], "LA").save(tmp_path / "la.png")
    assert pixels(vi.open_image(tmp_path / "la.png")) == [[(204, 204, 204), WHITE, (9, 9, 9)]]


def test_tensors_a_little_beyond_0_to_1_are_clamped_and_others_refused():
    a_little = torch.tensor([-0.4, 0.2, 1.4]).expand(3, 1, 3)
    assert pixels(vi.as_picture(a_little)) == [[(0, 0, 0), (51, 51, 51), WHITE]]
    for low, high in ((-0.6, 1.0), (0.0, 1.6)):
        with pytest.raises(InputError, match=rf"expected an image in \[0,1\], got values from {low:g} to {high:g};"):
            vi.as_picture(torch.tensor([low, high]).expand(3, 1, 2))


def test_premultiplied_alpha_is_composited_over_white():
    # 255 - alpha + colour: 255 - 51 + 10 = 214
    assert pixels(vi.as_picture(picture([[(10, 51), (0, 0), (9, 255)]], "La"))) == [[(214,) * 3, WHITE, (9, 9, 9)]]
    colours = picture([[(10, 20, 30, 51), (0, 0, 0, 0)]], "RGBa")
    assert pixels(vi.as_picture(colours)) == [[(214, 224, 234), WHITE]]


@pytest.mark.parametrize(
    ("mode", "shown", "hidden", "key"), [("RGB", (7, 8, 9), (1, 1, 1), (1, 1, 1)), ("L", 7, 1, 1), ("1", 0, 255, 1)]
)
def test_transparent_colour_is_white(tmp_path, mode, shown, hidden, key):
    picture([[shown, hidden]], mode).save(tmp_path / "a.png", transparency=key)
    assert pixels(vi.open_image(tmp_path / "a.png")) == [[shown if mode == "RGB" else (shown,) * 3, WHITE]]


def test_palette_with_and_without_transparency(tmp_path):
    image = picture([[0, 1]], "P")
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.save(tmp_path / "a.png")
    assert pixels(vi.open_image(tmp_path / "a.png")) == [[(200, 10, 20), (30, 40, 50)]]
    image.save(tmp_path / "b.png", transparency=b"\x00\xff")  # an alpha per entry, for which Pillow's convert() warns
    assert pixels(vi.open_image(tmp_path / "b.png")) == [[WHITE, (30, 40, 50)]]
    image.save(tmp_path / "c.gif", transparency=1)
    assert pixels(vi.open_image(tmp_path / "c.gif")) == [[(200, 10, 20), WHITE]]


def test_grey_one_bit_and_cmyk(tmp_path):
    picture([[0, 99]], "L").save(tmp_path / "l.png")
    assert pixels(vi.open_image(tmp_path / "l.png")) == [[(0, 0, 0), (99, 99, 99)]]
    picture([[0, 255]], "1").save(tmp_path / "1.png")
    assert pixels(vi.open_image(tmp_path / "1.png")) == [[(0, 0, 0), WHITE]]
    # without a profile: R = 255 - C - K
    picture([[(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 0, 0)]], "CMYK").save(tmp_path / "c.tif")
    assert pixels(vi.open_image(tmp_path / "c.tif")) == [[WHITE, RED, (0, 0, 0), (0, 255, 255)]]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)  # stored inverted, as by Adobe
    assert all(abs(a - b) <= 3 for a, b in zip(vi.open_image(tmp_path / "c.jpg").getpixel((8, 8)), RED, strict=True))


def linear_profile(kind):
    """An ICC v2 profile with gamma 1: sRGB's primaries, or grey. Written by hand from the ICC specification."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def xyz(*values):
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)  # no entries: the identity
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78), b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if kind == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
        tags |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02100000, b"mntr", kind, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


# sRGB's transfer curve: 255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055) = 136.9 and, for 128, 188.0
@pytest.mark.parametrize(
    ("mode", "kind", "value"),
    [
        ("RGB", b"RGB ", (64, 64, 128)),
        ("RGBA", b"RGB ", (64, 64, 128, 255)),
        ("L", b"GRAY", 64),
        ("LA", b"GRAY", (64, 255)),
    ],
)
def test_embedded_profile_is_converted_to_srgb(tmp_path, mode, kind, value):
    picture([[value]], mode).save(tmp_path / "a.png", icc_profile=linear_profile(kind))
    image = vi.open_image(tmp_path / "a.png")
    expected = (137, 137, 188) if mode.startswith("RGB") else (137, 137, 137)
    assert all(abs(a - b) <= 1 for a, b in zip(image.getpixel((0, 0)), expected, strict=True))
    # not applied a second time
    assert image.info == {}
    assert pixels(vi.to_pil(vi.to_tensor(image))) == pixels(image)


def cmyk_profile():
    """An ICC v2 profile of a press whose inks C, M and Y print nothing: L* = 100 - K, a* = b* = 0."""
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *[65536 if i % 4 == 0 else 0 for i in range(9)])
    lut += bytes(range(256)) * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + bytes(range(256)) * 3  # K varies fastest
    tag = 128 + 4 + 12
    head = struct.pack(">I4sI4s4s4s", tag + len(lut), b"\0" * 4, 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", tag, len(lut)) + lut


def test_profile_of_cmyk(tmp_path):
    inks = [[(255, 255, 255, 0), (0, 0, 0, 255)]]
    picture(inks, "CMYK").save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    white, black = pixels(vi.open_image(tmp_path / "a.tif"))[0]
    assert min(white) >= 254 and max(black) <= 1


def test_profile_applies_before_the_alpha(tmp_path):
    picture([[(64, 64, 64, 0), (64, 64, 64, 128)]], "RGBA").save(
        tmp_path / "a.png", icc_profile=linear_profile(b"RGB ")
    )
    first, second = pixels(vi.open_image(tmp_path / "a.png"))[0]
    assert first == WHITE
    assert abs(second[0] - (137 * 128 + 255 * 127) / 255) <= 1


@pytest.mark.parametrize("case", ["junk", "grey in RGB", "Lab in RGB", "RGB in grey"])
def test_broken_or_foreign_profile_is_ignored(tmp_path, case):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    profiles = {"junk": b"no profile", "grey in RGB": linear_profile(b"GRAY"), "Lab in RGB": lab}
    grey = case == "RGB in grey"
    stored = picture([[64]], "L") if grey else picture([[(64, 65, 66)]])
    stored.save(tmp_path / "a.png", icc_profile=profiles.get(case, linear_profile(b"RGB ")))
    assert pixels(vi.open_image(tmp_path / "a.png")) == [[(64, 64, 64) if grey else (64, 65, 66)]]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    assert vi.open_image(tmp_path / f"a{suffix}").getpixel((0, 0)) == RED


# Reading: what goes wrong -----------------------------------------------------------------------------------------


def jpeg():
    buffer = io.BytesIO()
    picture([[(x * y % 256, x * x % 256, y * y % 256) for x in range(64)] for y in range(64)]).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"These are words.\n", "something else"),
        (jpeg()[: len(jpeg()) // 2], "damaged"),
        (jpeg()[:20], "expected an image"),
        (png(8, 8, bytes(10)), "damaged"),
        (png(2, 2, bytes(14))[:44], "damaged"),
        (png(0, 4), "expected an image"),
        (b"P6 4 0 255\n", "expected an image"),
        (png(100_000, 10_000), "smaller image .*178956970 pixels"),  # Pillow's limit
    ],
    ids=["empty", "text", "half jpg", "jpg head", "few pixels", "half png", "no width", "no height", "bomb"],
)
@pytest.mark.parametrize("read", [vi.open_image, vi.read_settings])
def test_files_that_are_no_whole_image(tmp_path, data, message, read):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    if read is vi.read_settings and "damaged" in message:
        assert read(path) is None  # it does not decode the pixels
        return
    with pytest.raises(ImageError, match=message) as info:
        read(path)
    assert str(info.value).startswith(f"{path}: expected") and one_line(info)


@pytest.mark.parametrize("read", [vi.open_image, vi.read_settings])
def test_missing_file_and_folder(tmp_path, read):
    with pytest.raises(ImageError, match="found nothing of that name") as info:
        read(tmp_path / "none.png")
    assert one_line(info)
    with pytest.raises(ImageError, match="got a folder") as info:
        read(tmp_path)
    assert one_line(info)
    with pytest.raises(ImageError, match="File name too long"):
        read(tmp_path / ("x" * 300 + ".png"))


def test_permission_denied(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.png").write_bytes(png(1, 1, bytes(4)))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match="got 'Permission denied'; check") as info:
        vi.open_image(str(tmp_path / "a.png"))
    assert one_line(info)


def test_a_size_at_which_pillow_only_warns_is_read_without_a_warning(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(5, 3, bytes(3 * 16)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # a warning above 10 pixels, an error above 20
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert vi.open_image(tmp_path / "a.png").size == (5, 3)
    assert seen == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(ImageError, match="15 pixels"):
        vi.open_image(tmp_path / "a.png")


def test_picture_without_pixels():
    with pytest.raises(ImageError, match="at least 1x1 pixels, got 0x5"):
        vi.to_tensor(Image.new("RGB", (0, 5)))


# Tensors ----------------------------------------------------------------------------------------------------------


def test_to_tensor_layout_and_values():
    tensor = vi.to_tensor(picture([[(255, 51, 0), (0, 102, 153), (1, 2, 3)], [RED, GREEN, BLUE]]))
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 3, 2, 3) and tensor.is_contiguous()
    first = torch.tensor(
        [[[1, 0, 1 / 255], [1, 0, 0]], [[0.2, 0.4, 2 / 255], [0, 1, 0]], [[0, 0.6, 3 / 255], [0, 0, 1]]]
    )
    torch.testing.assert_close(tensor[0], first, rtol=0, atol=1e-7)


def test_to_tensor_reads_other_modes_and_leaves_the_image_alone():
    image = picture([[(0, 0, 0, 51)]], "RGBA")
    image.info["note"] = "kept"
    torch.testing.assert_close(vi.to_tensor(image), torch.full((1, 3, 1, 1), 0.8), rtol=0, atol=1e-6)
    assert image.mode == "RGBA" and image.info == {"note": "kept"}


def test_all_levels_survive_the_way_there_and_back():
    levels = picture([[(v, 255 - v, v) for v in range(256)]])
    assert vi.to_pil(vi.to_tensor(levels)).tobytes() == levels.tobytes()


def test_to_pil_clamps_and_rounds_to_nearest():
    values = [-3.0, 0.49 / 255, 0.51 / 255, 1.49 / 255, 1.51 / 255, 127.5 / 255, 254.49 / 255, 254.51 / 255, 1.0, 7.0]
    expected = [0, 0, 1, 1, 2, 128, 254, 255, 255, 255]
    image = vi.to_pil(torch.tensor(values).expand(3, 1, 10))
    assert pixels(image) == [[(v, v, v) for v in expected]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_pil_shapes_channels_and_dtypes(dtype):
    rows = [[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (255, 255, 0)]]
    flat = torch.tensor(rows).permute(2, 0, 1).to(dtype) / 255  # (3, 2, 3), not contiguous
    assert pixels(vi.to_pil(flat)) == rows
    assert pixels(vi.to_pil(flat[None].requires_grad_())) == rows


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 4), (1, 4, 4), (4, 4, 3), (4, 4), (3,), (3, 0, 4), (1, 1, 3, 4, 4), (0, 3, 4, 4)]
)
def test_to_pil_refuses_other_shapes(shape):
    with pytest.raises(InputError, match=r"expected one RGB image.*got torch\.float32 \("):
        vi.to_pil(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_to_pil_refuses_other_dtypes(dtype):
    with pytest.raises(InputError, match=f"got {dtype}"):
        vi.to_pil(torch.zeros(3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_to_pil_refuses_values_that_are_not_finite(value):
    images = torch.zeros(1, 3, 4, 4)
    images[0, 1, 2, 3] = value
    with pytest.raises(InputError, match="finite"):
        vi.to_pil(images)


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480, 320), (320, 240)),
        ((480, 640, 320), (240, 320)),
        ((100, 100, 7), (7, 7)),
        ((1000, 1, 10), (10, 1)),  # 0.01, at least 1
        ((1, 1000, 10), (1, 10)),
        ((3, 2, 100), (100, 67)),  # 66.67
        ((2, 3, 100), (67, 100)),
        ((400, 300, 2), (2, 2)),  # 1.5
        ((300, 400, 2), (2, 2)),
        ((10, 5, 10), (10, 5)),
        ((30, 20, 3000), (3000, 2000)),
    ],
)
def test_fit(size, expected):
    assert vi.fit(*size) == expected


@pytest.mark.parametrize("size", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (4, 4, -1)])
def test_fit_refuses_lengths_below_one(size):
    with pytest.raises(InputError, match="at least 1 pixel"):
        vi.fit(*size)


def test_resize():
    image = picture([[(100, 100, 100)] * 4 + [(200, 200, 200)] * 4] * 8)
    assert vi.resize(image, 8, 8) is image
    assert vi.resize(Image.new("RGB", (4, 2)), 2, 4).size == (2, 4)
    small = vi.resize(image, 2, 4)
    assert small.size == (2, 4)
    # Lanczos is symmetric about the edge, so the halves stay as far from 150 on either side, and apart
    left, right = small.getpixel((0, 1))[0], small.getpixel((1, 1))[0]
    assert abs(left + right - 300) <= 1 and left < 110 and right > 190
    assert vi.resize(Image.new("RGB", (4, 4), (9, 8, 7)), 9, 5).getcolors() == [(45, (9, 8, 7))]
    with pytest.raises(InputError, match="got 0x5"):
        vi.resize(image, 0, 5)


# Where to write ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PNG", ".Jpg"])
def test_check_output_takes_every_format(tmp_path, suffix):
    assert vi.check_output(str(tmp_path / f"a{suffix}")) == tmp_path / f"a{suffix}"
    assert list(tmp_path.iterdir()) == []


def test_formats_are_those_of_the_brief():
    assert sorted(vi.FORMATS) == sorted(SUFFIXES)
    assert set(vi.FORMATS.values()) == {"PNG", "JPEG", "WEBP", "TIFF"}


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png"])
def test_check_output_names_the_formats(tmp_path, name):
    with pytest.raises(ImageError) as info:
        vi.check_output(tmp_path / name)
    assert all(suffix in str(info.value) for suffix in SUFFIXES) and one_line(info)


def test_check_output_refuses(tmp_path, monkeypatch):
    file, folder, link = tmp_path / "a.png", tmp_path / "folder.png", tmp_path / "link.png"
    file.write_bytes(b"old")
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=r"already exists.*--overwrite.*another name"):
        vi.check_output(file)
    with pytest.raises(ImageError, match="already exists"):
        vi.check_output(link)
    assert vi.check_output(file, overwrite=True) == file
    with pytest.raises(ImageError, match="got a folder"):
        vi.check_output(folder, overwrite=True)
    with pytest.raises(ImageError, match="expected a folder at .*none, found none"):
        vi.check_output(tmp_path / "none" / "b.png")
    with pytest.raises(ImageError, match="expected a folder at .*a.png"):
        vi.check_output(file / "b.png")
    with pytest.raises(ImageError, match="File name too long"):
        vi.check_output(tmp_path / ("x" * 300 + ".png"))
    for right in (os.W_OK, os.X_OK):  # both are needed to make a file
        monkeypatch.setattr(os, "access", lambda path, mode, right=right: not (Path(path) == tmp_path and mode & right))
        with pytest.raises(ImageError, match="not writable"):
            vi.check_output(tmp_path / "b.png")


def test_check_output_refuses_what_is_read_and_what_is_no_file(tmp_path, monkeypatch):
    file, link, pipe = tmp_path / "a.png", tmp_path / "link.png", tmp_path / "pipe.png"
    file.write_bytes(b"old")
    link.symlink_to(file)
    for name in (file, link, tmp_path / "." / "a.png"):
        with pytest.raises(ImageError, match="one of the files that are read"):
            vi.check_output(name, overwrite=True, inputs=["missing.png", file])
    assert vi.check_output(link, overwrite=True, inputs=["missing.png"]) == link
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        with pytest.raises(ImageError, match="a device or a pipe"):
            vi.check_output(pipe, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)
    with pytest.raises(ImageError, match="protected against writing"):
        vi.check_output(file, overwrite=True)


def test_files_in_a_folder_that_is_read_stay(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(ImageError, match="it is one of the files that are read"):
        vi.check_output(tmp_path / "a.png", overwrite=True, inputs=[tmp_path])
    assert vi.check_output(tmp_path / "b.png", inputs=[tmp_path]) == tmp_path / "b.png"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_check_output_refuses_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ImageError, match="not writable"):
            vi.check_output(tmp_path / "b.png")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_temporary_file_that_cannot_be_removed_loses_no_picture(tmp_path, monkeypatch, overwrite):
    """Where on Windows another program, such as a virus scanner, has it open."""

    def held(path, missing_ok=False):
        raise PermissionError(13, "another program has it open")

    monkeypatch.setattr(Path, "unlink", held)
    with files.new_file(tmp_path / "a.png", overwrite=overwrite) as file:
        file.write(b"picture")
    assert (tmp_path / "a.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EACCES, "choose another place"),
    ],
    ids=["full", "quota", "permission"],
)
def test_what_to_do_about_a_file_that_cannot_be_written(tmp_path, number, hint):
    said = f"cannot write .*a.txt: {os.strerror(number)}; {hint}$"
    with pytest.raises(RunError, match=said), files.written(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_free_name(tmp_path):
    path = tmp_path / "a.b.png"
    assert files.free_name(str(path)) == path
    path.touch()
    assert files.free_name(path) == tmp_path / "a.b-2.png"
    (tmp_path / "a.b-2.png").symlink_to(tmp_path / "nowhere")  # taken, though nothing is behind it
    (tmp_path / "a.b-3.png").mkdir()
    (tmp_path / "a.b-5.png").touch()
    assert files.free_name(path) == tmp_path / "a.b-4.png"


# Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_and_open(tmp_path, scene, suffix):
    path = vi.save_image(scene, str(tmp_path / f"a{suffix}"))
    assert path == tmp_path / f"a{suffix}"
    with Image.open(path) as stored:
        assert stored.format == vi.FORMATS[suffix] and stored.mode == "RGB"
    error = (vi.to_tensor(vi.open_image(path)) - scene).abs().max() * 255
    assert error <= (0.501 if suffix in (".png", ".tif", ".tiff") else 8)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_suffixes_in_capitals(tmp_path, scene):
    with Image.open(vi.save_image(scene, tmp_path / "a.JPG")) as stored:
        assert stored.format == "JPEG"


def test_quality(tmp_path, scene):
    with Image.open(vi.save_image(scene, tmp_path / "a.jpg")) as jpg:
        # ITU-T T.81 table K.1 starts with 16 and 11; libjpeg's quality 95 takes a tenth of it, rounded
        assert list(jpg.quantization[0])[:2] == [2, 1]
        assert jpg.layer[0][1:3] == (1, 1)  # no subsampling
    with Image.open(vi.save_image(scene, tmp_path / "a.tif")) as tif:
        assert tif.info["compression"] in ("tiff_deflate", "tiff_adobe_deflate")


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_save_takes_pillow_images_of_any_mode(tmp_path, suffix):
    path = vi.save_image(picture([[(0, 0, 0, 51), (9, 8, 7, 255)]], "RGBA"), tmp_path / f"a{suffix}")
    with Image.open(path) as stored:
        assert stored.mode == "RGB" and pixels(stored) == [[(204, 204, 204), (9, 8, 7)]]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("settings", [SETTINGS, {}, {"long": "ü" * 5000}])
def test_settings_survive(tmp_path, scene, suffix, settings):
    path = vi.save_image(scene, tmp_path / f"a{suffix}", settings=settings)
    assert vi.read_settings(path) == settings
    assert vi.open_image(path).size == (32, 24)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_settings(tmp_path, scene, suffix):
    assert vi.read_settings(vi.save_image(scene, tmp_path / f"a{suffix}")) is None


def test_numbers_that_json_lacks_cost_no_picture(tmp_path, scene):
    settings = {"error": math.nan, "rest": [1.5, math.inf, {"low": -math.inf}]}
    path = vi.save_image(scene, tmp_path / "a.png", settings=settings)
    assert vi.read_settings(path) == {"error": None, "rest": [1.5, None, {"low": None}]}


def test_where_settings_are_stored(tmp_path, scene):
    with Image.open(vi.save_image(scene, tmp_path / "a.png", settings={"steps": 5})) as stored:
        assert stored.text == {"vggfeat": '{"steps": 5}'}
    for suffix in (".jpg", ".webp", ".tif"):
        with Image.open(vi.save_image(scene, tmp_path / f"a{suffix}", settings={"steps": 5})) as stored:
            assert stored.getexif()[0x010E] == '{"steps": 5}' and stored.getexif()[0x0131] == "vggfeat"


@pytest.mark.parametrize(
    ("description", "software"),
    [('{"steps": 5}', "someone"), ("a photo", "vggfeat"), ("[1]", "vggfeat"), ("5", "vggfeat")],
)
def test_descriptions_of_others_are_not_settings(tmp_path, description, software):
    tags = Image.Exif()
    tags[0x010E], tags[0x0131] = description, software
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=tags)
    assert vi.read_settings(tmp_path / "a.jpg") is None


def test_settings_that_do_not_fit(tmp_path, scene):
    with pytest.raises(ImageError, match=r"at most 65533 bytes in a JPEG, got 7\d{4}; save a \.png"):
        vi.save_image(scene, tmp_path / "a.jpg", settings={"long": "x" * 70_000})
    for settings in ({"a": object()}, {"a": {1, 2}}):
        with pytest.raises(InputError, match="JSON"):
            vi.save_image(scene, tmp_path / "a.png", settings=settings)
    assert list(tmp_path.iterdir()) == []
    for suffix in (".png", ".webp", ".tif"):
        path = vi.save_image(scene, tmp_path / f"a{suffix}", settings={"long": "x" * 70_000})
        assert vi.read_settings(path) == {"long": "x" * 70_000}


def test_settings_that_just_fit(tmp_path, scene):
    """A JPEG segment's length is 16 bits and counts its own two bytes: 65535 - 2 are left."""
    with pytest.raises(ImageError, match=r"at most 65533 bytes in a JPEG, got \d+") as info:
        vi.save_image(scene, tmp_path / "a.jpg", settings={"long": "x" * 70_000})
    around = int(str(info.value).split("got ")[1].split(";")[0]) - 70_000
    fits = {"long": "x" * (65533 - around)}
    assert vi.read_settings(vi.save_image(scene, tmp_path / "a.jpg", settings=fits)) == fits
    with pytest.raises(ImageError, match="at most 65533 bytes in a JPEG, got 65534"):
        vi.save_image(scene, tmp_path / "b.jpg", settings={"long": fits["long"] + "x"})


def test_never_overwrites_unasked(tmp_path, scene):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ImageError, match="--overwrite"):
        vi.save_image(scene, path)
    assert path.read_bytes() == b"old"
    vi.save_image(scene, path, overwrite=True)
    assert vi.open_image(path).size == (32, 24)
    assert list(tmp_path.iterdir()) == [path]


def broken_save(monkeypatch, failure):
    """Let Pillow write some bytes and fail; what the folder held at that time is returned."""
    seen = []

    def save(self, file, format=None, **options):
        file.write(b"half a picture")
        file.flush()
        seen.extend(p.name for p in Path(file.name).parent.iterdir())
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    return seen


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ImageError),
        (ValueError("encoding error 5"), ImageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_midway_leaves_nothing_behind(tmp_path, scene, monkeypatch, failure, raised, overwrite):
    path = tmp_path / "a.png"
    if overwrite:
        path.write_bytes(b"old")
    seen = broken_save(monkeypatch, failure)
    with pytest.raises(raised) as info:
        vi.save_image(scene, path, overwrite=overwrite)
    if raised is ImageError:
        assert str(info.value).startswith(f"cannot write {path}: {failure.args[-1]};") and one_line(info)
    assert len(seen) == 1 + overwrite  # the temporary file lay in the same folder
    assert [p.name for p in tmp_path.iterdir()] == (["a.png"] if overwrite else [])
    assert not overwrite or path.read_bytes() == b"old"


def test_a_picture_too_large_for_the_format(tmp_path):
    with pytest.raises(ImageError, match="encoding error 5.*another format"):
        vi.save_image(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, scene, monkeypatch, links):
    path, fsync = tmp_path / "a.png", os.fsync

    def sync(descriptor):
        fsync(descriptor)
        path.write_bytes(b"someone else's")

    def no_link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", sync)  # also shows that the file is synced before it gets its name
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(ImageError, match="already exists"):
        vi.save_image(scene, path)
    assert path.read_bytes() == b"someone else's"
    assert list(tmp_path.iterdir()) == [path]
    vi.save_image(scene, path, overwrite=True)
    assert vi.open_image(path).size == (32, 24)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_whole_file_is_synced(tmp_path, scene, monkeypatch, suffix):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    assert [vi.save_image(scene, tmp_path / f"a{suffix}").stat().st_size] == synced


def test_saving_where_there_are_no_hard_links(tmp_path, scene, monkeypatch):
    monkeypatch.delattr(os, "link")
    path = vi.save_image(scene, tmp_path / "a.png")
    assert vi.open_image(path).size == (32, 24)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_permissions_follow_the_umask(tmp_path, scene, umask, mode, overwrite):
    previous = os.umask(umask)
    try:
        path = vi.save_image(scene, tmp_path / "a.png", overwrite=overwrite)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_what_replaces_a_file_is_as_private_and_where_its_link_leads(tmp_path, scene):
    (tmp_path / "elsewhere").mkdir()
    private, link = tmp_path / "elsewhere" / "a.png", tmp_path / "link.png"
    private.write_bytes(b"old")
    private.chmod(0o600)
    link.symlink_to(Path("elsewhere") / "a.png")
    assert vi.save_image(scene, link, overwrite=True) == link
    assert link.is_symlink() and private.stat().st_mode & 0o777 == 0o600 and vi.open_image(private).size == (32, 24)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "link.png"]
    assert [*private.parent.iterdir()] == [private]


def test_what_a_dangling_link_leads_to_is_written(tmp_path, scene):
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "new.png")
    assert vi.save_image(scene, link, overwrite=True) == link
    assert link.is_symlink() and vi.open_image(tmp_path / "new.png").size == (32, 24)


def test_check_output_refuses_a_link_into_a_folder_without_permission(tmp_path, monkeypatch):
    file, link = tmp_path / "there" / "a.png", tmp_path / "link.png"
    file.parent.mkdir()
    file.write_bytes(b"old")
    link.symlink_to(file)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file.parent)
    with pytest.raises(ImageError, match="that it leads to is not writable"):
        vi.check_output(link, overwrite=True)


@pytest.mark.parametrize("read", ["", "a.png", "\0.png"], ids=["folder", "file", "none"])
@pytest.mark.parametrize("name", ["\0.png", "there\0/a.png", "x" * 300 + ".png"], ids=["zero", "in zero", "long"])
def test_names_that_no_file_can_have(tmp_path, scene, name, read):
    with pytest.raises(ImageError, match=r"(?s)^cannot write .*; (choose|create)") as info:
        vi.check_output(tmp_path / name, inputs=[tmp_path / read])
    assert one_line(info)
    with pytest.raises(ImageError, match=r"(?s)^cannot write .*; (choose|create)"):
        vi.save_image(scene, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_links_that_lead_in_a_circle(tmp_path):
    link, back = tmp_path / "a.png", tmp_path / "b.png"
    link.symlink_to(back)
    back.symlink_to(link)
    assert vi.check_output(tmp_path / "c.png", inputs=[link]) == tmp_path / "c.png"
    with pytest.raises(ImageError, match="expected a folder at .*a.png, found none"):
        vi.check_output(link / "c.png", inputs=[tmp_path / "d.png"])
    with pytest.raises(ImageError, match="one of the files that are read"):
        vi.check_output(link, overwrite=True, inputs=[link])
    with pytest.raises(ImageError, match="already exists"):
        vi.check_output(link, inputs=[tmp_path])
    assert vi.check_output(link, overwrite=True, inputs=[tmp_path]) == link


def test_numbers_that_json_lacks_inside_a_tuple(tmp_path):
    path = vi.save_image(Image.new("RGB", (1, 1)), tmp_path / "a.png", settings={"v": (1.0, float("nan"))})
    assert vi.read_settings(path) == {"v": [1.0, None]}


def test_empty_names():
    with pytest.raises(ImageError, match="expected an image file, got an empty name"):
        vi.open_image("")
    with pytest.raises(ImageError, match="expected a file name, got an empty one"):
        vi.check_output("")


def test_pictures_opened_in_threads_leave_warnings_as_they_were(tmp_path):
    """Contexts that overlap, as of two threads: a process must not be silenced for good."""
    before = list(warnings.filters)
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn_explicit("odd metadata", UserWarning, "Image.py", 1, module="PIL.Image")  # an error if it is seen
    with pytest.warns(UserWarning, match="of the program's own"):
        warnings.warn("of the program's own", stacklevel=1)
    second.__exit__(None, None, None)
    assert warnings.filters == before
    Image.new("RGB", (600, 400)).save(tmp_path / "a.jpg")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: vi.open_image(tmp_path / "a.jpg"), range(80)))
    assert warnings.filters == before
