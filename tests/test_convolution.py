"""Convolutions of small maps against torch's own, in value, in gradient and in company."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import vggfeat
from vggfeat import convolution, devices
from vggfeat.convolution import Conv2d, conv_as_product, convolve, prefers_matmul, prefers_winograd

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4), (2, 4), (4, 3), (1, 4)]


def example(side, n=6, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(side[0] * 8 + side[1])
    shapes = ((n, 5, *side), (7, 5, 3, 3), (7,))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients_are_those_of_torch(side, layout):
    x, weight, bias = (
        v.detach().contiguous(memory_format=layout).requires_grad_() if v.ndim == 4 else v for v in example(side)
    )
    ours, theirs = conv_as_product(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn(theirs.shape, dtype=theirs.dtype, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight, bias), grad),
        torch.autograd.grad(theirs, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [(2, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_values_in_any_order_in_memory(side, order):
    def laid_out(values):
        back = [order.index(i) for i in range(4)]
        return values.detach().permute(order).contiguous().permute(back)

    x, weight, bias = example(side, n=8)
    y = F.conv2d(x, weight, bias, padding=1)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    leaf = laid_out(x).requires_grad_()
    ours = conv_as_product(leaf, weight, bias)
    torch.testing.assert_close(ours, y)
    theirs = torch.autograd.grad(y, (x, weight), grad)
    for mine, other in zip(torch.autograd.grad(ours, (leaf, weight), laid_out(grad)), theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("side", [(2, 2), (4, 4)])
def test_first_and_second_derivatives(side):
    x, weight, bias = example(side, n=2)
    assert torch.autograd.gradcheck(conv_as_product, (x, weight, bias))
    assert torch.autograd.gradgradcheck(conv_as_product, (x, weight, bias))


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("side", [(2, 2), (4, 4)])
def test_one_gradient_without_the_other(side, wanted):
    x, weight, _ = example(side, requires_grad=False)
    pair = [x, weight]
    pair[wanted].requires_grad_()
    (ours,) = torch.autograd.grad(conv_as_product(*pair, None).square().sum(), [pair[wanted]])
    (theirs,) = torch.autograd.grad(F.conv2d(*pair, padding=1).square().sum(), [pair[wanted]])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", [(2, 2), (4, 4)])
def test_bfloat16_under_autocast_is_as_near_as_torch(side):
    x, weight, bias = example(side, n=64, dtype=torch.float32)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv_as_product(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    errors = [
        float((each.detach().double() - exact.detach()).norm() / exact.detach().norm()) for each in (ours, theirs)
    ]
    assert errors[0] < 1.5 * errors[1] < 0.02
    ours.float().sum().backward()
    assert weight.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("side", [(2, 2), (4, 4)])
def test_autocast_leaves_float64_alone(side):
    x, weight, bias = example(side)
    exact = F.conv2d(x, weight, bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv_as_product(x, weight, bias)
        grads = torch.autograd.grad(ours.square().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(grads, torch.autograd.grad(exact.square().sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_backward_under_autocast_is_as_exact_as_its_forward(wanted):
    values = example((4, 4), dtype=torch.float32, requires_grad=False)[:2]
    values[wanted].requires_grad_()
    loss = conv_as_product(*values, None).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = torch.autograd.grad(loss, values[wanted])
    (theirs,) = torch.autograd.grad(F.conv2d(*values, padding=1).square().sum(), values[wanted])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def by_tiles(monkeypatch, n=70, channels=64, outputs=96, side=(8, 7)):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    generator = torch.Generator().manual_seed(0)
    shapes = (n, channels, *side), (outputs, channels, 3, 3), (outputs,)
    values = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    assert prefers_winograd(*values[:2])
    return values


@pytest.mark.parametrize("bias", [True, False])
def test_tiles_give_value_and_gradients(monkeypatch, bias):
    given = by_tiles(monkeypatch)[: 2 + bias]
    grad = torch.randn(70, 96, 8, 7, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        values = [value.detach().to(dtype).requires_grad_() for value in given]
        y = convolve(*values, *[None] * (not bias))
        assert ("Winograd" in type(y.grad_fn).__name__) == (dtype == torch.float32)
        results.append([y, *torch.autograd.grad(y, values, grad.to(dtype))])
    for found, exact in zip(*results, strict=True):
        assert found.dtype == torch.float32 and (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("side", [(8, 7), (4, 4), (2, 2)])
def test_what_follows_may_work_in_place(monkeypatch, side):
    """As after torch's own convolution."""
    x, weight, bias = by_tiles(monkeypatch, n=300, side=side) if side[0] > 4 else example(side, n=300)
    found, exact = convolve(x, weight, bias).relu_(), F.conv2d(x, weight, bias, padding=1).relu()
    assert (found - exact).norm() < 1e-5 * exact.norm()
    grads = [torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (found, exact)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_tiles_give_one_gradient_without_the_others_and_second_derivatives(monkeypatch):
    x, weight, bias = by_tiles(monkeypatch)
    for wanted in (x, weight, bias):
        values = [value.detach() for value in (x, weight, bias)]
        leaf = next(i for i, value in enumerate((x, weight, bias)) if value is wanted)
        values[leaf].requires_grad_()
        ours, theirs = (
            torch.autograd.grad(way(*values).square().sum(), values[leaf])[0]
            for way in (convolve, lambda *v: F.conv2d(*v, padding=1))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))

    def penalty(dtype):
        values = [value.detach().to(dtype).requires_grad_() for value in (x, weight, bias)]
        first = torch.autograd.grad(convolve(*values).square().mean(), values, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), values)

    for found, exact in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert (found - exact).norm() < 1e-4 * exact.norm()


def test_what_tiles_are_for(monkeypatch):
    x, weight, _ = by_tiles(monkeypatch)
    assert "Winograd" in type(Conv2d(64, 96, 3, padding=1)(x).grad_fn).__name__
    assert "Tiles" not in type(Conv2d(64, 96, 3, padding=1, stride=2)(x).grad_fn).__name__
    assert not prefers_winograd(x.double(), weight.double()) and not prefers_winograd(x.bfloat16(), weight.bfloat16())
    assert not prefers_winograd(x[:10], weight) and not prefers_winograd(x[:, :3], weight[:, :3])
    assert not prefers_winograd(x[..., :2, :2], weight)
    many = x[:, :, :6, :2].repeat(4, 1, 1, 1)  # 560 tiles, of which 12 of 32 positions are filled
    assert not prefers_winograd(many, weight) and prefers_winograd(many.repeat(1, 1, 1, 2), weight)
    assert not prefers_winograd(x, weight.double())  # for torch to refuse
    assert not prefers_winograd(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_winograd(x, weight)
    with FakeTensorMode() as mode:
        assert not prefers_winograd(mode.from_tensor(x), mode.from_tensor(weight))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not prefers_winograd(x, weight)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp's own
def test_tiles_in_company(monkeypatch):
    """Where others look inside (compilers, torch.func, forward-mode derivatives) torch's own convolution serves."""
    x, weight, bias = (value.detach() for value in by_tiles(monkeypatch))
    exact = F.conv2d(x, weight, bias, padding=1)
    near = {"rtol": 1e-4, "atol": 1e-4}
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), exact, **near)
    for which in range(3):
        several = [value[None] if i == which else value for i, value in enumerate((x, weight, bias))]
        mapped = torch.func.vmap(convolve, tuple(0 if i == which else None for i in range(3)))
        torch.testing.assert_close(mapped(*several)[0], exact, **near)
    leaf = bias.clone().requires_grad_()
    seeds = torch.randn(2, *exact.shape, generator=torch.Generator().manual_seed(2))
    (batched,) = torch.autograd.grad(convolve(x, weight, leaf), leaf, seeds, is_grads_batched=True)
    torch.testing.assert_close(batched, seeds.sum((1, 3, 4)), **near)
    slopes = torch.func.grad(lambda value: convolve(value, weight, bias).square().mean())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(convolve(leaf, weight, bias).square().mean(), leaf)
    torch.testing.assert_close(slopes, expected, **near)
    _, slope = torch.func.jvp(lambda value: convolve(value, weight, bias), (x,), (x,))
    torch.testing.assert_close(slope, exact - bias[:, None, None], **near)


def test_is_for_small_maps_in_batches_on_a_cpu():
    assert prefers_matmul(torch.zeros(128, 3, 2, 2)) and prefers_matmul(torch.zeros(128, 3, 4, 4))
    assert not prefers_matmul(torch.zeros(128, 3, 5, 4)) and not prefers_matmul(torch.zeros(1, 3, 2, 2))
    assert prefers_matmul(torch.zeros(32, 3, 1, 1)) and not prefers_matmul(torch.zeros(31, 3, 1, 1))
    assert prefers_matmul(torch.zeros(8, 3, 4, 4)) and not prefers_matmul(torch.zeros(7, 3, 4, 4))
    assert not prefers_matmul(torch.zeros(128, 3, 2, 2, device="meta"))


def test_is_not_for_bfloat16_where_its_products_are_slow(monkeypatch):
    x = torch.zeros(128, 3, 2, 2)
    for hardware in (True, False):
        monkeypatch.setattr(devices, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        with torch.autocast("cpu", torch.bfloat16):
            assert prefers_matmul(x) == hardware
        assert prefers_matmul(x) and prefers_matmul(x.bfloat16()) == hardware


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 5}, {"padding_mode": "reflect"}]
)
def test_other_convolutions_stay_torchs(options, monkeypatch):
    monkeypatch.setattr(convolution, "conv_as_product", lambda *_: pytest.fail("taken over"))
    settings = {"padding": 1} | options
    ours, theirs = (kind(5, 5, 3, **settings) for kind in (Conv2d, torch.nn.Conv2d))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(64, 5, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_network_uses_it_and_agrees_with_torchvision(torchvision, monkeypatch):
    seen = []
    real = convolution.conv_as_product
    monkeypatch.setattr(
        convolution, "conv_as_product", lambda x, *rest: seen.append(tuple(x.shape[2:])) or real(x, *rest)
    )
    torch.manual_seed(0)
    net = vggfeat.vgg16(num_classes=7, batch_norm=True, head="slim").features
    other = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    other.load_state_dict(net.state_dict())
    x, labels = torch.randn(32, 3, 32, 32), torch.arange(32)
    scores = [each.train()(x).flatten(1) for each in (net, other)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    assert seen == [(4, 4)] * 3 + [(2, 2)] * 3
    for score in scores:
        F.cross_entropy(score, labels).backward()
    ours, theirs = (each[0].weight.grad for each in (net, other))
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9999


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer
def test_compiles_in_one_graph():
    conv = Conv2d(5, 7, 3, padding=1)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for side in (2, 4):
        x = torch.randn(64, 5, side, side, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, F.conv2d(x, conv.weight, conv.bias, padding=1), rtol=1e-4, atol=1e-4)
        out.sum().backward()


def test_exports_for_any_batch():
    conv = Conv2d(5, 7, 3, padding=1).eval()
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(conv, (torch.randn(64, 5, 4, 4),), dynamic_shapes=({0: batch},))
    for n in (3, 300):
        x = torch.randn(n, 5, 4, 4)
        torch.testing.assert_close(program.module()(x), conv(x), rtol=1e-4, atol=1e-4)


def test_per_sample_gradients():
    x, weight, _ = example((4, 4), n=24, requires_grad=False)

    def loss(weight, x):
        return conv_as_product(x, weight, None).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x.view(2, 12, 5, 4, 4))
    for part, each in zip(x.view(2, 12, 5, 4, 4), found, strict=True):
        w = weight.clone().requires_grad_()
        F.conv2d(part, w, padding=1).square().sum().backward()
        torch.testing.assert_close(each, w.grad)
