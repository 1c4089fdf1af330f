"""Pictures: against numbers worked out by hand, ordinary autograd, and the network as plain modules."""

import copy
import csv
import errno
import importlib
import inspect
import json
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import click
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from vggfeat_cli import analyse, learn, main as command_module, pictures

import vggfeat
from vggfeat import visualize
from vggfeat.arch import Arch, parse, scaled
from vggfeat.image import fit, open_image, read_settings, resize, to_pil, to_tensor
from vggfeat.training.folder import write_weights
from vggfeat.transfer.objective import Objective
from vggfeat.visualize import Sheet, cam, distance, dream, filters, invert, maps, sheet as sheet_module
from vggfeat.visualize.dreams import _Fourier, _jittered, _Pixels
from vggfeat.visualize.sheet import overlay, palette, spread
from vggfeat.visualize.units import _crop, _mosaic, _peaks
from vggfeat.weights import DEFAULT, load

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small():
    """Random weights of a VGG-11 an eighth as wide, every layer's output at unit scale."""
    return load("random", Arch("A", channels=scaled(8), head=None))


@pytest.fixture(scope="module")
def headed():
    """The same with a classifier for 5 classes on top."""
    torch.manual_seed(0)
    net = vggfeat.vgg11(5, width=0.125, head="slim", weights=None).eval()
    vggfeat.weights.load_weights(net, load("random", Arch("A", channels=scaled(8), head=None)), head=False)
    torch.nn.init.normal_(net.classifier[1].weight)
    return net


def noise(*shape, seed=0):
    """Smooth random images."""
    low = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(low, size=shape, mode="bicubic").clamp(0, 1)


def pixels(picture):
    return (to_tensor(picture)[0] * 255).round().int()  # (3,H,W)


# ── what goes in ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [None, 32])
def test_images_that_are_not_in_0_to_1_are_refused(small, size):
    for wrong in (noise(48, 48) * 255, noise(48, 48) * 2 - 1, noise(48, 48) * 2):
        with pytest.raises(vggfeat.InputError, match=r"expected an image in \[0,1\], got values from"):
            maps(wrong, "relu1_1", weights=small, size=size)
    with pytest.raises(vggfeat.InputError, match="size must be a whole number of at least 1, got"):
        maps(noise(48, 48), "relu1_1", weights=small, size=0)


def test_one_image_needs_no_batch_and_any_kind_of_numbers_will_do(small):
    image = noise(32, 48)
    expected = maps(image, "relu1_1", size=None, weights=small).image.tobytes()
    for same in (image[0], image.double(), image.clone().requires_grad_()):
        assert maps(same, "relu1_1", size=None, weights=small).image.tobytes() == expected
        assert distance(same, image, ["relu1_1"], weights=small).total == 0


def test_pictures_are_rgb_before_they_are_resized(small):
    picture = to_pil(noise(48, 64)).quantize(16)  # whose numbers have no order
    expected = resize(picture.convert("RGB"), 32, 24)
    found = distance(picture, expected, ["relu1_1"], weights=small, size=32)
    assert found.total == 0


# ── sheets ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_single_tile_is_the_sheet_and_several_stand_in_rows():
    tile = Image.new("RGB", (20, 10), "red")
    assert Sheet([tile]).image.tobytes() == tile.tobytes()
    sheet = Sheet([Image.new("RGB", (20, 10), name) for name in ("red", "lime", "blue")], columns=2)
    picture = sheet.image
    assert picture.size == (12 + 20 + 6 + 20 + 12, 12 + 10 + 6 + 10 + 12)
    spots = [picture.getpixel(at) for at in ((12, 12), (38, 12), (12, 28), (38, 28))]
    assert spots == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_tiles_fill_the_room_under_a_wide_title_in_even_rows():
    tile, title = Image.new("RGB", (20, 10), "red"), "a title of some length"
    width, height = Sheet([tile] * 4, (), title).image.size
    assert height == 12 + 18 + 12 + 10 + 12  # one row
    assert width > 12 + 4 * 20 + 3 * 6 + 12
    rows = Sheet([tile] * 12, (), title).image
    assert rows.height == 12 + 18 + 12 + 10 + 6 + 10 + 12
    assert rows.getpixel((12 + 5 * 26, 42)) == (255, 0, 0) and rows.getpixel((12 + 6 * 26, 42)) == (255, 255, 255)


@pytest.mark.parametrize(("count", "height", "across"), [(12, 80, 6), (12, 40, 6), (13, 20, 4)])
def test_tiles_make_about_a_square_with_full_rows_if_possible(count, height, across):
    picture = Sheet([Image.new("RGB", (20, height))] * count).image
    down = math.ceil(count / across)
    assert picture.size == (12 + across * 26 - 6 + 12, 12 + down * (height + 6) - 6 + 12)


def test_labels_and_title_are_drawn_in_black():
    tile = Image.new("RGB", (40, 10), "white")
    plain, labelled = Sheet([tile, tile]).image, Sheet([tile, tile], ["12", "13"], "Title").image
    assert min(plain.convert("L").tobytes()) == 255 and min(labelled.convert("L").tobytes()) < 50


def test_a_sheet_at_a_prompt_is_one_short_line():
    sheet = Sheet([Image.new("RGB", size) for size in ((30, 10), (15, 20))], ["1", "2"], "T", settings={"layer": "x"})
    assert repr(sheet) == "Sheet('T', 2 tiles of at most 30×20 pixels)"


def test_heat_shows_in_grey_too():
    image, heat = torch.full((1, 3, 4, 4), 0.5), torch.zeros(4, 4)
    heat[1, 2] = 1
    found = overlay(image, heat, "grey")
    assert torch.allclose(found[..., 1, 2], torch.tensor(0.5)) and found[..., 0, 0].max() < 0.1


def test_labels_of_any_letters_and_length():
    tile = Image.new("RGB", (300, 10), "white")
    heads = [
        Sheet([tile], [label]).image.crop((0, 12, 324, 26)).tobytes() for label in ("Tübingen\n→", "Tübingen →", "T")
    ]
    assert heads[0] == heads[1] != heads[2]  # a line break is a space
    boxes = Sheet([tile], ["T\uffffbingen \uffff"]).image.crop((0, 12, 324, 26)).tobytes()  # what no font has
    assert heads[1] != boxes
    assert Sheet([tile], ["x" * 5000], "y" * 5000).image.width < 2000


def test_labels_without_a_font_for_them(monkeypatch):
    monkeypatch.setattr(sheet_module, "FONT", "no such font")
    sheet_module._font.cache_clear()
    try:
        assert sheet_module._drawable("Tübingen … ‖×") == "Tubingen ... ??"
        assert Sheet([Image.new("RGB", (9, 9))], ["größte"]).image.width > 30
    finally:
        sheet_module._font.cache_clear()


def test_letters_that_the_usual_font_lacks():
    pytest.importorskip("matplotlib")  # which brings it
    assert sheet_module._drawable("猫 née × Łódź…\U0010ffff") == "? née × Łódź…?"


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_ending_chooses_the_format(tmp_path, suffix, start):
    if suffix != ".png":
        matplotlib = pytest.importorskip("matplotlib")
        before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    sheet = Sheet([Image.new("RGB", (30, 20), "red")] * 2, ["$a", "b_1"], "T", settings={"layer": "conv1_1"})
    path = sheet.save(tmp_path / f"a{suffix}")
    assert path.read_bytes().startswith(start)
    with pytest.raises(vggfeat.ImageError, match="already exists"):
        sheet.save(path)
    assert [each.name for each in tmp_path.iterdir()] == [f"a{suffix}"]
    if suffix == ".png":
        assert read_settings(path) == {"layer": "conv1_1"}
    else:
        assert ("matplotlib.pyplot" in sys.modules) == pyplot and dict(matplotlib.rcParams) == before


def test_a_label_stands_over_the_middle_of_its_own_tile():
    wide, narrow = Image.new("RGB", (60, 20), "red"), Image.new("RGB", (20, 10), "lime")
    dark = to_tensor(Sheet([wide, narrow], ["", "x"], columns=9).image)[0].sum(0) < 1
    rows, columns = dark.nonzero().unbind(1)
    assert 12 <= rows.min() and rows.max() < 12 + 13  # the second tile begins at 12 + 60 + 6, below 13 pixels and a gap
    assert float(columns.float().mean()) == pytest.approx(78 + 30, abs=1.5)
    picture = Sheet([wide, narrow], ["", "x"], columns=9).image
    assert picture.size == (12 + 60 + 6 + 60 + 12, 12 + 19 + 20 + 12)
    lime = (to_tensor(picture)[0, 1] - to_tensor(picture)[0, 0] > 0.9).nonzero()
    assert lime.amin(0).tolist() == [31, 98] and lime.amax(0).tolist() == [40, 117]


def test_a_long_title_has_a_line_under_the_other():
    tile = Image.new("RGB", (40, 10), "white")
    one, two = (Sheet([tile], (), " ".join(["word"] * count)).image for count in (1, 12))
    assert two.height - one.height == 18 + 6
    first, second = (two.crop((12, top, 12 + 100, top + 18)).convert("L") for top in (12, 12 + 24))
    assert min(second.tobytes()) < 50 and first.tobytes() == second.tobytes()  # both begin with the same words


def test_a_sheet_with_real_text_looks_like_the_one_of_pixels():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    tiles = [to_pil(noise(20, 60, seed=seed)) for seed in range(2)]
    sheet = Sheet(tiles, ["", "label"], "Title", columns=2)
    canvas = FigureCanvasAgg(sheet.figure())
    assert not any(text.get_parse_math() for text in canvas.figure.axes[0].texts)  # names of files may have $ in them
    canvas.draw()
    width, height = canvas.get_width_height()
    drawn = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba()).convert("RGB")
    assert drawn.size == sheet.image.size
    top = 12 + 18 + 6 + 6 + 19  # of the tiles: the title, a gap more, and the labels
    assert drawn.crop((0, top, width, height)).tobytes() == sheet.image.crop((0, top, width, height)).tobytes()
    for begin, end, where in ((0, 36, torch.amin), (36, top, torch.mean)):  # the title from the left, the label centred
        texts = (to_tensor(each.crop((0, begin, width, end)))[0].mean(0) < 0.5 for each in (drawn, sheet.image))
        places = [where(text.nonzero().float(), 0) for text in texts]
        assert (places[0] - places[1]).abs().max() < 2.5


def test_small_pictures_grow_by_whole_pixels_and_large_ones_are_averaged():
    row = to_pil(torch.rand(1, 3, 1, 100))
    small = sheet_module.enlarged(row, 20)
    means = to_tensor(row)[0, 0, 0].view(20, 5).mean(1)
    assert small.size == (20, 1) and (to_tensor(small)[0, 0, 0] - means).abs().max() < 1 / 255
    assert [sheet_module.enlarged(Image.new("RGB", (10, 5)), side).size for side in (14, 16, 48)] == [
        (10, 5), (20, 10), (50, 25),
    ]  # fmt: skip


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(vggfeat.DependencyError, match=r"pip install 'vggfeat\[plot\]'"):
        Sheet([Image.new("RGB", (9, 9))]).save(tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_palettes_begin_and_end_where_they_are_known_to():
    assert (palette("viridis")[[0, -1]] * 255).round().int().tolist() == [[68, 1, 84], [253, 231, 37]]
    assert palette("grey")[51].tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(vggfeat.InputError, match="did you mean viridis"):
        palette("viridid")


def test_spreading_over_whole_multiples_keeps_the_mean_and_no_heat_leaves_the_grey():
    values = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    assert float(spread(values, (24, 40)).mean()) == pytest.approx(float(values.mean()), abs=1e-6)
    image = noise(8, 8)
    cold = overlay(image, torch.zeros(8, 8))
    assert torch.allclose(cold, (0.15 + 0.7 * image.mean(1, keepdim=True)).expand_as(cold))


def test_the_hottest_place_is_mostly_of_the_last_colour():
    heat = torch.zeros(2, 2)
    heat[0, 1] = 1
    found = overlay(torch.full((1, 3, 2, 2), 0.4), heat, "viridis")[0, :, 0, 1]
    grey, last = 0.4 * 0.7 + 0.15, torch.tensor([253, 231, 37]) / 255
    torch.testing.assert_close(found, 0.25 * grey + 0.75 * last, atol=2e-3, rtol=0)


# ── filters ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_first_layer_filters_are_scaled_around_mid_grey(small):
    state = {key: value.clone() for key, value in small.state.items()}
    kernels = state["features.0.weight"].zero_()
    kernels[1, 0, 1, 1], kernels[1, 2, 0, 2] = -2.0, 1.0
    kernels[2] = 0.01  # small weights look like large ones
    sheet = filters(weights=state, arch="vgg11", count=1000)
    assert sheet.labels == [str(i) for i in range(8)]
    grey, colour, white = (pixels(tile)[:, ::16, ::16] for tile in sheet.tiles[:3])
    assert grey.shape == (3, 3, 3) and (grey == 128).all()
    expected = torch.full((3, 3, 3), 128)
    expected[0, 1, 1], expected[2, 0, 2] = 0, 191  # 0.5 - 0.5, and 0.75 · 255 to the nearest
    assert torch.equal(colour, expected.int()) and (white == 255).all()


def test_filters_by_number_and_by_strength(small):
    norms = small.state["features.0.weight"].flatten(1).norm(dim=1)
    assert filters(weights=small, channels=[5, 2]).labels == ["5", "2"]
    assert filters(weights=small, count=3, order="strongest").labels == [str(int(i)) for i in norms.topk(3).indices]
    with pytest.raises(vggfeat.InputError, match="channels 0 to 7, got 8"):
        filters(weights=small, channels=[8])
    with pytest.raises(vggfeat.InputError, match="give images"):
        filters("conv2_1", weights=small)
    with pytest.raises(vggfeat.InputError, match="did you mean conv"):
        filters("convv2_1", weights=small)


@pytest.mark.parametrize("name", ["conv1_1", "pool1", "conv2_1", "relu3_2", "pool3", "conv4_1"])
def test_a_crop_is_what_its_unit_sees(name):
    """Against the gradient, in a network of positive weights: all pixels that a unit sees have one."""
    layer = parse("vgg11").layer(name)
    net = vggfeat.vgg11(2, width=1 / 64, head="slim")
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 0.1)
        if isinstance(module, torch.nn.Sequential):
            for i, each in enumerate(module):
                if isinstance(each, torch.nn.MaxPool2d):
                    module[i] = torch.nn.AvgPool2d(2)  # which sees its whole window
    x = torch.ones(1, 3, 128, 128, requires_grad=True)
    row, column = 64 // layer.stride, 64 // layer.stride + 1
    net.taps(x, [name])[name][0, 0, row, column].backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    places = torch.arange(128.0 * 128).view(1, 1, 128, 128)
    crop = _crop(places, layer, row, column)[0, 0]
    assert crop.shape == (layer.receptive_field,) * 2
    assert (int(crop[0, 0]), int(crop[-1, -1])) == (
        int(rows.min() * 128 + columns.min()),
        int(rows.max() * 128 + columns.max()),
    )


def test_a_crop_at_the_border_is_grey_beyond_it():
    crop = _crop(torch.ones(1, 3, 8, 8), parse("vgg11").layer("conv1_1"), 0, 7)
    assert crop[0, 0].tolist() == [[0.5, 0.5, 0.5], [1, 1, 0.5], [1, 1, 0.5]]


def test_peaks_are_local_maxima_apart_and_inside():
    layer = parse("vgg11").layer("conv2_1")  # sees 8 pixels, stride 2
    tap = torch.zeros(1, 20, 20)
    tap[0, 10, 10], tap[0, 10, 11], tap[0, 4, 15], tap[0, 0, 0] = 5.0, 4.0, 3.0, 9.0
    values, places = _peaks(tap, layer, 2)
    assert values.tolist() == [[5, 3]] and places.tolist() == [[[10, 10], [4, 15]]]
    values, places = _peaks(tap[:, :2, :2], layer, 2)  # every unit sees beyond the border
    assert values.tolist() == [[9, -math.inf]] and places[0, 0].tolist() == [0, 0]
    assert _peaks(torch.zeros(1, 20, 20), layer, 2)[0].tolist() == [[-math.inf] * 2]
    alone = torch.zeros(1, 20, 20)
    alone[0, 0, 0] = 5  # sees beyond the border, too, but there is no other
    assert _peaks(alone, layer, 2)[0].tolist() == [[5, -math.inf]]
    tap[:, 5:, 5:] = 0
    assert _peaks(tap, layer, 3)[0].tolist() == [[3, -math.inf, -math.inf]]


def test_the_first_patch_drives_its_channel_most(small):
    images = [noise(48, 64, seed=1), to_pil(noise(56, 40, seed=2))]
    sheet = filters("conv2_1", images, channels=[3, 0], patches=4, tile=8, size=None, weights=small)
    layer = small.arch.layer("conv2_1")
    r, side = layer.receptive_field, sheet.tiles[0].width // 2
    features = vggfeat.VGGFeatures(["conv2_1"], weights=small)
    edge = 2  # units this near the border see beyond it
    for channel, tile in zip([3, 0], sheet.tiles, strict=True):
        best = max(
            float(features(image)["conv2_1"][0, channel, edge:-edge, edge:-edge].max())
            for image in (images[0], to_tensor(images[1]))
        )
        patch = tile.crop((0, 0, side, side)).resize((r, r), Image.Resampling.NEAREST)
        around = F.pad(to_tensor(patch), (9, 9, 9, 9), value=0.3)  # the surroundings must not matter
        start = (9 - (layer.stride - r) // 2) // layer.stride
        seen = float(features(around)["conv2_1"][0, channel, start, start])
        assert seen == pytest.approx(best, abs=0.03)  # the patch is in 8 bits


def test_channels_by_their_largest_activation_and_one_that_is_silent(small):
    state = {key: value.clone() for key, value in small.state.items()}
    names = [name for name in state if name.endswith("bias")]
    state[names[1]][4] = -1e6
    images = [noise(48, 64, seed=1), noise(56, 40, seed=2)]
    features = vggfeat.VGGFeatures(["relu2_1"], weights=state, arch="vgg11")
    most = torch.stack([features(image)["relu2_1"][0, :, 2:-2, 2:-2].amax((1, 2)) for image in images]).amax(0)
    options = {"size": None, "patches": 4, "weights": state, "arch": "vgg11"}
    sheet = filters("relu2_1", images, count=16, order="strongest", **options)
    assert sheet.labels == [str(int(i)) for i in most.argsort(descending=True, stable=True)]
    assert len({tile.size for tile in sheet.tiles}) == 1
    blank = sheet.tiles[sheet.labels.index("4")]
    assert blank.getextrema() == ((255, 255),) * 3 and float(most[4]) == 0


@pytest.mark.parametrize("kind", [str, Path, Image.open, lambda path: to_tensor(Image.open(path)), lambda path: [path]])
def test_filters_take_one_image_of_any_kind(small, tmp_path, kind):
    image = to_pil(noise(40, 48, seed=4))
    image.save(tmp_path / "a.png")
    options = {"channels": [2, 5], "patches": 2, "weights": small}
    expected = filters("conv2_1", [image], **options)
    found = filters("conv2_1", kind(tmp_path / "a.png"), **options)
    assert found.labels == ["2", "5"] and found.image.tobytes() == expected.image.tobytes()


def test_patches_are_large_enough_to_be_seen(small):
    """At least about 36 pixels, at most 96: conv2_1 sees 8 pixels and pool5 150."""
    for layer, size in (("conv2_1", 2 * 4 * 8 + 1), ("pool5", 2 * 96 + 1)):
        sheet = filters(layer, noise(160, 160), count=1, patches=4, weights=small)
        assert sheet.tiles[0].size == (size, size)


def test_titles_say_what_is_shown(small):
    image = noise(32, 48)
    assert filters("conv2_1", image, count=1, weights=small).title.endswith("of conv2_1, vgg11 (random): 8×8 pixels")
    for options, which in (
        ({"count": 3}, ", the strongest 3 of 8"),
        ({"count": 3, "order": "first"}, ", the first 3 of 8"),
        ({}, ", strongest first"),
        ({"order": "first"}, ""),
        ({"channels": [6, 1]}, ", 2 of 8"),
    ):
        title = maps(image, "pool1", size=None, weights=small, **options).title
        assert title == f"Feature maps of pool1, vgg11 (random){which}, 24×16, colours for each map alone"


def test_patches_of_a_convolution_that_is_below_0_everywhere(small):
    """It responds, though not above 0: what drives it most is shown; and a layer all of whose units see the border."""
    state = {key: value.clone() for key, value in small.state.items()}
    state[[name for name in state if name.endswith("bias")][1]][4] = -100
    sheet = filters("conv2_1", noise(48, 48), channels=[4], patches=1, weights=state, arch="vgg11", size=None)
    assert sheet.tiles[0].getextrema() != ((255, 255),) * 3
    layer = small.arch.layer("conv2_1")  # 4 units, of which each sees 2 beyond the border
    assert _peaks(torch.arange(16.0).view(1, 4, 4), layer, 1)[1].tolist() == [[[3, 3]]]


# ── maps ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_maps_show_the_networks_own_values_strongest_first(small, headed):
    image = noise(32, 48)
    sheet = maps(image, "relu2_1", count=5, colors="grey", size=None, tile=24, weights=small)
    normal = (image - torch.tensor(small.mean)[:, None, None]) / torch.tensor(small.std)[:, None, None]
    tap = headed.taps(normal, ["relu2_1"])["relu2_1"][0].detach()
    order = tap.mean((1, 2)).argsort(descending=True)[:5].tolist()
    assert sheet.labels == [str(channel) for channel in order]
    for tile, channel in zip(sheet.tiles, order, strict=True):
        row = tap[channel].flatten()
        low, high = row.min(), row.sort().values[math.ceil(0.995 * len(row)) - 1]
        expected = ((tap[channel] - low) / (high - low)).clamp(0, 1) * 255
        assert tile.size == (24, 16)  # a pixel for each unit
        assert (pixels(tile) - expected).abs().max() <= 1.01


@pytest.mark.parametrize(("value", "color"), [(-1, (68, 1, 84)), (0, (68, 1, 84)), (1, (253, 231, 37))])
def test_constant_maps_have_a_colour_at_an_end(small, value, color):
    """The highest above 0: a unit that is active everywhere must not look like a silent one."""
    state = {key: each.clone() for key, each in small.state.items()}
    state["features.0.weight"][4], state["features.0.bias"][4] = 0, value
    sheet = maps(noise(32, 32), "conv1_1", channels=[4], size=None, weights=state, arch="vgg11")
    assert sheet.tiles[0].getextrema() == tuple((each, each) for each in color)


def test_maps_with_values_below_0_are_cut_off_on_both_sides(small):
    sheet = maps(noise(48, 48), "conv1_1", count=3, scale="shared", size=None, weights=small, arch="vgg11")
    tap = vggfeat.VGGFeatures(["conv1_1"], weights=small)(noise(48, 48))["conv1_1"][0]
    row = tap[[int(label) for label in sheet.labels]].flatten().sort().values
    low, high = (float(row[math.ceil(share * len(row)) - 1]) for share in (0.005, 0.995))
    assert low < 0 and sheet.title.endswith(f"colours from {low:.3g} to {high:.3g}")


def test_a_sheet_has_a_label_for_each_picture_or_none():
    tile = Image.new("RGB", (4, 4))
    for tiles, labels in (([], []), ([tile, tile], ["a"])):
        with pytest.raises(vggfeat.InputError, match="a label for each picture, or none"):
            Sheet(tiles, labels)


def test_a_shared_scale_compares_maps(small):
    image = noise(32, 32)
    tap = vggfeat.VGGFeatures(["relu1_1"], weights=small)(image)["relu1_1"][0]
    sheet = maps(image, "relu1_1", order="first", scale="shared", colors="grey", size=None, weights=small)
    means = torch.tensor([pixels(tile).float().mean() for tile in sheet.tiles])
    assert means.argsort().tolist() == tap.mean((1, 2)).argsort().tolist()
    low, high = float(tap.min()), float(tap.flatten().sort().values[math.ceil(0.995 * tap.numel()) - 1])
    assert sheet.title.endswith(f", colours from {low:.3g} to {high:.3g}")


def test_maps_refuse_what_is_not_there(small):
    for options, message in (
        ({"layer": "relu9_1"}, "unknown layer"),
        ({"layer": "relu1_2"}, "has no layer 'relu1_2'"),
        ({"layer": "relu1_1", "order": "weakest"}, "unknown order"),
        ({"layer": "relu1_1", "count": 0}, "count must be a whole number of at least 1"),
        ({"layer": "relu1_1", "tile": 0}, "tile must be a whole number of at least 1"),
        ({"layer": "relu1_1", "scale": "own"}, "unknown scale"),
        ({"layer": "relu1_1", "channels": []}, "no channel"),
    ):
        with pytest.raises(vggfeat.InputError, match=message):
            maps(noise(32, 32), **options, weights=small)


# ── dreams ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("parametrization", ["fourier", "pixels"])
def test_a_dream_excites_its_channel_more_than_any_image_at_hand(small, parametrization):
    steps = []
    options = {
        "parametrization": parametrization,
        "size": 40,
        "steps": 40,
        "jitter": 2,
        "precision": "float32",
        "weights": small,
    }
    found = dream("relu2_1", [1, 6], **options, callback=steps.append)
    features = vggfeat.VGGFeatures(["relu2_1"], weights=small)
    here = [float(features(noise(40, 40, seed=seed))["relu2_1"][0, [1, 6]].mean((1, 2)).max()) for seed in range(4)]
    for i, (channel, picture) in enumerate(zip([1, 6], found.images, strict=True)):
        own = float(features(to_tensor(picture))["relu2_1"][0, channel].mean())
        assert own == pytest.approx(found.activations[i], rel=1e-4)  # what is said of the saved picture is so
        assert own > 2 * found.start[i] and own > 2 * max(here)
        other = float(features(to_tensor(found.images[1 - i]))["relu2_1"][0, channel].mean())
        assert own > other
    assert [step.step for step in steps] == list(range(1, 41)) and steps[0].images()[0].size == (40, 40)
    assert steps[-1].activations[0] > steps[0].activations[0]


def test_dreams_follow_their_seed(small):
    options = {"size": 32, "steps": 3, "weights": small}
    a, b, c = (dream("conv1_1", [0], seed=seed, **options).images[0].tobytes() for seed in (1, 1, 2))
    assert a == b != c
    for seed in (-1, 2**63):
        with pytest.raises(vggfeat.InputError, match="seed must be"):
            dream("conv1_1", [0], seed=seed, **options)


def test_jitter_shifts_turns_and_zooms(monkeypatch, small):
    ramp = torch.arange(32.0).expand(1, 3, 32, 32) / 100
    right, down = (torch.rand(4, generator=torch.Generator().manual_seed(1)) * 2 - 1)[2:].tolist()
    turned = _jittered(ramp, 0, torch.Generator().manual_seed(1)) - ramp
    assert float(turned[..., 12:20, 12:20].abs().max()) > 0.001
    monkeypatch.setattr("vggfeat.visualize.dreams._TURN", 0)
    monkeypatch.setattr("vggfeat.visualize.dreams._ZOOM", 0)
    for image, shift in ((ramp, right), (ramp.mT, down)):
        moved = _jittered(image, 4, torch.Generator().manual_seed(1)) - image
        assert torch.allclose(moved[..., 6:-6, 6:-6], torch.tensor(4 * shift / 100), atol=1e-5)

    monkeypatch.undo()
    told = {0: [], 4: [], 9: []}
    for jitter, steps in told.items():
        dream("relu1_1", [1], jitter=jitter, size=32, steps=1, weights=small, callback=steps.append)
    (none,), (some,), (most,) = ([step.activations for step in steps] for steps in told.values())
    assert none != some == most  # an eighth of 32 at most


def test_pixels_are_blurred_every_fourth_step():
    canvas = _Pixels((1, 3, 24, 24), 0.05, torch.Generator().manual_seed(0), torch.device("cpu"))
    before = canvas.images().detach()
    found = []
    for progress in (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0):
        canvas.step((canvas.images() * 0).sum(), progress)
        found.append(canvas.images().detach())
    assert all(torch.equal(each, before) for each in found[:3])
    weights = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * 0.8**2))  # σ half way from 1.2 to 0.4
    weights /= weights.sum()
    expected = F.conv2d(before.view(3, 1, 24, 24), torch.outer(weights, weights)[None, None]).view(1, 3, 18, 18)
    assert torch.allclose(found[3][..., 3:-3, 3:-3], expected, atol=1e-6)
    assert all(torch.equal(each, found[3]) for each in found[4:])  # and the last one is not


def test_the_last_step_knows_that_it_is(small, monkeypatch):
    """So that the picture is not blurred at its very end."""
    step, told = _Pixels.step, []
    monkeypatch.setattr(_Pixels, "step", lambda self, loss, share: told.append(share) or step(self, loss, share))
    dream("relu1_1", [1], parametrization="pixels", size=16, steps=4, weights=small)
    assert told == [0.25, 0.5, 0.75, 1]


def test_a_unit_is_driven_and_no_other_place(small):
    found = dream("conv2_1", [2], unit=(2, 3), size=32, steps=40, jitter=0, precision="float32", weights=small)
    tap = vggfeat.VGGFeatures(["conv2_1"], weights=small)(to_tensor(found.images[0]))["conv2_1"][0, 2]
    assert float(tap[2, 3]) == pytest.approx(found.activations[0], rel=1e-4)
    assert int(tap.argmax()) == 2 * tap.shape[1] + 3
    with pytest.raises(vggfeat.InputError, match="16 rows and 16 columns"):
        dream("conv2_1", [2], unit=(16, 0), size=32, weights=small)


def test_no_unit_is_lost_out_of_sight():
    """With a shift as for a whole channel, four of these units see none of what grew for them, and end silent."""
    found = dream("relu2_1", count=11, unit=True, size=48, steps=40, precision="float32", weights="bundled")
    assert all(end > start for start, end in zip(found.start, found.activations, strict=True))


def test_a_silent_unit_is_at_zero(small):
    found = dream("relu1_1", count=8, unit=True, size=16, steps=1, precision="float32", weights=small)
    silent = [value for value in (*found.start, *found.activations) if value == 0]
    assert silent and all(math.copysign(1, value) == 1 for value in silent)


def test_what_a_classifier_saw_can_be_inverted(headed):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = invert(image, ["fc"], size=32, steps=15, tv_weight=0, weights=headed.state_dict(), precision="float32")
    assert found.error < 0.2 * found.start
    with pytest.raises(vggfeat.InputError, match="fc has no positions, over which style is summed"):
        invert(image, ["fc"], gram=True, size=32, steps=1, weights=headed.state_dict())


def test_classes_of_a_classifier_that_was_replaced(headed):
    net = copy.deepcopy(headed)
    net.classifier[-1] = torch.nn.Linear(net.classifier[-1].in_features, 4)
    image = torch.rand(1, 3, 32, 32)
    assert cam(image, 3, size=None, net=net, names=["a", "b", "c", "d"]).class_index == 3
    with pytest.raises(vggfeat.InputError, match="vgg11 has classes 0 to 3 here, got 4"):
        cam(image, 4, size=None, net=net)


def test_a_size_that_is_no_whole_number(small):
    for size in (64.0, "64", 0):
        with pytest.raises(vggfeat.InputError, match="size must be a whole number of at least 1"):
            maps(torch.rand(1, 3, 32, 32), "conv1_1", size=size, weights=small)


def test_a_dream_of_a_class(headed):
    found = dream("fc", [3], size=32, steps=25, precision="float32", weights=headed.state_dict())
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    logits = headed((to_tensor(found.images[0]) - shift) / scale)[0].detach()
    assert float(logits[3]) == pytest.approx(found.activations[0], rel=1e-3)
    assert int(logits.argmax()) == 3 and found.activations[0] > found.start[0] + 1
    with pytest.raises(vggfeat.InputError, match="fc has no rows and columns"):
        dream("fc", [3], unit=True, size=32, weights=headed.state_dict())
    with pytest.raises(vggfeat.InputError, match="channels 0 to 4, got 5"):
        dream("fc", [5], size=32, weights=headed.state_dict())


def test_folders_whose_suffixes_differ(small, tmp_path):
    """What a network made of a JPEG is a PNG, mostly; two that share a name without its suffix have no partner."""
    files = {"a": ["both.png", "both.jpg", "one.png", "two.png", "two.bmp"], "b": ["both.png", "one.jpg", "two.jpg"]}
    for folder, names in files.items():
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(names):
            pictures_of_noise(24, 32, seed).save(tmp_path / folder / name)
    found = visualize.distances(tmp_path / "a", tmp_path / "b", weights=small)
    assert found.names == ["both.png", "one.png"]
    assert found.unpaired == ["both.jpg", "two.bmp", "two.jpg", "two.png"]
    assert found.totals[0] == 0 and found.totals[1] == pytest.approx(
        distance(tmp_path / "a" / "one.png", tmp_path / "b" / "one.jpg", weights=small).total, rel=1e-6
    )


def test_distances_of_folders_are_those_of_their_pairs(small, tmp_path, call):
    """By name; what only one folder has, or is no image, is left out and said."""
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        for name in ("x.png", "y.JPG", f"only{folder}.png"):
            picture = pictures_of_noise(24, 32, number * (name != "y.JPG") + len(name))
            picture.save(tmp_path / folder / name)
        (tmp_path / folder / "notes.txt").write_text("no image")
        (tmp_path / folder / ".x.png").write_text("no image")
        (tmp_path / folder / "plot.pdf").write_text("no image")
        (tmp_path / folder / "inside.png").mkdir()
    told = []
    found = visualize.distances(tmp_path / "a", tmp_path / "b", weights=small, callback=lambda *done: told.append(done))
    assert found.names == ["x.png", "y.JPG"] and found.unpaired == ["onlya.png", "onlyb.png"]
    assert told == [(1, 2), (2, 2)]
    for name, total, layers in zip(found.names, found.totals, found.layers, strict=True):
        single = distance(tmp_path / "a" / name, tmp_path / "b" / name, weights=small)
        assert total == pytest.approx(single.total, rel=1e-6) and layers == pytest.approx(single.layers, rel=1e-6)
    assert found.totals[0] > 0.01 > found.totals[1] == 0 and found.mean == sum(found.totals) / 2
    assert found.to_dict()["pairs"][0]["total"] == found.totals[0]
    assert f": mean {found.mean:.6g} of 2 pairs\n" in str(found) and found.to_dict()["unpaired"] == found.unpaired
    code, out, err = call("distance a b --json")
    assert code == 0 and json.loads(out)["mean"] == found.mean
    assert "2 images without a partner: onlya.png, onlyb.png" in err
    code, out, _ = call("distance a b -o out.csv --layers relu1_1")
    rows = list(csv.reader((tmp_path / "out.csv").read_text().splitlines()))
    assert (code, out, rows[0]) == (0, "out.csv\n", ["image", "total", "relu1_1"]) and len(rows) == 3
    assert "cannot write out.csv: it already exists" in call("distance a b -o out.csv")[2]
    assert "--colors is for the heat map" in call("distance a b --colors grey")[2]
    assert "two folders give a table, not a picture" in call("distance a b -o heat.png")[2]
    pictures_of_noise(24, 25, 0).save(tmp_path / "b" / "x.png")
    code, _, err = call("distance a b")
    assert code == 2 and "x.png: the images differ in size, 32×24 and 25×24" in err and err.count("\n") == 1
    assert "25×24: scale or crop one of them first" in err  # of other shapes: no one size would do
    pictures_of_noise(18, 24, 0).save(tmp_path / "b" / "x.png")
    for same in ("a b", "a/x.png b/x.png"):
        assert "the images differ in size, 32×24 and 24×18: --size 24 resizes both\n" in call(f"distance {same}")[2]
    assert call("distance a b --size 24")[0] == 0
    (tmp_path / "b" / "x.png").write_bytes(b"no image")
    assert f"{Path('b') / 'x.png'}: expected an image" in call("distance a b")[2]
    (tmp_path / "c").mkdir()
    assert "no image in a has the name of one in c: 3 and 0 images, folders inside left out" in call("distance a c")[2]
    assert "expected an image file, got a folder" in call("distance a b/y.JPG")[2]
    with pytest.raises(vggfeat.InputError, match="expected a folder at .*y.JPG, found a file"):
        visualize.distances(tmp_path / "a", tmp_path / "b" / "y.JPG", weights=small)


def pictures_of_noise(height, width, seed):
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def test_dreams_of_a_run_s_classes_have_their_names(headed, tmp_path, call):
    write_weights(tmp_path, headed, {"classes": ["ant", "bee", "cat", "dog", "elk"]})
    options = {"size": 32, "steps": 1, "weights": tmp_path}
    found = dream("fc", [3, 1], **options)
    assert found.labels == found.sheet.labels == ["dog", "bee"]
    assert dream("fc", [3], names=list("abcde"), **options).labels == ["d"]
    assert dream("relu2_1", [3, 1], **options).labels == ["3", "1"]  # channels of no class
    assert dream("fc", [3], **options | {"weights": headed.state_dict()}).labels == ["3"]
    with pytest.raises(vggfeat.InputError, match="2 names for 5 classes"):
        dream("fc", [3], names=["ant", "bee"], **options)
    headless = {"arch": Arch("A", head=None, channels=(4, 8, 16, 32, 32)), "weights": "random"}
    assert dream("pool5", [1], names=["ant", "bee"], **options | headless).labels == ["1"]
    code, _, err = call("dream --class 4 --size 32 --steps 1", weights=str(tmp_path))
    assert code == 0 and "fc elk: " in err
    code, _, err = call("dream --class bee,dog --size 32 --steps 1", weights=str(tmp_path))
    assert code == 0 and "fc bee: " in err and "fc dog: " in err
    code, _, err = call("cam photo.png --class cat", weights=str(tmp_path))
    assert code == 0 and "class 2 cat: " in err
    code, _, err = call("cam photo.png --class kat", weights=str(tmp_path))
    assert code == 2 and "no class 'kat': did you mean cat" in err
    code, _, err = call("cam photo.png --class 1,2", weights=str(tmp_path))
    assert code == 2 and "--class is one class, got '1,2'" in err
    code, _, err = call("cam photo.png --class cat")
    assert code == 2 and "Invalid value for '--class': expected numbers such as 3,8,16-31, got 'cat'" in err
    for line in ("dream --class cat --size 32", "cam photo.png --class cat"):
        code, _, err = call(line, weights="gone")
        assert code == 2 and "no weights at gone" in err and err.count("\n") == 1
    write_weights(tmp_path, headed, {"classes": ["1", "10", "2", "2024-01", "3"]})  # names go first
    for said, shown in (("10", "class 1 10: "), ("2024-01", "class 3 2024-01: "), ("4", "class 4 3: ")):
        code, _, err = call(f"cam photo.png --class {said}", weights=str(tmp_path))
        assert code == 0 and shown in err


def test_a_dream_of_a_class_needs_a_classifier(small):
    with pytest.raises(vggfeat.WeightsError, match="have no classifier"):
        dream("fc8", [3], weights=small)
    for wrong in (
        {"steps": 0},
        {"size": 1},
        {"jitter": -1},
        {"learning_rate": 0.0},
        {"parametrization": "dct"},
        {"size": 3, "parametrization": "pixels"},
        {"device": "nonsense"},
    ):
        with pytest.raises(vggfeat.InputError, match=next(iter(wrong))):
            dream("relu1_1", weights=small, **wrong)


@pytest.mark.parametrize("parametrization", ["fourier", "pixels"])
def test_a_dream_that_was_stopped(small, parametrization, monkeypatch):
    def stopped(step):
        if step.step == 2:
            raise KeyboardInterrupt

    options = {"weights": small, "size": 32, "parametrization": parametrization}
    found = dream("relu1_1", [1, 2], steps=9, callback=stopped, **options)
    assert found.interrupted and found.sheet.settings["steps"] == 2 and len(found.images) == 2
    assert not dream("relu1_1", [1], steps=1, **options).interrupted

    def stopped_at_once(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vggfeat.visualize.dreams._{parametrization.title()}.step", stopped_at_once)
    with pytest.raises(KeyboardInterrupt):
        dream("relu1_1", [1], **options)


def test_an_inversion_that_was_stopped_at_once(monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vggfeat.transfer.objective.Objective.value_and_grad", stopped)
        with pytest.raises(KeyboardInterrupt):
            invert(noise(48, 48), size=48, weights="bundled")
    found = invert(noise(48, 48), size=48, weights="bundled", callback=stopped)
    assert found.result.interrupted and found.image.size == (48, 48) and found.error >= 0
    settings = read_settings(found.save(tmp_path / "whole.png"))
    assert settings["error"] == found.error
    coarse = invert(noise(128, 128), gram=True, size=128, weights="bundled", callback=stopped, start_size=64)
    settings = read_settings(coarse.save(tmp_path / "coarse.png"))
    assert math.isnan(coarse.error) and settings["error"] is None  # JSON has no NaN
    with pytest.raises(vggfeat.InputError, match="unknown option 'precisoin': did you mean precision"):
        invert(noise(48, 48), size=48, weights="bundled", precisoin="float32")
    with pytest.raises(vggfeat.InputError, match="invert sets content_weight itself"):
        invert(noise(48, 48), size=48, weights="bundled", content_weight=0.0)


def test_amplitudes_fall_with_frequency():
    canvas = _Fourier((8, 3, 64, 64), 0.05, torch.Generator().manual_seed(0), torch.device("cpu"))
    grey = torch.logit(canvas.images().detach()).mean(1)
    power = torch.fft.fft2(grey).abs().square().mean(0)
    f = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(64), torch.fft.fftfreq(64), indexing="ij"))
    rings = [float(power[(f > at * 0.9) & (f < at * 1.1)].mean()) for at in (0.1, 0.2, 0.4)]
    assert rings[0] / rings[1] == pytest.approx(4, rel=0.3) and rings[1] / rings[2] == pytest.approx(4, rel=0.3)


def test_a_start_has_as_much_contrast_at_any_size():
    deviations = []
    for size in (32, 128):
        canvas = _Fourier((16, 3, size, size), 0.05, torch.Generator().manual_seed(0), torch.device("cpu"))
        deviations.append(float(torch.logit(canvas.images().detach()).std()))
    assert deviations[0] == pytest.approx(deviations[1], rel=0.3)


def test_a_unit_that_is_silent_at_first_still_grows(small):
    """A tenth of what the ReLU cuts off counts: there is a gradient where there is no activation."""
    state = {key: value.clone() for key, value in small.state.items()}
    state["features.0.bias"][2] = -0.5
    options = {"size": 16, "steps": 20, "jitter": 0, "precision": "float32", "weights": state, "arch": "vgg11"}
    found = dream("relu1_1", [2], **options)
    assert found.start == [0] and found.activations[0] > 0


def test_each_step_shows_the_picture_it_began_with(small):
    seen = []
    found = dream("relu2_1", [1], size=32, steps=3, weights=small, callback=lambda step: seen.append(step.images()[0]))
    assert len({image.tobytes() for image in (*seen, found.images[0])}) == 4
    assert found.sheet.settings["activations"] == found.activations
    assert found.sheet.title == "" and found.sheet.image.tobytes() == found.images[0].tobytes()
    assert dream("relu2_1", [1, 2], size=32, steps=1, weights=small).sheet.title.startswith("What excites relu2_1 of ")


def test_trained_channels_dream_of_what_photographs_rarely_have(oxford, test_data):
    features = vggfeat.VGGFeatures(["relu2_2"], weights=oxford)
    photo = open_image(test_data / "photos" / "tubingen.jpg")
    natural = features(to_tensor(resize(photo, *fit(*photo.size, 128))))["relu2_2"][0, [4, 6]].mean((1, 2))
    found = dream("relu2_2", [4, 6], size=48, steps=40, weights=oxford)
    for own, start, usual in zip(found.activations, found.start, natural.tolist(), strict=True):
        assert own > 3 * usual and own > 5 * start


# ── inversion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """A file with calibrated random weights of a narrow VGG-19."""
    path = tmp_path_factory.mktemp("weights") / "thin.safetensors"
    save_file(load("random", Arch("E", channels=scaled(16), head=None)).state, path)
    return str(path)


def test_an_inversion_has_the_features_of_the_image(thin):
    image, layers = noise(32, 48), ["relu1_1", "relu2_1"]
    found = invert(image, layers, size=48, steps=60, tv_weight=0.001, weights=thin, precision="float32")
    features = vggfeat.VGGFeatures(layers, weights=thin)
    theirs, ours = (features(to_tensor(each)) for each in (found.original, found.image))
    errors = [float((ours[name] - theirs[name]).square().sum() / theirs[name].square().sum()) for name in layers]
    assert sum(errors) / 2 == pytest.approx(found.error, rel=1e-3)
    assert found.error < found.start / 10
    assert found.image.size == (48, 32) and found.layers == ("relu1_1", "relu2_1")
    assert float(F.mse_loss(to_tensor(found.image), image)) < 0.1 * float(image.var())


def test_a_texture_has_the_gram_matrices_of_the_image(thin):
    image = noise(32, 32)
    found = invert(image, ["relu1_1", "relu2_1"], gram=True, size=32, steps=60, weights=thin, precision="float32")
    features = vggfeat.VGGFeatures(found.layers, weights=thin)
    theirs, ours = (features(to_tensor(each)) for each in (found.original, found.image))
    errors = []
    for name in found.layers:
        a, g = (torch.einsum("ncij,ndij->cd", tap[name], tap[name]) for tap in (theirs, ours))
        errors.append(float((g - a).square().sum() / a.square().sum()))
    assert sum(errors) / 2 == pytest.approx(found.error, rel=1e-2)
    assert found.error < found.start / 10
    again = invert(
        image, ["relu1_1", "relu2_1"], gram=True, size=32, steps=60, weights=load_file(thin), precision="float32"
    )
    assert again.image.tobytes() == found.image.tobytes()


def test_inversions_keep_to_one_scale_and_textures_are_not_smoothed(thin):
    options = {"size": 400, "steps": 1, "weights": thin, "precision": "float32"}
    features = invert(noise(400, 300), ["relu1_1"], **options)
    texture = invert(noise(400, 300), ["relu1_1"], gram=True, **options)
    assert len({each["scale"] for each in features.result.history}) == 1
    assert (features.result.to_dict()["config"]["tv_weight"], texture.result.to_dict()["config"]["tv_weight"]) == (
        1.0,
        0.0,
    )


def test_inversions_follow_their_seed(thin):
    options = {"size": 32, "steps": 1, "weights": thin, "precision": "float32"}
    a, b, c = (invert(noise(32, 32), ["relu1_1"], seed=seed, **options).image.tobytes() for seed in (1, 1, 2))
    assert a == b != c


def test_texture_layers_go_as_far_as_the_weights(oxford):
    image = noise(32, 32)
    assert invert(image, gram=True, size=32, steps=1, weights=oxford).layers == ("relu1_1", "relu2_1", "relu3_1")
    with pytest.raises(vggfeat.WeightsError, match="do not reach relu4_1"):
        invert(image, ["relu4_1"], size=32, steps=1, weights=oxford)


# ── distance ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_distance_is_a_perceptual_loss_and_the_mean_of_its_map(small):
    a, b = noise(32, 64, seed=1), noise(32, 64, seed=2)
    layers = ["relu1_1", "relu2_1", "relu3_2"]
    found = distance(a, b, layers, weights=small)
    channels = {name: float(small.arch.layer(name).channels) for name in layers}
    loss = vggfeat.PerceptualLoss(layers, normalize_features=True, layer_weights=channels, weights=small)
    assert found.total == pytest.approx(float(loss(a, b)), rel=1e-5)
    for name in layers:
        alone = vggfeat.PerceptualLoss([name], normalize_features=True, layer_weights=[channels[name]], weights=small)
        assert found.layers[name] == pytest.approx(float(alone(a, b)), rel=1e-5)
    assert found.map.shape == (32, 64)
    assert float(found.map.mean()) == pytest.approx(found.total, rel=1e-5)  # 32 and 64 are multiples of each stride
    assert 0 < found.total < 4 * len(layers)
    heats = {name: spread(found.maps[name], (32, 64)) for name in layers}
    shown = [("all layers", found.total, found.map), *((name, found.layers[name], heats[name]) for name in layers)]
    labels = [f"{name}: mean {value:.3g}, max {float(heat.max()):.3g}" for name, value, heat in shown]
    assert list(found.sheet.labels) == ["A", "B", *labels]


def test_the_same_image_is_at_no_distance_and_black_is_no_exception(small):
    for image in (noise(32, 32), torch.zeros(1, 3, 32, 32)):
        assert distance(image, image, weights=small).total == 0
    assert list(distance(image, image, weights=small).layers) == ["relu1_1", "relu2_1", "relu3_2", "relu4_2", "relu5_2"]


def test_the_heat_is_where_the_images_differ(small):
    a = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[..., 32:64, 32:64] = a[..., 32:64, 32:64].mean()
    layer = small.arch.layer("relu2_1")
    heat = distance(a, b, ["relu2_1"], weights=small).map
    reach = layer.receptive_field // 2 + 2 * layer.stride
    outside = heat.clone()
    outside[32 - reach : 64 + reach, 32 - reach : 64 + reach] = 0
    assert float(outside.abs().max()) == 0
    assert float(heat[36:60, 36:60].mean()) > 10 * float(heat.mean()) / 9  # the square is a ninth of the image


def test_the_sheet_of_a_distance_names_its_pictures(small, tmp_path):
    a, b = (to_pil(noise(480, 600, seed=seed)) for seed in (1, 2))
    b.save(tmp_path / "b.png")
    sheet = distance(a, tmp_path / "b.png", ["relu1_1"], weights=small).sheet
    assert sheet.labels[:2] == ["A", "b.png"] and sheet.labels[2].startswith("relu1_1: ") and len(sheet.labels) == 3
    for tile, picture in zip(sheet.tiles[:2], (a, b), strict=True):
        assert tile.tobytes() == resize(picture, 400, 320).tobytes()


def test_images_of_different_sizes_have_no_distance(small):
    with pytest.raises(vggfeat.InputError, match="64×32 and 32×32"):
        distance(noise(32, 64), noise(32, 32), weights=small)


def test_patches_are_in_reading_order():
    crops = [Image.new("RGB", (3, 3), (10 * i, 0, 0)) for i in range(5)]
    picture = _mosaic(crops, 5, 3)  # three across, two down, a pixel between
    assert picture.size == (11, 7)
    found = [picture.getpixel((1 + 4 * column, 1 + 4 * row)) for row in range(2) for column in range(3)]
    assert found == [*((10 * i, 0, 0) for i in range(5)), (255, 255, 255)]


def test_peaks_are_more_than_half_a_field_apart():
    layer = parse("vgg11").layer("conv2_1")  # sees 8 pixels, stride 2: half of that is 2 units
    for apart, expected in ((1, [5, -math.inf]), (2, [5, -math.inf]), (3, [5, 4])):
        tap = torch.zeros(1, 20, 20)
        tap[0, 10, 10], tap[0, 10, 10 + apart] = 5, 4
        assert _peaks(tap, layer, 2)[0].tolist() == [expected]


def test_a_few_active_units_have_the_highest_colour(small):
    """Where the 99.5th percentile is 0, the colours go to the highest value."""
    state = {key: value.clone() for key, value in small.state.items()}
    state["features.0.weight"][4] = 0
    state["features.0.weight"][4, 0, 1, 1], state["features.0.bias"][4] = 1, -0.4 / 0.229  # only red above its middle
    image = torch.full((1, 3, 32, 32), 0.485)
    image[0, 0, 16, 16] = 0.485 + 0.4 + 0.1  # one unit of 1024 at 0.1 / 0.229
    sheet = maps(image, "relu1_1", channels=[4], size=None, tile=32, colors="grey", weights=state, arch="vgg11")
    expected = torch.zeros(32, 32)
    expected[16, 16] = 1
    assert torch.equal(to_tensor(sheet.tiles[0])[0, 0], expected)


def folders(tmp_path, a, b):
    for name, image in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        to_pil(image).save(tmp_path / name / "x.png")
    return tmp_path / "a", tmp_path / "b"


def test_distances_at_a_size(small, tmp_path):
    a, b = noise(64, 48, seed=1), noise(64, 48, seed=2)
    found = visualize.distances(*folders(tmp_path, a, b), ["relu1_1"], size=32, weights=small)
    a, b = (to_tensor(resize(to_pil(each), 24, 32)) for each in (a, b))
    taps = [vggfeat.VGGFeatures(["relu1_1"], weights=small)(each)["relu1_1"].double() for each in (a, b)]
    x, y = (F.normalize(tap, dim=1, eps=1e-30) for tap in taps)
    assert found.totals == pytest.approx([float((x - y).square().sum(1).mean())], rel=1e-4)


def test_distances_by_lpips(tmp_path):
    weights = load("random", "vgg16")
    a, b = folders(tmp_path, noise(32, 32, seed=1), noise(32, 32, seed=2))
    found = visualize.distances(a, b, lpips=True, weights=weights)
    expected = vggfeat.LPIPS(weights=weights)(*(to_tensor(open_image(f / "x.png")) for f in (a, b)))
    assert found.totals == pytest.approx(expected.tolist(), rel=1e-4) and len(found.layers[0]) == 5


def test_the_sheet_lights_the_first_image_where_they_differ(small):
    a, b = noise(32, 64, seed=1), noise(32, 64, seed=2)
    found = distance(a, b, ["relu1_1", "relu2_1"], colors="grey", weights=small)
    for tile, heat in zip(found.sheet.tiles[2:], (found.map, found.maps["relu1_1"]), strict=False):
        expected = a * (0.15 + 0.85 * (heat / heat.max()).sqrt())
        assert (to_tensor(tile) - expected).abs().max() < 0.6 / 255
    assert found.sheet.settings["total"] == found.total and found.sheet.settings["layers"] == found.layers  # H9


def test_the_sheet_lights_where_the_class_is_seen(headed):
    image = noise(64, 64)
    each = (cam(image, k, net=headed, size=None, colors="grey") for k in range(5))
    found = next(one for one in each if one.map.any())
    expected = image * (0.15 + 0.85 * found.map.sqrt())
    assert (to_tensor(found.sheet.tiles[1]) - expected).abs().max() < 0.6 / 255


def test_names_of_ones_own_go_before_those_of_the_run(headed, tmp_path):
    write_weights(tmp_path, headed, {"classes": list("abcde"), "size": 32})
    assert cam(noise(48, 48), 1, weights=tmp_path).class_name == "b"
    assert cam(noise(48, 48), 1, weights=tmp_path, names=list("vwxyz")).class_name == "w"


def test_both_images_are_brought_to_the_size(small):
    a, b = noise(64, 48, seed=1), noise(32, 24, seed=2)
    assert distance(b, a, ["relu1_1"], size=32, weights=small).map.shape == (32, 24)


def test_a_blurred_tower_shows(oxford, test_data):
    photo = open_image(test_data / "photos" / "tubingen.jpg")
    photo = resize(photo, *fit(*photo.size, 192))
    box = (100, 40, 150, 90)
    blurred = photo.copy()
    blurred.paste(photo.crop(box).filter(ImageFilter.GaussianBlur(2)), box[:2])
    found = distance(photo, blurred, weights=oxford)
    assert list(found.layers) == ["relu1_2", "relu2_2", "relu3_4"]
    share = found.map[box[1] - 8 : box[3] + 8, box[0] - 8 : box[2] + 8].sum() / found.map.sum()
    assert share > 0.95


# ── class activation maps ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layer", [None, "relu3_1", "conv4_2", "pool5"])
def test_grad_cam_is_what_autograd_says(headed, layer):
    image = noise(64, 64)
    headed.zero_grad()
    found = cam(image, 2, layer=layer, net=headed, size=None)
    assert all(parameter.grad is None for parameter in headed.parameters())
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, kept = (image - shift) / scale, None
    for spec, module in zip(headed.arch.layers, headed.features, strict=True):
        x = module(x)
        if spec.name == (layer or "relu5_2"):
            x = kept = x.detach().requires_grad_()
    logits = headed.classifier(headed.avgpool(x).flatten(1))[0]
    logits[2].backward()
    logits = logits.detach()
    alpha = kept.grad[0].mean((1, 2))
    expected = torch.einsum("k,khw->hw", alpha, kept[0]).clamp_min(0).detach()
    assert torch.allclose(found.raw, expected, rtol=1e-4, atol=1e-7)
    assert found.logit == pytest.approx(float(logits[2]), rel=1e-4)
    assert found.probability == pytest.approx(float(logits.exp()[2] / logits.exp().sum()), rel=1e-4)
    assert found.map.shape == (64, 64) and float(found.map.max()) == pytest.approx(float(expected.max() > 0))


def test_the_label_says_how_probable_the_class_is_and_whether_it_is_seen(headed):
    net = copy.deepcopy(headed)
    with torch.no_grad():
        net.classifier[1].weight[0], net.classifier[1].weight[1] = 0.01, -0.01  # all speaks for it, and against it
    names = ["a" * 24, "b" * 25, "", "", ""]
    for number, name, more in ((0, names[0], ""), (1, "b" * 23 + "…", ": nothing speaks for it")):
        found = cam(noise(64, 64), number, net=net, size=None, names=names)
        assert found.sheet.labels[1] == f"{number} {name}, {100 * found.probability:.1f} %, by relu5_2{more}"
    best = cam(noise(64, 64), net=net, size=None)
    assert best.sheet.settings["class"] == best.class_index and best.probability > 0.2
    assert f", {100 * best.probability:.1f} %, by " in best.sheet.labels[1]


def test_grad_cam_finds_the_red_square_that_a_class_stands_for():
    """A network that hands red minus green on from layer to layer, and whose class 1 is their sum."""
    net = vggfeat.vgg11(2, width=1 / 64, head="slim").train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for module in net.features:
            if isinstance(module, torch.nn.Conv2d):
                module.weight[0, 0, 1, 1] = 1
        net.features[0].weight[0, 1, 1, 1] = -1
        net.classifier[1].weight[1, 0] = 1
    net.classifier[0].eval()
    image = torch.full((1, 3, 64, 64), 0.5)
    image[:, 1:, 0:32, 32:64] = 0
    found = cam(image, net=net, layer="relu3_2", size=None, names=["grey", "red"], mean=(0, 0, 0), std=(1, 1, 1))
    assert found.class_index == 1 and "1 red" in found.sheet.labels[1]
    assert float(found.map[4:28, 36:60].min()) > 0.99 and float(found.map[36:].max()) == 0
    assert float(found.map[:, :28].max()) == 0
    assert net.training and not net.classifier[0].training  # left as it was
    silent = cam(image, 0, net=net, size=None)
    assert float(silent.map.max()) == 0 and silent.sheet.image.size[0] > 128


def test_a_class_or_classifier_that_is_not_there(headed, small):
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(vggfeat.InputError, match="class_index must be a whole number of at least 0"):
            cam(noise(32, 32), wrong, net=headed)
    with pytest.raises(vggfeat.InputError, match="mean and std are three numbers each"):
        cam(noise(32, 32), net=headed, mean=(0.5, 0.5))
    with pytest.raises(vggfeat.InputError, match="classes 0 to 4 here, got 5"):
        cam(noise(32, 32), 5, net=headed)
    with pytest.raises(vggfeat.WeightsError, match="have no classifier"):
        cam(noise(32, 32), weights=small)
    with pytest.raises(vggfeat.InputError, match="expected a network of vggfeat.vgg, got Sequential"):
        cam(noise(32, 32), net=torch.nn.Sequential())
    with pytest.raises(vggfeat.InputError, match="2 names for 5 classes"):
        cam(noise(32, 32), net=headed, names=["ant", "bee"])
    with pytest.raises(vggfeat.InputError, match="weights has no effect with net"):
        cam(noise(32, 32), net=headed, weights="nowhere.pth")
    with pytest.raises(vggfeat.InputError, match="std has no effect without net"):
        cam(noise(32, 32), weights=headed.state_dict(), std=(1, 1, 1))
    with pytest.raises(vggfeat.InputError, match="at least 32 pixels on each side, got 64×16; choose a size of 128"):
        cam(noise(32, 128), net=headed, size=64)
    a, b = cam(noise(64, 64), 1, net=headed), cam(noise(64, 64), 1, weights=headed.state_dict())
    assert torch.allclose(a.map, b.map, atol=1e-5)
    double = cam(noise(64, 64), 1, net=copy.deepcopy(headed).double())
    assert torch.allclose(double.map, a.map, atol=1e-4)


def test_layers_are_lists_and_channels_numbers(small):
    for call in (
        lambda: invert(noise(32, 32), "relu1_1", weights=small),
        lambda: distance(noise(32, 32), noise(32, 32), "relu1_1", weights=small),
        lambda: vggfeat.plot_receptive_fields(noise(32, 32), "vgg11", "relu1_1", "out.png"),
    ):
        with pytest.raises(vggfeat.InputError, match=r"layers is a list of names: write \['relu1_1'\]"):
            call()
    assert maps(noise(32, 32), "relu1_1", channels=3, weights=small).settings["channels"] == [3]
    for bad in (["3"], [-1], 2.5):
        with pytest.raises((vggfeat.InputError, TypeError)):
            maps(noise(32, 32), "relu1_1", channels=bad, weights=small)
    for name, options in {"steps": {"steps": 2.5}, "unknown parametrization 3": {"parametrization": 3}}.items():
        with pytest.raises(vggfeat.InputError, match=name):
            dream("relu1_1", weights=small, **options)


def test_a_dream_of_random_weights_classifier():
    found = dream("fc8", [3], size=32, steps=1, arch=Arch("A", channels=scaled(8), num_classes=5), weights="random")
    assert found.sheet.image.size[0] >= 32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_work_where_gradients_are_off(small, headed, mode):
    """As in a notebook or a server that wraps everything, its images included."""

    def made():
        return [
            dream("relu2_1", [0, 3], size=32, steps=2, weights=small).sheet.image,
            invert(noise(32, 48), ["relu2_1"], size=32, steps=2, weights=small.state).image,
            cam(noise(64, 64), 3, layer="relu2_1", size=64, net=headed).sheet.image,
        ]

    expected = made()
    with mode():
        found = made()
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(headed, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "headed.safetensors"
    save_file(headed.state_dict(), path)
    return str(path)


@pytest.fixture
def call(model, tmp_path, monkeypatch, capsys):
    to_pil(noise(48, 64)).save(tmp_path / "photo.png")
    to_pil(noise(48, 64, seed=3)).save(tmp_path / "other.png")
    monkeypatch.chdir(tmp_path)

    def run(line, weights=model):
        monkeypatch.setattr(sys, "argv", ["vggfeat", *line.split(), *(["--weights", weights] if weights else [])])
        with pytest.raises(SystemExit) as info:
            command_module.main()
        return info.value.code, *capsys.readouterr()

    return run


LINES = {
    "filters": "filters-conv1_1.png",
    "filters photo.png other.png --layer relu2_1 --channel 0-3,7 --patches 2": "filters-relu2_1.png",
    "maps photo.png --layer relu2_1 --count 4 --size 48": "photo-maps-relu2_1.png",
    "dream --layer relu1_1 --channel 1 --size 32 --steps 2 --quiet": "dream-relu1_1.png",
    "dream --class 0,3 --size 32 --steps 2 --parametrization pixels": "dream-classes.png",
    "invert photo.png --layer relu1_1 --size 32 --steps 2": "photo-inverted.png",
    "invert photo.png --gram --layer relu1_1,relu2_1 --layer relu1_1 --size 32 --steps 2": "photo-texture.png",
    "cam photo.png --class 1": "photo-cam.png",
    "distance photo.png other.png -o heat.jpg": "heat.jpg",
}


@pytest.mark.parametrize("line", ["filters", "maps photo.png", "filters photo.png --layer relu1_1 --count 1"])
def test_weights_that_had_to_be_others_are_named_once(call, line):
    """By the command's own line; a warning, an error in tests, is for those who get no such line."""
    code, _, err = call(line, weights="auto")
    assert code == 0 and err == "weights: bundled (imagenet weights for vgg16 are unavailable)\n"


def test_a_dream_of_a_class_of_random_weights(call):
    code, out, err = call("dream --class 3 --size 32 --steps 1 --arch vgg11 --weights random", weights=None)
    assert (code, out) == (0, "dream-classes.png\n"), err


@pytest.mark.parametrize("line", LINES)
def test_commands_write_their_picture_and_never_over_another(call, line, tmp_path):
    code, out, err = call(line)
    name = LINES[line]
    assert code == 0, err
    assert out.split()[-1] == name and "weights: headed.safetensors" in err
    with Image.open(name) as picture:
        assert picture.width > 16
    assert read_settings(name) or {}
    before = Path(name).read_bytes()
    code, out, err = call(line)
    if "-o" in line:
        assert code == 2 and "already exists" in err
    else:
        assert (code, out.split()[-1]) == (0, name.replace(".png", "-2.png"))
    assert Path(name).read_bytes() == before
    assert call(f"{line} --overwrite")[0] == 0


def interrupting(monkeypatch, at):
    """Let the command be told to end in the so-manieth evaluation of the objective."""
    calls, value_and_grad = [], Objective.value_and_grad

    def interrupted(self, image):
        calls.append(image)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return value_and_grad(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", interrupted)


@pytest.mark.parametrize(("at", "runs"), [(1, 0), (2, 1), (4, 1), (6, 2)])
def test_inversions_that_were_stopped(call, monkeypatch, at, runs):
    interrupting(monkeypatch, at)
    code, out, err = call("invert photo.png --layer relu1_1 --layer relu2_1 --layer relu1_2 --size 32 --steps 3")
    assert code == 130 and "interrupted" in err.splitlines()[-1] and err.count("error") == runs
    if not runs:
        assert out == "" and not Path("photo-inverted.png").exists()
        return
    assert out == "photo-inverted.png\n"
    assert len((read_settings("photo-inverted.png") or {})["runs"]) == runs


def test_a_dream_that_was_stopped_is_saved(call, monkeypatch):
    step, calls = _Fourier.step, []

    def interrupted(self, loss, progress):
        calls.append(progress)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        step(self, loss, progress)

    monkeypatch.setattr(_Fourier, "step", interrupted)
    code, out, err = call("dream --layer relu1_1 --channel 1 --size 32 --steps 9")
    assert (code, out) == (130, "dream-relu1_1.png\n") and "interrupted" in err.splitlines()[-1]
    assert (read_settings("dream-relu1_1.png") or {})["steps"] == 2


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("line", LINES)
def test_a_picture_that_cannot_be_written_is_rescued(call, line, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    fsync, name = os.fsync, LINES[line]
    monkeypatch.setattr(os, "fsync", lambda file: [monkeypatch.setattr(os, "fsync", fsync), full_disk(file)])
    code, out, err = call(line)
    rescued = tmp_path / "tmp" / Path(name).with_suffix(".png")
    assert code == 1 and out.split()[-1] == str(rescued) and not Path(name).exists()
    assert f"cannot write {name}: No space left on device" in err and f"the picture is in {rescued}" in err
    with Image.open(rescued) as picture:
        picture.load()


def test_pictures_that_are_read_are_not_replaced(call):
    before = Path("photo.png").read_bytes()
    for line in (
        "filters photo.png",
        "maps photo.png",
        "invert photo.png",
        "cam photo.png",
        "distance other.png photo.png",
    ):
        code, out, err = call(f"{line} -o photo.png --overwrite")
        assert (code, out) == (2, "") and "one of the files that are read" in err
    assert Path("photo.png").read_bytes() == before


HANDED_ON = {
    "filters photo.png other.png --layer relu2_1 --channel 1-3,7 --patches 2 --size 40": lambda weights: filters(
        "relu2_1", ["photo.png", "other.png"], channels=[1, 2, 3, 7], patches=2, size=40, weights=weights
    ),
    "maps photo.png --layer pool1 --order first --count 3 --scale shared --colors grey --tile 40 --size 48": (
        lambda weights: maps(
            "photo.png",
            "pool1",
            order="first",
            count=3,
            scale="shared",
            colors="grey",
            tile=40,
            size=48,
            weights=weights,
        )
    ),
    "dream --layer relu2_1 --channel 1 --unit --size 32 --steps 2 --jitter 2 --seed 5": lambda weights: dream(
        "relu2_1", [1], unit=True, size=32, steps=2, jitter=2, seed=5, weights=weights
    ),
    "dream --layer relu2_1 --count 2 --size 32 --steps 2": lambda weights: dream(
        "relu2_1", count=2, size=32, steps=2, weights=weights
    ),
    "invert photo.png --layer relu1_1 --size 32 --steps 2 --seed 3 --tv-weight 0.5": lambda weights: invert(
        "photo.png", ["relu1_1"], size=32, steps=2, seed=3, tv_weight=0.5, weights=weights
    ),
    "cam photo.png --class 1 --layer relu3_1 --size 48 --colors grey": lambda weights: cam(
        "photo.png", 1, layer="relu3_1", size=48, colors="grey", weights=weights
    ),
}


@pytest.mark.parametrize("line", HANDED_ON)
def test_a_command_draws_what_the_library_does(call, model, line):
    code, out, err = call(line)
    assert code == 0, err
    HANDED_ON[line](model).save("expected.png")
    with Image.open(out.split()[-1]) as found, Image.open("expected.png") as expected:
        assert found.size == expected.size and found.tobytes() == expected.tobytes()


def test_figures_on_stderr_are_those_of_the_result(call, model):
    _, _, err = call("dream --layer relu2_1 --channel 3,0 --size 32 --steps 2")
    found = dream("relu2_1", [3, 0], size=32, steps=2, weights=model)
    rows = zip((3, 0), found.start, found.activations, strict=True)
    assert err.splitlines()[:2] == [f"relu2_1 {channel}: {start:.4g} → {end:.4g}" for channel, start, end in rows]
    _, _, err = call("cam photo.png")
    best = cam("photo.png", weights=model)
    assert err.splitlines()[0] == f"class {best.class_index}: {100 * best.probability:.1f} %"


def test_inversions_beside_the_original(call, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "Sheet", lambda *args, **words: drawn.append((args, words)) or Sheet(*args, **words))
    options = "--size 32 --steps 2 --layer relu1_1"
    assert call(f"invert photo.png --compare {options}")[0] == 0
    assert call(f"invert photo.png --gram {options},relu2_1,relu3_1 --layer relu2_1,relu3_1")[0] == 0
    for ((tiles, labels, title), _), kind in zip(drawn, ("Inverted features", "Textures"), strict=True):
        assert title == f"{kind}, weights headed.safetensors"
        original = resize(open_image("photo.png"), 32, 24)
        assert tiles[0].tobytes() == original.tobytes() and labels[0] == "photo.png"
        assert len({tile.tobytes() for tile in tiles}) == len(tiles)
    assert [label.split(":")[0] for label in drawn[0][0][1][1:]] == ["relu1_1"]
    assert [label.split(":")[0] for label in drawn[1][0][1][1:]] == ["relu1_1 … relu3_1", "relu2_1, relu3_1"]


def test_a_distance_for_machines(call, headed):
    found = distance("photo.png", "other.png", weights=headed.state_dict())
    code, out, err = call("distance photo.png other.png --json")
    told = json.loads(out)
    assert (code, err, told.pop("weights")) == (0, "", "headed.safetensors")
    expected = {"total": found.total, "lpips": False, "layers": found.layers, "arch": "vgg11"}
    assert told == {**expected, "total": pytest.approx(found.total), "layers": pytest.approx(found.layers)}
    assert json.loads(call("distance photo.png other.png --json -o h.png")[1])["output"] == "h.png"
    before = Path("photo.png").read_bytes()
    assert call("distance photo.png other.png -o photo.png --overwrite")[0] == 2
    assert Path("photo.png").read_bytes() == before


def test_images_in_one_folder_alone_are_named_up_to_three(call):
    for name in ("one", "two"):
        Path(name).mkdir()
        open_image("photo.png").save(f"{name}/x.png")
    for count, said in ((3, "3 images without a partner: 0.png, 1.png, 2.png\n"), (4, "2.png, …\n")):
        for i in range(count):
            open_image("photo.png").save(f"one/{i}.png")
        code, out, err = call("distance one two --layer relu1_1")
        assert code == 0 and said in err and "mean 0 of 1 pair" in out.splitlines()[0]


def test_distance_prints_what_the_library_says(call, headed):
    code, out, _ = call("distance photo.png other.png --layer relu1_1 --layer relu2_1")
    table = {name: float(value) for name, value in (line.split() for line in out.splitlines())}
    images = [to_tensor(open_image(name)) for name in ("photo.png", "other.png")]
    found = distance(*images, ["relu1_1", "relu2_1"], weights=headed.state_dict())
    assert code == 0 and table == pytest.approx({"total": found.total, **found.layers}, rel=1e-4)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["other.png", "photo.png"]


BAD = {
    "maps nothing.png": "found nothing of that name",
    "maps photo.png --layer relu3_9": "did you mean relu3_",
    "maps photo.png --arch vgg17": "did you mean vgg1",
    "maps photo.png --colors viridi": "did you mean viridis",
    "maps photo.png --size 0x": "is not a valid integer",
    "maps photo.png -o a.bmp": "expected a name that ends in",
    "maps photo.png -o no/folder.png": "found none; create it first",
    "filters --layer conv2_1": "give images",
    "filters --layer relu1_1": "relu1_1 has no filters: name the convolution before it, conv1_1, or give images",
    "filters --layer pool2": "pool2 has no filters: name the convolution before it, conv2_1, or give images",
    "filters --channel 8": "channels 0 to 7",
    "filters --channel 7-3": "expected a rising range of at most 10000, got '7-3'",
    "filters --channel 0-10000": "expected a rising range of at most 10000, got '0-10000'",
    "filters --patches 3": "--patches and --size are for IMAGES",
    "filters --size 64": "--patches and --size are for IMAGES",
    "dream --layer relu2_1 --channel x": "expected numbers",
    "dream --class 7 --size 32": "channels 0 to 4, got 7",
    "dream --class 1 --channel 1": "not both",
    "dream --class 1 --layer relu1_1": "give --layer or --class, not both",
    "dream --layer relu9_9": "unknown layer",
    "invert photo.png --layer relu7_1 --size 32": "unknown layer",
    "invert photo.png --size 4": "too small",
    "distance photo.png nothing.png": "found nothing of that name",
    "cam photo.png --class 5": "classes 0 to 4",
    "cam photo.png --layer fc": "fc is one of the head's layers",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_no_file(call, line):
    before = sorted(path.name for path in Path.cwd().iterdir())
    code, out, err = call(line)
    assert (code, out) == (2, "") and BAD[line] in err and err.count("\n") == 1, err
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_weights_that_do_not_reach(call, oxford):
    code, _, err = call("maps photo.png --layer relu4_1", weights=str(oxford))
    assert code == 2 and "do not reach relu4_1" in err and err.count("\n") == 1
    code, _, err = call("cam photo.png", weights=str(oxford))
    assert code == 2 and "have no classifier" in err


FUNCTIONS = {command: getattr(visualize, command.name) for command in pictures.COMMANDS}
FUNCTIONS |= {analyse.describe: vggfeat.describe, analyse.compare: vggfeat.compare, learn.evaluate: vggfeat.evaluate}
FUNCTIONS |= {analyse.fields: vggfeat.plot_receptive_fields}
NAMES = {"size": "input_size", "classes": "num_classes"}  # of options, where the library's is another


@pytest.mark.parametrize("command", FUNCTIONS, ids=lambda command: command.name)
def test_defaults_are_the_librarys(command):
    """The value of each option, or where that is None what its help says."""
    parameters = inspect.signature(FUNCTIONS[command]).parameters
    compared = 0
    for option in command.params:
        name = option.name if option.name in parameters else NAMES.get(option.name)
        default = parameters[name].default if name in parameters else None
        unknown = default in (None, False, inspect.Parameter.empty, DEFAULT)  # the last is the machine's to say
        if not isinstance(option, click.Option) or unknown or (command.name, name) == ("cam", "size"):
            continue
        if option.default is None or type(option.default).__name__ == "Sentinel":  # in newer releases of click
            assert re.search(rf"\[default: {re.escape(str(default))}\b", option.help), f"--{option.name}"
        else:
            assert option.default == default, f"--{option.name}"
        compared += 1
    assert compared


# ── the chapter's exercises ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    return importlib.import_module


def test_exercise_3_tells_kinds_of_filters_apart(example, capsys, tmp_path, oxford):
    module = example("exercise3_filters")
    blob, edge = torch.zeros(3, 3, 3), torch.zeros(3, 3, 3)
    blob[0], blob[1] = 1, -1
    edge[:, 0], edge[:, 2] = 1, -1
    kinds = [module.kind(w) for w in (torch.ones(3, 3, 3), blob, edge, blob * edge, blob + edge)]
    assert kinds == list(module.KINDS)
    assert [module.direction(w) for w in (edge.mT, edge)] == ["vertical", "horizontal"]
    module.main(tmp_path / "f.png", str(oxford))
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line.split()[-1]) for line in lines[1:6]]
    assert sum(counts) == 64 and counts[1] > 10 and counts[2] > 20 and counts[4] < 16  # colour blobs, edges, mixtures
    directions = [int(part.split()[-1]) for part in lines[6].split(",")]
    assert min(directions[:4]) >= 2 and sum(directions) == counts[2]  # edges of every direction, and spots
    spot = -torch.ones(3, 3, 3)
    spot[:, 1, 1] = 8
    assert module.direction(spot) == module.SPOT
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_exercise_5_counts_the_units_that_respond(example, capsys, tmp_path, small):
    module = example("exercise5_feature_maps")
    module.main(weights="random", arch="vgg16", size=32)  # any VGG, whose last ReLU of each block it finds
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert names == ["relu1_1", "relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"]
    module.main(picture=tmp_path / "m.png", weights=small, arch=None, layers=("relu1_1", "relu2_1"), size=48)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["relu1_1", "8", "48×36"] and lines[3].split()[:3] == ["relu2_1", "16", "24×18"]
    assert 20 < int(lines[2].split()[3].rstrip("%")) < 80
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_a_dream_begins_at_what_the_relu_gives(small):
    seen = []
    found = dream("relu2_1", count=4, size=32, steps=1, precision="float32", weights=small, callback=seen.append)
    own = vggfeat.VGGFeatures(["relu2_1"], weights=small)(seen[0]._images[:4])["relu2_1"]
    assert found.start == pytest.approx(own[range(4), range(4)].mean((1, 2)).tolist(), rel=1e-4)


def test_the_first_of_three_colours_is_brightness():
    canvas = _Fourier((1, 3, 16, 16), 0.05, torch.Generator().manual_seed(0), torch.device("cpu"))
    with torch.no_grad():
        canvas.spectrum[:, 1:] = 0
        red, green, blue = torch.logit(canvas.images())[0]
    torch.testing.assert_close(red / 0.26, green / 0.27, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(blue, green, rtol=1e-3, atol=1e-4)


def test_a_run_tested_at_several_scales_is_shown_at_the_largest(headed, tmp_path):
    write_weights(tmp_path, headed, {"classes": list("abcde"), "size": 32, "scales": [32, 48]})
    found = cam(noise(60, 40), weights=tmp_path)
    assert sorted(found.map.shape) == [48, 72]
    assert [max(tile.size) for tile in found.sheet.tiles] == [224, 224]  # what it sees is hard to make out


def test_maps_of_a_convolution_by_what_the_relu_lets_through(small):
    image = noise(32, 32)
    found = maps(image, "conv2_1", count=16, weights=small, size=None)
    tap = vggfeat.VGGFeatures(["conv2_1"], weights=small)(image)["conv2_1"][0]
    assert [int(label) for label in found.labels] == tap.relu().mean((1, 2)).argsort(descending=True).tolist()


@pytest.mark.parametrize("parametrization", ["fourier", "pixels"])
def test_a_dream_goes_as_fast_as_it_is_told(small, parametrization):
    options = {"count": 1, "size": 32, "parametrization": parametrization, "precision": "float32", "weights": small}
    begun, slow, fast = (
        to_tensor(dream("relu2_1", steps=steps, learning_rate=rate, **options).images[0])
        for steps, rate in ((1, 1e-9), (3, 0.02), (3, 0.2))
    )
    assert (fast - begun).abs().mean() > 2 * (slow - begun).abs().mean() > 0


def test_a_deviation_of_ones_own_needs_no_mean(headed):
    options = {"class_index": 0, "net": headed, "size": None}
    found = cam(noise(32, 32), std=(0.5, 0.5, 0.5), **options)
    same = cam(noise(32, 32), mean=(0.485, 0.456, 0.406), std=(0.5, 0.5, 0.5), **options)
    assert found.logit == same.logit != cam(noise(32, 32), **options).logit
    found = cam(noise(32, 32), mean=(0.5, 0.5, 0.5), **options)
    assert found.logit == cam(noise(32, 32), mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225), **options).logit
