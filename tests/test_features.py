"""VGGFeatures: what it takes, what it refuses, what it gives, and how it behaves inside other people's models."""

import copy
import gc
import pickle
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreters import Python
from torch import nn

import vggfeat
from vggfeat import PerceptualLoss, features as features_module
from vggfeat.arch import Arch
from vggfeat.devices import bfloat16_is_fast, trunk_dtype
from vggfeat.errors import InputError, WeightsError
from vggfeat.features import VGGFeatures
from vggfeat.trunk import Trunk, strips
from vggfeat.weights import Weights, load

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # torchvision's documentation
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def small(config="D", **options):
    torch.manual_seed(0)
    net = vggfeat.vgg(config, num_classes=7, width=0.125, **options).eval()
    for module in net.modules():  # biases and classifier of a size that shows
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return small()


@pytest.fixture(scope="module")
def state(net):
    return net.state_dict()


def batch(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*(shape or (2, 3, 32, 40)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normalised(x):
    return (x - MEAN.to(x.dtype)) / STD.to(x.dtype)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ── what it refuses ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_unknown_layer_names_the_nearest(state):
    with pytest.raises(
        InputError, match=r"unknown layer 'style': choose from conv1_1, relu1_1, .*, fc7, relu7, fc8$"
    ) as e:
        vggfeat.arch.check_names(["style"], None)  # the network is not known yet
    assert "bn" not in str(e.value) and "lrn" not in str(e.value)
    for name in ("14", "features.14"):  # torchvision's (`vgg16().features[14]`)
        with pytest.raises(InputError, match=f"unknown layer '{name}': vgg16's is conv3_3$"):
            VGGFeatures([name], "vgg16", "random")
    with pytest.raises(InputError, match=r"unknown layer 'rleu3_3': did you mean .*relu3_3"):
        VGGFeatures(["rleu3_3"], weights=state)
    with pytest.raises(InputError, match=r"names such as 'relu3_3', got \[3\]"):
        VGGFeatures([3], weights=state)


def test_layer_that_this_network_lacks(state):
    with pytest.raises(InputError, match=r"vgg16 has no layer 'relu3_4'; it has conv1_1, .*relu3_3, pool3"):
        VGGFeatures(["relu1_1", "relu3_4"], weights=state)
    with pytest.raises(InputError, match=r"no layer 'bn1_1'"):
        VGGFeatures(["bn1_1"], weights=state)
    with pytest.raises(InputError, match=r"no layer 'fc'"):
        VGGFeatures(["fc"], weights=state)


def test_layers_must_be_a_list_of_names(state):
    with pytest.raises(InputError, match=r"list of names: write \['relu3_3'\]"):
        VGGFeatures("relu3_3", weights=state)
    with pytest.raises(InputError, match="no layer asked for"):
        VGGFeatures([], weights=state)


def test_weights_that_do_not_reach(state):
    shallow = {
        key: value for key, value in state.items() if key.startswith(("features.0.", "features.2.", "features.5."))
    }
    VGGFeatures(["relu2_1"], weights=shallow)
    with pytest.raises(WeightsError, match=r"do not reach relu2_2: missing features.7.weight, .*serve is relu2_1"):
        VGGFeatures(["relu2_2"], weights=shallow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "avg"}, "unknown pooling 'avg': .*average"),
        ({"padding": "zero"}, "unknown padding 'zero': did you mean zeros"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"keep": "all"}, "unknown keep 'all': choose from bits, values"),
        ({"input_range": (1, 0)}, r"must rise and be finite, got \(1, 0\)"),
        ({"input_range": (1, 1)}, r"must rise and be finite, got \(1, 1\)"),
        ({"input_range": (float("-inf"), 0)}, r"must rise and be finite, got \(-inf, 0\)"),
    ],
)
def test_unknown_choices(state, options, message):
    with pytest.raises(InputError, match=message):
        VGGFeatures(["relu1_1"], weights=state, **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 32, 32), r"3 channels .*\(2, 1, 32, 32\); repeat_grey=True"),
        (torch.rand(2, 4, 32, 32), r"3 channels .*\(2, 4, 32, 32\); images\[:, :3\] is RGBA without transparency"),
        (torch.rand(2, 5, 32, 32), r"3 channels .*\(2, 5, 32, 32\)$"),
        (torch.rand(30, 32, 3), r"channels come first, .*: image.permute\(2, 0, 1\)\[None\]"),
        (torch.rand(2, 32, 40, 3), r"channels come second: images.permute\(0, 3, 1, 2\)"),
        (torch.rand(3, 32, 32), r"shape \(3, 32, 32\); add the batch dimension: images\[None\]"),
        (torch.rand(1, 1, 3, 32, 32), r"\(1, 1, 3, 32, 32\); frames as images: video.flatten\(0, 1\)"),
        (torch.rand(32, 32), r"\(32, 32\)$"),
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
            "floating-point images, got torch.uint8; divide 8-bit values by 255",
        ),
        (torch.zeros(2, 3, 32, 32, dtype=torch.bool), "floating-point images, got torch.bool$"),
        (torch.full((2, 3, 32, 32), torch.nan), "hold NaN"),
        ([[0.0]], r"expected a tensor .* got list; .*to_tensor\(image\)\[None\]"),
    ],
)
def test_images_that_cannot_be_used(state, images, message):
    with pytest.raises(InputError, match=message):
        VGGFeatures(["relu2_1"], weights=state)(images)


def test_one_nan_is_enough(state):
    x = batch()
    x[1, 2, 31, 39] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        VGGFeatures(["relu2_1"], weights=state)(x)


@pytest.mark.parametrize("config", ["D", "C"])
@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_smallest_image(config, padding):
    state = small(config).state_dict()
    arch = Arch(config)
    # by hand: a pool halves, rounding down, and needs 2 pixels; reflection needs 2 at every 3×3 convolution
    for name in [layer.name for layer in arch.layers]:
        f = VGGFeatures([name], arch=config, weights=state, padding=padding)

        def fits(side, name=name):
            for layer in arch.layers:
                if layer.kind == "pool":
                    side //= 2
                if side < 1 or (layer.kind == "conv" and layer.kernel == 3 and padding == "reflect" and side < 2):
                    return False
                if layer.name == name:
                    return True

        least = next(side for side in range(1, 65) if fits(side))
        assert f.plan.min_size == least, name
        for shape in ((1, 3, least, least + 3), (1, 3, least + 1, least)):
            assert f(torch.rand(shape))[name].numel() > 0
        if least > 1:
            for shape in ((1, 3, least - 1, least + 9), (1, 3, least + 9, least - 1)):
                with pytest.raises(InputError, match=f"too small for {name}: it needs at least {least} pixels"):
                    f(torch.rand(shape))
            text = f"{least + 9}×{least - 1} "  # width × height
            with pytest.raises(InputError, match=text):
                f(torch.rand(1, 3, least - 1, least + 9))


@pytest.mark.parametrize("scale", [255.0, -3.0])
def test_values_far_outside_the_range_warn_once(state, scale):
    f = VGGFeatures(["relu1_1"], weights=state)
    with pytest.warns(UserWarning, match=r"far outside input_range=\(0, 1\); say what they are") as caught:
        f(batch() * scale)
    assert [warning.filename for warning in caught] == [__file__]  # where somebody can do something about it
    f(batch() * scale)  # filterwarnings = error
    with pytest.warns(UserWarning, match="far outside"):  # each module speaks for itself
        VGGFeatures(["relu1_1"], weights=state)(batch() * scale)


def test_values_normalised_before_warn(state):
    f = VGGFeatures(["relu1_1"], weights=state)
    with pytest.warns(UserWarning, match="give them before their normalisation, which the features do themselves, or"):
        f(batch() * 4 - 2)


def test_what_was_said_in_a_replica_of_data_parallel_is_not_said_again(state):
    f = VGGFeatures(["relu1_1"], weights=state)
    with pytest.warns(UserWarning, match="far outside"):
        f._replicate_for_data_parallel()(batch() * 255)
    f._replicate_for_data_parallel()(batch() * 255)  # filterwarnings = error


@pytest.mark.parametrize(("span", "scale"), [((0, 1), 255), ((0, 255), 1)])
def test_a_warning_made_an_error_comes_once(state, span, scale):
    f = VGGFeatures(["relu1_1"], weights=state, input_range=span)
    with pytest.raises(UserWarning, match="images reach from"):  # warnings are errors in tests
        f(batch() * scale)
    f(batch() * scale)


def test_values_in_a_small_part_of_the_range_warn(state):
    f = VGGFeatures(["relu1_1"], weights=state, input_range=(0, 255))
    with pytest.raises(AttributeError, match="input_range"):
        f.input_range = (0, 1)
    f(torch.zeros(1, 3, 32, 32))  # black is black
    with pytest.warns(UserWarning, match=r"a small part of input_range=\(0, 255\)"):
        f(batch())
    f(batch())  # warns once


def test_what_auto_came_to_is_said(state):
    with pytest.warns(
        UserWarning, match=r"weights='auto' resolved to bundled \(imagenet weights for vgg16 are unavailable"
    ):
        VGGFeatures(["relu1_1"], weights="auto")


def test_values_a_little_outside_are_normal_in_optimisation(state):
    VGGFeatures(["relu1_1"], weights=state)(batch() * 1.6 - 0.3)
    VGGFeatures(["relu1_1"], weights=state, input_range=(0, 255))(batch() * 255)
    with pytest.warns(UserWarning, match=r"input_range=\(-1, 1\)"):
        VGGFeatures(["relu1_1"], weights=state, input_range=(-1, 1))(batch() * 255)


def test_grey_only_when_asked(state):
    grey = batch(2, 1, 32, 40)
    f = VGGFeatures(["relu1_1", "relu2_1"], weights=state, repeat_grey=True)
    equal(f(grey), VGGFeatures(["relu1_1", "relu2_1"], weights=state)(grey.repeat(1, 3, 1, 1)))
    equal(f(batch()), VGGFeatures(["relu1_1", "relu2_1"], weights=state)(batch()))
    with pytest.raises(InputError, match="3 channels"):
        f(batch(2, 2, 32, 40))
    a, b = grey.clone().requires_grad_(), grey.repeat(1, 3, 1, 1).requires_grad_()
    f(a)["relu2_1"].square().sum().backward()
    f(b)["relu2_1"].square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad.sum(1, keepdim=True))


# ── what it gives ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_taps_equal_the_network(net, state):
    names = ["conv1_1", "relu1_2", "pool2", "conv3_3", "relu4_3", "pool5"]
    f = VGGFeatures(names, weights=state)
    a, b = batch().requires_grad_(), batch().requires_grad_()
    ours, theirs = f(a), net.taps(normalised(b), names)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    for taps in (ours, theirs):
        sum(tap.square().mean() for tap in taps.values()).backward()
    assert (a.grad - b.grad).norm() / b.grad.norm() < 1e-5


def test_normalisation_is_torchvision(torchvision, net, state):
    import torchvision.transforms.v2.functional as transforms

    x = transforms.normalize(batch(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = net.features[0](x)
    torch.testing.assert_close(
        VGGFeatures(["conv1_1"], weights=state)(batch())["conv1_1"], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("span", [(-1, 1), (0, 255), (-0.5, 3)])
def test_input_ranges_are_equivalent(state, span):
    names, x = ["conv1_1", "relu2_2"], batch(dtype=torch.float64)
    low, high = span
    plain = VGGFeatures(names, weights=state)(x)
    other = VGGFeatures(names, weights=state, input_range=span)(x * (high - low) + low)
    for name in names:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-9, atol=1e-10)


def test_conventions_travel_with_the_weights(state):
    loaded = load(state)
    changed = Weights(loaded.arch, loaded.state, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), "own", ("own",))
    x = batch(dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))
    weight, bias = (state[f"features.0.{part}"].double() for part in ("weight", "bias"))
    expected = nn.functional.conv2d((x - mean) / std, weight, bias, padding=1)
    torch.testing.assert_close(VGGFeatures(["conv1_1"], weights=changed)(x)["conv1_1"], expected)


def test_order_and_duplicates(state):
    names = ["relu3_1", "conv1_1", "pool2", "conv1_1", "relu1_1"]
    f = VGGFeatures(names, weights=state)
    assert list(f(batch())) == ["relu3_1", "conv1_1", "pool2", "relu1_1"]
    assert f.layers == ("relu3_1", "conv1_1", "pool2", "relu1_1")
    equal(f(batch()), {name: VGGFeatures([name], weights=state)(batch())[name] for name in f.layers})


def test_shapes_and_layout(state):
    taps = VGGFeatures(["relu1_1", "conv3_3", "pool5"], weights=state)(batch(2, 3, 37, 65))
    assert [tuple(tap.shape) for tap in taps.values()] == [(2, 8, 37, 65), (2, 32, 9, 16), (2, 64, 1, 2)]
    assert all(tap.is_contiguous(memory_format=torch.channels_last) for tap in taps.values())


HEAD = ["fc6", "relu6", "fc7", "relu7", "fc8"]


@pytest.mark.parametrize("size", [(32, 40), (224, 224)])
def test_head_equals_the_network(net, state, size):
    x = batch(2, 3, *size)
    f = VGGFeatures([*HEAD, "relu2_1"], weights=state)
    ours, theirs = f(x), net.taps(normalised(x), [*HEAD, "relu2_1"])
    torch.testing.assert_close(ours["fc8"], net(normalised(x)), rtol=1e-3, atol=1e-4)
    assert ours["fc8"].shape == (2, 7)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a)["fc8"].square().sum().backward()
    net(normalised(b)).square().sum().backward()
    assert (a.grad - b.grad).norm() / b.grad.norm() < 1e-5


@pytest.mark.parametrize("names", [["pool5", "fc6"], ["fc6", "pool5", "relu5_3"], ["fc7"], ["conv1_1", "relu6"]])
def test_head_beside_other_taps(net, state, names):
    f = VGGFeatures(names, weights=state)
    a, b = batch().requires_grad_(), batch().requires_grad_()
    ours, theirs = f(a), net.taps(normalised(b), names)
    assert list(ours) == names
    for taps in (ours, theirs):
        sum(tap.square().mean() for tap in taps.values()).backward()
    assert (a.grad - b.grad).norm() / b.grad.norm() < 1e-5


def test_head_runs_no_further_than_asked(state, monkeypatch):
    f = VGGFeatures(["relu6"], weights=state)
    calls = []
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or real(*args))
    f(batch())
    assert len(calls) == 1


def test_slim_head():
    net = small("A", head="slim")
    f = VGGFeatures(["fc", "relu5_2"], weights=net.state_dict())
    torch.testing.assert_close(f(batch())["fc"], net(normalised(batch())), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no layer 'fc8'"):
        VGGFeatures(["fc8"], weights=net.state_dict())


def test_head_of_weights_without_one(state):
    without = {key: value for key, value in state.items() if key.startswith("features.")}
    with pytest.raises(
        WeightsError,
        match=r"do not reach fc7: missing classifier\.0\.weight, .*; the deepest layer they serve is pool5",
    ):
        VGGFeatures(["fc7"], weights=without)


@pytest.mark.parametrize("keep", ["bits", "values"])
def test_layouts_of_the_images_do_not_matter(state, keep):
    f = VGGFeatures(["conv1_2", "relu3_1"], weights=state, keep=keep)
    x = batch(2, 3, 32, 33)
    wide = torch.zeros(2, 3, 64, 66)
    wide[:, :, ::2, ::2] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "flipped twice": x.flip(3).contiguous().flip(3),
        "strided": wide[:, :, ::2, ::2],
        "from HWC": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    results = {}
    for label, given in {"contiguous": x, **layouts}.items():
        before = given.clone()
        leaf = given.detach().requires_grad_()
        taps = f(leaf)
        taps["relu3_1"].square().mean().backward()
        results[label] = (*taps.values(), leaf.grad)
        assert torch.equal(given, before), label
    for label, result in results.items():
        assert all(map(torch.equal, result, results["contiguous"])), label
    one = batch(1, 3, 32, 33)
    equal(f(one.expand(3, 3, 32, 33)), f(one.repeat(3, 1, 1, 1)))


@pytest.mark.parametrize("names", [["pool2"], ["relu1_1", "conv2_1"], ["fc8", "relu1_1"]])
def test_a_batch_of_no_images(state, names):
    x = torch.zeros(0, 3, 32, 40, requires_grad=True)
    taps = VGGFeatures(names, weights=state)(x)
    full = VGGFeatures(names, weights=state)(batch())
    assert all(tap.shape == (0, *full[name].shape[1:]) for name, tap in taps.items())
    sum(tap.sum() for tap in taps.values()).backward()
    assert x.grad.shape == x.shape


def test_each_image_is_alone(state):
    f = VGGFeatures(["relu3_1"], weights=state)
    x = batch(3, 3, 32, 32)
    one = torch.cat([f(image[None])["relu3_1"] for image in x])
    torch.testing.assert_close(f(x)["relu3_1"], one, rtol=1e-5, atol=1e-6)


# ── frozen ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_to_train_nothing_to_save(state):
    f = VGGFeatures(["relu2_1", "fc6"], weights=state)
    f(batch())
    assert not list(f.parameters())
    assert not list(f.buffers())
    assert not f.state_dict()
    host = nn.Sequential(nn.Conv2d(3, 3, 1), f)
    assert set(host.state_dict()) == {"0.weight", "0.bias"}
    host.load_state_dict(nn.Sequential(nn.Conv2d(3, 3, 1)).state_dict(), strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.train(),
        lambda f: f.eval(),
        lambda f: f.double(),
        lambda f: f.half(),
        lambda f: f.to(torch.bfloat16),
        lambda f: f.to("cpu"),
        lambda f: f.to(memory_format=torch.channels_last),
        lambda f: f.requires_grad_(True),
        lambda f: copy.copy(f),
        lambda f: copy.deepcopy(f),
        lambda f: pickle.loads(pickle.dumps(f)),
    ],
)
def test_nothing_changes_the_outputs(change):
    state = small("A", batch_norm=True).state_dict()
    f = VGGFeatures(["bn2_1", "relu3_1", "fc8"], weights=state)
    before = f(batch())
    changed = change(f)
    equal(changed(batch()), before)
    assert changed.trunk is f.trunk


def test_pickle_in_another_process(state, tmp_path):
    f = VGGFeatures(["relu2_1", "fc7", "conv1_2"], weights=state, pooling="l2", padding="reflect", input_range=(-1, 1))
    x = batch() * 2 - 1
    (tmp_path / "f.pickle").write_bytes(pickle.dumps((f, copy.deepcopy(f))))
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "script.py").write_text(
        "import pickle, sys, torch; folder = sys.argv[1]\n"
        "f, g = pickle.load(open(folder + '/f.pickle', 'rb'))\n"
        "assert f.trunk is g.trunk\n"
        "torch.save(f(torch.load(folder + '/x.pt')), folder + '/taps.pt')\n"
    )
    status, _, error = Python(tmp_path / "script.py", tmp_path).wait()
    assert status == 0, error
    equal(torch.load(tmp_path / "taps.pt"), f(x))


def test_equal_weights_share_one_trunk(state):
    same = {key: value.clone() for key, value in state.items()}
    other = {key: value + 0.01 for key, value in state.items()}
    f = VGGFeatures(["relu1_1"], weights=state)
    assert VGGFeatures(["relu3_1", "conv1_1"], weights=same, pooling="average").trunk is f.trunk
    assert VGGFeatures(["relu1_1"], weights=other).trunk is not f.trunk
    random = VGGFeatures(["relu1_1"], weights="random")
    assert VGGFeatures(["relu4_1"], weights="random").trunk is random.trunk
    assert random.trunk is not f.trunk


def test_weights_modified_since_they_were_loaded():
    """They are what is computed with, and nobody else's are."""
    unmodified = VGGFeatures(["relu1_1"], weights="random")
    loaded = load("random")
    assert VGGFeatures(["relu1_1"], weights=loaded).trunk is unmodified.trunk
    assert VGGFeatures(["relu1_1"], weights=replace(loaded, note="mine")).trunk is unmodified.trunk
    loaded.state["features.0.weight"].zero_()
    silent = VGGFeatures(["relu1_1"], weights=loaded)
    assert silent(batch())["relu1_1"].std((0, 2, 3)).max() < 1e-6  # the biases alone
    replaced = replace(loaded, state={key: torch.zeros_like(value) for key, value in loaded.state.items()})
    assert not VGGFeatures(["relu1_1"], weights=replaced)(batch())["relu1_1"].any()
    del unmodified
    assert VGGFeatures(["relu1_1"], weights="random")(batch())["relu1_1"].std() > 0.1


def test_a_trunk_is_freed_with_its_last_module():
    key = VGGFeatures(["relu1_1"], weights=small("B").state_dict()).trunk.key
    gc.collect()
    assert not [other for other in Trunk._live if other[1:] == key]


def test_a_shallow_module_and_a_deeper_one(net, state):
    """The deeper one brings the layers that the shared trunk lacks."""
    shallow = VGGFeatures(["relu1_1"], weights=state)
    before = shallow(batch())
    deep = VGGFeatures(["fc8"], weights=state)
    assert deep.trunk is shallow.trunk
    torch.testing.assert_close(deep(batch())["fc8"], net(normalised(batch())), rtol=1e-3, atol=1e-4)
    equal(shallow(batch()), before)


def test_a_pickle_holds_its_own_layers_alone(state):
    own = {key: value for key, value in state.items() if key.startswith("features.0.")}
    deep, shallow = VGGFeatures(["relu3_1"], weights=state), VGGFeatures(["relu1_1"], weights=state)
    assert deep.trunk is shallow.trunk
    size = sum(value.nbytes for value in own.values())
    assert len(pickle.dumps(shallow)) < size + 20_000 < sum(value.nbytes for value in deep.trunk.state.values())
    both = pickle.dumps((shallow, deep, copy.deepcopy(deep)))  # what they share goes along once
    assert len(both) < len(pickle.dumps(deep)) + 20_000
    for other in (*pickle.loads(both), copy.copy(deep)):
        assert other.trunk is deep.trunk


def test_training_the_source_changes_nothing():
    source = small("A")
    f = VGGFeatures(["relu1_1", "fc6"], weights=source.state_dict())
    expected = source.taps(normalised(batch()), ["relu1_1", "fc6"])
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    for name, tap in f(batch()).items():  # the first use, and only now
        torch.testing.assert_close(tap, expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_the_images_alone(state):
    f = VGGFeatures(["relu2_1", "fc6"], weights=state)
    x = batch()
    assert not any(tap.requires_grad for tap in f(x).values())
    taps = f(x.requires_grad_())
    assert all(tap.requires_grad for tap in taps.values())
    sum(tap.sum() for tap in taps.values()).backward()
    assert x.grad.abs().sum() > 0
    for values in f.trunk._ready.values():
        assert not any(value.requires_grad for group in values.values() for value in group)


def test_nothing_is_kept_for_images_without_gradient(state):
    f = VGGFeatures(["relu2_1"], weights=state)
    f(batch())
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: seen.append(value) or value, lambda value: value):
        f(batch())
        with torch.no_grad():
            f(batch().requires_grad_())
    assert not seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_first_use_inside_a_mode(mode, precision):
    state = {key: value + 1e-3 for key, value in small("A").state_dict().items()}
    state = {key: value * (1.0 if precision == "float32" else 0.9) for key, value in state.items()}
    names = ["relu2_1", "fc6"]
    span = (0.0, 1 + len(mode.__name__ + precision) / 64)  # constants of its own
    with mode():
        f = VGGFeatures(names, weights=state, input_range=span, precision=precision)
        inside = f(batch())
        wide = VGGFeatures(names, weights=state, input_range=span)(batch().double())
    assert not any(tap.requires_grad for tap in inside.values())
    equal(f(batch()), inside)
    for x in (batch(), batch().double()):
        x.requires_grad_()
        g = f if x.dtype == torch.float32 else VGGFeatures(names, weights=state, input_range=span)
        taps = g(x)
        equal(taps, inside if g is f else wide)
        sum(tap.float().square().mean() for tap in taps.values()).backward()
        assert x.grad.abs().sum() > 0


def test_first_use_inside_a_transform():
    """What is kept of a first use inside torch.func or export serves ordinary use afterwards."""
    for turn, first in enumerate(
        (
            lambda f, x: torch.func.vmap(torch.func.grad(lambda image: f(image[None])["relu2_1"].square().mean()))(x),
            lambda f, x: torch.export.export(f, (x,)),
        )
    ):
        state = {key: value + 1e-3 * (turn + 2) for key, value in small("A").state_dict().items()}
        f = VGGFeatures(["relu2_1"], weights=state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            first(f, batch())
        kept = [value for ready in f.trunk._ready.values() for values in ready.values() for value in values]
        assert kept
        assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))
        x = batch().requires_grad_()
        tap = f(x)["relu2_1"]
        assert type(tap) is torch.Tensor
        tap.square().mean().backward()
        y = batch().requires_grad_()
        net = small("A")
        net.load_state_dict(state)
        net.taps(normalised(y), ["relu2_1"])["relu2_1"].square().mean().backward()
        assert (x.grad - y.grad).norm() / y.grad.norm() < 1e-5


@pytest.mark.parametrize("weights", ["random", "given"])
def test_made_inside_a_transform(weights):
    weights = small("A").state_dict() if weights == "given" else weights

    def score(image):
        return PerceptualLoss(["relu2_1"], arch="vgg11", weights=weights)(image, torch.zeros(1, 3, 20, 20))

    x = batch()[:1, :, :20, :20]
    leaf = x.clone().requires_grad_()
    score(leaf).backward()
    torch.testing.assert_close(torch.func.grad(score)(x), leaf.grad)
    assert torch.func.vmap(lambda image: score(image[None]))(x) == score(x)


def test_vmap_of_the_module(state):
    f = VGGFeatures(["relu1_2", "pool2", "fc6"], weights=state)

    def score(image):
        return sum(tap.square().mean() for tap in f(image[None]).values())

    x = batch(3, 3, 32, 33)
    grads = torch.func.vmap(torch.func.grad(score))(x)
    for image, grad in zip(x, grads, strict=True):
        image = image.clone().requires_grad_()
        score(image).backward()
        torch.testing.assert_close(grad, image.grad, rtol=1e-4, atol=1e-8)
    # off the CPU, too, where images are laid out otherwise
    assert torch.func.vmap(lambda image: f(image[None])["pool2"])(x.to("meta")).shape == (3, 1, 16, 8, 8)


def test_tensors_that_are_two(state):
    """Of a kind whose operators are its own business, which what runs beside the dispatcher would pass by."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    f = VGGFeatures(["relu1_2", "pool2"], weights=state)
    both = [batch(1, 3, 16, 16), batch(2, 3, 16, 16)[1:]]
    x = two_tensor.TwoTensor(*(image.clone() for image in both)).requires_grad_()
    tap = f(x)["pool2"]
    tap.square().sum().backward()
    for name, image in zip("ab", both, strict=True):
        image.requires_grad_()
        alone = f(image)["pool2"]
        assert torch.equal(getattr(tap, name), alone)
        torch.testing.assert_close(getattr(x.grad, name), torch.autograd.grad(alone.square().sum(), image)[0])


def test_a_derivative_outside_of_vmap(state):
    f = VGGFeatures(["relu1_2", "pool2"], weights=state)

    def score(image):
        return torch.stack([tap.square().mean() for tap in f(image[None]).values()])

    x = batch(2, 3, 16, 16).requires_grad_()
    (plain,) = torch.autograd.grad(sum(score(image) for image in x).sum(), x)
    (mapped,) = torch.autograd.grad(torch.func.vmap(score)(x).sum(), x)
    torch.testing.assert_close(mapped, plain, rtol=1e-4, atol=1e-8)
    by_func = torch.func.grad(lambda x: torch.func.vmap(score)(x).sum())(x.detach())
    torch.testing.assert_close(by_func, plain, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("keep", ["bits", "values"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's older vmap calls its operator in a loop
def test_many_gradients_at_once(state, keep):
    """`is_grads_batched`, which goes by an older vmap than torch.func's."""
    f, x = VGGFeatures(["relu1_2", "pool2"], weights=state, keep=keep), batch(2, 3, 16, 16)

    def scores(x):
        return torch.cat([tap.square().mean((1, 2, 3)) for tap in f(x).values()])

    def both(x, **options):
        return (torch.autograd.functional.jacobian(scores, x, vectorize=how, **options) for how in (True, False))

    torch.testing.assert_close(*both(x), rtol=1e-4, atol=1e-8)
    x.requires_grad_()
    again = [torch.autograd.grad(found.square().sum(), x)[0] for found in both(x, create_graph=True)]
    torch.testing.assert_close(*again, rtol=1e-3, atol=1e-3 * float(again[1].abs().max()))


# ── precision ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FAST = torch.bfloat16 if bfloat16_is_fast(torch.device("cpu")) else torch.float32


@pytest.mark.parametrize(
    ("precision", "images", "autocast", "expected"),
    [
        ("float32", torch.float32, None, torch.float32),
        ("float32", torch.float16, None, torch.float32),
        ("float32", torch.bfloat16, None, torch.float32),
        ("float32", torch.float64, None, torch.float64),
        ("float32", torch.float32, torch.bfloat16, torch.bfloat16),
        ("float32", torch.float32, torch.float16, FAST),  # never float16
        ("float32", torch.float64, torch.bfloat16, torch.float64),
        ("bfloat16", torch.float32, None, torch.bfloat16),
        ("bfloat16", torch.float64, None, torch.bfloat16),
        ("bfloat16", torch.float32, torch.float16, torch.bfloat16),
        ("auto", torch.float32, None, FAST),
        ("auto", torch.float32, torch.bfloat16, FAST),
        ("auto", torch.float64, None, torch.float64),
    ],
)
def test_precision(state, precision, images, autocast, expected):
    x = batch(dtype=torch.float64).to(images)
    f = VGGFeatures(["relu2_1", "fc6"], weights=state, precision=precision)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert trunk_dtype(precision, x.device, x.dtype) == expected
        taps = f(x)
    assert {tap.dtype for tap in taps.values()} == {expected}
    x.requires_grad_()
    f(x)["relu2_1"].float().sum().backward()
    assert x.grad.dtype == images


@pytest.mark.parametrize("fast", [True, False])
def test_auto_goes_by_what_the_device_can(state, monkeypatch, fast):
    monkeypatch.setattr("vggfeat.devices.bfloat16_is_fast", lambda device: fast)
    f = VGGFeatures(["relu2_1", "fc6"], weights=state, precision="auto")
    wanted = torch.bfloat16 if fast else torch.float32
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert {tap.dtype for tap in f(batch()).values()} == {wanted}


def test_bfloat16_is_close(state):
    exact = VGGFeatures(["relu2_1", "pool5", "fc8"], weights=state)(batch().double())
    close = VGGFeatures(["relu2_1", "pool5", "fc8"], weights=state, precision="bfloat16")(batch())
    for name, tap in close.items():
        assert tap.dtype == torch.bfloat16
        assert (tap.double() - exact[name]).norm() / exact[name].norm() < 0.02


def test_float64_images_are_computed_in_float64(net, state):
    x = batch(dtype=torch.float64)
    expected = copy.deepcopy(net).double()(normalised64(x))
    torch.testing.assert_close(VGGFeatures(["fc8"], weights=state)(x)["fc8"], expected, rtol=1e-10, atol=1e-11)


def normalised64(x):
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    return (x - mean) / std


def test_repr_says_what_it_is(state):
    text = repr(VGGFeatures(["relu2_1"], weights=state, precision="bfloat16"))
    assert "relu2_1" in text
    assert "vgg16" in text
    assert "bfloat16" in text


# ── there and back ────────────────────────────────────────────────────────────────────────────────────────────────────

WALKS = [
    ("D", {}, ["relu1_1", "conv2_1", "relu2_1", "pool3"], {}),
    ("D", {}, ["pool1", "relu3_3", "relu3_2"], {"pooling": "average", "padding": "reflect"}),
    ("A", {"batch_norm": True}, ["relu2_1", "conv2_1", "bn2_1", "bn1_1"], {"pooling": "l2", "padding": "replicate"}),
    ("A-LRN", {}, ["lrn1_1", "relu2_1"], {"input_range": (-1, 1)}),
    ("A", {}, ["fc6", "relu1_1"], {}),
]


@pytest.mark.parametrize(
    ("keep", "precision", "dtype", "size", "wanted"),
    [
        ("bits", "float32", torch.float32, (1, 256, 256), "values"),
        ("bits", "float32", torch.float32, (1, 256, 257), "taps"),
        ("bits", "float32", torch.float32, (2, 256, 129), "taps"),
        ("bits", "bfloat16", torch.float32, (1, 362, 362), "values"),
        ("bits", "bfloat16", torch.float32, (1, 363, 363), "taps"),
        ("bits", "float32", torch.float64, (1, 256, 129), "taps"),
        ("values", "float32", torch.float32, (1, 256, 257), "values"),
    ],
)
def test_small_images_are_kept_as_values(monkeypatch, keep, precision, dtype, size, wanted):
    net = small("A")
    features = VGGFeatures(["relu1_1"], net.arch, net.state_dict(), keep=keep, precision=precision)

    class Made(Exception):
        """Says what the walk is to keep."""

    def made(filters, plan, keep):
        raise Made(keep)

    monkeypatch.setattr(features_module, "Walk", made)
    count, height, width = size
    x = torch.zeros(count, 3, height, width, dtype=dtype)
    with pytest.raises(Made, match=f"^{wanted}$"):
        features.vjp(x)
    with pytest.raises(Made, match="^values$" if keep == "values" else "^taps$"):  # for pictures, whatever their size
        features.vjp_by_rows(x[:1, :, :64], lambda *_: None)
    with pytest.raises(Made, match="^none$"):
        features.taps_by_rows(x[:1], lambda *_: None)


@pytest.mark.parametrize("keep", ["bits", "values", "small", "by autograd"])
@pytest.mark.parametrize(("config", "options", "names", "how"), WALKS)
def test_vjp_is_what_autograd_does(config, options, names, how, keep, monkeypatch):
    net = small(config, **options)
    monkeypatch.setattr(features_module, "SMALL", 2 * 35 * 42 * 8 - (keep != "small"))
    if keep == "by autograd":  # as on MPS
        monkeypatch.setattr(features_module, "CUSTOM_BACKWARD_DEVICES", ())
    features = VGGFeatures(names, net.arch, net.state_dict(), keep="values" if keep == "values" else "bits", **how)
    x = batch(2, 3, 35, 42, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    wanted = features(leaf)
    seeds = {name: torch.randn(tap.shape, dtype=tap.dtype) for name, tap in wanted.items()}
    (gradient,) = torch.autograd.grad([*wanted.values()], leaf, [seeds[name] for name in wanted])
    if keep in ("small", "values") and "fc6" not in names:  # no bits
        for room in ("stage", "layers"):
            monkeypatch.setattr(f"vggfeat.trunk.{room}.pack", None)
    with torch.autocast("cpu", torch.bfloat16):  # which float64 has no use for
        taps, back = features.vjp(x)
        assert {*taps} == {*names} and not any(tap.requires_grad for tap in taps.values())
        for name, tap in wanted.items():
            torch.testing.assert_close(taps[name], tap)

        asked = []

        def slope(name, tap):
            asked.append(name)
            torch.testing.assert_close(tap, wanted[name])
            return seeds[name]

        found = back(slope)
    assert asked == sorted(names, key=net.arch.names.index, reverse=True) and not taps
    assert not found.requires_grad and (found.shape, found.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12 * float(gradient.abs().max()))


@pytest.mark.parametrize("keep", ["bits", "values", "by autograd"])
@pytest.mark.parametrize(("config", "options", "names", "how"), WALKS)
def test_by_rows_is_what_autograd_does(config, options, names, how, keep, monkeypatch):
    net = small(config, **options)
    if keep == "by autograd":
        monkeypatch.setattr(features_module, "CUSTOM_BACKWARD_DEVICES", ())
        keep = "bits"
    monkeypatch.setattr(strips, "ROWS", 8)
    monkeypatch.setattr(strips, "BYTES", 8)
    features = VGGFeatures(names, net.arch, net.state_dict(), keep=keep, **how)
    leaf = batch(1, 3, 35, 42, dtype=torch.float64).requires_grad_()
    wanted = features(leaf)
    seeds = {name: torch.randn(tap.shape, dtype=tap.dtype) for name, tap in wanted.items()}
    (gradient,) = torch.autograd.grad([*wanted.values()], leaf, [seeds[name] for name in wanted])

    def of_rows(value, rows):
        return value[:, :, rows] if value.ndim == 4 else value

    def see(name, part, rows):
        assert not part.requires_grad
        torch.testing.assert_close(part, of_rows(wanted[name], rows))
        seen.append((name, rows.start, rows.stop))
        return of_rows(seeds[name], rows)

    with torch.autocast("cpu", torch.bfloat16):  # which float64 has no use for
        seen = []
        features.taps_by_rows(leaf, see)
        shown, seen = seen, []
        back = features.vjp_by_rows(leaf, see)
        assert shown == seen and {name for name, *_ in seen} == {*names}
        for name, tap in wanted.items():
            ends = [end for each, *rows in seen if each == name for end in rows]
            assert ends[0] == 0 and ends[1:-1:2] == ends[2::2] and ends[-1] == (tap.shape[2] if tap.ndim == 4 else 1)
        found = back(see)
    assert not found.requires_grad and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12 * float(gradient.abs().max()))


@pytest.mark.parametrize("keep", ["bits", "values"])
def test_taps_are_let_go_on_the_way_back(state, keep):
    names = ["relu1_1", "relu1_2", "conv2_1", "pool2"]
    taps, back = VGGFeatures(names, weights=state, keep=keep).vjp(batch())
    alive, asked = {name: weakref.ref(tap) for name, tap in taps.items()}, []

    def slope(name, tap):
        for before in asked[:-1]:  # the one before may still be what masks the way
            assert alive[before]() is None, f"{before} is still there at {name}"
        asked.append(name)
        return torch.ones_like(tap)

    gradient = back(slope)
    assert asked == names[::-1] and not taps and bool(gradient.isfinite().all())


def test_the_way_back_does_not_hold_on_to_the_images(state):
    features, image = VGGFeatures(["relu2_1"], weights=state), batch(1, 3, 32, 40).requires_grad_()
    for walk in (lambda x: features.vjp(x)[1], lambda x: features.vjp_by_rows(x, lambda *_: None)):
        made = (2 * image).sigmoid()
        there = weakref.ref(made)
        back = walk(made)
        del made
        assert there() is None and callable(back)


@pytest.mark.parametrize("keep", ["bits", "values"])
def test_vjp_runs_in_what_autocast_says(state, keep):
    features, x = VGGFeatures(["relu2_1"], weights=state, keep=keep), batch()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = features(x)["relu2_1"]
        taps, back = features.vjp(x)
        assert (wanted.dtype, taps["relu2_1"].dtype) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(taps["relu2_1"], wanted)
        assert back(lambda name, tap: torch.ones_like(tap)).dtype == torch.float32


def test_images_of_half_precision_get_their_own_gradients():
    features = VGGFeatures(["relu1_1"], "vgg16", "random")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        _, back = features.vjp(torch.rand(1, 3, 8, 8).to(dtype))
        assert back(lambda name, tap: torch.ones_like(tap)).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 1, 3, 16, 16), (2, 0, 3, 16, 16)], ids=["no call", "no image"])
def test_vmap_over_nothing(state, shape):
    features = VGGFeatures(["relu1_2"], weights=state)

    def score(images):
        return features(images)["relu1_2"].sum()

    assert torch.func.vmap(score)(torch.rand(shape)).shape == shape[:1]
    assert torch.func.vmap(torch.func.grad(score))(torch.rand(shape)).shape == shape
