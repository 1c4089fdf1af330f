"""The scripts that train and score the bundled weights (examples/bundled), and what the shipped file does."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from vggfeat import StyleConfig, VGGFeatures, stylize
from vggfeat.functional import gram

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "bundled"
STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu3_4")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("data", "distill", "deep", "score", "probe", "console"):
        sys.modules.pop(name, None)


def test_the_chosen_channels_explain_the_others(script):
    """Six channels that are mixtures of two: the two that are chosen span all of them, and the loudest comes first."""
    torch.manual_seed(0)
    mixed = torch.randn(6, 2) @ torch.randn(2, 50)
    mixed[4] *= 10
    chosen = script("distill").choose(mixed @ mixed.T, 2)
    assert chosen[0] == 4
    solved = torch.linalg.lstsq(mixed[chosen].T, mixed.T)
    assert torch.allclose(mixed[chosen].T @ solved.solution, mixed.T, atol=1e-3)


def test_errors_are_those_of_mapped_features(script, monkeypatch):
    """The products say the same as mapping every feature and comparing; a teacher that is the pupil has no error."""
    distill = script("distill")
    monkeypatch.setattr(distill, "RIDGE", 1e-6)
    torch.manual_seed(0)
    slim = distill.Slim((4, 4, 4))
    images = torch.rand(3, 3, 32, 32)
    same = VGGFeatures(distill.LAYERS, weights=slim.state([torch.ones(4)] * 8), arch="vgg19")
    with torch.no_grad():
        features, grams, _ = distill.errors(slim, same, images)
    assert max(map(float, (*features, *grams))) < 1e-2  # bfloat16
    other = VGGFeatures(distill.LAYERS, arch="vgg19", weights=distill.Slim((6, 6, 6)).state([torch.ones(6)] * 8))
    with torch.no_grad():
        features, grams, _ = distill.errors(slim, other, images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        s = slim(images)[2].float().flatten(2)
    t = other(images)["relu2_1"].flatten(2)
    weight = 1 / t.square().sum((1, 2), keepdim=True)
    m = torch.linalg.solve((s * weight @ s.mT).sum(0), (s * weight @ t.mT).sum(0)).T
    left = ((t - m @ s).square().sum((1, 2)) / t.square().sum((1, 2))).mean()
    assert float(features[2]) == pytest.approx(float(left), abs=5e-3)


def test_folded_batch_normalisation_is_the_same_network(script):
    deep_module = script("deep")
    from vggfeat.arch import Arch

    arch = Arch("E", head=None, channels=(2, 2, 3, 5, 5))
    deep = deep_module.Deep(arch, {"cifar": 2})
    torch.manual_seed(0)
    for norm in deep.norms:
        for value in (norm.weight, norm.running_var):
            torch.nn.init.uniform_(value, 0.5, 2)
        for value in (norm.bias, norm.running_mean):
            torch.nn.init.normal_(value)
    deep.eval()
    x = torch.rand(2, 3, 16, 16)
    expected = deep(x, "cifar")[1]
    state = deep.state()
    for layer in deep.layers:
        x = torch.relu(
            torch.nn.functional.conv2d(
                x, state[f"features.{layer.index}.weight"], state[f"features.{layer.index}.bias"], padding=1
            )
        )
        if layer.name.endswith("_4"):
            x = torch.nn.functional.max_pool2d(x, 2)
    torch.testing.assert_close(deep.heads["cifar5"](x.mean((2, 3))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.data
def test_bundled_weights_carry_style(test_data, oxford):
    """Oxford's network finds in the result far less of an error than in a result of random weights."""
    pair = str(test_data / "photos" / "tubingen.jpg"), str(test_data / "paintings" / "starry_night.jpg")
    judge = VGGFeatures(STYLE, weights=str(oxford))
    from vggfeat.image import fit, open_image, resize, to_tensor

    def error(picture):
        goal = open_image(pair[1])
        goal = judge(to_tensor(resize(goal, *fit(*goal.size, 96))))
        return sum(
            float((gram(value) - gram(goal[name])).norm() ** 2 / gram(goal[name]).norm() ** 2)
            for name, value in judge(to_tensor(picture)).items()
        )

    errors = {}
    for weights in ("bundled", "random"):
        config = StyleConfig(size=96, weights=weights, style_layers=STYLE, content_layers=("relu3_3",), steps=40)
        errors[weights] = error(stylize(*pair, config).image)
    assert errors["bundled"] < errors["random"] / 5
