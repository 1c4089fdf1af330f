"""Convolutions by tiles, against float64 and against direct ones in float32."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat import VGGFeatures, devices, winograd
from vggfeat.arch import Arch
from vggfeat.convolution import Conv2d
from vggfeat.trunk import Trunk
from vggfeat.winograd import convolve, is_faster, transformed, weight_gradient


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    assert found.shape == exact.shape
    return float(((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).detach())


def test_a_tile_by_hand():
    """One tile of one channel: y = Aᵀ [(G g Gᵀ) · (Bᵀ d B)] A, and each y is the sum of nine products."""
    to_points, of_kernel, back = winograd._matrices()
    d, g = drawn(6, 6).double(), drawn(3, 3, seed=1).double()
    found = back @ ((of_kernel @ g @ of_kernel.T) * (to_points @ d @ to_points.T)) @ back.T
    for i in range(4):
        for j in range(4):
            torch.testing.assert_close(found[i, j], (d[i : i + 3, j : j + 3] * g).sum(), rtol=1e-12, atol=1e-12)


def test_a_flipped_kernel_is_the_same_numbers_at_other_points():
    weight = drawn(4, 5, 3, 3).double()
    flipped = transformed(weight.flip(2, 3).transpose(0, 1)).view(6, 6, 4, 5)
    points = transformed(weight).view(6, 6, 5, 4)[winograd.FLIPPED][:, winograd.FLIPPED].transpose(2, 3)
    torch.testing.assert_close(flipped, points, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize(
    ("n", "c", "k", "height", "width"),
    [(1, 3, 5, 3, 3), (2, 8, 4, 16, 12), (1, 4, 9, 17, 23), (1, 64, 96, 70, 41), (1, 128, 128, 96, 96),
     (300, 8, 64, 8, 8), (401, 64, 16, 5, 7), (0, 4, 4, 8, 8)],
)  # fmt: skip
def test_equals_the_convolution_and_its_gradients(n, c, k, height, width, pad):
    x, weight, bias = drawn(n, c, height, width), drawn(k, c, 3, 3, seed=1), drawn(k, seed=2)
    tiles = transformed(weight)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=pad)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        found = convolve(given, tiles, bias, pad)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, exact) < 2e-6 and error(convolve(given, tiles, bias, pad, relu=True), exact.relu()) < 2e-6
    grad = drawn(*exact.shape, seed=3)
    back = F.conv_transpose2d(grad.double(), weight.double(), padding=pad)
    assert error(convolve(grad, tiles, None, 2 - pad, transposed=True), back) < 2e-6
    convolve(torch.full((1, c, 64, 64), torch.nan), tiles, bias, pad)  # and what is left behind does not leak
    of_weight = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=pad)
    for layout in (torch.contiguous_format, torch.channels_last):
        given, back = (v.contiguous(memory_format=layout) for v in (x, grad))
        assert error(weight_gradient(given, back, pad), of_weight) < 1e-5  # sums of thousands: oneDNN has up to 6e-6


@pytest.mark.parametrize("pad", [1, 2])
def test_of_several_images_in_bands_each_has_borders_of_its_own(monkeypatch, pad):
    for name, value in (("BAND", 40), ("SUMMED", 40)):
        monkeypatch.setattr(winograd, name, value)
    x, weight = drawn(3, 8, 83, 90), drawn(8, 8, 3, 3, seed=1)
    exact = F.conv2d(x.double(), weight.double(), padding=pad)
    assert error(convolve(x, transformed(weight), None, pad), exact) < 2e-6
    grad = drawn(*exact.shape, seed=2)
    of_weight = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=pad)
    assert error(weight_gradient(x, grad, pad), of_weight) < 1e-5


@pytest.mark.parametrize("size", [6, 8])
def test_a_last_band_of_fewer_images_sums_nothing_of_those_before(monkeypatch, size):
    """With tiles that hang over the border, so that a band is copied, and with those that fit."""
    monkeypatch.setattr(winograd, "SUMMED", 8)  # two images of four tiles
    x, grad = drawn(5, 8, size, size), drawn(5, 8, size, size, seed=1)
    expected = torch.nn.grad.conv2d_weight(x.double(), (8, 8, 3, 3), grad.double(), padding=1)
    assert error(weight_gradient(x, grad, 1), expected) < 1e-5


def test_tiles_of_a_band_and_memory_that_is_kept(monkeypatch):
    """For each thread as many; a weight's gradient is summed over more, and laid out as weights are in training."""
    of, seen = winograd._Bands.of, []
    monkeypatch.setattr(winograd._Bands, "of", staticmethod(lambda *args: seen.append(args[-1]) or of(*args)))
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        convolve(drawn(1, 8, 6, 6), transformed(drawn(8, 8, 3, 3)), None, 1)
    assert seen == [128, 384]
    x = drawn(1, 8, 6, 6)
    assert weight_gradient(x, x, 1).is_contiguous(memory_format=torch.channels_last) and seen[-1] == 256
    before = winograd._workspace(2, 1000).data_ptr()
    assert winograd._workspace(1, 10).data_ptr() == before == winograd._workspace(2, 1000).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "height", "width"), [(1, 200, 37), (3, 21, 18), (1, 16, 16), (1, 130, 300)])
def test_what_comes_out_may_take_the_place_of_what_goes_in(monkeypatch, images, height, width, dtype):
    """To the same bits, over many bands and over images together; where it does not fit it goes elsewhere."""
    monkeypatch.setattr(winograd, "BAND", 40)
    x = drawn(images, 64, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    tiles, bias = transformed(drawn(64, 64, 3, 3, seed=1) / 24), drawn(64, seed=2)
    for options in ({"relu": True}, {"transposed": True}):
        given = None if "transposed" in options else bias
        expected, place = convolve(x, tiles, given, 1, **options), x.clone(memory_format=torch.preserve_format)
        found = convolve(place, tiles, given, 1, **options, overwrite=True)
        assert torch.equal(found, expected) and found.data_ptr() == place.data_ptr()
    for other, kernel, pad in ((x.contiguous(), tiles, 1), (x, tiles, 0), (x, tiles[:, :, :32], 1)):
        before = other.clone()
        found = convolve(other, kernel, None, pad, overwrite=True)
        assert torch.equal(other, before) and torch.equal(found, convolve(other, kernel, None, pad))


@pytest.mark.parametrize("keep", ["bits", "values"])
def test_what_is_kept_or_tapped_is_not_overwritten(keep, monkeypatch):
    """What is tapped, and what was given and may be held, is the same as where every layer is tapped: none is free."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    used = []
    monkeypatch.setattr(
        winograd, "convolve", lambda *a, real=convolve, **k: used.append(k["overwrite"]) or real(*a, **k)
    )
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    every = [name for name in Arch("D").names[: Arch("D").names.index("pool3")] if name not in ("conv1_1", "conv1_2")]
    wanted = VGGFeatures(every, "vgg16", "random", keep=keep)(image)
    assert used and not any(used)
    for names in (
        ("conv2_1", "relu3_3"),
        ("relu2_1", "conv3_3"),
        ("pool1", "relu2_2", "conv3_2"),
        ("pool2", "relu3_1"),
    ):
        features, shown = VGGFeatures(names, "vgg16", "random", keep=keep), {}
        used.clear()
        features.taps_by_rows(image, lambda name, part, rows, shown=shown: shown.setdefault(name, []).append(part))
        taps, back = features.vjp(image)
        assert any(used)
        for name in names:
            assert torch.equal(taps[name], wanted[name]) and torch.equal(torch.cat(shown[name], 2), wanted[name]), name
        leaf = image.clone().requires_grad_()
        found = features(leaf)
        seeds = [drawn(*tap.shape, seed=i) for i, tap in enumerate(found.values())]
        before = [seed.clone() for seed in seeds]
        (gradient,) = torch.autograd.grad([*found.values()], leaf, seeds)
        assert all(torch.equal(*pair) for pair in zip(seeds, before, strict=True))
        given = iter(reversed(seeds))  # taps' gradients are asked for deepest first
        assert error(back(lambda name, tap, given=given: next(given)), gradient) < 1e-6
        assert all(torch.equal(*pair) for pair in zip(seeds, before, strict=True))


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(128, 96), (256, 64), (512, 32)])
def test_is_about_as_exact_as_a_direct_convolution(channels, size, rectified):
    x = drawn(1, channels, size, size)
    x = x.relu() if rectified else x
    weight = drawn(channels, channels, 3, 3, seed=1) * (2 / (9 * channels)) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    direct = error(F.conv2d(*(v.contiguous(memory_format=torch.channels_last) for v in (x, weight)), padding=1), exact)
    found = error(convolve(x, transformed(weight), None, 1), exact)
    assert found < max(3 * direct, 1.2e-6)  # where direct sums are taken in short blocks, they are the exacter ones


def test_large_values_and_what_others_left_behind():
    """Activations of Oxford's size; and the workspace, which holds what the last call wrote, NaN too, does not leak."""
    x, weight = drawn(1, 64, 33, 20), drawn(64, 64, 3, 3, seed=1)
    spoilt = torch.full((1, 64, 33, 20), torch.nan)
    tiles = transformed(weight)
    assert convolve(spoilt, tiles, None, 1).isnan().all()
    exact = F.conv2d(1e4 * x.double(), weight.double(), padding=1)
    assert error(convolve(1e4 * x, tiles, None, 1), exact) < 2e-6


def test_in_inference_mode_and_in_threads():
    x, weight = drawn(1, 16, 40, 40), drawn(16, 16, 3, 3, seed=1)
    tiles, exact = transformed(weight), F.conv2d(x.double(), weight.double(), padding=1)
    winograd._kept.__dict__.clear()
    winograd._bases.cache_clear()
    with torch.inference_mode(), torch.device("meta"):  # what is kept must not be of the kind that is made here
        assert error(convolve(x, tiles, None, 1), exact) < 2e-6
    assert error(convolve(x, tiles, None, 1), exact) < 2e-6
    errors = []

    def work(seed):
        mine = drawn(1, 16, 40, 40, seed=seed)
        right = F.conv2d(mine.double(), weight.double(), padding=1)
        errors.extend(error(convolve(mine, tiles, None, 1), right) for _ in range(20))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80 and max(errors) < 2e-6


def test_where_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    cpu, large = torch.device("cpu"), (256, 256, 64, 64)
    assert is_faster(cpu, torch.float32, *large)
    assert not is_faster(torch.device("cuda"), torch.float32, *large)
    assert not is_faster(cpu, torch.float64, *large)
    for hardware in (True, False):
        monkeypatch.setattr(devices, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        assert is_faster(cpu, torch.bfloat16, *large) != hardware
    for channels, faster in (((64, 64), False), ((64, 128), True), ((128, 64), True), ((3, 128), False)):
        assert is_faster(cpu, torch.float32, *channels, 64, 64) == faster
    assert not is_faster(cpu, torch.float32, 3, 64, 64, 64) and not is_faster(cpu, torch.float32, 256, 256, 8, 64)
    before = torch.get_float32_matmul_precision()
    try:  # products of rounded factors were asked for; a convolution's are not meant
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            assert not is_faster(cpu, torch.float32, *large)
    finally:
        torch.set_float32_matmul_precision(before)
    assert is_faster(cpu, torch.float32, *large)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not is_faster(cpu, torch.float32, *large)


@pytest.mark.parametrize(
    ("arch", "keep", "padding"),
    [
        ("vgg16", "bits", "zeros"),
        ("vgg16", "values", "reflect"),
        ("vgg16", "bits", "replicate"),
        ("vgg16_bn", "values", "zeros"),
        ("vgg16_bn", "bits", "reflect"),
        ("vgg16_bn", "values", "replicate"),
    ],
)
def test_taps_and_gradient_in_float32(arch, keep, padding, monkeypatch):
    """All of a trunk in tiles where they pay, against float64, with weights that leave no ReLU near its corner."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    net = vggfeat.vgg("D", batch_norm=arch.endswith("bn"), head="slim", num_classes=2)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.data = drawn(*module.weight.shape, seed=fan) / fan
            module.bias.data.fill_(2)
    names = ["conv2_2", "relu2_2", "conv3_2", "relu3_3", "pool3"]
    features = VGGFeatures(names, arch, net.state_dict(), "average", padding, keep=keep)
    images = torch.rand(2, 3, 76, 84, generator=torch.Generator().manual_seed(0))
    used = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, real=convolve, **k: used.append(k) or real(*a, **k))
    found = []
    for given in (images, images.double()):
        leaf = given.clone().requires_grad_()
        taps = list(features(leaf).values())
        assert min(float(tap.detach().min()) for tap in taps) > 0
        seeds = [drawn(*tap.shape, seed=i).to(tap.dtype) for i, tap in enumerate(taps)]
        (gradient,) = torch.autograd.grad(taps, leaf, seeds)
        found.append([*taps, gradient])
    assert sum("transposed" in each for each in used) == 5 + arch.endswith("bn") * 2 < len(used)
    assert max(error(ours, exact) for ours, exact in zip(*found, strict=True)) < 2e-6


@pytest.mark.parametrize("keep", ["bits", "values"])
def test_bfloat16_without_hardware_for_it(keep, monkeypatch):
    """Computed in float32, kept in bfloat16: nearer to float64 than eight bits of mantissa, and no operation fails."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: False)
    used = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, real=convolve, **k: used.append(k) or real(*a, **k))
    layers = ["conv1_2", "relu2_1", "conv3_2"]
    features = VGGFeatures(layers, "vgg16", "random", "average", precision="bfloat16", keep=keep)
    exact = VGGFeatures(layers, "vgg16", "random", "average", keep=keep)
    # of its own, so that no filters are found that were made ready for hardware
    monkeypatch.setattr(features, "trunk", Trunk(features.arch, features.trunk.state, ("alone",)))
    images = torch.rand(2, 3, 76, 84, generator=torch.Generator().manual_seed(0))
    found = []
    for given, network in ((images, features), (images.double(), exact)):
        leaf = given.clone().requires_grad_()
        taps = list(network(leaf).values())
        assert all(tap.dtype == (torch.bfloat16 if network is features else torch.float64) for tap in taps)
        seeds = [drawn(*tap.shape, seed=i).to(tap.dtype) for i, tap in enumerate(taps)]
        (gradient,) = torch.autograd.grad(taps, leaf, seeds)
        found.append([*taps, gradient])
    assert sum("transposed" in each for each in used) == 4 < len(used)
    errors = [error(ours, true) for ours, true in zip(*found, strict=True)]
    assert max(errors[:-1]) < 2**-7 and errors[-1] < 0.05  # of the gradient: a ReLU at its corner falls to either side


@pytest.fixture
def features(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return VGGFeatures(["relu3_1"], "vgg16", "random")


def test_weights_that_only_ordinary_operations_need_are_not_copied(features):
    cpu = torch.device("cpu")
    filters = features.trunk.filters(features.plan, cpu, torch.float32, size=(64, 64))
    tiled = [weight for weight, back in zip(filters[::3], filters[2::3], strict=True) if back.ndim == 3]
    originals = {value.data_ptr() for value in features.trunk.state.values()}
    assert len(tiled) == 3 and all(weight.data_ptr() in originals for weight in tiled)


def test_a_callers_gradient_of_a_convolution_is_not_overwritten(monkeypatch):
    """Though the gradient of its input would fit there."""
    monkeypatch.setattr(winograd, "is_faster", lambda device, dtype, channels, *_: channels == 96)
    arch = Arch("D", head=None, channels=(96, 8, 8, 8, 8))
    features = VGGFeatures(["conv1_2"], arch=arch, weights="random")
    x = drawn(1, 3, 32, 32).sigmoid().requires_grad_()
    grad = drawn(1, 96, 32, 32, seed=1).contiguous(memory_format=torch.channels_last)
    before = grad.clone()
    features(x)["conv1_2"].backward(grad)
    assert torch.equal(grad, before) and x.grad.abs().max() > 0


def test_second_derivatives(features):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def penalty(x):
        (gradient,) = torch.autograd.grad(features(x)["relu3_1"].square().mean(), x, create_graph=True)
        return gradient.square().sum()

    first, second = (torch.autograd.grad(penalty(x), x)[0] for x in (image, image.double()))
    assert error(first, second.detach()) < 1e-2  # ReLUs at their corner fall to either side


def gradients(conv, x, autocast=False, batched=False):
    """Of images, weights and bias; with `batched` of three outputs at once."""
    outputs = conv(x).square().mean((0, 2, 3))[:3]
    leaves = (x, *conv.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if batched:
            return torch.autograd.grad(outputs, leaves, torch.eye(3), is_grads_batched=True)
        each = [torch.autograd.grad(outputs, leaves, way, retain_graph=True) for way in torch.eye(3)]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


@pytest.mark.parametrize("side", [32, 4])
@pytest.mark.parametrize("how", ["autocast", "batched"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's older vmap calls its operator in a loop
def test_a_backward_inside_autocast_and_of_many_at_once(side, how):
    x = torch.randn(32 if side == 4 else 4, 64, side, side, requires_grad=True)
    conv = Conv2d(64, 64, 3, padding=1)
    for ours, expected in zip(gradients(conv, x, **{how: True}), gradients(conv, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's own tracer
def test_in_compiled_graphs_and_under_vmap(features, monkeypatch):
    used = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, real=convolve, **k: used.append(k) or real(*a, **k))

    def step(x):
        return features(x)["relu3_1"].square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for side in (24, 64, 80):  # from small maps, which are taken directly, to a graph for any size
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        found = []
        for function in (compiled, step):
            used.clear()
            leaf = image.clone().requires_grad_()
            found += torch.autograd.grad(function(leaf), leaf)
            assert bool(used) == (side > 24)
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-9)

    several = torch.rand(3, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    each = torch.func.vmap(step)(several)
    torch.testing.assert_close(each, torch.stack([step(image) for image in several]), rtol=1e-5, atol=0)


def test_a_convolution_in_front_of_its_normalisation_gets_what_that_does(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = VGGFeatures(["conv2_2", "relu3_2"], "vgg16_bn", "random")
    for name, wanted in features(image.double()).items():
        assert error(features(image)[name], wanted) < 1e-4, name


@pytest.mark.parametrize(
    ("count", "most", "each"), [(16, 12, 8), (4, 3, 2), (16, 16, 16), (5, 2, 2), (7, 100, 7), (3, 0, 1), (0, 4, 1)]
)
def test_bands_are_as_few_as_can_be_and_of_one_size(count, most, each):
    """16 rows of at most 12 are two bands of 8: of 12, the second would be computed whole for 4."""
    assert winograd._part_size(count, most) == each
