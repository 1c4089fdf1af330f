"""The losses: against ordinary autograd through an ordinary network, and inside other people's models."""

import copy
import dataclasses
import gc
import io
import math
import os
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from interpreters import together
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vggfeat
from vggfeat import InputError, PerceptualLoss, StyleLoss, functional as VF
from vggfeat.arch import Arch, scaled
from vggfeat.image import open_image, to_tensor

REPO = Path(__file__).resolve().parents[1]
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
CRITERIA = ("mse", "l1", "charbonnier", "cosine")


def small_net():
    """A VGG-16 of an eighth of the width; the losses get its state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = vggfeat.vgg16(width=0.125, head="slim", num_classes=2)
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return net.requires_grad_(False)


NET = small_net()
STATE = NET.state_dict()


def noting_saved(held):
    """A context in which the list gets what autograd saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t)


def perceptual(layers=("relu2_2",), **options):
    return vggfeat.PerceptualLoss(layers, **{"weights": STATE, **options})


def style(layers=("relu1_2", "relu2_2"), **options):
    return vggfeat.StyleLoss(layers, **{"weights": STATE, **options})


def combined(**options):
    own = {"reduction": options.get("reduction", "mean"), "weights": STATE} | options
    return vggfeat.CombinedLoss([perceptual(["relu2_2", "conv3_1"], **own), style(**own)], [2.0, 30.0])


def taps(images, names):
    """The taps by ordinary modules and ordinary autograd."""
    net = NET if images.dtype == torch.float32 else copy.deepcopy(NET).to(images.dtype)
    return net.taps(((images - MEAN) / STD).to(images.dtype), names)


def gram(features):
    return torch.einsum("nchw,ndhw->ncd", features, features) / features[0].numel()


class Host(nn.Module):
    """Somebody's model."""

    def __init__(self, loss=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))
        if loss is not None:
            self.loss = loss

    def forward(self, x, target=None):
        output = torch.sigmoid(self.body(x))
        return output if target is None else self.loss(output, target)


@pytest.fixture
def pair():
    return torch.rand(2, 3, 24, 32), torch.rand(2, 3, 24, 32)


def close(a, b, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ── the value ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("criterion", "plain"), [("mse", F.mse_loss), ("l1", F.l1_loss)])
@pytest.mark.parametrize("layer", ["conv1_1", "relu1_2", "pool1", "conv2_2", "relu3_3"])
def test_one_layer_is_a_plain_distance_of_taps(pair, layer, criterion, plain):
    x, y = pair
    expected = plain(taps(x, [layer])[layer], taps(y, [layer])[layer])
    close(perceptual([layer], criterion=criterion)(x, y), expected)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0], {"relu2_2": 2.0, "conv1_1": 0.0, "relu1_2": 0.5}])
def test_layer_weights(pair, weights):
    x, y = pair
    layers = ["relu1_2", "relu2_2", "conv1_1"]
    ours, theirs = taps(x, layers), taps(y, layers)
    numbers = [1.0, 1.0, 1.0] if weights is None else [0.5, 2.0, 0.0]
    expected = sum(n * F.mse_loss(ours[name], theirs[name]) for n, name in zip(numbers, layers, strict=True))
    close(perceptual(layers, layer_weights=weights)(x, y), expected)


def test_layer_weights_that_can_be_read_once(pair):
    names = ["relu1_2", "relu2_2"]
    listed, made = perceptual(names, layer_weights=[2, 3]), perceptual(names, layer_weights=(k for k in (2, 3)))
    assert torch.equal(made(*pair), listed(*pair))


def test_layers_that_a_mapping_leaves_out_weigh_1(pair):
    layers = ["relu1_2", "relu2_2"]
    close(
        perceptual(layers, layer_weights={"relu2_2": 3.0})(*pair), perceptual(layers, layer_weights=[1.0, 3.0])(*pair)
    )


FORMULAS = {
    "mse": lambda a, b: ((a - b) ** 2).mean((1, 2, 3)),
    "l1": lambda a, b: (a - b).abs().mean((1, 2, 3)),
    "charbonnier": lambda a, b: (((a - b) ** 2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3)),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=1).mean((1, 2)),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_are_their_formulas(pair, criterion, normalize):
    x, y = pair
    a, b = taps(x, ["conv2_2"])["conv2_2"], taps(y, ["conv2_2"])["conv2_2"]
    if normalize:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    loss = perceptual(["conv2_2"], criterion=criterion, normalize_features=normalize, reduction="none")
    close(loss(x, y), FORMULAS[criterion](a, b), rtol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradient_is_that_of_ordinary_autograd(pair, criterion):
    x, y = (image.double() for image in pair)
    x.requires_grad_(), y.requires_grad_()
    layers = ["conv1_2", "relu2_1", "pool2", "conv3_1"]
    value = perceptual(layers, criterion=criterion)(x, y)
    a, b = taps(x, layers), taps(y, layers)
    expected = sum(VF.CRITERIA[criterion](a[name], b[name]).mean() for name in layers)
    close(value, expected, rtol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_style_loss_is_the_formula(pair):
    x, y = (image.double().requires_grad_() for image in pair)
    layers = ["relu1_2", "relu2_2"]
    a, b = taps(x, layers), taps(y, layers)
    parts = [(gram(a[name]) - gram(b[name])).square().mean((1, 2)) for name in layers]
    expected = 0.5 * parts[0] + 2 * parts[1]
    found = style(layers, layer_weights=[0.5, 2.0], reduction="none")(x, y)
    close(found, expected, rtol=1e-10, atol=1e-15)
    weights = torch.tensor([1.0, 3.0])
    ours = torch.autograd.grad((found * weights).sum(), (x, y))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, y))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_style_criteria(pair, criterion):
    a, b = (gram(taps(image, ["relu2_2"])["relu2_2"]) for image in pair)
    expected = VF.CRITERIA[criterion](a, b).flatten(1).mean(1)
    close(style(["relu2_2"], criterion=criterion, reduction="none")(*pair), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [perceptual, style])
def test_reductions_agree(pair, make):
    each = make(reduction="none")(*pair)
    assert each.shape == (2,)
    close(make(reduction="sum")(*pair), each.sum())
    close(make(reduction="mean")(*pair), each.mean())
    for index, (x, y) in enumerate(zip(*pair, strict=True)):  # every image alone
        close(make()(x[None], y[None]), each[index])


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_symmetric(pair, make, criterion):
    x, y = pair
    loss = make(criterion=criterion)
    close(loss(x, y), loss(y, x))


def test_callable_criteria(pair):
    x, y = pair
    a, b = taps(x, ["relu2_2"])["relu2_2"], taps(y, ["relu2_2"])["relu2_2"]
    cubed = perceptual(criterion=lambda a, b: (a - b).abs() ** 3, reduction="none")
    close(cubed(x, y), ((a - b).abs() ** 3).mean((1, 2, 3)))
    by_position = perceptual(criterion=lambda a, b: (a - b).norm(dim=1, keepdim=True), reduction="none")
    close(by_position(x, y), (a - b).norm(dim=1).mean((1, 2)))
    half = torch.ones(1, 1, 24, 32)
    half[..., 16:] = 0
    close(by_position(x, y, half), (a - b)[..., :8].norm(dim=1).mean((1, 2)))
    pooled = perceptual(criterion=lambda a, b: (a - b).square().mean((2, 3), keepdim=True))
    with pytest.raises(vggfeat.InputError, match=r"a mask needs a criterion .*, got shape \(2, 16, 1, 1\)"):
        pooled(x, y, half)
    scalar = F.smooth_l1_loss
    close(perceptual(criterion=scalar)(x, y), scalar(a, b))
    with pytest.raises(vggfeat.InputError, match="reduction='none' needs a criterion that keeps the batch"):
        perceptual(criterion=scalar, reduction="none")(x, y)
    with pytest.raises(vggfeat.InputError, match="a mask needs a criterion"):
        perceptual(criterion=scalar)(x, y, half)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda a, b: (a - b).abs().flatten(), r"expected the criterion to give values \(2,…\) .*, got shape \("),
        (lambda a, b: (a - b).abs().mean((0, 1)), r"expected the criterion to give values \(2,…\) .*, got shape \("),
        (lambda a, b: 1.0, "or a scalar tensor, got 1.0"),
    ],
)
def test_callable_criteria_that_lose_the_images(pair, criterion, message):
    with pytest.raises(vggfeat.InputError, match=message):
        perceptual(criterion=criterion, reduction="sum")(*pair)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("make", [perceptual, style])
def test_the_type_of_the_images_is_that_of_the_loss(pair, make, encoded):
    """A target of another type changes the value by rounding alone."""
    loss = make()
    for input, target in ((pair[0], pair[1].double()), (pair[0].double(), pair[1])):
        wanted = loss(*(image.to(input.dtype) for image in pair))
        for leaf in (input, input.clone().requires_grad_()):
            value = loss(leaf, loss.encode(target) if encoded else target)
            assert value.dtype == input.dtype
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)


def test_callable_criteria_get_float32(pair):
    seen = []

    def criterion(a, b):
        seen.extend((a.dtype, b.dtype))
        return (a - b).abs()

    value = perceptual(criterion=criterion, precision="bfloat16")(*pair)
    assert seen == [torch.float32] * 2
    close(value, perceptual(criterion="l1", precision="bfloat16")(*pair))


def test_input_range(pair):
    x, y = pair
    expected = perceptual()(x, y)
    close(perceptual(input_range=(-1, 1))(2 * x - 1, 2 * y - 1), expected, rtol=1e-4)
    close(perceptual(input_range=(0, 255))(255 * x, 255 * y), expected, rtol=1e-4)
    close(style(input_range=(-1, 1))(2 * x - 1, 2 * y - 1), style()(x, y), rtol=1e-4)


def test_grey_images(pair):
    x, y = (image[:, :1] for image in pair)
    expected = perceptual()(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
    close(perceptual(repeat_grey=True)(x, y), expected)
    grey, colours = x.clone().requires_grad_(), x.expand(-1, 3, -1, -1).clone().requires_grad_()
    perceptual(repeat_grey=True)(grey, y).backward()
    perceptual()(colours, y.expand(-1, 3, -1, -1)).backward()
    close(grey.grad, colours.grad.sum(1, keepdim=True))
    with pytest.raises(vggfeat.InputError, match="repeat_grey=True"):
        perceptual()(x, y)


# ── encoded targets ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
def test_an_encoded_target_is_as_good_as_a_fresh_one(pair, make):
    x, y = pair
    loss = make(["relu1_2", "relu2_2"], reduction="none")
    fresh, kept = x.clone().requires_grad_(), x.clone().requires_grad_()
    encoded = loss.encode(y.requires_grad_())
    assert len(encoded) == 2
    assert not any(value.requires_grad for value in encoded.values.values())
    expected = loss(fresh, y.detach())
    found = loss(kept, encoded)
    assert torch.equal(found, expected)
    expected.sum().backward(), found.sum().backward()
    assert torch.equal(kept.grad, fresh.grad)
    # pieces of it
    for index in (slice(0, 1), [0], torch.tensor([0]), 0):
        close(loss(x[:1], encoded[index]), expected[:1])
    close(loss(x[[1]], encoded[-1]), expected[1:])
    close(loss(x.flip(0), encoded[[1, 0]]), expected.flip(0))
    # one for all
    alone = torch.cat([loss(x[:1], y[1:].detach()), loss(x[1:], y[1:].detach())])
    close(loss(x, encoded[1]), alone)
    close(loss(x, y[1:].detach()), alone)
    for wide in (encoded.to(torch.float64), encoded.to(dtype=torch.float64)):
        assert {value.dtype for value in wide.values.values()} == {torch.float64}
        close(loss(x.double(), wide), expected.double(), rtol=1e-4)


def test_targets_encoded_by_another_loss(pair):
    x, y = pair
    encoded = perceptual(["relu2_2"]).encode(y)
    close(
        perceptual(["relu2_2"], criterion="l1", layer_weights=[2.0])(x, encoded), 2 * perceptual(criterion="l1")(x, y)
    )
    others = [
        perceptual(["relu2_1"]),
        perceptual(["relu1_2", "relu2_2"]),
        perceptual(normalize_features=True),
        perceptual(pooling="average"),
        perceptual(padding="reflect"),
        perceptual(weights={key: 2 * value for key, value in STATE.items()}),
        style(["relu2_2"]),
    ]
    for other in others:
        with pytest.raises(vggfeat.InputError, match="was encoded by PerceptualLoss of relu2_2, vgg16 .*; this is"):
            other(x, encoded)


def test_the_order_of_layers_makes_no_other_target(pair):
    x, y = pair
    one, other = perceptual(["relu1_2", "relu2_2"]), perceptual(["relu2_2", "relu1_2"])
    joined = vggfeat.EncodedTarget.cat([one.encode(y[:1]), other.encode(y[1:])])
    for loss in (one, other):
        close(loss(x, joined), loss(x, y))


def test_an_encoded_target_survives_a_pickle(pair):
    x, y = pair
    loss = perceptual()
    encoded = pickle.loads(pickle.dumps(loss.encode(y)))
    close(loss(x, encoded), loss(x, y))


# ── masks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
def test_a_mask_of_ones_is_no_mask(pair, make):
    loss = make(reduction="none")
    for mask in (
        torch.ones(2, 1, 24, 32),
        torch.ones(1, 1, 24, 32, dtype=torch.float64),
        torch.full((1, 1, 24, 32), 0.4),
    ):
        close(loss(*pair, mask), loss(*pair))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_half_a_mask_is_half_the_features(pair, criterion):
    x, y = pair
    mask = torch.zeros(2, 1, 24, 32)
    mask[0, ..., :16] = 1  # the left half of one image, the lower half of the other
    mask[1, :, 12:] = 1
    a, b = taps(x, ["relu2_2"])["relu2_2"], taps(y, ["relu2_2"])["relu2_2"]  # of 12 by 16
    distance = VF.CRITERIA[criterion]
    expected = [distance(a[:1, ..., :8], b[:1, ..., :8]).mean(), distance(a[1:, :, 6:], b[1:, :, 6:]).mean()]
    close(perceptual(criterion=criterion, reduction="none")(x, y, mask), torch.stack(expected))


def test_half_a_mask_in_a_style_loss(pair):
    x, y = pair
    mask = torch.zeros(1, 1, 24, 32)
    mask[..., :16] = 1
    a, b = (gram(taps(image, ["relu2_2"])["relu2_2"][..., :8]) for image in pair)
    loss = style(["relu2_2"], reduction="none")
    expected = (a - b).square().mean((1, 2))
    close(loss(x, y, mask), expected)
    encoded = loss.encode(y, mask.clone().requires_grad_())
    assert not encoded.values["relu2_2"].requires_grad
    close(loss(x, encoded, mask), expected)
    whole = gram(taps(y, ["relu2_2"])["relu2_2"])
    close(loss(x, loss.encode(y), mask), (a - whole).square().mean((1, 2)))
    # one target for all, under each image's own mask
    masks = torch.cat([mask, mask.flip(3)])
    close(loss(x, y[:1], masks), torch.cat([loss(x[k : k + 1], y[:1], masks[k : k + 1]) for k in (0, 1)]))


def test_a_mask_is_averaged_over_each_features_pixels(pair):
    x, y = pair
    mask = (torch.rand(2, 1, 24, 32) > 0.5).float()
    a, b = taps(x, ["relu2_2"])["relu2_2"], taps(y, ["relu2_2"])["relu2_2"]
    weight = F.avg_pool2d(mask, 2)
    expected = ((a - b).square() * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * a.shape[1])
    close(perceptual(reduction="none")(x, y, mask), expected)


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("criterion", ["mse", "l1", "charbonnier"])
def test_a_mask_of_zeros_gives_0(pair, make, criterion):
    x, y = pair
    x.requires_grad_()
    mask = torch.zeros(2, 1, 24, 32)
    mask[1] = 1
    value = make(criterion=criterion, reduction="none")(x, y, mask)
    assert 0 <= value[0] < 1e-20 < value[1]
    value.sum().backward()
    assert x.grad[0].abs().max() < 1e-12
    assert torch.isfinite(x.grad).all()
    assert x.grad[1].abs().max() > 0


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("criterion", ["mse", nn.MSELoss(reduction="none")])
def test_the_scale_of_a_mask_does_not_matter(pair, make, criterion):
    loss, (x, y) = make(criterion=criterion), pair
    mask = torch.rand(2, 1, *x.shape[2:])
    x.requires_grad_()
    mask.requires_grad_()
    wanted = loss(x, y, mask)
    to_x, to_mask = torch.autograd.grad(wanted, (x, mask))
    for scale in (1e-30, 1e-15, 1e6, 3e38):  # where float32 ends
        value = loss(x, y, scale * mask.detach())
        close(value, wanted, rtol=1e-5)
        close(torch.autograd.grad(value, x)[0], to_x, rtol=1e-4, atol=1e-6 * to_x.abs().max().item())
    exact = mask.detach().double().requires_grad_()
    other = make(criterion=criterion)
    given = torch.autograd.grad(other(x.detach().double(), y.double(), exact), exact)[0]
    assert (to_mask - given).norm() < 1e-3 * given.norm()
    step = 1e-5 * torch.randn_like(exact)
    with torch.no_grad():
        ahead, behind = (other(x.double(), y.double(), exact + side * step) for side in (1, -1))
    assert float(ahead - behind) / 2 == pytest.approx(float((given * step).sum()), rel=1e-4)


def test_a_mask_made_in_inference_mode(pair):
    x, y = pair
    x.requires_grad_()
    with torch.inference_mode():
        mask = torch.rand(2, 1, *x.shape[2:])
    for criterion in ("mse", nn.L1Loss(reduction="none")):
        loss = perceptual(criterion=criterion)
        (found,) = torch.autograd.grad(loss(x, y, mask), x)
        (wanted,) = torch.autograd.grad(loss(x, y, mask.clone()), x)
        close(found, wanted)


def test_maps(pair):
    x, y = pair
    loss = perceptual(["relu1_1", "conv2_2"], layer_weights=[2.0, 0.5], reduction="none", criterion="l1")
    maps = loss.maps(x, y)
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        name: (2, x.shape[2] // stride, x.shape[3] // stride) for name, stride in (("relu1_1", 1), ("conv2_2", 2))
    }
    close(sum(each.mean((1, 2)) for each in maps.values()), loss(x, y))
    encoded = loss.maps(x, loss.encode(y))
    assert all(torch.equal(encoded[name], each) for name, each in maps.items())
    assert all(each.dtype == torch.float32 for each in loss.maps(x, y.double()).values())
    plane = perceptual(["relu1_1"], criterion=lambda a, b: (a - b).square().mean(1))  # (N,h,w)
    close(plane.maps(x, y)["relu1_1"], perceptual(["relu1_1"]).maps(x, y)["relu1_1"])
    without = {
        r"\(\)": F.mse_loss,
        r"\(2, 8, 1, 1\)": lambda a, b: (a - b).square().mean((2, 3), keepdim=True),
        r"\(2, 2, 8, 24, 32\)": lambda a, b: torch.stack([a, b], 1),
    }
    for shape, criterion in without.items():
        with pytest.raises(vggfeat.InputError, match=f"no map of relu1_1: its values have the shape {shape}"):
            perceptual(["relu1_1"], criterion=criterion).maps(x, y)
    with pytest.raises(vggfeat.InputError, match="the input is an encoded target"):
        loss(loss.encode(x), y)


def test_criteria_compare_in_float32_inside_autocast(pair):
    loss = perceptual(criterion=lambda a, b: torch.einsum("nchw,nchw->nhw", a, b), precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.maps(*pair)["relu2_2"], loss(*pair)
    assert torch.equal(found[0], loss.maps(*pair)["relu2_2"]) and torch.equal(found[1], loss(*pair))


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 1, 24, 31), ""),
        ((2, 3, 24, 32), "; mask[:, :1] is its first channel"),
        ((3, 1, 24, 32), ""),
        ((24, 32), ""),
        ((1, 24, 32), "; mask[:, None] adds the channel"),
        ((3, 24, 32), ""),
    ],
)
def test_masks_of_other_shapes(pair, make, shape, hint):
    with pytest.raises(vggfeat.InputError) as info:
        make()(*pair, torch.ones(shape))
    assert str(info.value) == f"expected a mask (2,1,24,32) or (1,1,24,32), got shape {shape}{hint}"


def test_sizes_that_do_not_match(pair):
    x, y = pair
    for target in (y[..., :30], perceptual().encode(y[..., :30])):
        with pytest.raises(vggfeat.InputError, match="32×24 pixels against a target of 30×24"):
            perceptual()(x, target)
    for loss in (perceptual(), style()):
        for target in (torch.rand(3, 3, 24, 32), loss.encode(torch.rand(3, 3, 24, 32))):
            with pytest.raises(
                vggfeat.InputError, match="2 images against 3 targets: expected as many, or one for all"
            ):
                loss(x, target)
        with pytest.raises(vggfeat.InputError, match="1 images against 2 targets"):
            loss(x[:1], y)
        for target in (y.to("meta"), loss.encode(y).to("meta")):
            with pytest.raises(vggfeat.InputError, match=r"input is on cpu, the target on meta: target.to\('cpu'\)"):
                loss(x, target)
    with pytest.raises(vggfeat.InputError, match=r"loss.encode\(target, its_mask\)"):
        style()(x, y[..., :30], torch.ones(1, 1, 24, 32))
    with pytest.raises(vggfeat.InputError, match="give the mask to the comparison"):
        perceptual().encode(y, torch.ones(1, 1, 24, 32))


@pytest.mark.parametrize("make", [perceptual, style])
def test_what_is_no_batch_of_images(pair, make):
    x, y = pair
    loss = make()
    for arguments in ((x[0], y[0]), (x, y[0]), (x[0], y), (x[0], y[0, :, :8]), (x[0], y[0], torch.ones(1, 1, 24, 32))):
        with pytest.raises(vggfeat.InputError, match=r"got shape \(3, .*images\[None\]"):
            loss(*arguments)
    for wrong in ("photo.jpg", None, y.numpy()):
        with pytest.raises(vggfeat.InputError, match="expected a tensor of images"):
            loss(x, wrong)
        with pytest.raises(vggfeat.InputError, match="expected a tensor of images"):
            loss.encode(wrong)
    with pytest.raises(vggfeat.InputError, match=r"images\[None\]"):
        loss.encode(y[0])


def test_a_style_target_of_another_size(pair):
    x = pair[0]
    y = torch.rand(1, 3, 40, 20)
    a, b = (gram(taps(image, ["relu2_2"])["relu2_2"]) for image in (x, y))
    loss = style(["relu2_2"])
    close(loss(x, y), (a - b).square().mean())
    close(loss(x, loss.encode(y)), (a - b).square().mean())
    left = torch.zeros(1, 1, 24, 32)  # of the input
    left[..., :16] = 1
    a = gram(taps(x, ["relu2_2"])["relu2_2"][..., :8])
    close(loss(x, loss.encode(y), left), (a - b).square().mean())
    with pytest.raises(vggfeat.InputError, match="32×24 pixels against a target of 20×40"):
        vggfeat.CombinedLoss([style(), perceptual()])(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"criterion": "huber"},
            "unknown criterion 'huber': choose from mse, l1, charbonnier, cosine (or pass a function)",
        ),
        ({"criterion": "charbonier"}, "did you mean charbonnier?"),
        ({"criterion": "mae"}, "unknown criterion 'mae': here it is 'l1'"),
        ({"criterion": "l2"}, "unknown criterion 'l2': the mean square is 'mse'"),
        ({"criterion": "fro"}, "pass lambda a, b: torch.linalg.vector_norm(a - b)"),
        ({"criterion": ["l1"]}, "unknown criterion ['l1']: choose from mse, l1"),
        ({"criterion": 3}, "unknown criterion 3: choose from mse, l1, charbonnier, cosine"),
        ({"reduction": "average"}, "unknown reduction 'average': choose from none, mean, sum"),
        ({"reduction": None}, "unknown reduction None"),
        ({"layers": ["relu9_1"]}, "relu9_1"),
        ({"layers": ["relu3_4"]}, "relu3_4"),  # which is VGG-19's
        ({"layers": ["rel2_2"]}, "did you mean relu2_2"),
        ({"layers": "relu2_2"}, "write ['relu2_2']"),
        ({"layers": []}, "name at least one"),
        ({"layer_weights": [1.0, 2.0]}, "2 layer_weights for relu2_2: expected 1"),
        ({"layer_weights": {"relu3_3": 1.0}}, "layer_weights for relu3_3, which is not among relu2_2"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"pooling": "mean"}, "unknown pooling 'mean'"),
        ({"input_range": (1, 0)}, "input_range must rise"),
    ],
)
def test_unknown_words(options, message):
    for make in (perceptual, style):
        with pytest.raises(vggfeat.InputError) as caught:
            make(**{"layers": ["relu2_2"], **options})
        assert message in str(caught.value)


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("image", ["random", "black"])
def test_gradient_is_finite_where_input_equals_target(make, criterion, image):
    y = torch.rand(1, 3, 24, 24) if image == "random" else torch.zeros(1, 3, 24, 24)
    x = y.clone().requires_grad_()
    value = make(["conv1_1", "relu1_2", "relu2_2"], criterion=criterion)(x, y)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()
    if criterion != "cosine":
        assert value == 0
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("make", [perceptual, style])
def test_gradients_flow_to_whoever_asks(pair, make):
    x, y = pair
    loss = make()
    assert not loss(x, y).requires_grad
    for wants in ((True, False), (False, True), (True, True)):
        a, b = (image.clone().requires_grad_(want) for image, want in zip(pair, wants, strict=True))
        loss(a, b).backward()
        for image, want in zip((a, b), wants, strict=True):
            assert (image.grad is not None) == want
            assert not want or image.grad.abs().max() > 0


def test_monitoring_costs_no_gradient(pair, loss, monkeypatch):
    x, y = pair[0].requires_grad_(), pair[1]
    expected = loss(x, y).detach()
    monkeypatch.setattr(loss.features, "vjp", None)
    with torch.no_grad():
        close(loss(x, y), expected)


@pytest.mark.parametrize("make", [perceptual, style])
def test_gradient_penalty(pair, make):
    """The gradient of a gradient's norm, through the loss."""
    x, y = (image[..., :16, :16].double() for image in pair)
    x.requires_grad_()
    layers = ["conv1_2", "relu2_1"]
    loss = make(layers)

    def plain(x, y):
        a, b = taps(x, layers), taps(y, layers)
        if make is style:
            a, b = ({name: gram(value) for name, value in each.items()} for each in (a, b))
        return sum((a[name] - b[name]).square().mean() for name in layers)

    penalties = []
    for each in (loss, plain):
        first = torch.autograd.grad(each(x, y), x, create_graph=True)[0]
        penalties.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert penalties[1].abs().max() > 0
    close(penalties[0], penalties[1], rtol=1e-7, atol=1e-6 * float(penalties[1].abs().max()))


@pytest.mark.parametrize("make", [perceptual, style])
def test_vmap_and_grad_of_torch_func(pair, make):
    x, y = pair
    loss = make(reduction="none")
    alone = make()
    expected = loss(x, y)
    found = torch.func.vmap(lambda a, b: alone(a[None], b[None]))(x, y)
    close(found, expected)
    leaf = x.clone().requires_grad_()
    loss(leaf, y).sum().backward()
    close(torch.func.grad(lambda a: loss(a, y).sum())(x), leaf.grad, rtol=1e-4)
    each = torch.func.vmap(torch.func.grad(lambda a, b: alone(a[None], b[None])))(x, y)
    close(each, leaf.grad, rtol=1e-4)


# ── value and gradient at once ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_computed_with_the_value_equal_those_computed_after_it(pair, make, masked):
    """A criterion of one's own is the way to have them computed in the backward."""
    x, y = (image.double() for image in pair)
    mask = torch.rand(2, 1, 24, 32) if masked else None
    upstream = torch.tensor([0.5, -3.0], dtype=torch.float64)
    found = []
    for criterion in ("mse", VF.CRITERIA["mse"]):
        loss = make(["relu1_2", "conv3_1"], reduction="none", normalize_features=True, criterion=criterion)
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y, mask)
        assert ("LossWithGradient" in type(value.grad_fn).__name__) == (criterion == "mse")
        first = torch.autograd.grad(value, leaf, upstream, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(value, leaf, upstream)[0], first)
        with pytest.raises(RuntimeError, match="second time"):
            value.sum().backward()
        found.append(first)
    assert found[0][1].abs().max() > 0
    close(found[0], found[1], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [perceptual, style])
def test_one_target_for_all_gets_its_gradient_from_every_part(pair, make, monkeypatch):
    x, y = (image.double() for image in pair)
    loss, found = make(), []
    for values in (1, 1 << 30):  # image by image, and all at once
        monkeypatch.setattr("vggfeat.feature_loss.VALUES_AT_A_TIME", values)
        leaf, target = x.clone().requires_grad_(), y[:1].clone().requires_grad_()
        found.append(torch.autograd.grad(loss(leaf, target), (leaf, target)))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        close(one, other, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [perceptual, style])
def test_only_images_and_their_gradient_are_held(pair, make):
    x, y = pair
    held = []
    x.requires_grad_()
    with noting_saved(held):
        make(["relu1_2", "relu3_1"], reduction="none")(x, y)
    # the gradient besides, which the node holds itself
    assert [t.data_ptr() for t in held] == [x.data_ptr(), y.data_ptr()]  # the caller's own


@pytest.mark.parametrize("make", [perceptual, style, combined])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("masked", [False, True])
def test_the_trained_image_may_come_second(pair, make, criterion, masked):
    """As in many a training script; it takes as little memory."""
    x, y = pair
    mask = torch.rand(2, 1, 24, 32) if masked else None
    loss, first, held = make(criterion=criterion, reduction="none"), x.clone().requires_grad_(), []
    x.requires_grad_()
    with noting_saved(held):
        value = loss(y, x, mask)
    assert {t.data_ptr() for t in held if t.ndim == 4 and t.shape[1] == 3} == {x.data_ptr(), y.data_ptr()}
    assert len(held) == 2 + masked and torch.equal(value, loss(first, y, mask))
    value.sum().backward()
    loss(first, y, mask).sum().backward()
    assert torch.equal(x.grad, first.grad) and x.grad.abs().max() > 0


@pytest.mark.parametrize("make", [perceptual, style, combined])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 1 << 30])
def test_two_trained_images_get_their_gradients_with_the_value(pair, make, criterion, masked, at_a_time, monkeypatch):
    """As where two samples of a generator are to differ; a criterion of one's own computes them in the backward."""
    monkeypatch.setattr("vggfeat.feature_loss.VALUES_AT_A_TIME", at_a_time)
    images = [image.double().requires_grad_() for image in pair]
    mask = torch.rand(2, 1, 24, 32, dtype=torch.float64) if masked else None
    upstream, held, found = torch.tensor([0.5, -3.0], dtype=torch.float64), [], []
    loss = make(criterion=criterion, reduction="none")
    with noting_saved(held):
        value = loss(*images, mask)
    assert {t.data_ptr() for t in held if t.shape[1:] == images[0].shape[1:]} == {t.data_ptr() for t in images}
    assert len(held) == 2 + masked
    for total in (value, make(criterion=VF.CRITERIA[criterion], reduction="none")(*images, mask)):
        found.append([total, *torch.autograd.grad(total, images, upstream)])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        close(one, other, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [perceptual, style])
def test_two_trained_images_of_any_kind(pair, make):
    x, y = pair
    grey, loss = x.mean(1, keepdim=True).requires_grad_(), make(repeat_grey=True, reduction="sum")
    one, other = torch.autograd.grad(loss(grey, second := y.mean(1, keepdim=True).requires_grad_()), (grey, second))
    close(one, torch.autograd.grad(loss(grey, second.detach()), grey)[0])
    close(other, torch.autograd.grad(loss(grey.detach(), second), second)[0])
    halves = [image.half().requires_grad_() for image in pair]
    assert [each.dtype for each in torch.autograd.grad(loss(*halves), halves)] == [torch.float16] * 2
    nothing = torch.rand(0, 3, 24, 32, requires_grad=True), torch.rand(0, 3, 24, 32, requires_grad=True)
    assert [len(each) for each in torch.autograd.grad(loss(*nothing), nothing)] == [0, 0]
    same = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(loss(same, same), same)[0], torch.zeros_like(x))


@pytest.mark.parametrize("make", [perceptual, style])
def test_second_derivatives_of_two_trained_images(make):
    images = [torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    loss = make(["relu1_2"])
    assert torch.autograd.gradgradcheck(loss, [image.requires_grad_() for image in images], fast_mode=True)
    assert torch.autograd.gradcheck(loss, images)


@pytest.mark.parametrize("make", [perceptual, style])
def test_an_image_and_what_is_computed_from_it(make):
    """The gradient is the same whether it is to be differentiated again or not, and as by ordinary operations."""
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    blur = nn.Conv2d(3, 3, 3, padding=1).double()
    for images in (
        lambda x: (x, x.flip(3)),
        lambda x: (x.flip(3), x),
        lambda x: (blur(x).sigmoid(), x),
        lambda x: (x, x * x),
    ):
        found = []
        for criterion in ("mse", VF.CRITERIA["mse"]):
            loss = make(["relu1_2"], criterion=criterion)
            found += [torch.autograd.grad(loss(*images(x)), x, create_graph=again)[0] for again in (False, True)]
            found[-1:] = [found[-1].detach(), torch.autograd.grad(found[-1].square().sum(), x)[0]]
        (first, again, second), expected = found[:3], found[3:]
        assert first.abs().max() > 0 and second.abs().max() > 0
        close(again, first, rtol=1e-9, atol=1e-15)
        for ours, other in zip((first, again, second), expected, strict=True):
            close(ours, other, rtol=1e-7, atol=1e-13)


def test_images_change_places_only_where_that_makes_no_difference(pair):
    x, y = pair
    unlike = perceptual(["conv2_1"], criterion=lambda ours, theirs: (ours - 2 * theirs) ** 2)
    x.requires_grad_()
    ours, theirs = taps(y, ["conv2_1"])["conv2_1"], taps(x, ["conv2_1"])["conv2_1"]
    (expected,) = torch.autograd.grad(((ours - 2 * theirs) ** 2).mean(), x)
    close(torch.autograd.grad(unlike(y, x), x)[0], expected, rtol=1e-4, atol=1e-6)
    one, other = x.detach().double().requires_grad_(), x.detach()[:1].clone().requires_grad_()
    wide = perceptual()(y, one)  # in the type of the input
    assert wide.dtype == torch.float32
    close(torch.autograd.grad(wide, one)[0].float(), torch.autograd.grad(perceptual()(y, x), x)[0], rtol=1e-4)
    (found,) = torch.autograd.grad(perceptual(reduction="sum")(y, other), other)  # one target for both images
    same = [torch.autograd.grad(perceptual(reduction="sum")(each[None], other), other)[0] for each in y]
    close(found, same[0] + same[1], rtol=1e-4)


def test_small_gradients_of_float16_images_survive_a_gradient_scaler(pair):
    x, y = (image.half() for image in pair)
    scale, tiny = 2.0**24, 2.0**-20  # gradients of about 1e-9, where float16 ends at 6e-8
    loss = perceptual(layer_weights=[tiny])
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    (loss(half, y) * scale).backward()
    (loss(full, y.float()) * scale).backward()
    assert 0 < full.grad.abs().max() / scale < 6e-8
    assert half.grad.dtype == torch.float16
    close(half.grad.float(), full.grad, rtol=2e-3, atol=1e-3 * float(full.grad.abs().max()))


@pytest.mark.parametrize("make", [perceptual, style])
def test_second_derivatives_follow_the_autocast_of_the_forward(pair, make):
    x, y = pair
    loss, leaf = make(precision="bfloat16"), x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        value = make()(leaf, y)
    found = torch.autograd.grad(value, leaf, create_graph=True)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's older vmap calls an operator in a loop
def test_a_hessian_of_many_at_once(make):
    x, y = (torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    loss = make(["relu1_2"])
    whole, one_by_one = (
        torch.autograd.functional.hessian(lambda x: loss(x, y), x, vectorize=how) for how in (True, False)
    )
    assert (whole - one_by_one).norm() < 1e-4 * one_by_one.norm()


def test_second_derivatives_made_inside_autocast(pair):
    x, y = pair
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(perceptual()(leaf, y), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(first.square().sum(), leaf)
    assert (found - expected).norm() < 1e-4 * expected.norm()


# ── precision ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [perceptual, style])
def test_inside_autocast(pair, make):
    x, y = pair
    loss = make(["relu1_2", "relu3_1"])
    expected = loss(x, y)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(leaf, y)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(leaf.grad).all()
    assert value != expected  # it was followed
    close(value.detach(), expected, rtol=1e-2)
    other = x.clone().requires_grad_()
    wanted = make(["relu1_2", "relu3_1"], precision="bfloat16")(other, y)
    wanted.backward()
    assert torch.equal(value, wanted) and torch.equal(leaf.grad, other.grad)  # of both images, and all the way back


@pytest.mark.parametrize("make", [perceptual, style])
def test_images_of_half_precision(pair, make):
    x, y = pair
    mask = torch.rand(2, 1, 24, 32)
    expected = make()(x, y)
    for dtype in (torch.float16, torch.bfloat16):
        halves = x.to(dtype), y.to(dtype)
        value = make()(*halves)
        assert value.dtype == torch.float32
        close(value, expected, rtol=1e-2)
        close(make()(*halves, mask), make()(*(half.float() for half in halves), mask))  # which stays as it is
    assert make()(x.double(), y.double()).dtype == torch.float64


@pytest.mark.data
@pytest.mark.parametrize("kind", [vggfeat.PerceptualLoss, vggfeat.StyleLoss])
@pytest.mark.parametrize(("layer", "floor"), [("relu1_2", 0.998), ("relu3_3", 0.98)])
def test_bfloat16_on_photographs(oxford, test_data, kind, layer, floor):
    """The value within 1 %, and a gradient no further off than that of ordinary modules in bfloat16.

    Below a max pool no implementation keeps a cosine of 0.999: bfloat16 moves winners of the pooling windows.
    """
    crops = []
    for name in ("tubingen", "lion", "golden_gate"):
        image = to_tensor(open_image(test_data / "photos" / f"{name}.jpg"))
        top, left = (image.shape[2] - 96) // 2, (image.shape[3] - 96) // 2
        crops.append(image[..., top : top + 96, left : left + 96])
    net = vggfeat.vgg19(head="slim", num_classes=2)
    net.load_state_dict(load_file(oxford), strict=False)
    net.requires_grad_(False).to(torch.bfloat16, memory_format=torch.channels_last)
    represent = VF.gram if kind is vggfeat.StyleLoss else torch.Tensor.float

    def plain(x, y):
        a, b = (represent(net.taps(((image - MEAN) / STD).bfloat16(), [layer])[layer]) for image in (x, y))
        return F.mse_loss(a, b)

    exact, quick = (kind([layer], weights=oxford, precision=p) for p in ("float32", "bfloat16"))
    blurred = F.interpolate(F.avg_pool2d(crops[0], 4), scale_factor=4, mode="bilinear")
    for output, target in ((blurred, crops[0]), (crops[1], crops[2])):
        values, gradients = [], []
        for loss in (exact, quick, plain):
            leaf = output.clone().requires_grad_()
            values.append(loss(leaf, target))
            gradients.append(torch.autograd.grad(values[-1], leaf)[0].flatten())
        close(values[1], values[0], rtol=1e-2)
        ours, peer = (float(F.cosine_similarity(gradients[0], other, dim=0)) for other in gradients[1:])
        assert ours >= floor
        assert ours >= peer - 5e-4


# ── several losses in one pass ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", ["images", "another size", "one target", "masked", "encoded", "encoded masked"])
def test_a_sum_of_losses_is_their_sum(reduction, given):
    options = {"reduction": reduction, "criterion": "l1"}
    terms = [
        style(["relu1_2", "relu2_2", "conv3_2"], layer_weights=[1.0, 0.5, 2.0], **options),
        style(["relu2_2"], normalize_features=True, reduction=reduction),
    ]
    if given not in ("another size", "encoded masked"):
        terms.append(perceptual(["relu2_2", "conv3_1"], layer_weights=[0.25, 3.0], **options))
    weights = [4.0, -0.5, 2.0][: len(terms)]
    x = torch.rand(3, 3, 24, 32, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1 if given == "one target" else 3, 3, *((40, 24) if given == "another size" else (24, 32)))
    y, mask = y.double(), torch.rand(3, 1, 24, 32).double()

    def value(loss):
        target = loss.encode(y, *[mask.flip(0)] * (given == "encoded masked")) if "encoded" in given else y
        return loss(x, target, *[mask] * ("masked" in given))

    def of(loss):
        values = value(loss)
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    found = of(vggfeat.CombinedLoss(terms, weights))
    for own, parts in zip(found, zip(*map(of, terms), strict=True), strict=True):
        close(own, sum(weight * part for weight, part in zip(weights, parts, strict=True)), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        close(value(vggfeat.CombinedLoss(terms, weights)), found[0], rtol=1e-9, atol=1e-12)


def test_a_sum_runs_the_network_once(pair):
    x, y = pair[0].requires_grad_(), pair[1]
    single, both = perceptual(["relu3_3"]), style(["relu1_2", "relu3_3"])
    flops = []
    for loss in (single, both, vggfeat.CombinedLoss([single, both])):
        with FlopCounterMode(display=False) as counter:
            loss(x, y).backward()
        flops.append(counter.get_total_flops())
    assert flops[2] - flops[1] < 0.01 * flops[0]


def test_sums_of_sums_and_of_features_from_the_classifier():
    x, y = torch.rand(2, 3, 32, 32).double().requires_grad_(), torch.rand(2, 3, 32, 32).double()
    tap, gram, head = perceptual(["relu1_1"]), style(), perceptual(["fc"], criterion="l1")
    inner = vggfeat.CombinedLoss(iter([tap, gram]), [3.0, 5.0])  # which can be read once
    value = vggfeat.CombinedLoss([inner, head], [0.5, 2.0])(x, y)
    wanted = 1.5 * tap(x, y) + 2.5 * gram(x, y) + 2 * head(x, y)
    close(value, wanted, rtol=1e-9)
    close(torch.autograd.grad(value, x)[0], torch.autograd.grad(wanted, x)[0], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("make", [perceptual, style])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_to_float16_on_a_cpu(pair, make, precision):
    """Where torch concatenates no bfloat16; the trunk runs in bfloat16 instead, or in float32."""
    loss, found = make(precision=precision), []
    for images in (pair, tuple(image.double() for image in pair)):
        x = images[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            value = loss(x, images[1])
            one, other = images[0].clone().requires_grad_(), images[1].clone().requires_grad_()
            both = loss(one, other)
        close(value.double(), loss(*images).double(), rtol=2e-2)
        close(both.double(), value.detach().double(), rtol=2e-2)
        found.append(torch.autograd.grad(value, x)[0])
    (expected,) = torch.autograd.grad(make()(x, images[1]), x)
    for each in found:
        assert F.cosine_similarity(each.double().flatten(), expected.double().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_parts_of_a_sum_are_what_its_losses_contribute(pair, reduction):
    x, y = pair[0].requires_grad_(), pair[1]
    mask = torch.rand(2, 1, 24, 32)
    given = [perceptual(["relu2_2", "conv3_1"], reduction=reduction), style(reduction=reduction)]
    inner = vggfeat.CombinedLoss(given, [2.0, 30.0])
    loss = vggfeat.CombinedLoss([inner, style(["relu3_1"], reduction=reduction)], [0.5, 0.0])
    for total, parts in ((inner, [2 * given[0](x, y, mask), 30 * given[1](x, y, mask)]), (loss, None)):
        found = total.parts(x, y, mask)
        assert not any(each.requires_grad for each in found)
        close(sum(found), total(x, y, mask), rtol=1e-5)
        close(torch.stack(found), torch.stack(parts or [0.5 * inner(x, y, mask), torch.zeros_like(found[0])]))
        close(torch.stack(total.parts(x, total.encode(y))), torch.stack(total.parts(x, y)))
    with FlopCounterMode(display=False) as once:
        inner(x.detach(), y)
    with FlopCounterMode(display=False) as here:
        inner.parts(x.detach(), y)
    assert here.get_total_flops() == once.get_total_flops()
    with pytest.raises(InputError, match="pixels against a target of"):
        inner.parts(x, y[:, :, :-1])


def test_a_sum_follows_its_losses(pair):
    x, y = pair
    parts = perceptual(), style()
    loss = vggfeat.CombinedLoss(parts, [1.0, 7.0])
    parts[1].layer_weights["relu1_2"] = 0.0
    parts[0].criterion = "l1"
    close(loss(x, y), F.l1_loss(*(taps(each, ["relu2_2"])["relu2_2"] for each in pair)) + 7 * parts[1](x, y))
    loss.weights[1] = 0.0
    close(loss(x, y), parts[0](x, y))


def test_a_sum_is_one_loss_when_it_is_differentiated_again(pair):
    x, y = pair[0][:1, :, :8, :8].double().requires_grad_(), pair[1][:1, :, :8, :8].double()
    loss = combined()
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x)
    (gradient,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    loss.weights[1] = 0.0  # too late
    loss.losses[0].layer_weights["relu2_2"] = 0.0
    found = torch.autograd.grad(gradient.square().sum(), x)[0]
    parts = combined().losses
    (gradient,) = torch.autograd.grad(2 * parts[0](x, y) + 30 * parts[1](x, y), x, create_graph=True)
    close(found, torch.autograd.grad(gradient.square().sum(), x)[0], rtol=1e-8, atol=1e-14)


def test_a_criterion_of_ones_own_in_a_sum(pair, monkeypatch):
    x, y = pair
    monkeypatch.setattr("vggfeat.feature_loss.VALUES_AT_A_TIME", 1)  # one image, for criteria that are known

    def whole(a, b):
        return (a - b).square().sum()

    for other in (style(criterion=lambda a, b: (a - b).abs()), style()):
        parts = [perceptual(criterion=whole), other]
        close(vggfeat.CombinedLoss(parts)(x, y), parts[0](x, y) + parts[1](x, y))
    for reduction in ("sum", "none"):
        parts = [perceptual(criterion=whole, reduction=reduction), style(reduction=reduction)]
        for call in (vggfeat.CombinedLoss(parts), vggfeat.CombinedLoss(parts).parts):
            with pytest.raises(InputError, match="only reduction='mean' suits both"):
                call(x, y)


def test_the_features_of_a_sum_are_pickled_with_all_their_layers(pair):
    weights = {key: value + 1e-3 for key, value in STATE.items()}  # of which no other test has a trunk
    loss = vggfeat.CombinedLoss([style(weights=weights), perceptual(["relu3_1"], weights=weights)])
    expected, kept = loss.features(pair[0]), pickle.dumps(loss.features)
    del loss
    gc.collect()  # and with it the trunk
    found = pickle.loads(kept)(pair[0])
    assert list(found) == ["relu1_2", "relu2_2", "relu3_1"]
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_lpips_in_a_sum():
    x, y = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
    lpips, l1 = vggfeat.LPIPS(weights="random"), vggfeat.StyleLoss(["relu4_1"], weights="random", reduction="none")
    loss = vggfeat.CombinedLoss([lpips, l1], [1.0, 1e3])
    close(loss(x, y), lpips(x, y) + 1e3 * l1(x, y))
    assert repr(loss).startswith("CombinedLoss(\n  weights=[1.0, 1000.0], reduction=none")


def test_targets_encoded_by_other_sums_are_refused(pair):
    x, y = pair
    target = vggfeat.CombinedLoss([perceptual(), style()]).encode(y)
    sums = ([style(), perceptual()], [perceptual()], [vggfeat.CombinedLoss([perceptual(), style()])])
    for losses in (*sums, [vggfeat.CombinedLoss([perceptual()]), style()]):
        with pytest.raises(InputError, match=r"this target was encoded by \(PerceptualLoss of .* and StyleLoss of"):
            vggfeat.CombinedLoss(losses)(x, target)
    again = vggfeat.CombinedLoss([perceptual(), style()])
    close(again(x, target), again(x, y))
    close(again(x, vggfeat.EncodedTarget.cat([target[1:], target[:1]])), again(x, y.flip(0)))


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ([], None, "losses are a list of PerceptualLoss, StyleLoss and the like, got none"),
        (perceptual(), None, "losses are a list of PerceptualLoss, StyleLoss and the like, got PerceptualLoss"),
        ([perceptual(), F.mse_loss], None, "got PerceptualLoss, function"),
        ([perceptual(), style(reduction="sum")], None, "a sum needs losses with the same reduction, got mean and sum"),
        ([perceptual(), style(pooling="average")], None, "one pass needs the same pooling, got max and average"),
        ([perceptual(), style(padding="reflect")], None, "one pass needs the same padding, got zeros and reflect"),
        ([perceptual(), style(precision="bfloat16")], None, "the same precision, got float32 and bfloat16"),
        ([perceptual(), style(input_range=(-1, 1))], None, r"the same input_range, got (0.0, 1.0) and (-1.0, 1.0)"),
        ([perceptual(), style(repeat_grey=True)], None, "the same repeat_grey, got False and True"),
        (
            [perceptual(), style(arch="vgg19", weights="random")],
            None,
            "the same arch, got vgg16 with head slim and vgg19 with head None",
        ),
        (
            [perceptual(), style(weights={key: 2 * value for key, value in STATE.items()})],
            None,
            "one pass needs the same weights, not others that are called",
        ),
        ([perceptual(), style()], [1.0], "1 weights for PerceptualLoss, StyleLoss: expected 2"),
        ([perceptual(), style()], 3.0, "weights are numbers, one for each of PerceptualLoss, StyleLoss; got 3.0"),
        ([perceptual(), style()], {"style": 1}, "weights are numbers, one for each of"),
        ([perceptual(), style()], [1, math.inf], "weights must be finite numbers, got inf"),
        ([perceptual(), style()], [1, torch.tensor(1.0, requires_grad=True)], "weights are fixed numbers"),
    ],
)
def test_sums_that_are_none(losses, weights, message):
    with pytest.raises(InputError, match=re.escape(message)):
        vggfeat.CombinedLoss(losses, weights)


# ── in somebody's model ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[perceptual, style, combined], ids=["perceptual", "style", "combined"])
def loss(request):
    return request.param()


def test_invisible_in_a_host(pair, loss):
    bare, host = Host(), Host(loss)
    assert list(loss.parameters()) == list(loss.buffers()) == []
    assert loss.state_dict() == {}
    assert host.state_dict().keys() == bare.state_dict().keys()
    assert [name for name, _ in host.named_parameters()] == [name for name, _ in bare.named_parameters()]
    checkpoint = {key: value + 1 for key, value in bare.state_dict().items()}
    host.load_state_dict(checkpoint, strict=True)
    assert torch.equal(host.body[0].weight, checkpoint["body.0.weight"])
    bare.load_state_dict(host.state_dict(), strict=True)


def test_copies_and_pickles(pair, loss):
    host = Host(loss)
    expected = loss(*pair)
    copied = copy.deepcopy(host)
    assert copied.loss is not loss
    assert copied.loss.features.trunk is loss.features.trunk  # 80 MB of frozen weights are not copied
    assert torch.equal(copied.loss(*pair), expected)
    assert torch.equal(copy.copy(loss)(*pair), expected)
    loaded = pickle.loads(pickle.dumps(host))
    assert torch.equal(loaded.loss(*pair), expected)
    assert loaded.loss.features.trunk is loss.features.trunk


def test_a_pickle_in_a_fresh_process(pair, tmp_path):
    both = nn.ModuleList([perceptual(["relu1_2", "conv2_1"], criterion="l1"), style()])
    expected = [float(loss(*pair)) for loss in both]
    torch.save((both, pair), tmp_path / "both.pt")
    code = (
        "import sys, torch; both, pair = torch.load(sys.argv[1], weights_only=False); "
        "print(*[float(loss(*pair)) for loss in both])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, str(tmp_path / "both.pt")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert [float(value) for value in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [style, combined])
def test_masks_of_encoded_styles_are_looked_at(pair, make):
    _, y = pair
    mask = torch.ones(len(y), 1, *y.shape[2:])
    for bad in (-mask, mask * math.nan, mask[..., :-1]):
        with pytest.raises(vggfeat.InputError, match="mask"):
            make().encode(y, bad)


def test_targets_encoded_under_another_convention_are_refused(pair):
    x, y = pair
    loaded = vggfeat.weights.load(STATE, "vgg16")
    for other in ({"mean": (0.0, 0.0, 0.0)}, {"std": (1.0, 1.0, 1.0)}):
        both = loaded, dataclasses.replace(loaded, **other)
        ours, theirs = (vggfeat.PerceptualLoss(["relu1_2"], weights=each) for each in both)
        assert ours.features.checksum() != theirs.features.checksum()
        with pytest.raises(vggfeat.InputError, match="was encoded by"):
            ours(x, theirs.encode(y))


@pytest.mark.parametrize("make", [perceptual, style])
def test_a_criterion_of_ones_own_sees_as_many_targets_as_images(pair, make, monkeypatch):
    """All at once, however many would be compared at a time by one that is known."""
    x, y = pair
    monkeypatch.setattr("vggfeat.feature_loss.VALUES_AT_A_TIME", 1)
    seen = []

    def criterion(a, b):
        seen.append((a.shape, b.shape))
        return torch.cat([a, b], 1).square()

    loss = make(criterion=criterion)
    one, several = loss(x, y[:1]), loss(x, y[:1].expand(len(x), -1, -1, -1))
    assert len(x) == 2 and all(a == b and a[0] == 2 for a, b in seen)
    close(one, several)


def test_a_weight_that_is_trained_gets_its_gradient(pair, loss):
    """Though the constructor refuses it, it can be put there later."""
    x, y = pair
    if isinstance(loss, vggfeat.CombinedLoss):
        loss.weights[0] = weight = torch.nn.Parameter(torch.tensor(1.5))
        loss(x.clone().requires_grad_(), y).backward()
        close(weight.grad, loss.losses[0](x, y))
        return
    name = next(iter(loss.layer_weights))
    loss.layer_weights[name] = weight = torch.nn.Parameter(torch.tensor(1.5))
    loss(x.clone().requires_grad_(), y).backward()
    loss.layer_weights.update({each: float(each == name) for each in loss.layer_weights})
    close(weight.grad, loss(x, y))


def test_what_may_become_a_graph(pair, monkeypatch):
    """On a device that could replay all."""
    monkeypatch.setattr("vggfeat.feature_loss.supports_capture", lambda device: True)
    x = pair[0]
    without = perceptual(cuda_graphs=False)
    assert perceptual()._may_replay(x) and vggfeat.CombinedLoss([perceptual(), style()])._may_replay(x)
    assert not without._may_replay(x) and not vggfeat.CombinedLoss([without, style()])._may_replay(x)
    assert not perceptual()._may_replay(x[:0])
    assert not vggfeat.LPIPS(weights="random", cuda_graphs=False)._may_replay(x)
    trained = perceptual()
    trained.layer_weights["relu2_2"] = torch.nn.Parameter(torch.tensor(1.5))
    assert not trained._may_replay(x)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_features_see_both_images(pair, loss, register):
    x, y = pair
    seen = []
    watch = getattr(loss.features, register)
    watch(lambda module, given, *result: seen.append(given[0]))
    loss(x.clone().requires_grad_(), y).backward()
    assert [torch.equal(image, x) for image in seen] == [True, False] and torch.equal(seen[1], y)


def test_where_hooks_on_what_is_saved_are_forbidden(pair, loss):
    x, y = pair
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        image = x.clone().requires_grad_()
        value = loss(image, y)
        value.backward()
    close(value, loss(x, y))
    assert image.grad.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda host: host.to(torch.float64),
        lambda host: host.double(),
        lambda host: host.half(),
        lambda host: host.bfloat16(),
        lambda host: host.to("cpu", memory_format=torch.channels_last),
        lambda host: host.train(),
        lambda host: host.eval(),
        lambda host: host.requires_grad_(True),
        lambda host: host.apply(lambda module: [nn.init.zeros_(p) for p in module.parameters(recurse=False)]),
        lambda host: host.zero_grad(),
    ],
)
def test_what_happens_to_the_host_does_not_happen_to_the_loss(pair, loss, change):
    expected = loss(*pair)
    change(Host(loss))
    assert torch.equal(loss(*pair), expected)
    assert not loss(*pair).requires_grad
    assert list(loss.parameters()) == []


@pytest.mark.gpu
def test_follows_the_device_of_images(pair, loss):
    x, y = (image.cuda() for image in pair)
    value = loss(x, y)
    assert value.device == x.device
    close(value.cpu(), loss(*pair), rtol=1e-2)


def test_training_moves_the_host_and_nothing_else(pair, loss):
    x, y = pair
    host = Host(loss)
    frozen = {name: value.clone() for name, value in loss.features.trunk.state.items()}
    optimizer = torch.optim.Adam(host.parameters(), lr=0.02)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = host(x, y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert all(torch.equal(frozen[name], value) for name, value in loss.features.trunk.state.items())


def test_the_weights_are_a_copy(pair):
    state = {key: value.clone() for key, value in STATE.items()}
    loss = perceptual(weights=state)
    expected = loss(*pair)
    for value in state.values():
        value.zero_()
    assert torch.equal(loss(*pair), expected)
    assert torch.equal(perceptual(weights=state, layers=["conv1_1"])(*pair), torch.tensor(0.0))


def test_losses_with_the_same_weights_share_a_trunk(pair):
    shallow = perceptual(["relu1_1"])
    expected = shallow(*pair)
    deep, gatys = perceptual(["relu3_1"]), style(["relu2_1"])
    assert shallow.features.trunk is deep.features.trunk is gatys.features.trunk
    assert "features.10.weight" in shallow.features.trunk.state  # conv3_1, which the deeper one brought
    assert torch.equal(shallow(*pair), expected)
    other = perceptual(["relu1_1"], weights={key: 2 * value for key, value in STATE.items()})
    assert other.features.trunk is not shallow.features.trunk


def test_what_print_shows():
    text = repr(perceptual(criterion="l1", reduction="sum"))
    assert all(part in text for part in ("criterion=l1", "reduction=sum", "relu2_2", "vgg16"))
    assert "criterion=smooth_l1_loss" in repr(perceptual(criterion=F.smooth_l1_loss))


def test_the_environment_chooses_the_default_weights(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(vggfeat.WeightsUnavailableError, match="VGGFEAT_WEIGHTS_DIR"):
        vggfeat.PerceptualLoss(["relu2_2"])
    torch.save(STATE, tmp_path / "mine.pth")
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "bundled")
    with pytest.raises(vggfeat.WeightsError, match=r"not to vgg16 \(VGGFEAT_WEIGHTS is 'bundled'\)"):
        vggfeat.PerceptualLoss(["relu1_2"], arch="vgg16")
    monkeypatch.setenv("VGGFEAT_WEIGHTS", str(tmp_path / "mine.pth"))
    loss = vggfeat.PerceptualLoss(["relu2_2"])
    assert loss.features.weights == "mine.pth"
    close(loss(*pair), perceptual()(*pair))
    # it changes the default, not what is asked for
    with pytest.raises(vggfeat.WeightsUnavailableError, match="imagenet weights for vgg16 are unavailable"):
        vggfeat.PerceptualLoss(["relu2_2"], weights="imagenet")


# ── in good company ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("inside", [False, True], ids=["of the host", "of host and loss"])
def test_gradient_checkpointing(pair, loss, inside):
    from torch.utils.checkpoint import checkpoint

    x, y = pair
    plain, saving = Host(loss), Host(loss)
    plain(x, y).backward()
    if inside:
        checkpoint(saving, x, y, use_reentrant=False).backward()
    else:
        loss(checkpoint(saving, x, use_reentrant=False), y).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        close(other.grad, one.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's own tracer
@pytest.mark.parametrize("encoded", [False, True])
def test_torch_compile_of_a_training_step(pair, loss, encoded):
    x, y = pair
    torch._dynamo.reset()
    eager, compiled = Host(loss), Host(loss)
    target = loss.encode(y) if encoded else y
    expected = eager(x, target)
    expected.backward()
    value = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x, target)
    value.backward()
    close(value, expected, rtol=1e-4)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        close(other.grad, one.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "options", "masked"),
    [
        (perceptual, {"criterion": "charbonnier"}, False),
        (perceptual, {"criterion": "cosine"}, True),
        (perceptual, {"normalize_features": True}, False),
        (style, {"normalize_features": True}, True),
    ],
)
def test_torch_compile_for_any_shape(pair, make, options, masked):
    loss, (x, y) = make(**options), pair
    x.requires_grad_()
    mask = torch.rand(len(x), 1, *x.shape[2:]) if masked else None
    torch._dynamo.reset()
    expected = loss(x, y, mask)
    (wanted,) = torch.autograd.grad(expected, x)
    value = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(x, y, mask)
    (found,) = torch.autograd.grad(value, x)
    close(value, expected, rtol=1e-4)
    close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_a_compiled_backward(pair, loss):
    x, y = pair
    x.requires_grad_()
    torch._dynamo.reset()
    (wanted,) = torch.autograd.grad(loss(x, y), x)
    value = loss(x, y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        value.backward()
    close(x.grad, wanted)


def test_fake_tensors(loss):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.rand(2, 3, 32, 32, requires_grad=True)
        value = loss(x, torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32))
        value.backward()
        assert isinstance(value, FakeTensor) and value.shape == () and x.grad.shape == x.shape


def test_torch_compile_in_a_fresh_process():
    """Nothing has to run before, with nothing cached yet."""
    code = """
import torch, vggfeat
losses = [vggfeat.PerceptualLoss(["relu1_2"], weights="random", precision=p) for p in ("float32", "auto", "bfloat16")]
features, net = vggfeat.VGGFeatures(["relu1_1"], weights="random"), vggfeat.vgg11(2, head="slim", width=0.25).eval()
x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
for call in (
    *losses,
    lambda x, y: features(x)["relu1_1"].mean(),
    lambda x, y: net.taps(x, ["relu1_1"])["relu1_1"].mean(),
    lambda x, y: net(x).mean(),
):
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = torch.compile(call, fullgraph=True, backend="eager")(x, y)
            torch.testing.assert_close(found, call(x, y), rtol=1e-2, atol=1e-4)
"""
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", [vggfeat.PerceptualLoss, vggfeat.StyleLoss])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_batch_add_up(monkeypatch, kind, masked):
    """Few images at a time give what the whole batch gives, and one target for all is looked at once."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(5, 3, 32, 32, generator=generator), torch.rand(1, 3, 32, 32, generator=generator)
    mask = torch.rand(5, 1, 32, 32, generator=generator) if masked else None
    loss = kind(["relu1_2", "conv2_1"], weights=NET.state_dict(), reduction="none")
    whole_x, parts_x = (x.clone().requires_grad_() for _ in range(2))
    whole = loss(whole_x, y, mask)
    seen = []
    checked = loss.features.checked
    monkeypatch.setattr(loss.features, "checked", lambda images: seen.append(len(images)) or checked(images))
    monkeypatch.setattr("vggfeat.feature_loss.VALUES_AT_A_TIME", 2 * 32 * 32 * NET.arch.layers[0].channels)
    parts = loss(parts_x, y, mask)
    assert sorted(seen) == [1, 1, 2, 2]  # the target, and five images in twos
    close(parts, whole, rtol=1e-5)
    whole.sum().backward()
    parts.sum().backward()
    close(parts_x.grad, whole_x.grad, rtol=1e-4, atol=1e-7)
    empty = x[:0].clone().requires_grad_()
    loss(empty, y).sum().backward()
    assert loss(empty, y).shape == (0,) and empty.grad.shape == empty.shape
    assert mask is None or loss(empty, y, mask[:0]).shape == (0,)


def ddp_worker(folder):
    """One of two processes: gradients with the loss outside and inside of the wrapped module."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, y = torch.load(f"{folder}/pair.pt")
    mine = slice(rank, rank + 1)
    loss = perceptual()
    outer = nn.parallel.DistributedDataParallel(Host())
    loss(outer(x[mine]), y[mine]).backward()
    inner = nn.parallel.DistributedDataParallel(Host(loss))
    inner(x[mine], y[mine]).backward()
    found = [[p.grad for p in wrapped.parameters()] for wrapped in (outer, inner)]
    torch.save(found, f"{folder}/grads{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(pair, tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.save(pair, tmp_path / "pair.pt")
    (tmp_path / "script.py").write_text(f"import test_losses; test_losses.ddp_worker({str(tmp_path)!r})")
    for status, _, error in together(2, tmp_path / "script.py", environment={"PYTHONPATH": str(REPO / "tests")}):
        assert status == 0, error
    host = Host(perceptual())
    host(*pair).backward()  # the mean over both images is the mean of the processes' means
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"grads{rank}.pt"):
            for one, parameter in zip(found, host.parameters(), strict=True):
                close(one, parameter.grad, rtol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [vggfeat.PerceptualLoss, vggfeat.StyleLoss])
def test_equal_images_have_no_distance_where_channels_are_dead(kind, criterion, normalize, pair):
    """Of all eight in the second layer, and of one in the first, whose Gram matrix then has a row of zeros."""
    state = {name: value.clone() for name, value in STATE.items()}
    state["features.0.bias"][3] = state["features.2.bias"][:] = -100
    loss = kind(["relu1_1", "relu1_2"], weights=state, criterion=criterion, normalize_features=normalize)
    x, y = pair
    leaf = x.clone().requires_grad_()
    value = loss(leaf, x)
    value.backward()
    assert value == 0 and torch.equal(leaf.grad, torch.zeros_like(x))
    assert loss(x, y) > 0


# ── other people's losses ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def piq(torchvision):
    return pytest.importorskip("piq", reason="piq, the other implementation, is not installed")


@pytest.mark.parametrize("distance", ["mse", "mae"])
def test_piqs_content_loss(pair, piq, distance):
    """piq sums over channels what we average over them: theirs is ours with layer weights times channels."""
    x, y = pair
    layers = {"relu1_2": ("3", 8, 0.5), "conv2_2": ("7", 16, 2.0)}
    peer = piq.ContentLoss(
        copy.deepcopy(NET).features[:8],
        layers=[index for index, _, _ in layers.values()],
        weights=[weight for _, _, weight in layers.values()],
        distance=distance,
        reduction="none",
    )
    ours = perceptual(
        list(layers),
        layer_weights=[weight * channels for _, channels, weight in layers.values()],
        criterion="mse" if distance == "mse" else "l1",
        reduction="none",
    )
    close(ours(x, y), peer(x, y), rtol=1e-4)


# ── masks, memory and transforms ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "stride"), [("relu1_2", 1), ("relu2_1", 2), ("relu3_1", 4), ("relu4_1", 8)])
@pytest.mark.parametrize("size", [(47, 33), (40, 24)])
def test_a_mask_weighs_the_pixels_of_each_position(name, stride, size):
    """Of sizes that the stride does not divide, too: a position stands for a whole square of pixels."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 1, 3, *size, generator=generator)
    mask = torch.zeros(1, 1, *size)
    mask[..., : 2 * size[0] // 3, 3:] = torch.rand(2 * size[0] // 3, size[1] - 3, generator=generator)
    ours, theirs = (vggfeat.VGGFeatures([name], weights="bundled")(x)[name] for x in (a, b))
    h, w = ours.shape[2:]
    assert (h, w) == (size[0] // stride, size[1] // stride)
    weights = mask[0, 0, : h * stride, : w * stride].unflatten(0, (h, stride)).unflatten(2, (w, stride)).mean((1, 3))
    expected = ((ours - theirs).square().mean(1)[0] * weights).sum() / weights.sum()
    loss = vggfeat.PerceptualLoss([name], weights="bundled")
    assert loss(a, b, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(a.requires_grad_(), b, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_images_that_are_changed_before_the_backward_change_nothing_but_second_derivatives():
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")
    a, b = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16)
    (expected,) = torch.autograd.grad(loss(a, b), a)
    for target, part in ((b, b), (encoded := loss.encode(b), encoded.values["relu1_2"])):
        kept, value = part.clone(), loss(a, target)
        part.zero_()
        assert torch.equal(torch.autograd.grad(value, a, retain_graph=True)[0], expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, a, create_graph=True)
        part.copy_(kept)
    output = a * 1.0
    value = loss(output, b)
    output.detach().clamp_(0, 0.5)
    assert torch.equal(torch.autograd.grad(value, a)[0], expected)


def test_targets_of_inference_mode_can_be_trained_against(pair, loss):
    x, y = pair
    mask = torch.rand(2, 1, *y.shape[2:])
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, y, mask), leaf)[0]
    with torch.inference_mode():
        encoded = loss.encode(y) if isinstance(loss, vggfeat.PerceptualLoss) else loss.encode(y, mask)
        target, weight = y * 1, mask * 1
        part, copied = encoded[:2], encoded[[0, 1]]
    assert not any(value.is_inference() for value in encoded.values.values())
    for theirs in (target, encoded, part, copied):
        leaf = x.clone().requires_grad_()
        close(torch.autograd.grad(loss(leaf, theirs, weight), leaf)[0], expected)


@pytest.mark.parametrize("make", [perceptual, style])
def test_targets_of_inference_mode_and_a_criterion_of_ones_own(pair, make):
    x, y = pair[0].requires_grad_(), pair[1]
    loss = make(criterion=torch.mul)  # whose backward needs the target
    (expected,) = torch.autograd.grad(loss(x, y), x)
    with torch.inference_mode():
        encoded = loss.encode(y)[[0, 1]]
    close(torch.autograd.grad(loss(x, encoded), x)[0], expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_laid_out_as_the_images(pair, loss, layout):
    x, y = (image.contiguous(memory_format=layout) for image in pair)
    (found,) = torch.autograd.grad(loss(x.requires_grad_(), y), x)
    assert found.is_contiguous(memory_format=layout)


def test_encoded_targets_last_longer_than_the_process(pair, tmp_path):
    """Saved by torch, and read by a loss with the same numbers from another file, and its layers in another order."""
    x, y = pair
    files = [tmp_path / f"{name}.pth" for name in "ab"]
    for file in files:
        torch.save(STATE, file)
    losses = [vggfeat.PerceptualLoss(list(names), weights=file) for names, file in
              zip((("relu1_2", "conv2_1"), ("conv2_1", "relu1_2")), files, strict=True)]  # fmt: skip
    torch.save(losses[0].encode(y), tmp_path / "encoded.pt")
    encoded = torch.load(tmp_path / "encoded.pt")  # weights_only, the default
    close(losses[1](x, encoded), losses[0](x, y))


def test_what_is_no_list_of_layers_or_of_weights(pair):
    for layers in ({"conv1_2": 0.1}, {"conv1_2", "conv2_1"}):
        with pytest.raises(vggfeat.InputError, match="layers is a list of names"):
            perceptual(layers)
    for weights in ({"relu1_2": math.nan}, {"relu1_2": "x"}, {"relu1_2": None}, "1"):
        with pytest.raises(vggfeat.InputError, match="layer_weights"):
            perceptual(["relu1_2"], layer_weights=weights)
    encoded = perceptual().encode(pair[1])
    for index in ((0, 1), None):
        with pytest.raises(vggfeat.InputError, match="indexed by its images alone"):
            encoded[index]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_masks_that_weigh_nothing_sensible(pair, loss, value):
    mask = torch.ones(2, 1, *pair[0].shape[2:])
    mask[0, 0, 3, 3] = value
    with pytest.raises(vggfeat.InputError, match="a mask has finite values of at least 0, this one from"):
        loss(*pair, mask)


def test_a_mask_fits_no_layer_of_the_classifier(pair):
    with pytest.raises(vggfeat.InputError, match="a mask fits no layer of the classifier.*: leave out fc"):
        perceptual(["relu1_2", "fc"])(*pair, torch.ones(1, 1, *pair[0].shape[2:]))


def test_a_classifier_has_no_gram_matrices(pair):
    with pytest.raises(vggfeat.InputError, match="have no positions and so no Gram matrices"):
        style(["relu1_2", "fc"])(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))


def test_without_values(pair, loss):
    """Meta tensors say what shapes there will be."""
    assert loss(*(image.to("meta") for image in pair)).shape == loss(*pair).shape


def test_the_default_type_makes_no_difference(pair):
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            loss = vggfeat.PerceptualLoss(["conv1_1"], weights="random", arch=Arch("A", channels=scaled(8), head=None))
            losses.append(float(loss(*pair)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert losses[0] == losses[1]


def test_charbonnier_of_what_is_nearly_equal():
    a = torch.tensor([[1e-6], [3e-5], [0.5]])
    exact = (a.double() ** 2 + 1e-6).sqrt() - 1e-3
    close(VF.charbonnier(a, torch.zeros_like(a)).double(), exact, rtol=1e-6, atol=0)


def test_a_second_derivative_is_of_the_loss_as_it_was():
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")
    a, b = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16)
    (expected,) = torch.autograd.grad(loss(a, b), a)
    value = loss(a, b)
    loss.criterion, loss.layer_weights["relu1_2"] = "l1", 9.0
    (found,) = torch.autograd.grad(value, a, create_graph=True)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-8)


def test_targets_are_let_go_after_the_backward():
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")
    a = torch.rand(1, 3, 16, 16, requires_grad=True)
    target = torch.rand(1, 3, 16, 16)
    gone = weakref.ref(target)
    value = loss(a, target)
    value.backward()
    del target
    gc.collect()
    assert gone() is None and value > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, of its decompositions
@pytest.mark.parametrize("kind", [vggfeat.PerceptualLoss, vggfeat.StyleLoss])
@pytest.mark.parametrize("options", [{}, {"normalize_features": True}, {"criterion": "cosine"}])
def test_forward_mode_derivatives(kind, options):
    loss = kind(["relu1_2", "conv2_1"], weights="bundled", **options)
    a, b, along = (torch.rand(1, 3, 16, 16, dtype=torch.float64) for _ in range(3))
    value, slope = torch.func.jvp(lambda x: loss(x, b), (a,), (along,))
    leaf = a.clone().requires_grad_()
    loss(leaf, b).backward()
    assert slope.item() == pytest.approx(float((leaf.grad * along).sum()), rel=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(a, along), b)).tangent
    assert dual.item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("kind", [vggfeat.PerceptualLoss, vggfeat.StyleLoss])
def test_vmap_over_one_of_two(kind):
    loss = kind(["relu1_2"], weights="bundled")
    a, b = torch.rand(2, 3, 3, 16, 16)
    fixed = a[:1].clone().requires_grad_()
    over_targets = torch.func.vmap(lambda t: loss(fixed, t[None]))(b)
    over_inputs = torch.func.vmap(lambda x: loss(x[None], b[:1]))(a)
    torch.testing.assert_close(over_targets.detach(), torch.stack([loss(a[:1], t[None]) for t in b]))
    torch.testing.assert_close(over_inputs, torch.stack([loss(x[None], b[:1]) for x in a]))


def test_a_step_under_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    host = torch.nn.Conv2d(3, 3, 1)
    with FlopCounterMode(display=False) as counter:
        vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")(
            host(torch.rand(1, 3, 16, 16)).sigmoid(), torch.rand(1, 3, 16, 16)
        ).backward()
    assert counter.get_total_flops() > 0 and host.weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layer_weights": 2.0}, "layer_weights are numbers, one for each of relu1_2"),
        ({"layer_weights": [float("nan")]}, "must be finite numbers"),
        ({"layer_weights": [float("inf")]}, "must be finite numbers"),
        ({"layer_weights": ["1"]}, r"layer_weights are numbers, one for each of relu1_2; got \['1'\]"),
        ({"layer_weights": [nn.Parameter(torch.ones(()))]}, "layer_weights are fixed numbers"),
        ({"criterion": nn.L1Loss}, r"criterion is a class: make one of it, L1Loss\(\)"),
        ({"criterion": "L1"}, r"unknown criterion 'L1': did you mean l1\?"),
        ({"input_range": 255}, "input_range is lowest and highest value"),
        ({"input_range": (0, float("inf"))}, "must rise and be finite"),
    ],
)
def test_settings_that_mislead(words, message):
    with pytest.raises(vggfeat.InputError, match=message):
        vggfeat.PerceptualLoss(["relu1_2"], weights="bundled", **words)


@pytest.mark.parametrize("mask", [1.0, [[1.0]], torch.ones(1, 1, 16, 16, dtype=torch.complex64)])
def test_masks_that_are_none(mask):
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")
    with pytest.raises(vggfeat.InputError, match=r"expected a mask \(1,1,16,16\) with values such as 0 and 1, got"):
        loss(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), mask)


def test_encoded_targets_as_batches():
    loss = vggfeat.PerceptualLoss(["relu1_2", "relu2_1"], weights="bundled")
    images = torch.rand(5, 3, 16, 16)
    single = [loss.encode(image[None]) for image in images]
    joined = vggfeat.EncodedTarget.cat([single[4], single[0], single[2]])
    assert len(joined) == 3
    torch.testing.assert_close(loss(images[:3], joined), loss(images[:3], images[[4, 0, 2]]))
    for odd in ([], [single[0], loss.encode(torch.rand(1, 3, 16, 24))]):
        with pytest.raises(vggfeat.InputError, match="encoded by one loss, from images of one size"):
            vggfeat.EncodedTarget.cat(odd)
    assert "tensor" not in repr(joined)
    assert single[0] == single[0] != single[1] and len({*single}) == 5  # each by itself, in a set or as a key


def test_one_encoded_target_by_any_integer():
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights="bundled")
    encoded = loss.encode(torch.rand(3, 3, 16, 16))
    for index in (1, torch.tensor(1)):
        assert len(encoded[index]) == 1 and torch.equal(
            encoded[index].values["relu1_2"][0], encoded.values["relu1_2"][1]
        )


@pytest.mark.parametrize(("layers", "convs"), [(["relu3_3"], 7), (["relu1_2", "conv2_1"], 3)])
def test_flops_are_counted_as_those_of_ordinary_convolutions(layers, convs):
    loss = perceptual(layers)
    x, y = torch.rand(2, 2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    counts = []
    for images in (x, leaf):
        with FlopCounterMode(display=False) as counter:
            value = loss(images, y)
            if images is leaf:
                value.backward()
        counts.append(counter.get_total_flops())
    once = sum(
        2 * 2 * (48 // conv.stride) * (40 // conv.stride) * 9 * conv.in_channels * conv.channels
        for conv in NET.arch.convs[:convs]
    )
    assert counts == [2 * once, 3 * once]
    assert torch.allclose(leaf.grad, torch.autograd.grad(loss(leaf, y), leaf)[0], atol=1e-6)


def test_only_what_a_gradient_passes_counts():
    features = vggfeat.VGGFeatures(["relu1_1", "relu2_2"], weights=STATE)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    taps = features(x)
    with FlopCounterMode(display=False) as counter:
        taps["relu1_1"].sum().backward()
    assert counter.get_total_flops() == 2 * 16 * 16 * 9 * 3 * taps["relu1_1"].shape[1]
    taps = features(x)
    with FlopCounterMode(display=False) as deep:
        taps["relu2_2"].sum().backward()
    with FlopCounterMode(display=False) as whole:
        features(x)
    assert deep.get_total_flops() == whole.get_total_flops() > counter.get_total_flops()


def test_flops_of_1x1_convolutions_are_those_torch_counts():
    net = vggfeat.VGG(Arch("C", head="slim", num_classes=2, channels=scaled(8)))
    features, x = vggfeat.VGGFeatures(["conv3_3"], weights=net.state_dict()), torch.rand(2, 3, 20, 28)
    counts = []
    for call in (features, lambda x: net.taps(x, ["conv3_3"])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_targets_encoded_beforehand_are_batches_of_a_data_loader():
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights=STATE)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = [(image, loss.encode(image[None])) for image in images]
    (batch, targets), _ = torch.utils.data.DataLoader(encoded, batch_size=2)
    assert len(targets) == 2 and loss(batch, targets) == 0
    assert torch.equal(loss(batch, targets[[1, 0]]), loss(images[:2], images[[1, 0]]))
    # Lightning's plugins convert batches so
    doubled = copy.copy(targets)
    doubled.values = {name: value.double() for name, value in targets.values.items()}
    assert loss(batch, doubled) == 0


def test_a_target_serves_the_loss_of_whatever_class_it_became():
    """By FSDP, not by people."""
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights=STATE)
    images = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target, expected = loss.encode(images[1]), loss(*images)
    loss.__class__ = type("FSDPPerceptualLoss", (vggfeat.PerceptualLoss,), {"__module__": "torch.distributed.fsdp"})
    assert loss(images[0], target) == expected
    loss.__class__ = type("Own", (vggfeat.PerceptualLoss,), {})  # which may encode otherwise
    with pytest.raises(InputError, match="this is Own of relu1_2"):
        loss(images[0], target)
    with pytest.raises(InputError, match="encoded by PerceptualLoss"):
        vggfeat.StyleLoss(["relu1_2"], weights=STATE)(images[0], target)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning", "ignore:.torch.jit.:FutureWarning")
def test_a_module_that_holds_a_loss_can_be_scripted():
    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)
            self.loss = vggfeat.PerceptualLoss(["relu1_2"], weights=STATE)

        def forward(self, x):
            return self.layer(x)

    host, file = Host(), io.BytesIO()
    torch.jit.save(torch.jit.script(host), file)
    file.seek(0)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.jit.load(file)(x), host(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning", "ignore:.torch.jit.:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{"normalize_features": True}, {"criterion": "cosine"}], ids="-".join)
def test_a_traced_loss_can_be_saved(options):
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights=STATE, **options)
    x, y = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(loss, (x, y)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x, y), loss(x, y))


def test_a_class_that_was_changed_around_the_loss():
    """As FSDP does, whose new class calls the old one's `__init__` when it is copied."""
    loss = vggfeat.PerceptualLoss(["relu1_2"], weights=STATE)
    x, y = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    loss(leaf, y).backward()

    def new(cls, *args, **kwargs):
        raise TypeError("not without its arguments")

    loss.__class__ = type("Sharded", (vggfeat.PerceptualLoss,), {"__new__": new})
    again = x.clone().requires_grad_()
    loss(again, y).backward()
    assert torch.equal(leaf.grad, again.grad)


def test_a_tracer_of_torch_fx_is_told_what_to_do():
    with pytest.raises(vggfeat.InputError, match="with which torch.fx traces: use torch.export"):
        torch.fx.symbolic_trace(vggfeat.PerceptualLoss(["relu1_2"], weights=STATE))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradients_through_the_classifier(criterion, normalized):
    loss = perceptual(["fc"], criterion=criterion, normalize_features=normalized)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    value = loss(x, y)
    (found,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        net = copy.deepcopy(NET).eval()  # without dropout
        a, b = (net.taps(((image - MEAN) / STD).float(), ["fc"])["fc"] for image in (x, y))
        a, b = (F.normalize(each) if normalized else each for each in (a, b))
        close(value.detach(), VF.CRITERIA[criterion](a, b).mean(), rtol=1e-4)
        ahead, behind = loss(x + 1e-3 * found / found.norm(), y), loss(x - 1e-3 * found / found.norm(), y)
    assert float(ahead - behind) / 2e-3 == pytest.approx(float(found.norm()), rel=0.05)


def test_targets_of_two_losses_make_no_batch():
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, other = (perceptual(pooling=pooling).encode(images) for pooling in ("max", "average"))
    with pytest.raises(vggfeat.InputError, match="encoded by one loss"):
        vggfeat.EncodedTarget.cat([one, other])


def test_what_is_wrong_is_said_before_weights_are_fetched(monkeypatch):
    """Half a gigabyte would be."""

    def fetched(*_):
        raise AssertionError("weights were looked for")

    monkeypatch.setattr("vggfeat.weights.sets.find", fetched)
    for said, layers, options in (
        ("no layer asked for", (), {}),
        ("unknown layer 'relu3_5': did you mean relu3_", ["relu3_5"], {}),
        ("for weights by layer write layers=[*w], layer_weights=w", {"relu3_3": 1.0}, {}),
        ("unknown layer 'relu3': did you mean relu3_1 or relu3_2", ["relu3"], {}),
        ("vgg16 has no layer 'conv3_4'", ["conv3_4"], {"weights": "imagenet"}),
        ("vgg11 has no layer 'relu1_2'", ["relu1_2"], {"arch": "vgg11"}),
        ("2 layer_weights for relu1_2: expected 1", ["relu1_2"], {"layer_weights": [1, 2]}),
        ("unknown pooling 'avg': did you mean average", ["relu1_2"], {"pooling": "avg"}),
        ("unknown padding 'zero'", ["relu1_2"], {"padding": "zero"}),
        ("unknown reduction 'average'", ["relu1_2"], {"reduction": "average"}),
        ("unknown criterion 'huber'", ["relu1_2"], {"criterion": "huber"}),
    ):
        for kind in (PerceptualLoss, StyleLoss):
            with pytest.raises(InputError, match=re.escape(said)):
                kind(layers, **options)
    with pytest.raises(AssertionError, match="were looked for"):
        PerceptualLoss(["relu3_3"], weights="imagenet")


def test_bytes_in_their_own_range_are_to_be_floats():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for high, said in ((255, "use .float()"), (1, "divide 8-bit values by 255")):
        loss = PerceptualLoss(["relu1_1"], weights="random", input_range=(0, high))
        with pytest.raises(InputError, match=re.escape(f"got torch.uint8; {said}")):
            loss(image, image)
