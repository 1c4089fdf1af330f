"""vggfeat.network against torchvision, plain loops and the papers' formulas."""

import math

import pytest
import torch
from torch import nn

import vggfeat
from vggfeat import functional
from vggfeat.arch import BLOCKS
from vggfeat.errors import InputError
from vggfeat.network import vgg

EIGHT = [name + bn for name in ("vgg11", "vgg13", "vgg16", "vgg19") for bn in ("", "_bn")]


def ours(name, **options):
    return getattr(vggfeat, name.removesuffix("_bn"))(batch_norm=name.endswith("_bn"), **options)


def fill(net, seed=0):
    """Cheap weights that differ from element to element and keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(997, generator=generator).sub_(0.5)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dtype == torch.long:
                value.fill_(3)
                continue
            if value.ndim > 1:  # a uniform variable of width 1 has variance 1/12
                values = pattern * math.sqrt(24 / value[0].numel())
            else:
                values = pattern + float(name.endswith(("weight", "running_var")))
            flat, whole = value.view(-1), value.numel() // 997 * 997
            flat[:whole].view(-1, 997).copy_(values)
            flat[whole:].copy_(values[: value.numel() - whole])
    return net


def small(config="D", **options):
    options = {"num_classes": 7, "width": 1 / 16, "head": "paper"} | options
    return fill(vgg(config, **options)).eval()


def loop(net, x):
    """Every layer's value by name, by a plain loop over the modules, copied lest anything overwrites it."""
    found = {}
    for name, module in zip(net.arch.names, net.features, strict=False):
        x = module(x)
        found[name] = x.clone()
    x = net.avgpool(x).flatten(1)
    names = iter(net.arch.head_names)
    for module in net.classifier:
        x = module(x)
        if not isinstance(module, nn.Dropout):
            found[next(names)] = x.clone()
    return found


@pytest.fixture(scope="module")
def classifier():
    """One set of fully connected layers, half a gigabyte, for all eight networks."""
    with torch.device("meta"):
        net = vgg("A")
    return fill(net.classifier.to_empty(device="cpu")).state_dict(prefix="classifier.")


@pytest.mark.parametrize("name", EIGHT)
def test_same_network_as_torchvision(name, torchvision, classifier):
    """Same keys in the same order, same shapes, and equal outputs with the same weights."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).eval()
        net = ours(name).eval()
    expected = {key: (value.shape, value.dtype) for key, value in theirs.state_dict().items()}
    found = {key: (value.shape, value.dtype) for key, value in net.state_dict().items()}
    assert list(found) == list(expected)
    assert found == expected
    fill(theirs.features.to_empty(device="cpu"))
    state = theirs.features.state_dict(prefix="features.") | classifier
    theirs.load_state_dict(state, assign=True)
    net.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 48, 33, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(x)
        assert 0.01 < wanted.std() < 100
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("config", BLOCKS)
def test_config_runs(config):
    net = small(config, width=1 / 64)
    assert net(torch.randn(1, 3, 32, 40)).shape == (1, 7)


@pytest.mark.parametrize("config", ["D", "A-LRN", "C"])
@pytest.mark.parametrize("head", ["paper", "slim"])
def test_taps_equal_a_plain_loop(config, head):
    net = small(config, head=head)
    x = torch.randn(2, 3, 37, 45)
    with torch.no_grad():
        expected = loop(net, x)
        taps = net.taps(x, net.arch.names)
        assert list(taps) == list(expected) == list(net.arch.names)
        assert all(torch.equal(taps[name], expected[name]) for name in expected)
        for name in net.arch.names:  # alone, and its value is the same
            assert torch.equal(net.taps(x, [name])[name], expected[name])
        assert torch.equal(expected[net.arch.names[-1]], net(x))


@pytest.mark.parametrize("training", [False, True])
def test_taps_with_batch_norm(training):
    net = small("D", batch_norm=True, dropout=0.0).train(training)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        before = {key: value.clone() for key, value in net.state_dict().items()}
        expected = loop(net, x)
        net.load_state_dict(before)
        taps = net.taps(x, ["fc7", "bn2_1", "conv2_1", "relu2_1", "pool5"])
    assert list(taps) == ["fc7", "bn2_1", "conv2_1", "relu2_1", "pool5"]
    assert all(torch.equal(taps[name], expected[name]) for name in taps)
    assert not torch.equal(taps["bn2_1"], taps["conv2_1"])


def test_nothing_is_run_past_the_deepest_tap():
    net = small()
    ran = []
    for name, module in zip(net.arch.names, net.features, strict=False):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    net.taps(torch.randn(1, 3, 32, 32), ["conv2_2", "relu1_1"])
    assert ran == ["conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1", "conv2_1", "relu2_1", "conv2_2"]
    last = []
    net.classifier[3].register_forward_hook(lambda *_: last.append("fc7"))
    net.taps(torch.randn(1, 3, 32, 32), ["fc6", "relu6"])
    assert not last


@pytest.mark.parametrize("bn", [False, True])
def test_extract_features(bn):
    net = small("D", batch_norm=bn)
    x = torch.randn(2, 3, 64, 32, requires_grad=True)
    expected = loop(net, x)
    features = net.extract_features(x)
    assert features.shape == (2, 32, 2, 1)
    assert torch.equal(features, expected["pool5"])
    assert features.requires_grad
    convs = net.extract_features(x, return_all=True)
    assert len(convs) == 13
    for layer, value in zip(net.arch.convs, convs, strict=True):
        assert torch.equal(value, expected[layer.name])
        assert value.min() < 0  # the chapter's code gives what the ReLU left
        assert not value.requires_grad


def test_taps_carry_gradients_to_weights():
    net = small()
    net.taps(torch.randn(1, 3, 32, 32), ["conv1_2"])["conv1_2"].sum().backward()
    assert net.features[0].weight.grad is not None
    assert net.features[5].weight.grad is None


def test_full_backward_hooks_on_convolutions():
    net = small()
    seen = {}
    for layer in net.arch.convs:
        net.features[layer.index].register_full_backward_hook(
            lambda _m, _gin, gout, name=layer.name: seen.update({name: gout[0].shape})
        )
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    net(x).sum().backward()
    assert set(seen) == {layer.name for layer in net.arch.convs}
    assert seen["conv3_1"] == (1, 16, 8, 8)


def test_kaiming_init():
    torch.manual_seed(0)
    net = vgg("A", 10, batch_norm=True, width=0.25)
    for layer in net.arch.convs:
        conv = net.features[layer.index]
        n = conv.weight.numel()
        std = math.sqrt(2 / (9 * layer.channels))  # fan-out: kernel area × outputs
        assert conv.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n))
        assert abs(conv.weight.mean().item()) < 5 * std / math.sqrt(n)
        assert not conv.bias.any()
        norm = net.features[layer.index + 1]
        assert bool((norm.weight == 1).all()) and not norm.bias.any()
    for i in (0, 3, 6):
        n = net.classifier[i].weight.numel()
        assert net.classifier[i].weight.std().item() == pytest.approx(0.01, rel=5 / math.sqrt(2 * n))
        assert not net.classifier[i].bias.any()


def test_paper_init():
    torch.manual_seed(0)
    net = vgg("A", 10, width=0.25, init="paper")
    modules = [*(net.features[layer.index] for layer in net.arch.convs), *(net.classifier[i] for i in (0, 3, 6))]
    for module in modules:
        assert module.weight.std().item() == pytest.approx(0.1, rel=5 / math.sqrt(2 * module.weight.numel()))
        assert not module.bias.any()
    net.features[0].weight.data.zero_()
    net.reset_parameters()
    assert net.features[0].weight.std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(("head", "drops"), [("paper", 2), ("slim", 1)])
def test_dropout_in_training_only(head, drops):
    net = small(head=head, dropout=0.4)
    assert [module.p for module in net.modules() if isinstance(module, nn.Dropout)] == [0.4] * drops
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        net.train()
        torch.manual_seed(0)
        first = net(x)
        assert not torch.equal(first, net(x))
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(net(x), net(x))


def test_width_scales_every_channel_count():
    net = vgg("A", 10, width=0.125)
    convs = [module for module in net.features if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [8, 16, 32, 32, 64, 64, 64, 64]
    assert [net.classifier[i].weight.shape for i in (0, 3, 6)] == [(512, 64 * 49), (512, 512), (10, 512)]


def test_config_c_has_1x1_third_convolutions():
    net = vgg("C", 10, width=1 / 64)
    kernels = {layer.name: net.features[layer.index].kernel_size for layer in net.arch.convs}
    assert {name for name, kernel in kernels.items() if kernel == (1, 1)} == {"conv3_3", "conv4_3", "conv5_3"}
    assert {kernel for name, kernel in kernels.items() if not name.endswith("_3")} == {(3, 3)}


def test_lrn_is_krizhevskys_formula():
    """b_i = a_i / (k + alpha · sum_{j=i-n/2}^{i+n/2} a_j²)^beta, Krizhevsky et al. 2012, section 3.3."""
    net = vgg("A-LRN", 10, width=12 / 64).double()
    a = 40 * torch.rand(1, 12, 3, 2, dtype=torch.float64)  # large enough for alpha to count
    k, n, alpha, beta = 2.0, 5, 1e-4, 0.75
    expected = torch.empty_like(a)
    for i in range(12):
        total = sum(a[:, j] ** 2 for j in range(max(0, i - n // 2), min(11, i + n // 2) + 1))
        expected[:, i] = a[:, i] / (k + alpha * total) ** beta
    lrn = net.features[net.arch.layer("lrn1_1").index]
    torch.testing.assert_close(lrn(a), expected, rtol=1e-12, atol=0)


def test_named_constructors():
    with torch.device("meta"):
        nets = [vggfeat.vgg11(5), vggfeat.vgg13(5), vggfeat.vgg16(5), vggfeat.vgg19(5)]
        assert [net.arch.config for net in nets] == ["A", "B", "D", "E"]
        assert all(net.classifier[6].out_features == 5 for net in nets)
        assert vggfeat.vgg16(5, True, head="slim").arch.name == vgg("vgg16_bn").arch.name == "vgg16_bn"


@pytest.mark.parametrize("head", ["paper", "slim"])
def test_torch_fx_traces_it(head):
    net = vggfeat.vgg11(3, head=head, width=0.125).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "vgg61"}, "unknown architecture 'vgg61' .'_bn' adds batch norm.: did you mean .*vgg16"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": "a"}, r"dropout must be in \[0, 1\), got 'a'"),
        ({"init": "xavier"}, "unknown init 'xavier': choose from kaiming, paper"),
        ({"head": None}, "unknown head None: choose from paper, slim"),
        ({"head": "fat"}, "unknown head 'fat'"),
        ({"width": 0}, "width must be a positive number"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
        ({"config": "A-LRN", "batch_norm": True}, "no batch-normalised form"),
    ],
)
def test_errors(options, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        vgg(**options)


def test_tap_errors():
    net = small()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(InputError, match="name at least one"):
        net.taps(x, [])
    with pytest.raises(InputError, match="vgg16 has no layer 'bn1_1'"):
        net.taps(x, ["bn1_1"])
    with pytest.raises(InputError, match="did you mean .*conv3_3"):
        net.taps(x, ["conv33"])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (8, 5), (12, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pool_before_the_classifier_is_the_same_as_products(size, dtype):
    """Which serve on CUDA under deterministic algorithms: the pool has no deterministic backward there."""
    x = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 3, 7, 7, dtype=dtype)
    expected = torch.nn.functional.adaptive_avg_pool2d(x, 7)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    found = functional._pool_as_products(x)
    (other,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(other, gradient)


@pytest.mark.parametrize("make", [vggfeat.vgg11, vggfeat.vgg13, vggfeat.vgg16, vggfeat.vgg19])
def test_named_constructors_hand_on_every_setting(make):
    net = make(4, True, None, "slim", 0.125, 0.25, "paper")
    assert (net.arch.num_classes, net.arch.batch_norm, net.arch.head, net.arch.width) == (4, True, "slim", 0.125)
    assert net.classifier[0].p == 0.25 and net.init == "paper"


def test_a_network_with_weights_has_the_dropout_asked_for():
    state = vgg("A", 3, head="slim", width=0.125).state_dict()
    assert vgg("A", 3, weights=state, head="slim", dropout=0.25).classifier[0].p == 0.25


def test_checkpointing_is_for_training():
    """In evaluation mode nothing is computed twice."""
    net = vgg("vgg11_bn", 3, head="slim", width=0.125)
    net.features[5] = nn.BatchNorm2d(16, track_running_stats=False)  # which has none to leave alone
    net.checkpointing, calls = True, []
    net.features[0].register_forward_hook(lambda *_: calls.append(1))
    for training in (True, False):
        calls.clear()
        net.train(training)(torch.randn(2, 3, 32, 32)).sum().backward()
        assert len(calls) == 1 + training
    assert all(module.momentum == 0.1 for module in net.features if isinstance(module, nn.BatchNorm2d))


def test_parameters_are_drawn_anew_for_batch_normalisation_too():
    net = vggfeat.vgg11(2, batch_norm=True, width=0.125, head="slim")
    with torch.no_grad():
        for value in net.state_dict().values():
            value.fill_(3)
    net.reset_parameters()
    bn = net.features[1]
    assert bn.weight.eq(1).all() and not bn.bias.any() and not bn.running_mean.any() and bn.running_var.eq(1).all()
