"""vggfeat.transfer: compared with the paper's formulas written out, torch.optim, and a plain network in float64."""

import dataclasses
import inspect
import itertools
import json
import math
import os
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from pictures import scene
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import vggfeat
from vggfeat import DependencyError, InputError, RunError, StyleConfig, VGGFeatures, WeightsError, stylize
from vggfeat.arch import Arch, parse
from vggfeat.image import fit, read_settings, resize, to_pil, to_tensor
from vggfeat.transfer import objective as objective_module, stylize as stylize_module, tiles as tiles_module
from vggfeat.transfer.objective import Objective
from vggfeat.transfer.optimize import LBFGS, Adam, FourierPreconditioner
from vggfeat.transfer.tiles import _spans, side_for
from vggfeat.trunk import bits as bits_module, strips as strips_module

UNIT = 8  # channels of conv1_1: a VGG-19 an eighth as wide
STAGES = (2, 2, 4, 4, 4)
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
STYLE, CONTENT = ("relu1_1", "relu2_1", "relu3_1"), ("relu2_2", "conv3_1")
KEYS = {"total", "style", "content", "tv"}


def convs():
    """(name, index in torchvision's features, whether a pool comes before) of VGG-19's convolutions."""
    index = 0
    for stage, count in enumerate(STAGES, start=1):
        for i in range(1, count + 1):
            yield f"{stage}_{i}", index, i == 1 and stage > 1
            index += 2
        index += 1


def random_state(seed=0, until="5_4"):
    generator = torch.Generator().manual_seed(seed)
    state, before = {}, 3
    for name, index, _ in convs():
        channels = UNIT * min(8, 2 ** (int(name[0]) - 1))
        filters = torch.randn(channels, before, 3, 3, generator=generator) * math.sqrt(2 / (9 * before))
        state[f"features.{index}.weight"] = filters
        state[f"features.{index}.bias"] = 0.1 * torch.randn(channels, generator=generator)
        before = channels
        if name == until:
            return state
    raise AssertionError(until)


def plain(state, image, names):
    """Taps of VGG-19, layer by layer, in the type of the image."""
    x = (image - MEAN.to(image)[:, None, None]) / STD.to(image)[:, None, None]
    taps = {}
    for name, index, pooled in convs():
        if f"features.{index}.weight" not in state or len(taps) == len(names):
            break
        x = F.max_pool2d(x, 2) if pooled else x
        x = F.conv2d(x, state[f"features.{index}.weight"].to(x), state[f"features.{index}.bias"].to(x), padding=1)
        taps |= {key: x for key in (f"conv{name}",) if key in names}
        x = x.relu()
        taps |= {key: x for key in (f"relu{name}",) if key in names}
    return taps


def rows(tap):
    return tap[0].flatten(1).double()  # (N, M): N filters, M positions, as in the paper


def by_hand(state, config, content, styles, image):
    """The three weighted terms, summed as the paper's equations and our docstring say."""
    names = (*config.style_layers, *config.content_layers)
    ours, target = plain(state, image, names), plain(state, content, names)
    painted = [plain(state, style, names) for style in styles]
    blend = config.style_blend or [1] * len(styles)
    style = content_term = 0.0
    weights = config.style_layer_weights or [1] * len(config.style_layers)
    for name, weight in zip(config.style_layers, weights, strict=True):
        f = rows(ours[name])
        n, m = f.shape
        gram = torch.einsum("ik,jk->ij", f, f)
        if config.normalization == "gatys":
            wanted = sum(
                b / sum(blend) * torch.einsum("ik,jk->ij", rows(p[name]), rows(p[name])) * m / rows(p[name]).shape[1]
                for b, p in zip(blend, painted, strict=True)
            )
            error = ((gram - wanted) ** 2).sum() / (4 * n**2 * m**2)  # eq. 4
        else:
            wanted = sum(
                b / sum(blend) * torch.einsum("ik,jk->ij", rows(p[name]), rows(p[name])) / rows(p[name]).shape[1]
                for b, p in zip(blend, painted, strict=True)
            )
            error = ((gram / m - wanted) ** 2).sum() / (wanted**2).sum()
        style += weight / sum(weights) * error
    weights = config.content_layer_weights or [1] * len(config.content_layers)
    for name, weight in zip(config.content_layers, weights, strict=True):
        error = ((rows(ours[name]) - rows(target[name])) ** 2).sum()
        error = error / 2 if config.normalization == "gatys" else error / (rows(target[name]) ** 2).sum()  # eq. 1
        content_term += weight / sum(weights) * error
    x = image[0].double()
    tv = ((x[:, 1:] - x[:, :-1]) ** 2).mean() + ((x[:, :, 1:] - x[:, :, :-1]) ** 2).mean()
    style_weight, content_weight = config.term_weights
    return {"style": style_weight * style, "content": content_weight * content_term, "tv": config.tv_weight * tv}


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("weights") / "tiny-vgg19.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture
def config(weights):
    """A run of well under a second; `config(steps=3)` changes a setting."""

    def make(**changes):
        settings = {"size": 48, "start_size": 48, "steps": 12, "weights": weights, "device": "cpu"}
        settings |= {"style_layers": STYLE, "content_layers": CONTENT, "precision": "float32"}
        return StyleConfig(**(settings | changes))

    return make


@pytest.fixture
def pair():
    """Content 48×36 and style 48×48: their size at the only scale, so that nothing is resampled."""
    return scene(48, 36, seed=1), scene(48, 48, seed=2, cells=16)


# ── objective ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def objective(state, config, content, styles, side=0, keep="values"):
    layers = (*config.style_layers, *config.content_layers)
    options = {"weights": state, "pooling": config.pooling, "padding": config.padding, "keep": keep}
    return Objective(VGGFeatures(layers, **options), config, content, styles, side)


@pytest.mark.parametrize("normalization", StyleConfig.CHOICES["normalization"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"style_layer_weights": (1, 0, 4), "content_layer_weights": (3, 1), "tv_weight": 2.5},
        {"style_weight": 7, "content_weight": 0.3, "style_blend": (3, 1)},
        {"content_layers": (), "tv_weight": 1},
    ],
    ids=["defaults", "layer weights", "blend", "no content"],
)
def test_terms_are_the_formulas(state, config, normalization, changes):
    config = config(normalization=normalization, **changes)
    content, image = (scene(20, 14, seed=seed).double() for seed in (1, 2))
    styles = [scene(20, 14, seed=3).double(), scene(13, 18, seed=4).double()][: len(config.style_blend or "1")]
    terms = objective(state, config, content, styles).terms(image)
    expected = by_hand(state, config, content, styles, image)
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, torch.as_tensor(expected[name]).double(), rtol=1e-9, atol=1e-12)


def test_images_that_the_features_refuse(state, config):
    fitting, small = scene(20, 14), scene(3, 3)
    for content, style in ((small, fitting), (fitting, small)):
        with pytest.raises(InputError, match="3×3"):
            objective(state, config(), content, [style])


def test_terms_vanish_where_they_should(state, config):
    content, style = scene(20, 14, seed=1).double(), scene(20, 14, seed=3).double()
    both = objective(state, config(), content, [style])
    assert float(both.terms(content)["content"]) == 0
    assert float(both.terms(style)["style"]) < 1e-25
    assert float(both.terms(content)["style"]) > 1e-4
    assert float(both.terms(content)["tv"]) == 0


def test_terms_in_float32_at_full_width(config):
    """By the convolutions that float32 has for itself; targets stay what they were while the rest is computed."""
    layers = {"style_layers": ("conv2_1", "relu2_2", "pool2"), "content_layers": ("conv3_1", "relu2_1")}
    config = config(**layers, pooling="average")
    content, style, image = (scene(68, 64, seed=seed) for seed in (1, 2, 3))
    both = objective("random", config, content, [style])
    exact = objective("random", config, content.double(), [style.double()])
    for x in (content, image):
        found, expected = both.terms(x), exact.terms(x.double())
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-9), name
    ours, theirs = both.value_and_grad(image)[2], exact.value_and_grad(image.double())[2]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-2  # a ReLU at its corner falls to either side


def test_terms_of_bfloat16_features_are_summed_in_float32(state, config):
    config = config(precision="bfloat16", style_weight=0, content_weight=1)
    features = VGGFeatures((*STYLE, *CONTENT), weights=state, precision="bfloat16")
    content, style, image = (scene(40, 36, seed=seed) for seed in (1, 2, 3))
    ours, theirs = (
        {name: tap.double() for name, tap in features(x).items() if name in CONTENT} for x in (image, content)
    )
    wanted = sum(float((ours[k] - theirs[k]).square().sum() / theirs[k].square().sum()) for k in CONTENT) / 2
    both = Objective(features, config, content, [style])
    assert float(both.terms(image)["content"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("normalization", StyleConfig.CHOICES["normalization"])
def test_gradient_is_the_finite_difference(state, config, normalization):
    config = config(normalization=normalization, style_blend=(1, 2), tv_weight=0.7)
    content, image = scene(16, 12, seed=1).double(), scene(16, 12, seed=2).double()
    generator = torch.Generator().manual_seed(0)
    image = image + 0.3 * torch.randn(image.shape, generator=generator, dtype=image.dtype)  # some of it out of range
    assert image.min() < -0.1 and image.max() > 1.1
    both = objective(state, config, content, [scene(16, 12, seed=3).double(), scene(9, 12, seed=4).double()])
    total, terms, grad = both.value_and_grad(image)
    assert not total.requires_grad and not any(term.requires_grad for term in terms.values())
    outside = (image - image.clamp(0, 1)).square().mean()
    # the penalty grows with the paper's unscaled terms, which start at what the content image has
    scale = sum(both.terms(content).values()) if normalization == "gatys" else 1
    torch.testing.assert_close(total, sum(terms.values()) + objective_module.RANGE_WEIGHT * scale * outside)
    for _ in range(6):
        along = torch.randn(image.shape, generator=generator, dtype=image.dtype)
        ahead, behind = (float(both.value_and_grad(image + step * along)[0]) for step in (1e-6, -1e-6))
        assert (ahead - behind) / 2e-6 == pytest.approx(float((grad * along).sum()), rel=1e-5)


@pytest.fixture
def thin(monkeypatch):
    """The first block goes by strips of 8 rows, gradients of taps come 8 rows at a time."""
    monkeypatch.setattr(strips_module, "ROWS", 8)
    monkeypatch.setattr(strips_module, "BYTES", 8)
    monkeypatch.setattr(bits_module, "BAND", 1)


@pytest.mark.parametrize("side", [0, 16])
@pytest.mark.parametrize("keep", ["bits", "values"])
@pytest.mark.parametrize("cut", [False, True])
def test_gradient_is_what_autograd_makes_of_the_terms(state, config, side, keep, cut, request):
    """In float64, with layers that count for style and content, and one whose ReLU is tapped behind it."""
    if cut:
        request.getfixturevalue("thin")
    layers = {"style_layers": ("relu1_1", "conv2_1", "pool2"), "content_layers": ("conv1_1", "conv2_1", "relu2_1")}
    config = config(**layers, tv_weight=0.3)
    content, image = scene(40, 36, seed=1).double(), scene(40, 36, seed=2).double()
    both = objective(state, config, content, [scene(30, 44, seed=3).double()], side, keep)
    leaf, sums = image.clone().requires_grad_(), {}
    for tile in both.tiles:
        add = both._by_part(leaf, tile, lambda part: both._add(sums, ("style", "content"), part))
        for name, tap in both.features(tile.read(leaf)).items():
            add(name, tap, slice(0, tap.shape[2]))
    total = sum(both._terms(sums, leaf).values())
    (wanted,) = torch.autograd.grad(total, leaf)
    found, _, grad = both.value_and_grad(image)
    assert sum(both.terms(image).values()) == pytest.approx(float(total.detach()), rel=1e-12)
    torch.testing.assert_close(found, total.detach(), rtol=1e-12, atol=0)  # nothing of the image is out of range
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize(("precision", "keep"), [("float32", "bits"), ("bfloat16", "values")])
def test_signs_are_packed_where_values_are_large(config, pair, precision, keep, monkeypatch):
    seen = []
    monkeypatch.setattr(
        stylize_module, "Objective", lambda features, *rest: seen.append(features) or Objective(features, *rest)
    )
    stylize(*pair, config(steps=1, precision=precision))
    assert {features.keep for features in seen} == {keep}


@pytest.mark.parametrize(("side", "calls"), [(0, ["vjp"]), (16, ["taps", "vjp"])])
def test_a_whole_picture_goes_through_the_network_once(state, config, monkeypatch, side, calls):
    both, seen = objective(state, config(), scene(20, 14), [scene(20, 14)], side), []
    for name in ("taps", "vjp"):
        walk = getattr(VGGFeatures, f"{name}_by_rows")
        monkeypatch.setattr(
            VGGFeatures, f"{name}_by_rows", lambda *given, name=name, walk=walk: (seen.append(name), walk(*given))[1]
        )
    both.value_and_grad(scene(20, 14, seed=2))
    assert seen == [name for name in calls for _ in both.tiles]


def test_silent_target_gives_finite_terms(config):
    state = {key: torch.zeros_like(value) for key, value in random_state(until="1_1").items()}
    state["features.0.weight"][:, 0, 1, 1] = -1.0  # a layer that no picture as red as this one excites
    config = config(style_layers=("relu1_1",), content_layers=("relu1_1",))
    red, blue = torch.zeros(2, 1, 3, 8, 8).unbind(0)
    red[:, 0], blue[:, 2] = 1, 1
    total, terms, grad = objective(state, config, red, [red]).value_and_grad(blue)
    assert total.isfinite() and grad.isfinite().all() and terms["style"] > 0 and terms["content"] > 0


# ── optimisers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def quadratic(size, condition, seed=0):
    """Gradient of ½ (x - c)ᵀ A (x - c) with eigenvalues from 1 to `condition`, and its minimum c."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.T
    centre = torch.randn(size, generator=generator, dtype=torch.float64)
    return lambda x: ((x.flatten() - centre) @ matrix).view_as(x), centre


def test_lbfgs_walks_as_torchs():
    size, history, count = 24, 4, 30
    gradient, centre = quadratic(size, 50)
    start = torch.zeros(1, 3, 2, 4, dtype=torch.float64)
    assert gradient(start).abs().sum() > 1  # then torch's first step is g / Σ|g|: a mean change of 1 / size

    theirs = start.clone().requires_grad_()
    visited = []

    def closure():
        visited.append(theirs.detach().clone())
        theirs.grad = gradient(theirs.detach())
        return 0.5 * ((theirs.detach().flatten() - centre) * theirs.grad.flatten()).sum()

    options = {"max_iter": count, "max_eval": 10 * count, "tolerance_grad": 0, "tolerance_change": 0}
    torch.optim.LBFGS([theirs], lr=1, history_size=history, **options).step(closure)

    optimizer, image = LBFGS(history=history, first_step=1 / size), start
    for expected in visited:
        torch.testing.assert_close(image, expected, rtol=1e-7, atol=1e-9)
        image = optimizer.step(image, gradient(image))
    assert len(visited) >= count


def test_lbfgs_reaches_the_minimum_of_a_narrow_valley():
    gradient, centre = quadratic(30, 1000)
    image, optimizer = torch.zeros(30, dtype=torch.float64), LBFGS()
    for _ in range(120):
        image = optimizer.step(image, gradient(image))
    torch.testing.assert_close(image, centre, rtol=0, atol=1e-4)


def inverse_hessian(pairs, guess):
    """BFGS' matrix, dense, from pairs (s, y): Nocedal and Wright 2006, eq. 7.16, without the two loops."""
    unit = torch.eye(len(pairs[0][0]), dtype=torch.float64) if pairs else 1.0
    matrix = guess * unit if isinstance(guess, float) else guess
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = unit - rho * torch.outer(s, y)
        matrix = left @ matrix @ left.T + rho * torch.outer(s, s)
    return matrix


def test_lbfgs_skips_pairs_without_positive_curvature():
    size, first = 6, 0.05
    gradient, _ = quadratic(size, 5)
    optimizer = LBFGS(history=10, first_step=first)
    image = torch.zeros(size, dtype=torch.float64)
    pairs, last = [], None
    for step in range(9):
        grad = gradient(image)
        if step in (3, 6):
            grad = last[1].clone() if step == 3 else last[1] - 2 * (image - last[0])  # sᵀy = 0, then sᵀy < 0
        gamma = first / float(grad.abs().mean())
        if last is not None:
            s, y = image - last[0], grad - last[1]
            if s @ y > 1e-9:
                pairs.append((s, y))
                gamma = float(s @ y / (y @ y))
        expected = image - (inverse_hessian(pairs, gamma) @ grad if pairs else gamma * grad)
        last = (image, grad)
        image = optimizer.step(image, grad)
        torch.testing.assert_close(image, expected, rtol=1e-9, atol=1e-12)
    assert len(pairs) in (5, 6, 7)  # of 8, at least the two spoilt ones were left out


def by_definition(pairs, shape, bands):
    """`FourierPreconditioner` dense, over the full spectrum: for each band √(Σ|S|² / Σ|Y|²), such that yᵀH₀y = sᵀy."""
    channels, height, width = shape[1:]
    frequencies = [torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width)]
    length = torch.hypot(frequencies[0][:, None], frequencies[1])
    edges = torch.logspace(math.log10(1 / min(height, width)), math.log10(math.sqrt(0.5)), bands + 1).double()
    band = (length[..., None] >= edges[1:-1] * (1 + 1e-6)).sum(-1).expand(channels, -1, -1).clone()
    band[1:] += bands
    spectra = [[torch.fft.fftn(v.view(shape)[0], norm="ortho").abs().square() for v in pair] for pair in pairs[-3:]]
    factors = torch.zeros(channels, height, width, dtype=torch.float64)
    for number in range(2 * bands):
        of_steps, of_changes = (sum(float(pair[i][band == number].sum()) for pair in spectra) for i in (0, 1))
        factors[band == number] = math.sqrt(of_steps / of_changes) if of_changes else 1.0
    units = torch.eye(channels * height * width, dtype=torch.float64).view(-1, channels, height, width)
    dims = (-3, -2, -1)
    matrix = torch.fft.ifftn(torch.fft.fftn(units, dim=dims) * factors, dim=dims).real.flatten(1).T
    s, y = pairs[-1]
    return matrix * (s @ y) / (y @ matrix @ y)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_lbfgs_with_a_spectrum_is_bfgs_from_that_matrix(size):
    shape, bands = (1, 3, *size), 3
    count = math.prod(shape)
    gradient, _ = quadratic(count, 30)
    image = torch.zeros(shape, dtype=torch.float64)
    optimizer = LBFGS(history=4, first_step=0.05, preconditioner=FourierPreconditioner(image, bands=bands))
    pairs, last = [], None
    for _ in range(8):
        grad = gradient(image)
        if last is None:
            expected = image - 0.05 / grad.abs().mean() * grad
        else:
            pairs.append(((image - last[0]).flatten(), (grad - last[1]).flatten()))
            guess = by_definition(pairs, shape, bands)
            expected = image - (inverse_hessian(pairs[-4:], guess) @ grad.flatten()).view(shape)
        last = (image, grad)
        image = optimizer.step(image, grad)
        torch.testing.assert_close(image, expected, rtol=1e-6, atol=1e-9)


def test_a_spectrum_finds_the_way_where_fine_patterns_curve_more():
    """A quadratic whose curvature rises 20,000-fold from the broadest to the finest waves."""
    shape = (1, 3, 32, 32)
    length = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).double()
    curvature = (1 + 200 * length).square()
    target = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(x):
        return torch.fft.irfft2(torch.fft.rfft2(x - target) * curvature, s=shape[2:])

    def needed(spectrum):
        optimizer, image = LBFGS(history=5, preconditioner=spectrum), torch.zeros(shape, dtype=torch.float64)
        for step in range(400):
            if (image - target).norm() < 1e-3 * target.norm():
                return step
            image = optimizer.step(image, gradient(image))
        return 400

    assert needed(FourierPreconditioner(target)) < needed(None) / 3


def test_a_spectrum_survives_pairs_without_curvature_and_a_restart():
    shape = (1, 3, 8, 8)
    image, optimizer = (
        torch.zeros(shape),
        LBFGS(first_step=0.02, preconditioner=FourierPreconditioner(torch.zeros(shape))),
    )
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in range(5):  # the gradient never changes: nothing is learnt, each step is like the first
        after = optimizer.step(image, slope)
        torch.testing.assert_close(after, image - 0.02 * slope / slope.abs().mean())
        image = after
    optimizer.step(image, slope * 2)
    optimizer.restart()
    torch.testing.assert_close(optimizer.step(image, slope) - image, -0.01 * slope / slope.abs().mean())
    assert torch.equal(LBFGS(preconditioner=FourierPreconditioner(image)).step(image, torch.zeros(shape)), image)


def test_lbfgs_on_a_slope_and_at_rest():
    optimizer, image = LBFGS(first_step=0.02), torch.zeros(1, 3, 2, 2)
    for _ in range(4):  # the gradient never changes: each step is like the first
        after = optimizer.step(image, torch.full_like(image, 3.0))
        torch.testing.assert_close(after, image - 0.02)
        image = after
    assert torch.equal(LBFGS().step(image, torch.zeros_like(image)), image)


def test_after_a_restart_the_spectrum_knows_nothing_of_before():
    shape = (1, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    curvature = 1 + 9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    start = torch.rand(shape, generator=generator, dtype=torch.float64)

    def walked(optimizer):
        image, images = start, []
        for _ in range(4):
            image = optimizer.step(image, curvature * image)
            images.append(image)
        return torch.stack(images)

    used, fresh = (LBFGS(preconditioner=FourierPreconditioner(start)) for _ in range(2))
    walked(used)
    used.restart()
    fresh.scale = 0.5  # as after one restart
    torch.testing.assert_close(walked(used), walked(fresh), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["lbfgs", "with a spectrum", "adam"])
def test_an_optimizers_state_is_all_it_goes_on_from_and_stays_as_it_was(kind):
    gradient, _ = quadratic(192, 10)
    image = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)

    def fresh():
        spectrum = FourierPreconditioner(image) if kind == "with a spectrum" else None
        return Adam(0.01) if kind == "adam" else LBFGS(history=3, preconditioner=spectrum)

    def walked(optimizer, start, count):
        images = [start]
        for _ in range(count):
            images.append(optimizer.step(images[-1], gradient(images[-1])))
        return images[1:]

    used, other = fresh(), fresh()
    walked(used, image, 2)
    used.restart()
    begun = walked(used, image, 4)[-1]
    state = used.state_dict()
    wanted = walked(used, begun, 4)
    other.load_state_dict(state)
    assert all(map(torch.equal, walked(other, begun, 4), wanted))


def test_restart_forgets_and_takes_half_steps():
    gradient, _ = quadratic(12, 10)
    start = torch.zeros(12, dtype=torch.float64)
    fresh, used = LBFGS(first_step=0.02), LBFGS(first_step=0.02)
    image = start
    for _ in range(5):
        image = used.step(image, gradient(image))
    used.restart()
    full, half = fresh.step(start, gradient(start)) - start, used.step(start, gradient(start)) - start
    torch.testing.assert_close(half, full / 2)

    fresh, used = Adam(0.02), Adam(0.02)
    image = start + 0.5
    for _ in range(5):
        image = used.step(image, gradient(image))
    used.restart()
    full, half = (each.step(start + 0.5, gradient(start)) - 0.5 for each in (fresh, used))
    torch.testing.assert_close(half, full / 2)


def test_adams_defaults():
    gradient, _ = quadratic(12, 10)
    theirs = torch.full((12,), 0.5, dtype=torch.float64, requires_grad=True)
    reference, image, optimizer = (
        torch.optim.Adam([theirs], 0.01, (0.9, 0.99), 1e-12),
        theirs.detach().clone(),
        Adam(0.01),
    )
    for _ in range(20):
        theirs.grad = gradient(theirs.detach())
        reference.step()
        image = optimizer.step(image, gradient(image))
    torch.testing.assert_close(image, theirs.detach(), rtol=1e-9, atol=1e-9)


def test_adam_is_torchs_and_stays_in_range():
    gradient, _ = quadratic(12, 10)
    theirs = torch.full((12,), 0.5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-12)
    image, optimizer = theirs.detach().clone(), Adam(0.01, (0.8, 0.95))
    for _ in range(20):
        theirs.grad = gradient(theirs.detach())
        reference.step()
        before = image.clone()
        after = optimizer.step(image, gradient(image))
        assert torch.equal(image, before)  # the caller may keep it as the best so far
        image = after
        torch.testing.assert_close(image, theirs.detach(), rtol=1e-9, atol=1e-9)
    assert 0 < image.min() and image.max() < 1
    for _ in range(300):
        image = optimizer.step(image, torch.linspace(-1, 1, 12, dtype=torch.float64))
    assert image[:6].eq(1).all() and image[6:].eq(0).all()


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD = [
    *[("size", value) for value in (0, -3, 512.5, "512", None, True, math.nan)],
    *[("steps", value) for value in (0, 2.5, "many", None)],
    *[("start_size", value) for value in (0, 1.5, None)],
    *[("seed", value) for value in (-1, 2**64, 0.5, "x", None)],
    *[("tile", value) for value in (-1, 0.5, "x")],
    *[(name, value) for name in ("weights", "init", "device") for value in (3, None)],
    *[("arch", value) for value in (3, "vgg99", "resnet50")],
    *[(name, value) for name in StyleConfig.CHOICES for value in ("nonsense", None, 1, [])],
    *[("style_layers", value) for value in ((), "relu1_1", 5, (1,), None, ("relu1_1", "relu1_1"))],
    *[("content_layers", value) for value in ("relu1_1", 5, (1,), None, ("relu1_1", "relu1_1"))],
    *[
        (name, value)
        for name in ("style_layer_weights", "content_layer_weights", "style_blend")
        for value in ((), (-1.0,), (0, 0), (math.nan,), ("a",), 3, "1,2", (math.inf, 1))
    ],
    *[(name, (1,) * 7) for name in ("style_layer_weights", "content_layer_weights")],
    *[(name, value) for name in ("style_weight", "content_weight") for value in (-1, math.nan, math.inf, "1", True)],
    *[("tv_weight", value) for value in (-1, math.nan, math.inf, "1", None)],
    *[(name, value) for name in ("style_scale", "learning_rate") for value in (0, -1, math.nan, math.inf, "1", None)],
    *[("keep_color", value) for value in ("yes", 1, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_settings_are_input_errors(name, value):
    with pytest.raises(InputError) as info:
        StyleConfig(**{name: value})
    assert "\n" not in str(info.value) and len(str(info.value)) > 20
    assert name in str(info.value) or name.replace("_", " ").rstrip("s") in str(info.value) or name == "arch"


def test_every_setting_has_a_bad_value_above_and_a_line_of_help():
    fields = dataclasses.fields(StyleConfig)
    assert {name for name, _ in BAD} == {field.name for field in fields}
    described = inspect.cleandoc(StyleConfig.__doc__)  # which Python 3.13 has done already
    for field in fields:
        assert field.metadata["help"] and f"\n    {field.name}: " in described


def test_a_picture_to_begin_with_is_a_file_and_the_other_starts_are_none():
    assert [StyleConfig(init=start).init_files for start in ("content", "noise", "a.png")] == [(), (), ("a.png",)]


def test_weights_of_the_terms_are_what_the_settings_say():
    assert StyleConfig().term_weights == (1, 0.05)
    assert StyleConfig(normalization="gatys").term_weights == (1000, 1)
    assert StyleConfig(style_weight=3, content_weight=0).term_weights == (3, 0)
    assert StyleConfig(style_weight=0, content_weight=2, normalization="gatys").term_weights == (0, 2)
    StyleConfig(style_weight=0, content_weight=0, tv_weight=0.1)  # something to improve


def test_settings_are_frozen_plain_values(tmp_path):
    config = StyleConfig(weights=tmp_path, style_layers=["relu1_1"], style_layer_weights=[2], style_weight=3)
    assert (config.weights, config.style_layers, config.style_layer_weights) == (str(tmp_path), ("relu1_1",), (2.0,))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 3
    read = json.loads(json.dumps(config.to_dict()))
    assert StyleConfig(**read) == config


def test_weights_may_be_a_state_dict(config, pair, state, tmp_path, monkeypatch):
    settings = config(weights=state, steps=3)
    result = stylize(*pair, settings)
    assert result.image.tobytes() == stylize(*pair, config(steps=3)).image.tobytes()
    assert result.weights == json.loads(json.dumps(result.to_dict()))["weights"] == "from a state dict"
    assert read_settings(result.save(tmp_path / "out.png"))["config"]["weights"] == "a state dict"
    # tensors are neither compared nor printed nor copied
    assert dataclasses.replace(settings, steps=4).weights is settings.weights and len(repr(settings)) < 1500
    assert settings == dataclasses.replace(settings) == config(weights=state, steps=3)
    assert settings != config(weights=dict(state), steps=3)
    assert len({settings, dataclasses.replace(settings), config(weights=state, steps=3)}) == 1
    with pytest.raises(InputError, match="weights must be a string or a state dict, got 3"):
        StyleConfig(weights=3)
    with pytest.raises(InputError, match="size must be a whole number, got "):
        StyleConfig(size=state)
    # a checkpoint knows other numbers, and these
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    stylize(*pair, settings, checkpoint=tmp_path / "run.pt")
    assert stylize(*pair, settings, checkpoint=tmp_path / "run.pt").image.tobytes() == result.image.tobytes()
    other = {key: value * 1.01 for key, value in state.items()}
    with pytest.raises(InputError, match="was written with other weights"):
        stylize(*pair, config(weights=other, steps=3), checkpoint=tmp_path / "run.pt")


# ── stylize: input and settings ───────────────────────────────────────────────────────────────────────────────────────


def test_takes_paths_pictures_and_tensors(config, pair, tmp_path):
    names = [tmp_path / "content.png", tmp_path / "style.png"]
    pictures = [to_pil(image) for image in pair]
    for picture, name in zip(pictures, names, strict=True):
        picture.save(name)
    config = config(steps=3)
    wanted = stylize(*pair, config).image.tobytes()
    for content, style in (pictures, names, map(str, names), (pictures[0].convert("RGBA"), [pair[1][0]])):
        assert stylize(content, style, config).image.tobytes() == wanted


@pytest.mark.parametrize(
    ("content", "style", "says"),
    [
        ("missing.jpg", None, "missing.jpg"),
        (torch.zeros(3, 3, 8, 8), None, "one of a batch"),
        (torch.full((1, 3, 48, 48), math.nan), None, "finite"),
        (torch.full((1, 3, 48, 48), 254.0), None, "to 254"),
        (3, None, "int"),
        (None, [], "no style"),
        (None, [Image.new("RGB", (0, 4))], "0x4"),
        (None, [torch.zeros(1, 1, 48, 48)], "RGB"),
    ],
)
def test_bad_images_are_input_errors(config, pair, content, style, says):
    with pytest.raises(InputError, match=says) as info:
        stylize(pair[0] if content is None else content, pair[1] if style is None else style, config())
    assert "\n" not in str(info.value)


def test_settings_that_do_not_fit_the_images(config, pair):
    for styles in ([pair[1]] * 2, (pair[1],) * 2):
        with pytest.raises(InputError, match="style_blend has 3 numbers for 2"):
            stylize(pair[0], styles, config(style_blend=(1, 2, 3), weights="nowhere.pth"))  # which come later
    with pytest.raises(InputError, match=r"48×2.* 4 pixels on each side; choose a size of 96 or more"):
        stylize(scene(48, 2), pair[1], config())
    assert stylize(scene(48, 2), pair[1], config(size=96, steps=1)).image.size == (96, 4)
    with pytest.raises(InputError, match="init is content, noise or an image file: there is none at 'somewhere.png'"):
        stylize(*pair, config(init="somewhere.png"))
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=device) as info:
            stylize(*pair, config(device=device))
        assert "\n" not in str(info.value)


def test_layers_that_are_not_there(config, pair, tmp_path):
    with pytest.raises(InputError, match="relu9_1"):
        stylize(*pair, config(content_layers=("relu9_1",)))
    save_file(random_state(until="2_2"), tmp_path / "shallow.safetensors")
    shallow = config(weights=tmp_path / "shallow.safetensors", arch="vgg19")
    with pytest.raises(
        WeightsError, match=r"do not reach relu3_1.*features\.10\.weight.*(relu2_2|pool2); choose style_layers and"
    ):
        stylize(*pair, shallow)
    stylize(*pair, dataclasses.replace(shallow, style_layers=("relu1_1",), content_layers=("conv2_2",), steps=1))


@pytest.mark.parametrize(("scale", "sizes"), [(1.0, [(24, 24), (48, 48)]), (2.0, [(48, 48), (96, 96)])])
def test_the_style_grows_with_the_picture(config, pair, monkeypatch, scale, sizes):
    seen = []
    monkeypatch.setattr(
        stylize_module,
        "Objective",
        lambda features, settings, content, styles, *rest: (
            seen.append(tuple(styles[0].shape[2:])) or Objective(features, settings, content, styles, *rest)
        ),
    )
    for content in (pair[0], pair[0].mT):  # a landscape, and a portrait
        stylize(content, pair[1], config(start_size=24, steps=1, style_scale=scale))
    assert seen == 2 * sizes


def test_a_thin_style_serves_every_scale(config, pair):
    result = stylize(pair[0], scene(400, 4), config(start_size=12, steps=2))
    assert len(result.history) > 2
    stylize(pair[0], scene(60, 50), config(style_scale=0.01, steps=1))  # 4 pixels high where it is 4.8 wide: so 5


def test_the_environment_names_the_automatic_weights(config, pair, weights, monkeypatch):
    monkeypatch.setenv("VGGFEAT_WEIGHTS", weights)
    assert stylize(*pair, config(weights="auto", steps=1)).weights == Path(weights).name


# ── tiles ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

DEEP = {"style_layers": ("relu1_1", "conv2_1", "pool4", "relu5_1"), "content_layers": ("relu4_2", "relu2_2")}


@pytest.mark.parametrize(
    ("changes", "width", "height", "side", "count"),
    [
        ({}, 97, 235, 48, 2 * 5),
        ({"pooling": "average", "padding": "reflect"}, 235, 97, 100, 3),
        ({"pooling": "l2", "padding": "replicate", "normalization": "gatys", "tv_weight": 0.1}, 130, 120, 64, 3 * 2),
        ({"padding": "reflect", "style_layers": ("relu1_2",), "content_layers": ("pool1",)}, 50, 37, 7, 7 * 5),
    ],
)
def test_tiles_are_the_whole(state, config, changes, width, height, side, count, thin):
    """Values and gradients in float64, of sizes that no stride divides."""
    config = config(**(DEEP | changes))
    x, content, style = (scene(width, height, seed=seed).double() for seed in (1, 2, 3))
    whole = objective(state, config, content, [style, x])
    tiled = objective(state, config, content, [style, x], side)
    assert (len(whole.tiles), len(tiled.tiles)) == (1, count)
    for name, target in whole.content.items():
        torch.testing.assert_close(tiled.content[name], target, rtol=1e-12, atol=1e-12)
    wanted, found = whole.value_and_grad(x), tiled.value_and_grad(x)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-12) and not found[2].requires_grad
    for terms in (found[1], tiled.terms(x)):
        assert terms == pytest.approx({name: float(value) for name, value in wanted[1].items()}, rel=1e-11)
    assert float((found[2] - wanted[2]).norm() / wanted[2].norm()) < 1e-12


def test_every_position_counts_once():
    for length in range(16, 150):
        for side in (1, 16, 33, 64, 200):
            spans = _spans(length, side, 16, 32)
            for stride in (1, 2, 4, 8, 16):
                seen = [n for span in spans for n in range(length // stride)[span.counts(stride)]]
                assert seen == [*range(length // stride)]
                for span in spans:
                    # cut into rows as they are read, however many at a time
                    lines = (span.stop - span.start) // stride
                    for count in (1, 5, lines):
                        cuts = [*range(0, lines, count), lines]
                        parts = [span.part(slice(*pair), stride) for pair in itertools.pairwise(cuts)]
                        numbers = [n for part in parts for n in range(length // stride)[part.counts(stride)]]
                        assert numbers == [*range(length // stride)[span.counts(stride)]]
                        for part, start in zip(parts, cuts, strict=False):
                            those = range(lines)[start : start + count][part.counts(stride, part.start)]
                            assert len(those) == len(range(length // stride)[part.counts(stride)])
                    read = range(span.start // stride, span.stop // stride)  # what the tile's own map stands for
                    own = read[span.counts(stride, span.start)]
                    assert own == range(length // stride)[span.counts(stride)]
                    # as far from the edge of what is read as `around` says, but where the picture ends
                    assert span.start == 0 or not own or own[0] * stride - span.start >= 32
                    assert span.stop == length or not own or span.stop - (own[-1] + 1) * stride >= 32


def test_a_picture_by_tiles_is_the_same(config, pair):
    whole, tiled = (stylize(*pair, config(start_size=24, steps=5, tile=tile)) for tile in (0, 16))
    assert tiled.losses == pytest.approx(whole.losses, rel=1e-3) and tiled.config.tile == 16
    assert (to_tensor(tiled.image) - to_tensor(whole.image)).abs().max() < 0.02


def test_a_classifier_is_not_computed_in_tiles():
    StyleConfig(content_layers=("fc8",), tile=0)
    with pytest.raises(InputError, match="fc8 sees the picture as a whole, not in tiles: leave tile out"):
        StyleConfig(content_layers=("fc8",), tile=32)


def test_a_classifier_carries_content_and_no_style(config, pair):
    """Its values have no positions to take a Gram matrix over; the content term is that of a plain head."""
    with pytest.raises(InputError, match="fc has no positions, .* a content layer"):
        StyleConfig(style_layers=("relu1_1", "fc"))
    state = vggfeat.vgg19(5, width=0.125, head="slim").state_dict()
    settings = config(weights=state, style_layers=("relu1_1",), content_layers=("fc",), content_weight=2)
    content, image = pair[0].double(), scene(48, 36, seed=5).double()
    both = objective(state, settings, content, [content])
    ours, theirs = (
        F.max_pool2d(plain(state, x, ("relu5_4",))["relu5_4"], 2).mean((2, 3)) @ state["classifier.1.weight"].double().T
        + state["classifier.1.bias"].double()
        for x in (image, content)
    )
    wanted = 2 * (ours - theirs).square().sum() / theirs.square().sum()
    assert float(both.terms(image)["content"]) == pytest.approx(float(wanted), rel=1e-9)
    state["classifier.1.weight"][0, 0] = math.nan
    with pytest.raises(WeightsError, match=r"classifier\.1\.weight holds NaN or infinite values$"):  # no layer's fault
        stylize(*pair, settings)


def test_tiles_are_as_large_as_memory_allows(config, pair, monkeypatch):
    """VGG-19 in float32 takes 6 × 64 × 4 bytes a pixel on a CPU, 9 × 64 × 4 elsewhere, and the optimiser 360."""
    arch, layers = parse("vgg19"), ["relu1_1", "relu5_1"]

    def side(free, height=3000, width=4000, names=layers, dtype=torch.float32, device="cpu"):
        return side_for(arch, names, height, width, dtype, torch.device(device), free)

    whole, narrow = 12e6 * 1536 / 0.7, 12e6 * 1152 / 0.7
    assert side(whole * 1.001) == 0 and side(narrow * 1.001, dtype=torch.bfloat16, device="cuda") == 0
    assert side(narrow * 0.999, dtype=torch.bfloat16, device="cuda") > 0
    monkeypatch.setattr(tiles_module, "emulates", lambda dtype, device: False)
    assert side(narrow * 1.001, dtype=torch.bfloat16) == 0 and side(narrow * 0.999, dtype=torch.bfloat16) > 0
    monkeypatch.setattr(tiles_module, "emulates", lambda dtype, device: True)  # bfloat16 that is computed in float32
    assert side(narrow * 1.001, dtype=torch.bfloat16) > 0 and side(whole * 1.001, dtype=torch.bfloat16) == 0
    monkeypatch.undo()
    assert side(2 * narrow * 0.999, device="cuda") > 0 and side(2 * narrow * 1.001, device="cuda") == 0
    assert side(4 * narrow * 0.999, device="mps") > 0 and side(4 * narrow * 1.001, device="mps") == 0  # by autograd
    assert side(whole / 3) == pytest.approx(math.sqrt((12e6 * 512 - 12e6 * 360) / 1536) - 156, abs=2)
    assert side(whole * 0.99) < 4000 and side(1e6) == 256  # something must be tried
    # of 64 channels, 2³¹ values are 33.5 million pixels
    assert side(1e15, 5700, 5800, device="cuda") == 0 and side(1e15, 5700, 5900) == 0
    assert side(1e15, 5700, 5900, device="cuda") == math.isqrt((2**31 - 1) // 64) - 156
    wide = Arch("E", head=None, channels=(8, 256, 8, 8, 8))  # its second block, of a quarter of the positions
    sides = [side_for(wide, layers, 5700, w, torch.float32, torch.device("cuda"), 1e15) for w in (5800, 5900)]
    assert sides[0] == 0 < sides[1]
    assert side(1e6, names=["relu1_1", "fc7"]) == 0  # of a classifier there are no parts
    asked = []
    monkeypatch.setattr(stylize_module, "side_for", lambda *given: asked.append(given) or 16)
    memory = iter(range(1000, 1010))
    monkeypatch.setattr(stylize_module, "free_memory", lambda device: next(memory))
    automatic = stylize(*pair, config(steps=3, precision="bfloat16"))
    cpu = torch.device("cpu")
    assert [each[2:] for each in asked] == [(36, 48, torch.bfloat16, cpu, 1000)]
    stylize(*pair, config(steps=3, start_size=24))  # what the first scale took is there for the second
    sizes = [(18, 24), (36, 48)]
    assert [each[2:] for each in asked[1:]] == [(*size, torch.float32, cpu, 1001) for size in sizes]
    assert automatic.losses == stylize(*pair, config(steps=3, precision="bfloat16", tile=16)).losses
    stylize(*pair, config(steps=1, tile=0))
    assert len(asked) == 3  # where it is said, nothing is asked


# ── stylize: scales and starts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (33, 100)])
def test_scales_go_from_coarse_to_fine(config, width, height):
    seen, config = [], config(size=72, start_size=18, steps=2)
    result = stylize(scene(width, height), scene(40, 40, seed=3), config, callback=seen.append)
    sizes = list(dict.fromkeys((step.width, step.height) for step in seen))
    assert [max(size) for size in sizes] == sorted({max(size) for size in sizes}) and len(sizes) > 2
    assert max(sizes[0]) == config.start_size
    assert sizes[-1] == fit(width, height, config.size) == result.image.size and max(sizes[-1]) == config.size
    for w, h in sizes:
        assert abs(w * height / width - h) <= 1 or abs(h * width / height - w) <= 1
    assert [step.scale for step in seen if step.step == 1] == list(range(1, len(sizes) + 1))
    assert {step.scales for step in seen} == {len(sizes)}


def test_neighbouring_scales_are_about_a_factor_of_two_apart():
    picture = Image.new("RGB", (1500, 1000))
    for size in range(128, 1500, 20):
        sizes = [max(each) for each in stylize_module._scales(picture, StyleConfig(size=size), 16)]
        assert sizes[-1] == size and (len(sizes) == 1 or sizes[0] == 128)
        assert all(1.18 < after / before < 2.4 for before, after in itertools.pairwise(sizes)), sizes
    square, config = Image.new("RGB", (64, 64)), StyleConfig(size=64, start_size=16)
    assert stylize_module._scales(square, config, 16) == [(16, 16), (32, 32), (64, 64)]
    assert stylize_module._scales(square, config, 17) == [(32, 32), (64, 64)]


def test_the_last_scale_gets_all_steps_and_the_others_half(config):
    result = stylize(scene(90, 60), scene(40, 40, seed=3), config(size=72, start_size=18, steps=5))
    counts = [sum(record["scale"] == scale for record in result.history) for scale in range(1, 4)]
    assert counts == [3, 3, 5]


@pytest.mark.parametrize("init", ["content", "file"])
def test_a_scale_begins_with_the_detail_of_the_picture_and_the_change_so_far(config, tmp_path, monkeypatch, init):
    """Each scale makes the picture 0.02 brighter: the next begins with the picture at its size, that much brighter."""
    content, style = scene(72, 48), scene(40, 40, seed=3)
    begun = to_pil(scene(72, 48, seed=9) if init == "file" else content)
    begun.save(tmp_path / "begun.png")
    seen = []
    value_and_grad = Objective.value_and_grad

    def ever_better(self, image):
        (tmp_path / "begun.png").unlink(missing_ok=True)  # read when the run began, not again
        seen.append(image)
        total, *rest = value_and_grad(self, image)
        return total / 2 ** len(seen), *rest

    monkeypatch.setattr(Objective, "value_and_grad", ever_better)
    monkeypatch.setattr(LBFGS, "step", lambda self, image, grad: image + 0.02)
    init = str(tmp_path / "begun.png") if init == "file" else init
    stylize(content, style, config(size=72, start_size=18, steps=4, init=init))
    assert [image.shape[3] for image in seen] == [18, 18, 36, 36, 72, 72, 72, 72]
    for number, image in enumerate((seen[0], seen[2], seen[4])):
        expected = to_tensor(resize(begun, image.shape[3], image.shape[2])) + 0.02 * number
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["content", "noise"])
def test_what_is_enlarged_stays_in_its_place_and_in_range(config, pair, monkeypatch, init):
    """A ramp at the middles of coarse pixels is one at those of fine pixels, as nearly as this cubic (-0.75) has it."""

    def made(width, height):
        picture = to_tensor(resize(to_pil(pair[0]), width, height)) if init == "content" else 0
        return picture + (2 * (torch.arange(width) + 0.5) / width - 0.5).expand(1, 3, height, width)

    seen, value_and_grad = [], Objective.value_and_grad

    def ever_better(self, image):
        seen.append(image)
        total, *rest = value_and_grad(self, image)
        return total / 1e6 ** len(seen), *rest

    monkeypatch.setattr(Objective, "value_and_grad", ever_better)
    monkeypatch.setattr(LBFGS, "step", lambda self, image, grad: made(image.shape[3], image.shape[2]))
    stylize(*pair, config(start_size=24, steps=4, init=init))
    assert [image.shape[3] for image in seen[:3]] == [24, 24, 48]
    wanted = made(48, 36).clamp(0, 1)
    torch.testing.assert_close(seen[2][:, :, :, 4:-4], wanted[:, :, :, 4:-4], rtol=0, atol=5e-3)
    assert seen[2].min() == 0 and seen[2].max() == 1


@pytest.mark.parametrize("start", [72, 500])
def test_one_scale_where_the_coarsest_is_the_finest(config, start):
    result = stylize(scene(90, 60), scene(40, 40, seed=3), config(size=72, start_size=start, steps=2))
    assert [record["width"] for record in result.history] == [72, 72]


def test_scales_that_are_too_small_for_the_network_are_left_out(config):
    names = {"style_layers": ("relu5_1",), "content_layers": ("relu4_2",)}
    result = stylize(scene(80, 60), scene(40, 40, seed=3), config(size=64, start_size=8, steps=1, **names))
    assert min(record["height"] for record in result.history) >= 16 and len(result.history) > 1


def test_noise_follows_its_seed(config, pair):
    runs = [stylize(*pair, config(init="noise", seed=seed, steps=3)).image.tobytes() for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_starts(config, pair, tmp_path, monkeypatch):
    def first(init):
        starts = []
        value_and_grad = Objective.value_and_grad

        def spy(self, image):
            starts.append(image.clone())
            return value_and_grad(self, image)

        with monkeypatch.context() as patch:
            patch.setattr(Objective, "value_and_grad", spy)
            stylize(*pair, config(init=init, steps=1))
        return starts[0]

    assert torch.equal(first("content"), pair[0])
    other = scene(48, 36, seed=9)
    to_pil(other).save(tmp_path / "start.png")
    assert torch.equal(first(tmp_path / "start.png"), other)
    noise = first("noise")
    assert noise.shape == pair[0].shape and 0 <= noise.min() and noise.max() <= 1 and noise.std() > 0.1


# ── stylize: what comes out ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("optimizer", StyleConfig.CHOICES["optimizer"])
@pytest.mark.parametrize("normalization", StyleConfig.CHOICES["normalization"])
def test_the_objective_of_the_saved_file(state, config, pair, tmp_path, optimizer, normalization):
    config = config(optimizer=optimizer, normalization=normalization, content_weight=1e-3, tv_weight=0.01, steps=40)
    result = stylize(*pair, config)
    saved = result.save(tmp_path / "out.png")
    assert read_settings(saved) == json.loads(json.dumps(result.to_dict()))
    with Image.open(saved) as picture:
        image = to_tensor(picture).double()
    expected = by_hand(state, config, pair[0].double(), [pair[1].double()], image)
    expected["total"] = sum(expected.values())
    assert result.losses.keys() == KEYS
    for name, value in expected.items():
        assert result.losses[name] == pytest.approx(float(value), rel=1e-3, abs=1e-9)
    assert result.losses["total"] < 0.2 * result.history[0]["total"]


def test_keeps_the_content_where_only_content_counts(config, pair):
    result = stylize(*pair, config(style_weight=0, init="noise", steps=60))
    assert result.losses["total"] < 0.05 * result.history[0]["total"]
    assert result.losses["style"] == 0


def test_total_variation_smooths(config, pair):
    rough, smooth = (
        to_tensor(stylize(*pair, config(tv_weight=weight, init="noise")).image).diff(dim=3).square().mean()
        for weight in (0, 100)
    )
    assert smooth < 0.3 * rough


def test_blended_styles_pull_both_ways(state, config, pair):
    other = scene(48, 48, seed=7, cells=4)
    errors = []
    for blend in ((1, 0), (1, 1), (0, 1)):
        result = stylize(pair[0], [pair[1], other], config(style_blend=blend, steps=30))
        image = to_tensor(result.image)
        errors.append([float(by_hand(state, config(), pair[0], [s], image)["style"]) for s in (pair[1], other)])
    first, second = zip(*errors, strict=True)
    assert first[0] < first[1] < first[2] and second[0] > second[1] > second[2]


def test_keep_color(config):
    content = scene(48, 36, seed=1) * 0.4 + 0.3  # so muted that no colour leaves [0,1]
    style = scene(48, 48, seed=2, cells=16)

    def chroma(picture):
        return torch.stack([torch.tensor([*b.tobytes()]).float() for b in picture.convert("YCbCr").split()[1:]])

    kept, free = (stylize(content, style, config(keep_color=keep)) for keep in (True, False))
    wanted = chroma(to_pil(content))
    assert (chroma(kept.image) - wanted).abs().mean() < 1.5
    assert (chroma(free.image) - wanted).abs().mean() > 3
    assert kept.image.convert("L").tobytes() != to_pil(content).convert("L").tobytes()


def test_what_keep_color_needs_is_looked_for_first(config, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.color", None)
    with pytest.raises(DependencyError, match="keep_color needs kornia"):
        stylize(*pair, config(keep_color=True), callback=lambda step: pytest.fail("begun"))


def test_records_and_callback(config, pair):
    seen = []
    config = config(start_size=24, steps=3)

    def callback(step):
        picture = step.image()
        assert isinstance(picture, Image.Image) and picture.size == (step.width, step.height)
        seen.append(step)

    result = stylize(*pair, config, callback=callback)
    assert [field.name for field in dataclasses.fields(vggfeat.StyleStep)][:9] == [
        *("scale", "scales", "step", "steps", "width", "height", "losses", "elapsed", "progress")
    ]
    assert seen[-1].steps == config.steps
    steps = {step.scale: step.steps for step in seen}
    assert [(step.scale, step.step) for step in seen] == [(k, i) for k in steps for i in range(1, steps[k] + 1)]
    assert len(seen) == len(result.history)
    for step, record in zip(seen, result.history, strict=True):
        assert record.keys() == {"scale", "step", "width", "height"} | KEYS == {*record}
        assert record == {"scale": step.scale, "step": step.step, "width": step.width, "height": step.height} | (
            step.losses
        )
        assert record["total"] == pytest.approx(record["style"] + record["content"] + record["tv"])
    assert [step.elapsed for step in seen] == sorted(step.elapsed for step in seen)
    shares = [step.progress for step in seen]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] == pytest.approx(1)
    facts = result.to_dict()
    assert (facts["width"], facts["height"], facts["steps"]) == (48, 36, len(seen))
    assert (facts["arch"], facts["device"], facts["precision"]) == ("vgg19", "cpu", "float32")
    assert not facts["interrupted"] and 0 < seen[-1].elapsed <= result.elapsed and result.config is config


def test_an_error_in_the_callback_is_the_callers(config, pair):
    def callback(step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stylize(*pair, config(), callback=callback)


# ── stylize: trouble on the way ───────────────────────────────────────────────────────────────────────────────────────


OUT_OF_MEMORY = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, RuntimeError("something else")])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_lack_of_memory_keeps_what_there_is(config, pair, error, scale, monkeypatch):
    config, value_and_grad = config(start_size=24, steps=3), Objective.value_and_grad
    sizes = []

    def lacking(self, image):
        sizes.append(image.shape)
        if len(set(sizes)) == scale:
            raise error
        return value_and_grad(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", lacking)
    if scale == 1 or error not in OUT_OF_MEMORY:
        with pytest.raises(type(error), match=str(error)):
            stylize(*pair, config)
        return
    result = stylize(*pair, config)
    assert result.failure.startswith("not enough memory for 48×36: ") and str(error) in result.failure
    assert not result.interrupted and result.losses == {} and result.image.size == (48, 36)
    assert len(result.history) == 2 and result.to_dict()["failure"] == result.failure


def test_a_lack_of_memory_for_the_enlarged_picture_keeps_it_as_it_is(config, pair, monkeypatch):
    def lacking(*_):
        raise MemoryError

    monkeypatch.setattr(stylize_module._Run, "_enlarged", lacking)
    result = stylize(*pair, config(start_size=24, steps=3, keep_color=True))
    assert result.failure == "not enough memory for 48×36: MemoryError"
    assert result.image.size == (24, 18) and result.losses == {}


def test_ctrl_c_before_anything_was_painted(config, pair, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Objective, "value_and_grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stylize(*pair, config())


def test_ctrl_c_while_the_result_is_put_together(config, pair, monkeypatch):
    terms, calls = Objective.terms, []

    def interrupted(self, image):
        if not image.requires_grad and not calls:
            calls.append(image)
            raise KeyboardInterrupt
        return terms(self, image)

    whole = stylize(*pair, config(steps=3))
    monkeypatch.setattr(Objective, "terms", interrupted)
    result = stylize(*pair, config(steps=3))
    assert calls and result.interrupted and result.losses == whole.losses
    assert result.image.tobytes() == whole.image.tobytes()


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_ctrl_c_gives_the_best_picture_so_far(state, config, pair, stop):
    config = config(start_size=24, steps=5)
    calls = []

    def callback(step):
        calls.append(step)
        if len(calls) == stop:
            raise KeyboardInterrupt

    result = stylize(*pair, config, callback=callback)
    assert result.interrupted and len(result.history) == stop and result.image.size == (48, 36)
    assert result.to_dict()["interrupted"]
    scale = max((step.scale for step in calls), default=1)
    best = min((step.losses["total"] for step in calls if step.scale == scale), default=math.inf)
    if scale == calls[-1].scales:
        assert result.losses["total"] == pytest.approx(best, rel=0.05)
    else:  # the picture of a coarser scale, brought to size
        small = scene(48, 36, seed=1)
        terms = by_hand(state, config, small, [pair[1]], to_tensor(result.image))
        start = by_hand(state, config, small, [pair[1]], small)
        if stop == 1:  # where that step led to was not looked at yet
            assert torch.equal(to_tensor(result.image), small.float())
        else:
            assert float(terms["style"]) < float(start["style"])


@pytest.fixture(params=[0, 1], ids=["at once", "a step later"])
def ahead(request, monkeypatch):
    """When the numbers of a step are looked at: as on a CPU, or as on CUDA."""
    monkeypatch.setattr(stylize_module, "lookahead", lambda device: request.param)
    return request.param


# ── runs that go on ───────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """As good as SIGKILL: nobody catches it."""


def killed_at(count):
    seen = []

    def callback(step):
        seen.append(step)
        if len(seen) == count:
            raise Killed

    return callback


@pytest.mark.parametrize(
    ("late", "changes"),
    [
        (0, {}),
        (0, {"optimizer": "adam"}),
        (0, {"tile": 16}),
        (0, {"init": "noise", "keep_color": True}),
        (1, {}),  # where no step is spoilt, it makes no difference when its numbers are looked at
    ],
)
def test_a_killed_run_goes_on_to_the_same_picture(config, pair, tmp_path, monkeypatch, late, changes):
    """Killed before the first checkpoint, and again and again."""
    monkeypatch.setattr(stylize_module, "lookahead", lambda device: late)
    settings = config(start_size=24, steps=6, **changes)
    whole = stylize(*pair, settings)
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    path = tmp_path / "run.pt"
    for count in (1, 2, 1, 2, 5):  # the last time at the second scale
        with pytest.raises(Killed):
            stylize(*pair, settings, callback=killed_at(count), checkpoint=path)
    seen = []
    result = stylize(*pair, settings, callback=seen.append, checkpoint=path)
    # the step that it is killed in, after its callback, is made again
    assert [(step.scale, step.step) for step in seen] == [(2, step) for step in range(4, 7)]
    assert result.image.tobytes() == whole.image.tobytes() and result.losses == whole.losses
    assert result.history == whole.history and seen[-1].progress == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    # and what is done already is not done again
    seen.clear()
    again = stylize(*pair, settings, callback=seen.append, checkpoint=path)
    assert not seen and again.image.tobytes() == whole.image.tobytes() and again.losses == whole.losses


def test_the_callback_sees_the_colours_that_are_kept(config, pair):
    pictures = []
    settings = config(steps=3, keep_color=True)
    result = stylize(*pair, settings, callback=lambda step: pictures.append(step.image()))
    colours = [
        [to_tensor(image).mean((2, 3)) - to_tensor(image).mean() for image in (each, to_pil(pair[0]))]
        for each in (*pictures, result.image)
    ]
    assert all((ours - theirs).abs().max() < 0.02 for ours, theirs in colours)
    with pytest.raises(InputError, match="config must be a StyleConfig, got dict"):
        stylize(*pair, {"size": 48})


def test_a_run_killed_within_a_minute_goes_on_from_its_last_whole_scale(config, pair, tmp_path):
    path, settings = tmp_path / "run.pt", config(start_size=24, steps=6)
    written, kept = [], tmp_path / "kept.pt"

    def watch(step):
        written.append(path.exists())
        if (step.scale, step.step) == (2, 4):
            shutil.copy(path, kept)  # as a kill would leave it

    whole = stylize(*pair, settings, callback=watch, checkpoint=path)
    assert written == [False] * 3 + [True] * 6
    assert path.read_bytes() == kept.read_bytes()  # nothing is written after the last scale
    seen = []
    elsewhere = dataclasses.replace(settings, device="auto")  # the device may be another
    result = stylize(*pair, elsewhere, callback=seen.append, checkpoint=kept)
    assert [(step.scale, step.step) for step in seen] == [(2, step) for step in range(1, 7)]
    assert result.image.tobytes() == whole.image.tobytes() and result.history == whole.history


def test_a_picture_that_no_step_improved_is_said_to_be_the_one_to_begin_with(config, pair, monkeypatch):
    settings = config(optimizer="adam", learning_rate=100.0, steps=3)
    with pytest.warns(UserWarning, match="no step improved on the picture .*: lower learning_rate"):
        result = stylize(*pair, settings)
    assert result.image.tobytes() == to_pil(pair[0]).tobytes()
    # where there is nothing to improve, or no step but the look at it, that is no warning, which here would be an error
    stylize(*pair, dataclasses.replace(settings, steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(LBFGS, "step", lambda self, image, grad: image)
        stylize(*pair, config(steps=3))  # which has no learning rate to lower
    same = stylize(pair[0], pair[0], dataclasses.replace(settings, learning_rate=0.01))
    assert same.image.tobytes() == to_pil(pair[0]).tobytes()


def test_ctrl_c_brings_the_checkpoint_up_to_date(config, pair, tmp_path, ahead):
    path, settings = tmp_path / "run.pt", config(steps=6)

    def callback(step):
        if step.step == 4:
            raise KeyboardInterrupt

    assert stylize(*pair, settings, callback=callback, checkpoint=path).interrupted
    seen = []
    result = stylize(*pair, settings, callback=seen.append, checkpoint=path)
    assert [step.step for step in seen] == [4, 5, 6]
    whole = stylize(*pair, settings)
    assert result.image.tobytes() == whole.image.tobytes() and result.history == whole.history


def test_pairs_that_a_run_resumed_with_are_freed_once_they_are_forgotten(config, pair, tmp_path, monkeypatch):
    path, settings, pairs, alive = tmp_path / "run.pt", config(), [], []
    monkeypatch.setattr(stylize_module, "HISTORY", 2)

    def end(step):
        if step.step == 9:
            raise KeyboardInterrupt

    assert stylize(*pair, settings, callback=end, checkpoint=path).interrupted
    read = stylize_module.checkpoints.read

    def reading(*given):
        state = read(*given)
        pairs.extend(weakref.ref(each) for name in ("steps", "changes") for each in state["optimizer"][name])
        return state

    monkeypatch.setattr(stylize_module.checkpoints, "read", reading)

    def count(step):
        alive.append(sum(each() is not None for each in pairs))

    stylize(*pair, settings, callback=count, checkpoint=path)
    assert len(pairs) == 4 and alive[0] and not alive[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["Ctrl-C", "error"])
def test_trouble_with_the_checkpoint_at_the_end_hides_nothing(config, pair, tmp_path, monkeypatch, error):
    """Ctrl-C, once more, while it is written after Ctrl-C; and an error while it is written after an error."""
    path, settings, written = tmp_path / "run.pt", config(start_size=24, steps=4), []
    stylize(*pair, settings, checkpoint=path)

    def full(*_):
        written.append(1)
        raise KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MemoryError

    def callback(step):
        if step.step == 2:
            raise error

    monkeypatch.setattr(stylize_module.checkpoints, "write", full)
    if isinstance(error, KeyboardInterrupt):
        assert stylize(*pair, settings, callback=callback, checkpoint=path).interrupted
    else:
        with pytest.raises(ZeroDivisionError):
            stylize(*pair, settings, callback=callback, checkpoint=path)
    assert written == [1]


def test_a_checkpoint_is_of_one_run(config, state, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    own = tmp_path / "w.safetensors"
    save_file(state, own)
    path, settings = tmp_path / "run.pt", config(steps=3, weights=str(own))
    stylize(*pair, settings, checkpoint=path)
    before = path.read_bytes()
    for images, changed, match in (
        (pair, {"steps": 4}, r"other settings: steps was 3, is 4; name another file .*--init PICTURE"),
        (pair, {"style_layers": STYLE[:1]}, "other settings: style_layers was"),
        ((pair[0], pair[1].flip(3)), {}, "was written with other pictures"),
    ):
        with pytest.raises(InputError, match=match):
            stylize(*images, dataclasses.replace(settings, **changed), checkpoint=path)
    save_file({key: value * 1.01 for key, value in state.items()}, own)  # a file that is another by now
    with pytest.raises(InputError, match="was written with other weights: name another file"):
        stylize(*pair, settings, checkpoint=path)
    save_file(state, own)
    assert path.read_bytes() == before
    for content in (b"", b"mine", before[: len(before) // 2], before.replace(b"config", b"konfig")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.pt is no checkpoint of a style transfer, or damaged"):
            stylize(*pair, settings, checkpoint=path)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="expected a folder at"):
        stylize(*pair, settings, checkpoint=tmp_path / "nowhere" / "run.pt")
    to_pil(pair[0]).save(tmp_path / "content.png")
    monkeypatch.setattr(stylize_module.checkpoints.torch, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    path.write_bytes(before)
    with pytest.raises(RunError, match=r"cannot read .*run\.pt: there is not enough memory"):
        stylize(*pair, settings, checkpoint=path)
    with pytest.raises(InputError, match="one of the files that are read"):
        stylize(tmp_path / "content.png", pair[1], settings, checkpoint=tmp_path / "content.png")
    settings = dataclasses.replace(settings, init=str(tmp_path / "content.png"))
    with pytest.raises(InputError, match="one of the files that are read"):
        stylize(*pair, settings, checkpoint=tmp_path / "content.png")


def test_a_checkpoint_is_of_pictures_of_one_shape(config, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    content, path, settings = to_pil(pair[0]), tmp_path / "run.pt", config(steps=2)
    stylize(content, pair[1], settings, checkpoint=path)
    turned = Image.frombytes("RGB", content.size[::-1], content.tobytes())  # the same bytes, 36×48
    with pytest.raises(InputError, match="was written with other pictures"):
        stylize(turned, pair[1], settings, checkpoint=path)


def test_a_run_that_goes_on_knows_how_good_its_best_picture_is(config, pair, tmp_path, monkeypatch):
    """Its second picture is the best; the third, made after it went on, is better than the first alone."""
    value_and_grad, first = Objective.value_and_grad, pair[0].mean()

    def told(self, image):
        _, *rest = value_and_grad(self, image)
        number = round(float(image.mean() - first) / 0.01)
        return torch.tensor([3.0, 1.0, 2.0, 2.5][number]), *rest

    monkeypatch.setattr(Objective, "value_and_grad", told)
    monkeypatch.setattr(LBFGS, "step", lambda self, image, grad: image + 0.01)
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    path, settings = tmp_path / "run.pt", config(steps=4)
    with pytest.raises(Killed):
        stylize(*pair, settings, callback=killed_at(3), checkpoint=path)
    result = stylize(*pair, settings, checkpoint=path)
    assert len(result.history) == 4
    assert result.image.tobytes() == to_pil(pair[0] + 0.01).tobytes()


def test_a_run_goes_on_in_the_tiles_that_it_began_with(config, pair, tmp_path, monkeypatch):
    """With as much free memory as there may be by then: L-BFGS remembers 8 steps in tiles and 20 without."""
    settings, path, sides = config(steps=4), tmp_path / "run.pt", []
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(stylize_module, "side_for", lambda *_: 16)
    with pytest.raises(Killed):
        stylize(*pair, settings, callback=killed_at(3), checkpoint=path)
    monkeypatch.setattr(stylize_module, "side_for", lambda *_: 0)
    monkeypatch.setattr(stylize_module, "Objective", lambda *given: sides.append(given[4]) or Objective(*given))
    stylize(*pair, settings, checkpoint=path)
    assert sides == [16]


def test_a_full_disk_costs_the_checkpoint_alone(config, pair, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(stylize_module.checkpoints, "write", full)
    with pytest.warns(UserWarning, match=r"cannot write checkpoint .*run\.pt: No space left on device"):
        result = stylize(*pair, config(steps=3), checkpoint=tmp_path / "run.pt")
    assert result.image.tobytes() == stylize(*pair, config(steps=3)).image.tobytes()


@pytest.mark.parametrize(("optimizer", "each"), [("lbfgs", 228), ("adam", 60)])  # bytes a pixel: images of 12
def test_what_no_memory_can_hold_is_refused_at_once(config, pair, monkeypatch, optimizer, each):
    settings = config(optimizer=optimizer, steps=1)
    pixels = math.prod(stylize(*pair, settings).image.size)
    monkeypatch.setattr(stylize_module, "free_memory", lambda device: 0)
    for total in (2 * each * pixels, None):  # not told by every system
        monkeypatch.setattr(stylize_module, "total_memory", lambda device, total=total: total)
        stylize(*pair, settings)
    monkeypatch.setattr(stylize_module, "total_memory", lambda device: 2 * each * pixels - 2)
    refused = pytest.raises(InputError, match=r"is 48×36, which takes 0\.0 GiB .* or more; the device has 0\.0 GiB")
    with monkeypatch.context() as patched, refused:
        patched.setattr(stylize_module, "resize", None)  # a single scale would begin at the full size
        stylize(*pair, settings)
    monkeypatch.setattr(stylize_module, "free_memory", lambda device: each * pixels)  # more than half of it
    stylize(*pair, settings)


def test_an_error_of_the_callback(config, pair, tmp_path):
    """It is the caller's, a lack of memory too, and what was painted since is in the checkpoint, if there was one."""

    def raising(error, scale, step):
        def callback(state):
            if (state.scale, state.step) == (scale, step):
                state.image()
                raise error

        return callback

    settings, file = config(start_size=24, steps=4), tmp_path / "run.pt"
    with pytest.raises(MemoryError, match="of my own"):
        stylize(*pair, settings, callback=raising(MemoryError("of my own"), 1, 2), checkpoint=file)
    assert not file.exists()  # where it would be in the way of other settings
    own = raising(MemoryError("of my own"), 2, 2)
    assert stylize(*pair, settings, callback=raising(KeyboardInterrupt(), 1, 2), checkpoint=file).interrupted
    with pytest.raises(MemoryError, match="of my own"):
        stylize(*pair, settings, callback=own, checkpoint=file)
    steps = []
    stylize(*pair, settings, callback=steps.append, checkpoint=file)
    assert (steps[0].scale, steps[0].step) == (2, 2)  # the first that was not over


def test_a_lack_of_memory_for_a_picture_on_the_way_is_the_runs(config, pair, monkeypatch):
    def full(self, image):
        raise MemoryError

    def callback(step):
        if step.scale == 2:
            with monkeypatch.context() as patched:
                patched.setattr(stylize_module._Run, "_picture", full)
                step.image()

    result = stylize(*pair, config(start_size=24, steps=4), callback=callback)
    assert result.failure == "not enough memory for 48×36: MemoryError" and result.image.size == (48, 36)


def test_the_callback_is_a_function(pair):
    with pytest.raises(InputError, match="callback must be a function of a StyleStep, got int"):
        stylize(*pair, callback=5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(config, pair, mode):
    settings = config(steps=2)
    with mode():
        image = stylize(*pair, settings).image
        assert not torch.is_grad_enabled()
    assert image.tobytes() == stylize(*pair, settings).image.tobytes()


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


def spoilt(monkeypatch, at, how, width=48):
    """Objective.value_and_grad whose calls at `width`, numbered in `at`, return what `how` makes of them."""
    count = 0
    value_and_grad = Objective.value_and_grad

    def wrapper(self, image):
        nonlocal count
        count += image.shape[-1] == width
        total, terms, grad = value_and_grad(self, image)
        if image.shape[-1] == width and count in at:
            total, factor, grad = how(total, grad)
            terms = {name: value * factor for name, value in terms.items()}
        return total, terms, grad

    monkeypatch.setattr(Objective, "value_and_grad", wrapper)


def test_a_run_killed_after_a_restart_goes_on_from_the_best_picture(config, pair, tmp_path, monkeypatch):
    settings, path = config(steps=10), tmp_path / "run.pt"

    def exploded(total, grad):
        return total * 1e9, 1e9, grad * 1e9

    with monkeypatch.context() as patch:
        spoilt(patch, {5}, exploded)
        whole = stylize(*pair, settings)
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    with monkeypatch.context() as patch:
        spoilt(patch, {5}, exploded)
        with pytest.raises(Killed):
            stylize(*pair, settings, callback=killed_at(6), checkpoint=path)
    result = stylize(*pair, settings, checkpoint=path)
    assert result.image.tobytes() == whole.image.tobytes()
    assert result.history == whole.history


@pytest.fixture(scope="module")
def unspoilt():
    """Where each optimizer ends undisturbed."""
    return {}


@pytest.mark.parametrize("optimizer", StyleConfig.CHOICES["optimizer"])
@pytest.mark.parametrize(
    "how",
    [
        lambda total, grad: (total * 1e9, 1e9, grad * 1e9),
        lambda total, grad: (total * math.inf, math.inf, grad),
        lambda total, grad: (total * math.nan, math.nan, grad * math.nan),
        lambda total, grad: (total, 1.0, grad * math.nan),
    ],
    ids=["exploded", "infinite", "nan", "nan gradient"],
)
def test_a_spoilt_step_costs_little(config, pair, optimizer, how, ahead, unspoilt, monkeypatch):
    config = config(optimizer=optimizer, steps=40)
    if optimizer not in unspoilt:  # when numbers are looked at changes nothing: tests/test_gpu.py
        unspoilt[optimizer] = stylize(*pair, config).losses["total"]
    wanted = unspoilt[optimizer]
    spoilt(monkeypatch, {12}, how)
    result = stylize(*pair, config)
    assert len(result.history) == config.steps
    assert result.losses["total"] < 2 * wanted and result.losses["total"] < 0.3 * result.history[0]["total"]


@pytest.mark.parametrize("optimizer", StyleConfig.CHOICES["optimizer"])
def test_when_nothing_helps_the_best_picture_stays(config, pair, optimizer, ahead, monkeypatch):
    spoilt(monkeypatch, range(8, 1000), lambda total, grad: (total * math.nan, math.nan, grad * math.nan))
    kind, restarts = {"lbfgs": LBFGS, "adam": Adam}[optimizer], []
    restart = kind.restart
    monkeypatch.setattr(kind, "restart", lambda self: (restarts.append(1), restart(self)))
    result = stylize(*pair, config(optimizer=optimizer, steps=40))
    best = min(record["total"] for record in result.history[:7])
    assert result.losses["total"] == pytest.approx(best, rel=0.05)
    # each restart costs one step; what had been begun after it is not on record
    assert [record["step"] for record in result.history] == list(range(1, len(result.history) + 1))
    assert len(result.history) <= 7 + stylize_module.RESTARTS and len(restarts) == stylize_module.RESTARTS


@pytest.mark.parametrize(("times", "restarts"), [(3.9, 0), (4.1, 1)])
def test_a_step_may_be_up_to_four_times_as_bad_as_the_best(config, pair, monkeypatch, times, restarts):
    value_and_grad, totals, calls = Objective.value_and_grad, iter((3.0, 2.0, 2 * times, 1.0)), []
    monkeypatch.setattr(
        Objective, "value_and_grad", lambda *given: (torch.tensor(next(totals)), *value_and_grad(*given)[1:])
    )
    monkeypatch.setattr(LBFGS, "restart", lambda self: calls.append(1))
    stylize(*pair, config(steps=4))
    assert len(calls) == restarts


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_from_the_start(config, pair, ahead, monkeypatch, value):
    spoilt(monkeypatch, range(1, 1000), lambda total, grad: (total * value, value, grad * value))
    with pytest.raises(RunError, match=f"{value} at the start") as info:
        stylize(*pair, config())
    assert "\n" not in str(info.value)


def test_nan_at_the_start_of_a_finer_scale_keeps_the_coarser_picture(config, pair, ahead, monkeypatch):
    settings = config(start_size=24, steps=5)
    coarse = stylize(*pair, dataclasses.replace(settings, size=24)).image
    spoilt(monkeypatch, range(1, 1000), lambda total, grad: (total * math.nan, math.nan, grad * math.nan))
    result = stylize(*pair, settings)
    assert result.image.size == (48, 36)
    assert (to_tensor(resize(result.image, *coarse.size)) - to_tensor(coarse)).abs().mean() < 0.05


# ── real weights, real pictures ───────────────────────────────────────────────────────────────────────────────────────

LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu3_4")


@pytest.mark.data
def test_tuebingen_takes_on_the_starry_night(oxford, test_data):
    state = load_file(oxford)
    content, style = test_data / "photos" / "tubingen.jpg", test_data / "paintings" / "starry_night.jpg"

    def gram_errors(picture):
        grams = [
            {name: rows(tap) @ rows(tap).T / rows(tap).shape[1] for name, tap in plain(state, image, LAYERS).items()}
            for image in (to_tensor(picture), to_tensor(painting))
        ]
        return (
            sum(float((g - a).square().sum() / a.square().sum()) for g, a in zip(*map(dict.values, grams), strict=True))
            / 4
        )

    totals = []
    for precision in ("float32", "bfloat16"):
        config = StyleConfig(
            size=96, weights=oxford, style_layers=LAYERS, content_layers=("relu3_3",), precision=precision
        )
        result = stylize(content, style, config)
        with Image.open(content) as photo, Image.open(style) as painting:
            painting = resize(painting.convert("RGB"), *fit(*painting.size, config.size))
            photo = resize(photo.convert("RGB"), *result.image.size)
            assert gram_errors(result.image) < gram_errors(photo) / 20
            terms = by_hand(state, config, to_tensor(photo), [to_tensor(painting)], to_tensor(result.image))
        totals.append(float(sum(terms.values())))
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


def test_a_run_that_goes_on_counts_the_time_before(config, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    path, settings = tmp_path / "run.pt", config(steps=2)
    stylize(*pair, settings, checkpoint=path)
    state = stylize_module.checkpoints.read(path, ())
    stylize_module.checkpoints.write(path, state | {"elapsed": 1000.0})
    assert stylize(*pair, settings, checkpoint=path).elapsed > 1000


def test_a_checkpoint_is_of_one_picture_to_start_from(config, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "CHECKPOINT_EVERY", 0.0)
    start, path = tmp_path / "start.png", tmp_path / "run.pt"
    to_pil(pair[0].flip(3)).save(start)
    settings = config(steps=2, init=str(start))
    stylize(*pair, settings, checkpoint=path)
    to_pil(pair[0].flip(2)).save(start)  # another picture by now
    with pytest.raises(InputError, match="was written with other pictures"):
        stylize(*pair, settings, checkpoint=path)


def test_a_style_too_large_for_memory_is_refused_before_any_work(config, pair, monkeypatch):
    monkeypatch.setattr(stylize_module, "total_memory", lambda device: 400 << 20)
    monkeypatch.setattr(stylize_module, "free_memory", lambda device: 0)
    style = to_pil(torch.rand(1, 3, 3, 3))
    with pytest.raises(InputError, match=r"style 2 is read at \d+×\d+, which takes .* choose a smaller style_scale"):
        stylize(pair[0], [style.resize((8, 800)), style], config(steps=1, style_scale=100))
    settings, needed = config(steps=1, style_scale=3.125), 2 * 12 * 150 * 150  # as it is, and normalised
    monkeypatch.setattr(stylize_module, "total_memory", lambda device: 2 * needed)
    stylize(*pair, settings)
    monkeypatch.setattr(stylize_module, "total_memory", lambda device: 2 * needed - 2)
    with pytest.raises(InputError, match="style 1 is read at 150×150"):
        stylize(*pair, settings)


def test_only_proportions_of_shares_matter():
    for values in ((1e308, 1e308), (1e-300, 1e-300), (3.0, 3.0)):
        assert StyleConfig(style_blend=values).shares("style_blend", 2) == (0.5, 0.5)


def test_a_loss_that_is_not_finite_suggests_no_precision_that_is_used_already(config, pair):
    with pytest.raises(RunError, match="at the start; try other weights") as caught:
        stylize(*pair, config(steps=1, content_weight=1e39, precision="float32"))
    assert "precision" not in str(caught.value)


def test_a_scale_goes_on_with_all_that_it_has_come_to():
    image = torch.rand(1, 3, 8, 8)
    before = stylize_module._Scale(1, image, Adam(0.1), 0, begun=5, best=2.0, restarts=3)
    after = stylize_module._Scale(1, torch.zeros_like(image), Adam(0.2), 0)
    after.load_state_dict(before.state_dict())
    assert (after.begun, after.best, after.restarts) == (5, 2.0, 3) and torch.equal(after.image, image)
    assert after.optimizer.learning_rate == 0.1


def test_a_run_clears_away_what_a_kill_left_and_not_what_another_is_writing(config, pair, tmp_path):
    old, new = tmp_path / ".vggfeat-0123.tmp", tmp_path / ".vggfeat-4567.tmp"
    old.touch(), new.touch()
    os.utime(old, (1, 1))
    stylize(*pair, config(steps=1), checkpoint=tmp_path / "run.pt")
    assert new.exists() and not old.exists()


def test_lbfgs_remembers_less_in_tiles_and_begins_with_smaller_steps_later(config, pair, monkeypatch):
    made = []
    monkeypatch.setattr(stylize_module, "LBFGS", lambda *given: made.append(given[:2]) or LBFGS(*given))
    for tile in (0, 16):
        stylize(*pair, config(start_size=24, steps=1, tile=tile))
    assert made == [(20, 0.03), (20, 0.02), (8, 0.03), (8, 0.02)]


def test_a_checkpoint_is_written_once_a_minute(config, pair, tmp_path, monkeypatch):
    now, written = itertools.count(0, 25), []  # each look at the clock is 25 seconds after the one before
    monkeypatch.setattr(stylize_module.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(stylize_module.checkpoints, "write", lambda *_: written.append(1))
    stylize(*pair, config(steps=9), checkpoint=tmp_path / "run.pt")
    assert len(written) == 3
