"""LPIPS: against its formula in float64, and against the package of its authors."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat.arch import Arch, scaled
from vggfeat.errors import InputError
from vggfeat.metrics import CALIBRATION, lpips_weights
from vggfeat.weights import DEFAULT, load

LAYERS = ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"]


@pytest.fixture(scope="module")
def weights():
    return load("random", "vgg16")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 32, 24, generator=generator)
    return a, (0.7 * a + 0.3 * b)


def by_hand(weights, a, b):
    """The paper's eq. 1 in float64, (N,)."""
    features = vggfeat.VGGFeatures(LAYERS, weights=weights)
    worth, total = load_file(CALIBRATION), 0
    ours, theirs = (features(image.double()) for image in (a, b))
    for name in LAYERS:
        x, y = (taps[name] / taps[name].norm(dim=1, keepdim=True).clamp_min(1e-30) for taps in (ours, theirs))
        total = total + ((x - y).square() * worth[name].double()[:, None, None]).sum(1).mean((1, 2))
    return total


def test_it_is_the_papers(weights, pair):
    metric = vggfeat.LPIPS(weights=weights)
    expected = by_hand(weights, *pair)
    assert expected.min() > 0.01
    for value in (metric(*pair), metric(*pair, torch.ones(1, 1, 32, 24)), metric(pair[0], metric.encode(pair[1]))):
        assert value.shape == (2,)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    leaf = pair[0].double().requires_grad_()
    (exact,) = torch.autograd.grad(by_hand(weights, leaf, pair[1]).sum(), leaf)
    for images in (pair[0].clone().requires_grad_(), leaf):
        value = metric(images, pair[1])
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
        (found,) = torch.autograd.grad(value.sum(), images)
        assert F.cosine_similarity(found.double().flatten(), exact.flatten(), dim=0) > 1 - 1e-6
    mean = vggfeat.LPIPS(weights=weights, reduction="mean")(*pair)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-4, atol=0)


def test_it_is_that_of_the_package(weights, pair):
    """The authors' own, with the same network; their weights lie in the package."""
    lpips = pytest.importorskip("lpips", reason="lpips, the other implementation, is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of how lpips asks it for a network
        peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    convs = [module for module in peer.net.modules() if isinstance(module, nn.Conv2d)]
    for conv, layer in zip(convs, weights.arch.convs, strict=True):
        conv.weight.data, conv.bias.data = (
            weights.state[f"features.{layer.index}.{part}"] for part in ("weight", "bias")
        )
    images, target = (image * 2 - 1 for image in pair)
    ours = vggfeat.LPIPS(weights=weights, input_range=(-1, 1))
    torch.testing.assert_close(ours(images, target), peer(images, target).flatten(), rtol=1e-4, atol=0)
    found = []
    for metric in (ours, peer):
        leaf = images.clone().requires_grad_()
        found.append(torch.autograd.grad(metric(leaf, target).sum(), leaf)[0].flatten())
    assert F.cosine_similarity(*found, dim=0) > 1 - 1e-5


def test_maps_have_the_distance_as_their_mean(weights, pair):
    metric = vggfeat.LPIPS(weights=weights)
    maps = metric.maps(*pair)
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        name: (2, 32 >> block, 24 >> block) for block, name in enumerate(LAYERS)
    }
    torch.testing.assert_close(sum(each.mean((1, 2)) for each in maps.values()), metric(*pair), rtol=1e-4, atol=0)
    one = metric.maps(pair[0], pair[1][:1])["relu5_3"]
    torch.testing.assert_close(one[:1], maps["relu5_3"][:1])
    with pytest.raises(InputError, match="input of .* against a target of 16×16"):
        metric.maps(pair[0], pair[1][:, :, :16, :16])
    with pytest.raises(InputError, match="1 images against 2 targets"):
        metric.maps(pair[0][:1], pair[1])
    found = vggfeat.visualize.distance(pair[0][:1], pair[1][:1], lpips=True, weights=weights)
    assert found.total == pytest.approx(float(metric(*pair)[0]), rel=1e-4) and list(found.layers) == LAYERS
    assert found.sheet.settings["lpips"] and found.sheet.settings["arch"] == "vgg16"
    with pytest.raises(vggfeat.WeightsUnavailableError, match="imagenet weights for vgg16 are unavailable"):
        vggfeat.visualize.distance(pair[0][:1], pair[1][:1], lpips=True, weights="auto")  # and no random number
    with pytest.raises(vggfeat.InputError, match="LPIPS has its own five layers"):
        vggfeat.visualize.distance(pair[0][:1], pair[1][:1], ["relu1_1"], lpips=True, weights=weights)


def test_equal_images_and_flat_ones(weights, pair):
    metric = vggfeat.LPIPS(weights=weights)
    assert torch.equal(metric(pair[0], pair[0]), torch.zeros(2))
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    value = metric(flat, torch.zeros(1, 3, 32, 32))
    assert value.item() == 0 and torch.equal(torch.autograd.grad(value, flat)[0], torch.zeros_like(flat))


def test_it_is_as_invisible_as_a_loss(weights, pair):
    metric = vggfeat.LPIPS(weights=weights)
    assert not list(metric.parameters()) and not metric.state_dict()
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(other(*pair), metric(*pair))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's own tracer
def test_compiled(weights, pair):
    metric = vggfeat.LPIPS(weights=weights)
    torch._dynamo.reset()
    compiled = torch.compile(metric, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*pair), metric(*pair), rtol=1e-4, atol=0)


def test_nothing_replaces_its_weights():
    with pytest.raises(vggfeat.WeightsUnavailableError, match="imagenet weights for vgg16 are unavailable"):
        vggfeat.LPIPS(weights="auto")
    assert "calibrated for relu1_2" in repr(vggfeat.LPIPS(weights="random"))
    with pytest.raises(vggfeat.InputError, match="weights=None is an untrained network, which is no LPIPS"):
        vggfeat.LPIPS(weights=None)


def test_other_networks_are_refused():
    narrow = load("random", Arch("D", channels=scaled(4), head=None))
    with pytest.raises(vggfeat.InputError, match=r"made for VGG-16 at full width, got vgg16 with \(4, 8, 16, 32, 32\)"):
        vggfeat.LPIPS(weights=narrow)
    with pytest.raises(vggfeat.WeightsError, match="random are of vgg19, not of vgg16"):
        vggfeat.LPIPS(weights=load("random", "vgg19"))
    with pytest.raises(vggfeat.WeightsError, match="'imagenet', which the bundled VGG-19 cannot replace"):
        vggfeat.LPIPS(weights="bundled")
    encoded = vggfeat.PerceptualLoss(LAYERS, weights=narrow).encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(vggfeat.InputError, match="encoded by PerceptualLoss"):
        vggfeat.LPIPS(weights="random")(torch.rand(1, 3, 16, 16), encoded)


def test_auto_means_imagenet_only_where_the_environment_says_nothing_else(monkeypatch):
    assert lpips_weights("auto") == "imagenet"
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "bundled")  # of another network: refused, not replaced
    with pytest.raises(vggfeat.WeightsError, match="which the bundled VGG-19 cannot replace"):
        lpips_weights("auto")
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "random")
    assert lpips_weights("auto") == "auto"
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "auto")
    assert type(lpips_weights(DEFAULT)) is str  # "imagenet" as such, not what the environment says


def test_channels_of_bfloat16_features_count_as_calibrated(weights, pair):
    """With a gradient as without: the weights themselves are not rounded."""
    metric = vggfeat.LPIPS(weights=weights, precision="bfloat16")
    value = metric(pair[0].clone().requires_grad_(), pair[1]).detach()
    torch.testing.assert_close(value, metric(*pair), rtol=1e-5, atol=0)


def test_grey_images_are_repeated(weights):
    grey = torch.rand(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    metric = vggfeat.LPIPS(weights=weights, repeat_grey=True, precision="bfloat16", keep="values")
    assert torch.equal(metric(*grey), metric(*grey.expand(-1, -1, 3, -1, -1)))
    assert (metric.features.precision, metric.features.keep) == ("bfloat16", "values")
