"""What is not finite stays so: a network that diverged must not look as if it trained."""

import pytest
import torch

from vggfeat import PerceptualLoss, StyleLoss, VGGFeatures
from vggfeat.arch import Arch, scaled
from vggfeat.errors import InputError
from vggfeat.trunk.filters import Filters, bounds
from vggfeat.trunk.layers import SAFE, SAFE_SQUARED, stays_finite
from vggfeat.weights import load

KEEPS = ("bits", "values")
BAD = [torch.nan, torch.inf, -torch.inf, 3e38]
TARGET = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state():
    return load("random", Arch("D", head=None, channels=scaled(16))).state


def images(value, everywhere):
    x = TARGET.clone()
    if everywhere:
        x.fill_(value)
    else:
        x[0, 1, 7, 9] = value
    return x.requires_grad_()


@pytest.mark.parametrize("kind", [PerceptualLoss, StyleLoss])
@pytest.mark.parametrize("value", BAD[:3])
def test_images_that_are_not_finite_are_refused(state, kind, value):
    loss = kind(["relu2_2"], weights=state)
    for pair in ((images(value, False), TARGET), (TARGET, images(value, False).detach())):
        with pytest.raises(InputError, match="NaN or infinite values: check what produced them"):
            loss(*pair)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("value", BAD)
def test_taps_and_gradients_of_what_is_not_finite(state, value, keep, precision, everywhere):
    """Where nothing is looked at beforehand; 3e38 is a number, and none behind the first layers."""
    features = VGGFeatures(["relu1_2", "pool2", "relu3_3"], weights=state, keep=keep, precision=precision)
    x = images(value, everywhere)
    taps = features.taps(x)
    assert not taps["relu3_3"].isfinite().all()
    total = sum(tap.float().square().mean() for tap in taps.values())
    total.backward()
    assert not total.isfinite() and not x.grad.isfinite().any()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("pooling", "scale"), [("max", 1e20), ("l2", 1e10)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_with_which_good_images_overflow(state, keep, precision, pooling, scale):
    """A ReLU fused with the convolution would make 0 of the NaN; l2 pooling overflows in its squares."""
    huge = {
        key: value * scale if key.startswith(("features.0.", "features.2.")) else value for key, value in state.items()
    }
    features = VGGFeatures(["pool1", "relu2_2"], weights=huge, keep=keep, precision=precision, pooling=pooling)
    x = TARGET.clone().requires_grad_()
    taps = features.taps(x)
    assert not taps["pool1"].isfinite().all() and taps["relu2_2"].isnan().any()
    taps["relu2_2"].float().square().mean().backward()
    assert not x.grad.isfinite().any()
    found, pullback = features.vjp(x.detach())
    assert found["relu2_2"].isnan().equal(taps["relu2_2"].isnan())
    assert not pullback(lambda name, tap: tap).isfinite().any()


@pytest.mark.parametrize("pooling", ["max", "average", "l2"])
def test_pools_keep_what_is_not_a_number(state, pooling):
    far = ("features.0.weight", "features.2.weight")
    huge = {key: value * 1e20 if key in far else value for key, value in state.items()}
    for keep in KEEPS:
        features = VGGFeatures(["pool2"], weights=huge, keep=keep, pooling=pooling)
        x = TARGET.clone().requires_grad_()
        tap = features.taps(x)["pool2"]
        tap.square().sum().backward()
        assert not tap.isfinite().any() and not x.grad.isfinite().all()
        taps, pullback = features.vjp(x.detach())
        assert not pullback(lambda name, tap: tap).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", [PerceptualLoss, StyleLoss])
def test_a_compiled_loss_of_nan_is_nan(state, kind):
    torch._dynamo.reset()
    loss = torch.compile(kind(["relu1_2", "relu3_3"], weights=state), backend="aot_eager")
    x = images(torch.nan, False)
    value = loss(x, TARGET)
    value.backward()
    assert value.isnan() and x.grad.isnan().all()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [PerceptualLoss, StyleLoss])
def test_under_transforms_too(state, kind):
    loss = kind(["relu1_2"], weights=state)
    grad, value = torch.func.grad_and_value(lambda x: loss(x, TARGET))(images(torch.nan, False).detach())
    # two convolutions spread it by two pixels on each side, and its gradient by two more; a Gram matrix everywhere
    reached = torch.zeros(1, 3, 32, 32, dtype=torch.bool)
    reached[:, :, 3:12, 5:14] = True
    assert value.isnan() and torch.equal(grad.isnan(), reached if kind is PerceptualLoss else torch.ones_like(reached))
    assert torch.func.vmap(lambda x: loss(x[None], TARGET))(images(torch.nan, True).detach()).isnan().all()


def test_a_bias_with_which_good_images_overflow(state):
    huge = dict(state) | {"features.0.bias": torch.full_like(state["features.0.bias"], 1e38)}
    assert VGGFeatures(["relu2_2"], weights=huge)(TARGET)["relu2_2"].isnan().any()


def test_what_a_convolution_can_make_of_values_is_bounded():
    weight = torch.ones(2, 3, 3, 3)
    weight[1] = -2
    second = torch.tensor([[[[1.0]], [[-1.0]]]])
    chain = [Filters(weight, torch.tensor([-5.0, 1.0]), weight), Filters(second, torch.tensor([-2.0]), second)]
    assert list(bounds(chain)) == [(54.0, 5.0), (27.0 + 54.0, 5.0 + 1.0 + 2.0)]
    images = torch.full((1, 3, 4, 4), -2.0)
    assert stays_finite(images, [(3.0, 1.0)], [7.5])
    assert not stays_finite(images, [(3.0, 1.0)], [6.5])  # what the last convolution gives counts, too
    assert not stays_finite(images * 1e33, [(0.0, 1.0)], [7.5])
    assert 5000 * SAFE < torch.finfo(torch.float32).max and 5 * SAFE_SQUARED**2 < torch.finfo(torch.float32).max
