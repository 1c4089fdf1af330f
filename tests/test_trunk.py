"""The hand-written trunk against plain PyTorch, written here layer by layer from the paper's table."""

import functools
import importlib.util
import io
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vggfeat import vgg16
from vggfeat.arch import Arch, scaled
from vggfeat.features import VGGFeatures
from vggfeat.losses import PerceptualLoss, StyleLoss
from vggfeat.trunk import Plan, Trunk, bits, direct, layers, operators, plain, run, strips, walk
from vggfeat.trunk.bits import pack, unpack
from vggfeat.trunk.filters import Filters, bounds, by_stage
from vggfeat.trunk.stage import ByRows, GradientAccumulator, Product, kept_of
from vggfeat.weights import load

# Table 1 of the paper: channels as multiples of the first block's, M for a pool; "c1" is a 1×1 convolution
TABLE = {
    "A": "1 M 2 M 4 4 M 8 8 M 8 8 M",
    "A-LRN": "1 LRN M 2 M 4 4 M 8 8 M 8 8 M",
    "C": "1 1 M 2 2 M 4 4 c4 M 8 8 c8 M 8 8 c8 M",
    "D": "1 1 M 2 2 M 4 4 4 M 8 8 8 M 8 8 8 M",
    "E": "1 1 M 2 2 M 4 4 4 4 M 8 8 8 8 M 8 8 8 8 M",
}
ARCHS = {
    "vgg16": Arch("D", channels=scaled(8), head=None),
    "vgg19_bn": Arch("E", True, channels=scaled(8), head=None),
    "A-LRN": Arch("A-LRN", channels=scaled(8), head=None),
    "vgg11_bn": Arch("A", True, channels=scaled(8), head=None),
    "C": Arch("C", channels=scaled(8), head=None),
    "odd": Arch("D", channels=scaled(5), head=None),
    "uneven": Arch("D", head=None, channels=(3, 8, 5, 6, 4)),
}
pytestmark = pytest.mark.usefixtures("one_thread")

POOLINGS = ("max", "average", "l2")
PADDINGS = ("zeros", "reflect", "replicate")
KEEPS = ("bits", "values")


def table(arch):
    """(name, kind, state-dict index, channels, kernel) of every layer, from TABLE."""
    rows, block, i, index = [], 1, 0, 0

    def add(name, kind, channels=0, kernel=0):
        nonlocal index
        rows.append((name, kind, index, channels, kernel))
        index += 1

    for word in TABLE[arch.config].split():
        if word == "M":
            add(f"pool{block}", "pool")
            block, i = block + 1, 0
        elif word == "LRN":
            add(f"lrn{block}_{i}", "lrn")
        else:
            i += 1
            channels = arch.channels[block - 1]
            assert arch.width is None or channels == int(word.removeprefix("c")) * arch.channels[0]
            add(f"conv{block}_{i}", "conv", channels, 1 if word[0] == "c" else 3)
            if arch.batch_norm:
                add(f"bn{block}_{i}", "bn", channels)
            add(f"relu{block}_{i}", "relu")
    return rows


def names_of(arch, blocks=3):
    return [name for name, *_ in table(arch) if int(name.lstrip("abcdefghijklmnopqrstuvwxyz")[0]) <= blocks]


def make_state(arch, seed=0):
    """He-scaled weights, biases that matter, BN with every statistic away from its default, some gammas negative."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state, below = {}, 3
    for _, kind, index, channels, kernel in table(arch):
        if kind == "conv":
            scale = (2 / (below * kernel**2)) ** 0.5
            state[f"features.{index}.weight"] = draw(channels, below, kernel, kernel) * scale
            state[f"features.{index}.bias"] = draw(channels) * 0.2
            below = channels
        elif kind == "bn":
            state[f"features.{index}.weight"] = draw(channels)
            state[f"features.{index}.bias"] = draw(channels) * 0.3
            state[f"features.{index}.running_mean"] = draw(channels) * 0.3
            state[f"features.{index}.running_var"] = draw(channels).square() + 0.5
    return {key: value.float() for key, value in state.items()}


def reference(x, state, arch, names, pooling="max", padding="zeros"):
    """The taps by name, one ordinary operation per layer."""
    found = {}
    for name, kind, index, _, kernel in table(arch):

        def part(what, index=index, dtype=x.dtype):
            return state[f"features.{index}.{what}"].to(dtype)

        if kind == "conv":
            pad = kernel // 2
            if padding == "zeros":
                x = F.conv2d(x, part("weight"), part("bias"), padding=pad)
            else:
                x = F.conv2d(F.pad(x, (pad,) * 4, mode=padding), part("weight"), part("bias"))
        elif kind == "bn":
            x = F.batch_norm(x, part("running_mean"), part("running_var"), part("weight"), part("bias"), eps=1e-5)
        elif kind == "relu":
            x = x.clamp_min(0) if pooling == "l2" else F.relu(x)
        elif kind == "lrn":
            # the paper's: k = 2, n = 5, alpha = 1e-4 (not divided by n), beta = 0.75
            square = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
            x = x / (2 + 1e-4 * sum(square[:, i : i + x.shape[1]] for i in range(5))) ** 0.75
        elif pooling == "max":
            x = F.max_pool2d(x, 2, 2)
        elif pooling == "average":
            x = F.avg_pool2d(x, 2, 2)
        else:
            mean = F.unfold(x.flatten(0, 1)[:, None], 2, stride=2).square().mean(1)
            mean = mean.view(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
            x = torch.where(mean > 0, mean.clamp_min(1e-300 if x.dtype == torch.float64 else 1e-38).sqrt(), 0)
        found[name] = x
        if set(names) <= found.keys():
            return [found[name] for name in names]
    raise AssertionError(f"{names} not in {arch}")


@pytest.fixture(scope="module")
def trunks():
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = Trunk(arch, make_state(arch), ("test", arch))
        return made[arch]

    return get


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(trunk, names, pooling="max", padding="zeros", keep="bits", shape=(2, 3, 19, 22), x=None, seed=0):
    """Taps and gradient, ours against the reference, in float64; a random half of the taps gets a gradient."""
    x = images(*shape, seed=seed) if x is None else x
    plan = Plan(trunk.arch, tuple(names), pooling, padding)
    filters = trunk.filters(plan, x.device, x.dtype)
    a, b, c = (x.clone().requires_grad_() for _ in range(3))
    ours = run(a, filters, plan, keep=keep)
    theirs = reference(b, trunk.state, trunk.arch, plan.by_depth, pooling, padding)
    simple = plain(c, filters, plan)
    chosen = random.Random(seed).sample(range(len(names)), (len(names) + 1) // 2)
    grads = [images(*theirs[i].shape, seed=seed + 1 + i) for i in chosen]
    for tap, other, third in zip(ours, theirs, simple, strict=True):
        torch.testing.assert_close(tap, other, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(third, other, rtol=1e-9, atol=1e-10)
    for taps in (ours, theirs, simple):
        torch.autograd.backward([taps[i] for i in chosen], grads)
    assert b.grad.abs().max() > 0
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9 * b.grad.abs().max().item())
    torch.testing.assert_close(c.grad, b.grad, rtol=1e-8, atol=1e-9 * b.grad.abs().max().item())


# ── equal to plain PyTorch ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ARCHS)
def test_random_taps_equal_plain_pytorch(trunks, arch, pooling, padding, keep):
    arch = ARCHS[arch]
    seed = list(itertools.product(POOLINGS, PADDINGS, KEEPS)).index((pooling, padding, keep))
    draw = random.Random(f"{arch.name}{arch.channels[0]}{seed}")
    for turn in range(2):
        pool = names_of(arch, blocks=2 + turn)
        names = draw.sample(pool, draw.randint(1, min(6, len(pool))))  # in any order, too
        shape = (draw.choice((1, 2)), 3, draw.randint(9, 21), draw.randint(9, 21))
        compare(trunks(arch), names, pooling, padding, keep, shape, seed=seed + 31 * turn)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("arch", ["vgg19_bn", "A-LRN"])
def test_every_combination_of_taps_of_one_stage(trunks, arch, keep):
    arch = ARCHS[arch]
    stage = [name for name in names_of(arch, 1) if name.endswith("_1") or "pool" in name]
    if arch.batch_norm:
        stage = ["conv1_2", "bn1_2", "relu1_2", "pool1"]
    for pooling in POOLINGS:
        for count in range(len(stage) + 1):
            for taps in itertools.combinations(stage, count):
                compare(trunks(arch), [*taps, "relu2_1"], pooling, "zeros", keep, (1, 3, 5, 6))
                if taps and pooling == "max":
                    compare(trunks(arch), taps, pooling, "zeros", keep, (1, 3, 5, 6))


def test_ordinary_operations_never_use_kernels_that_cannot_be_differentiated(monkeypatch):
    monkeypatch.setattr(layers, "triton_kernels", lambda device, dtype: pytest.fail("a kernel was asked for"))
    plan = Plan(load("random", "vgg16").arch, ("relu2_2",))
    trunk = load("random", "vgg16")
    filters = Trunk.shared(trunk.arch, trunk.state, trunk.current_key).filters(
        plan, torch.device("cpu"), torch.bfloat16
    )
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (tap,) = plain(x, filters, plan)
    assert torch.autograd.grad(tap.float().sum(), x)[0].any()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_local_response_normalisation_in_bfloat16(trunks, pooling, keep):
    """A CPU has no pool over channels in bfloat16."""
    arch, found = ARCHS["A-LRN"], []
    plan = Plan(arch, ("lrn1_1", "relu2_1"), pooling)
    for dtype in (torch.float32, torch.bfloat16):
        x = images(1, 3, 12, 16).float().requires_grad_()
        taps = run(x, trunks(arch).filters(plan, x.device, dtype), plan, keep=keep)
        sum(tap.float().square().mean() for tap in taps).backward()
        found.append([*(tap.detach().float() for tap in taps), x.grad])
    for exact, rough in zip(*found, strict=True):
        assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("keep", KEEPS)
def test_to_the_deepest_layer(trunks, keep):
    compare(trunks(ARCHS["odd"]), ["pool5", "relu5_3", "conv5_1", "conv1_1"], keep=keep, shape=(2, 3, 37, 65))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ["constant", "quantised", "dead"])
def test_ties_go_to_the_first_of_equals(trunks, kind, keep):
    arch = ARCHS["odd"]
    state = {key: value.clone() for key, value in trunks(arch).state.items()}
    x = torch.full((2, 3, 12, 14), 0.5, dtype=torch.float64)
    if kind == "quantised":  # whole numbers all the way down, so that equals are exactly equal
        x = torch.randint(0, 3, x.shape, generator=torch.Generator().manual_seed(0)).double()
        state = {key: value.mul(3).round() for key, value in state.items()}
    if kind == "dead":  # windows without a positive value
        x = images(*x.shape)
        state["features.2.bias"] -= 0.7
    compare(Trunk(arch, state, ("ties", kind)), ["relu1_2", "pool1", "pool2", "relu3_1"], keep=keep, x=x)
    compare(Trunk(arch, state, ("ties", kind)), ["relu3_1"], keep=keep, x=x)


def test_l2_pooling_by_hand(trunks):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)[None, None].requires_grad_()
    y = layers.pool(x, "l2", "none", True)[0]
    assert y.item() == pytest.approx((30 / 4) ** 0.5)
    back = layers.l2_pool_backward(torch.ones(1, 1, 1, 1, dtype=torch.float64), 2, 2, x.detach())
    torch.testing.assert_close(back, x.detach() / (4 * 7.5**0.5))  # d/dx of sqrt(mean x²)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 5, 5), (1, 3, 4, 33), (3, 3, 31, 6), (2, 3, 16, 16)])
def test_sizes(trunks, shape):
    for keep in KEEPS:
        compare(trunks(ARCHS["odd"]), ["relu1_2", "conv3_1"], keep=keep, shape=shape)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ["vgg16", "vgg19_bn", "A-LRN"])
def test_float32_gradient_is_within_1e5_of_float64(trunks, arch, pooling):
    arch = ARCHS[arch]
    names, x = ["relu1_1", "pool2", "relu3_2"], images(2, 3, 33, 40, seed=3)
    found = {}
    for keep in KEEPS:
        a = x.float().requires_grad_()
        plan = Plan(arch, tuple(names), pooling)
        taps = run(a, trunks(arch).filters(plan, x.device, torch.float32), plan, keep=keep)
        sum(tap.square().mean() for tap in taps).backward()
        found[keep] = a.grad
    b = x.float().double().requires_grad_()
    sum(tap.square().mean() for tap in reference(b, trunks(arch).state, arch, names, pooling)).backward()
    for grad in found.values():
        assert (grad - b.grad).norm() / b.grad.norm() < 1e-5
    assert torch.equal(found["bits"], found["values"])


# What bfloat16 itself costs, by any implementation: its rounding of relu1_1 moves winners of pool1, so that gradients
# from below the first pool agree with float64's to 0.997 or so with these weights, and those from above it to 0.9999.
@pytest.mark.parametrize(
    ("names", "cosine"),
    [(["relu1_2"], 0.9995), (["relu2_1"], 0.999), (["relu1_1", "relu2_1", "relu3_1", "relu3_4"], 0.997)],
)
@pytest.mark.parametrize("keep", KEEPS)
def test_bfloat16_on_a_photograph(oxford, test_data, keep, names, cosine):
    import numpy
    from PIL import Image

    with Image.open(test_data / "photos" / "tubingen.jpg") as picture:
        photo = numpy.asarray(picture.convert("RGB").resize((96, 72)))
    x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255
    loaded = load(oxford)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (loaded.mean, loaded.std))

    def taps_and_gradient(compute, dtype=torch.float32):
        a = x.to(dtype, copy=True).requires_grad_()
        taps = compute(a)
        sum(tap.to(dtype).square().mean() / tap.detach().to(dtype).square().mean() for tap in taps).backward()
        return taps, a.grad.double().flatten()

    def ordinary(a, dtype):
        x = ((a - mean.to(a.dtype)) / std.to(a.dtype)).to(dtype)
        return reference(x, loaded.state, Arch("E", head=None), names)

    f = VGGFeatures(names, weights=oxford, precision="bfloat16", keep=keep)
    ours, gradient = taps_and_gradient(lambda a: list(f(a).values()))
    exact, expected = taps_and_gradient(lambda a: ordinary(a, torch.float64), torch.float64)
    _, peer = taps_and_gradient(lambda a: ordinary(a, torch.bfloat16))
    for tap, other in zip(ours, exact, strict=True):
        assert tap.dtype == torch.bfloat16
        assert (tap.double() - other).norm() / other.norm() < 0.01
    assert gradient.isfinite().all()
    assert F.cosine_similarity(gradient, expected, dim=0) > cosine
    assert F.cosine_similarity(gradient, expected, dim=0) > F.cosine_similarity(peer, expected, dim=0) - 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", ["vgg16", "vgg19_bn"])
def test_a_tap_does_not_depend_on_what_else_was_asked_for(thin, trunks, arch, dtype):
    thin(23)  # where the plan goes on behind the first block, that goes strip by strip
    arch = ARCHS[arch]
    names = names_of(arch, 2)
    x = images(2, 3, 18, 23).to(dtype)

    def taps(names, **options):
        plan = Plan(arch, tuple(names))
        given = x.clone().requires_grad_(bool(options))
        return run(given, trunks(arch).filters(plan, x.device, dtype), plan, **options)

    alone = {name: taps([name])[0] for name in names}
    together = [taps(names), *(taps(names, keep=keep) for keep in KEEPS)]
    for found in together:
        for name, tap in zip(names, found, strict=True):
            assert torch.equal(tap, alone[name]), name
    for name in names:
        assert torch.equal(taps([name, "relu3_1"], keep="bits")[0], alone[name]), name


# ── derivatives ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck(pooling, padding):
    arch = Arch("A-LRN" if padding == "zeros" else "D", channels=scaled(2), head=None)
    trunk = Trunk(arch, make_state(arch, seed=4), ("gradcheck", arch))
    plan = Plan(arch, ("conv2_1", "relu1_1", "pool1"), pooling, padding)
    filters = trunk.filters(plan, torch.device("cpu"), torch.float64)
    x = images(1, 3, 5, 6, seed=5).requires_grad_()
    for keep in KEEPS:
        assert torch.autograd.gradcheck(lambda x, keep=keep: tuple(run(x, filters, plan, keep=keep)), x, fast_mode=True)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradgradcheck(pooling):
    arch = Arch("D", channels=scaled(2), head=None)
    trunk = Trunk(arch, make_state(arch, seed=4), ("gradgrad", arch))
    plan = Plan(arch, ("conv2_1", "relu1_1"), pooling, "reflect")
    filters = trunk.filters(plan, torch.device("cpu"), torch.float64)
    x = images(1, 3, 4, 4, seed=5).requires_grad_()
    for keep in KEEPS:
        assert torch.autograd.gradgradcheck(
            lambda x, keep=keep: tuple(run(x, filters, plan, keep=keep)), x, fast_mode=True
        )


def test_third_derivative_is_right(trunks):
    """Not an error and, above all, not a wrong number."""
    arch = ARCHS["odd"]
    plan = Plan(arch, ("relu2_1", "conv1_2"), "l2")
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)

    def third(taps):
        x = images(1, 3, 8, 6).requires_grad_()
        value = sum(tap.pow(3).mean() for tap in taps(x))
        for _ in range(2):
            value = torch.autograd.grad(value, x, create_graph=True)[0].pow(3).sum()
        return torch.autograd.grad(value, x)[0]

    expected = third(lambda x: reference(x, trunks(arch).state, arch, plan.names, "l2"))
    for keep in KEEPS:
        torch.testing.assert_close(
            third(lambda x, keep=keep: run(x, filters, plan, keep=keep)), expected, rtol=1e-7, atol=0
        )


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("keep", KEEPS)
def test_torch_func_transforms(trunks, keep):
    arch = ARCHS["odd"]
    plan = Plan(arch, ("relu2_1",), "l2")
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)
    x, along = images(1, 3, 6, 5), images(1, 3, 6, 5, seed=9)

    def ours(x):
        return run(x, filters, plan, keep=keep)[0].pow(3).mean()

    def theirs(x):
        return reference(x, trunks(arch).state, arch, plan.names, "l2")[0].pow(3).mean()

    func = torch.func
    torch.testing.assert_close(func.jvp(ours, (x,), (along,))[1], func.jvp(theirs, (x,), (along,))[1])  # never zero
    torch.testing.assert_close(func.jacrev(func.jacrev(ours))(x), func.jacrev(func.jacrev(theirs))(x))
    expected = func.jvp(func.grad(theirs), (x,), (along,))[1]
    torch.testing.assert_close(func.jvp(func.grad(ours), (x,), (along,))[1], expected)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("arch", ARCHS)
def test_vmap_of_grad_equals_a_loop(trunks, arch, keep):
    arch = ARCHS[arch]
    plan = Plan(arch, ("relu1_1", "conv1_1", "pool2", "relu3_1"))
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)

    def score(x):
        return sum(tap.square().mean() for tap in run(x[None], filters, plan, keep=keep)[1:])

    batch = images(3, 3, 9, 13)
    mapped = torch.func.vmap(torch.func.grad(score))(batch)
    for x, grad in zip(batch, mapped, strict=True):
        x = x.clone().requires_grad_()
        taps = reference(x[None], trunks(arch).state, arch, plan.by_depth)
        sum(tap.square().mean() for tap in taps[1:]).backward()
        torch.testing.assert_close(grad, x.grad)
    torch.testing.assert_close(torch.func.vmap(score)(batch), torch.stack([score(x) for x in batch]))


def _layouts(grad):
    yield "contiguous", grad.contiguous()
    yield "channels_last", grad.contiguous(memory_format=torch.channels_last)
    yield "expanded", grad.mean().expand_as(grad)
    yield "transposed", grad.transpose(2, 3).contiguous().transpose(2, 3)
    yield "strided", torch.stack([grad, grad], -1).flatten(3)[..., ::2]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ["vgg19_bn", "A-LRN"])
def test_tap_gradients_of_any_layout_are_used_and_left_alone(trunks, arch, pooling, keep):
    arch = ARCHS[arch]
    names = tuple(name for name in names_of(arch, 2) if name != "relu2_2")
    plan = Plan(arch, names, pooling)
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)
    x = images(2, 3, 10, 13).requires_grad_()
    ours, theirs = run(x, filters, plan, keep=keep), reference(x, trunks(arch).state, arch, names, pooling)
    alone = [[i] for i in range(len(names))]
    for which in (*alone, list(range(len(names))), list(range(0, len(names), 2))):
        makers = zip(*(_layouts(images(*ours[i].shape, seed=i)) for i in which), strict=True)
        for grads in makers:
            label, grads = grads[0][0], [grad for _, grad in grads]
            before = [grad.clone() for grad in grads]
            a = torch.autograd.grad([ours[i] for i in which], x, grads, retain_graph=True)[0]
            b = torch.autograd.grad([theirs[i] for i in which], x, before, retain_graph=True)[0]
            torch.testing.assert_close(a, b, msg=lambda text, label=label: f"{label}: {text}")
            for grad, copied in zip(grads, before, strict=True):
                assert torch.equal(grad, copied), label


def test_other_ways_to_a_gradient_inside_autocast(trunks):
    """Many gradients at once, and second derivatives, are as exact as if they were not inside of it."""
    trunk, plan = trunks(ARCHS["vgg16"]), Plan(ARCHS["vgg16"], ("relu2_1",))
    x = images(1, 3, 8, 8, dtype=torch.float32).requires_grad_()
    (tap,) = run(x, trunk.filters(plan, x.device, x.dtype), plan)
    (slope,) = torch.autograd.grad(tap.square().sum(), x, create_graph=True)
    many, some = images(2, *tap.shape, seed=1, dtype=torch.float32), images(*x.shape, seed=2, dtype=torch.float32)

    def derivatives():
        yield torch.autograd.grad(tap, x, many, is_grads_batched=True, retain_graph=True)[0]
        yield torch.autograd.grad(slope, x, some, retain_graph=True)[0]

    expected = [*derivatives()]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*derivatives()]
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_many_gradients_at_once_can_be_differentiated(trunks):
    trunk, plan = trunks(ARCHS["vgg16"]), Plan(ARCHS["vgg16"], ("relu2_1",), "l2")
    found = []
    for ours in (True, False):
        x = images(1, 3, 8, 8).requires_grad_()
        if ours:
            (tap,) = run(x, trunk.filters(plan, x.device, x.dtype), plan)
        else:
            (tap,) = reference(x, trunk.state, trunk.arch, plan.names, plan.pooling)
        many = images(2, *tap.shape, seed=1)
        (rows,) = torch.autograd.grad(tap, x, many, is_grads_batched=True, create_graph=True)
        found.append(torch.autograd.grad(rows.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)


def test_the_smallest_image_for_reflection(trunks):
    """Every 3×3 convolution needs two pixels; one less than that, ordinary padding refuses."""
    for arch, name in (("vgg16", "conv2_1"), ("vgg16", "pool2"), ("C", "relu3_3")):
        plan = Plan(ARCHS[arch], (name,), "max", "reflect")
        trunk, least = trunks(plan.arch), plan.min_size
        compare(trunk, plan.names, padding="reflect", shape=(1, 3, least, least))
        with pytest.raises(RuntimeError, match="[Pp]adding"):
            reference(images(1, 3, least - 1, least - 1), trunk.state, trunk.arch, plan.names, padding="reflect")


def test_the_first_convolution_in_bfloat16_is_exact_to_16_bits(trunks):
    """Before its sum is rounded: neither the images' lower halves are lost, nor the weight's."""
    trunk = trunks(ARCHS["vgg16"])
    x = images(1, 3, 8, 8, dtype=torch.float32)
    weight = trunk.filters(Plan(trunk.arch, ("conv1_1",)), x.device, torch.bfloat16)[0]
    found = F.conv2d(layers.split_bfloat16(x, weight).double(), weight.double())
    exact = F.conv2d(x.double(), trunk.state["features.0.weight"].double())
    assert (found - exact).norm() / exact.norm() < 2**-15


def test_a_tap_is_let_go_once_its_gradient_is_known(trunks):
    trunk = trunks(ARCHS["vgg16"])
    plan, x = Plan(trunk.arch, ("relu1_1", "relu2_1")), images(1, 3, 16, 16)
    with torch.no_grad():
        taps, pullback = walk.Walk(trunk.filters(plan, x.device, x.dtype), plan, "taps").vjp(x)
        left = []
        pullback(lambda name, tap: left.append([*taps]) or torch.ones_like(tap))
    assert left == [["relu1_1"], []]


def test_backward_twice_gives_the_same(trunks):
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_1", "pool1", "relu2_2"))
    for keep in KEEPS:
        x = images(1, 3, 12, 12).requires_grad_()
        taps = run(x, trunks(arch).filters(plan, x.device, x.dtype), plan, keep=keep)
        total = sum(tap.square().sum() for tap in taps)
        first = torch.autograd.grad(total, x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(total, x)[0])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(total, x)


def test_a_tap_changed_in_place_never_gives_a_wrong_gradient(trunks):
    """Either the tap is not read again (and the gradient is right) or autograd notices."""
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_2", "relu2_1"))
    for keep in KEEPS:
        grads = []
        for change in (False, True):
            x = images(1, 3, 12, 12).requires_grad_()
            first, last = run(x, trunks(arch).filters(plan, x.device, x.dtype), plan, keep=keep)
            if change:
                with torch.no_grad():
                    first.zero_()
            try:
                last.square().sum().backward()
            except RuntimeError as error:
                assert "inplace" in str(error)
                continue
            grads.append(x.grad)
        assert torch.equal(grads[0], grads[-1])


# ── what is kept, what is run ─────────────────────────────────────────────────────────────────────────────────────────


def held(compute, known):
    """Bytes that autograd keeps for `compute()`, each storage once, but for the storages of `known`."""
    sizes = {}

    def pack(value):
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = compute()
    for value in known:
        sizes.pop(value.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


@pytest.mark.parametrize(("keep", "factor"), [("bits", 10), ("values", 1.3)])
def test_memory_between_forward_and_backward(keep, factor):
    net = vgg16(head="slim").requires_grad_(False)
    x = torch.randn(1, 3, 64, 64)
    theirs = held(lambda: net.taps(x.clone().requires_grad_(), ["relu3_3"]), net.parameters())
    arch = Arch(head=None)
    trunk = Trunk(arch, net.state_dict(), ("memory",))
    plan = Plan(arch, ("relu3_3",))
    filters = trunk.filters(plan, x.device, x.dtype)
    ours = held(lambda: run(x.clone().requires_grad_(), filters, plan, keep=keep), filters)
    # sign bits of conv1_1 … relu3_3, three bits of each pooled value, and the image
    assert ours > x.nbytes
    assert ours * factor < theirs


def test_nothing_is_kept_without_gradient(trunks):
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu3_1",))
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float32)
    assert held(lambda: run(torch.randn(1, 3, 16, 16), filters, plan), ()) == 0
    with torch.no_grad():
        assert held(lambda: run(torch.randn(1, 3, 16, 16).requires_grad_(), filters, plan), ()) == 0
    assert not run(torch.randn(1, 3, 16, 16), filters, plan)[0].requires_grad


@pytest.mark.parametrize(("names", "forward"), [(("conv1_1",), 1), (("pool1",), 2), (("relu2_1", "conv1_2"), 3)])
@pytest.mark.parametrize("arch", ["vgg16", "vgg19_bn"])
def test_nothing_past_the_deepest_tap_is_run(trunks, monkeypatch, arch, names, forward):
    arch = ARCHS[arch]
    calls = []
    real = direct.convolve
    monkeypatch.setattr(direct, "convolve", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    plan = Plan(arch, names)
    x = images(1, 3, 16, 16).requires_grad_()
    taps = run(x, trunks(arch).filters(plan, x.device, x.dtype), plan)
    extra = arch.batch_norm * sum("conv" in name for name in names)  # a second, unfolded convolution
    assert len(calls) == (forward + extra if names != ("conv1_1",) else 1)
    calls.clear()
    taps[-1].sum().backward()
    assert len(calls) == forward


def test_backward_runs_nothing_below_the_shallowest_gradient(trunks, monkeypatch):
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_1", "relu3_1"))
    x = images(1, 3, 16, 16).requires_grad_()
    shallow, _ = run(x, trunks(arch).filters(plan, x.device, x.dtype), plan)
    calls = []
    real = direct.convolve
    monkeypatch.setattr(direct, "convolve", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    shallow.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 4, 4), (2, 5, 3, 3), (1, 64, 2, 9), (0, 5, 3, 3)])
def test_pack_round_trip(shape):
    x = images(*shape)
    x.flatten()[::3] = 0
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        positive = (x > 0).to(torch.uint8)
        assert torch.equal(unpack(pack(laid > 0), shape), positive)
        assert torch.equal(unpack(pack((laid > 0).to(torch.int16)), shape), positive)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            rectified = laid.relu().to(dtype)
            for values in (rectified, torch.where(rectified == 0, -rectified, rectified)):  # zeros may have a sign
                bits = pack(values)
                assert bits.dtype == torch.uint8 and bits.shape == (shape[0], -(-math.prod(shape[1:]) // 8))
                assert torch.equal(unpack(bits, shape), positive)


@pytest.mark.parametrize("pooling", ["max", "average", "l2"])
@pytest.mark.parametrize("code", ["A", "A-LRN", "B", "C", "D", "D_bn", "E"])
def test_good_images_are_known_to_stay_finite(code, pooling):
    """Or else ReLUs would not be fused, and all would be slower, unnoticed."""
    arch = Arch(code.split("_")[0], head=None, batch_norm="bn" in code, channels=scaled(8))
    deepest = "relu5_4" if code == "E" else "relu5_1"
    features = VGGFeatures([deepest], weights=load("random", arch), pooling=pooling)
    x = images(2, 3, 32, 32)
    each = walk.Walk(features._filters(x), features.plan, "none")
    assert each._prepared(features._normalised(x))[1]
    assert not each._prepared(features._normalised(x * 1e36))[1]


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_of_convolutions(dtype, padding):
    """They hold, and are reached where an image agrees with a filter in all signs."""
    state = load("random", Arch("D", head=None, channels=scaled(8)))
    features = VGGFeatures(["conv1_1", "conv1_2", "conv2_2", "conv5_1"], weights=state, padding=padding)
    filters = features.trunk.filters(features.plan, torch.device("cpu"), dtype)
    chain = [folded for folded, _ in by_stage(features.plan, filters)]
    found = dict(zip([stage.conv for stage in features.plan.stages], bounds(chain), strict=True))
    first = features.trunk.state["features.0.weight"].to(dtype).double()
    norms = first.abs().sum((1, 2, 3))
    loose = 2 if dtype == torch.bfloat16 else 1  # an image's lower halves count as if they were as large as its upper
    assert found["conv1_1"][0] == pytest.approx(loose * float(norms.max()), rel=0.02)
    for seed in range(3):
        x = 5 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        x[..., 10:13, 10:13] = 100 * first[norms.argmax()].sign()
        for name, tap in zip(features.plan.by_depth, plain(x, filters, features.plan), strict=True):
            factor, shift = found[name]
            largest = float(tap.abs().max())
            assert largest <= 1.02 * (100 * factor + shift)
            if name == "conv1_1":
                assert largest >= 0.98 * (100 * factor / loose - shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_max_pools_as_torch_pools(dtype):
    """By comparing integers: ties, zeros with a sign, odd sides, infinity, the smallest; and NaN of either sign."""
    small = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, -0.0, small, 1, 1 + torch.finfo(dtype).eps, 3e38, torch.inf], dtype=dtype)
    which = torch.randint(len(values), (2, 8, 33, 47), generator=torch.Generator().manual_seed(0))
    x = values[which].contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = torch.nn.functional.max_pool2d(x, 2)
    grad = images(*wanted.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    wanted.backward(torch.where(wanted > 0, grad, 0))
    for keep in ("none", "bits", "values"):
        y, argmax = layers.pool(x.detach(), "max", keep, True)
        assert torch.equal(y, wanted)
        if argmax is not None:
            pooled = y if keep == "values" else None
            assert torch.equal(layers.max_pool_backward(grad, 33, 47, argmax, pooled), x.grad)
    assert argmax is not None and argmax.dtype == {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert layers.argmax_type(dtype, torch.device("cuda")) == torch.uint8
    bytes_ = argmax.to(torch.uint8)  # as on CUDA
    assert torch.equal(layers.max_pool_backward(grad, 33, 47, bytes_, wanted.detach()), x.grad)
    for keep in ("none", "bits", "values"):
        y, argmax = layers.pool(x.detach()[:0], "max", keep, True)
        assert y.shape == (0, 8, 16, 23)
        if argmax is not None:
            pooled = y if keep == "values" else None
            assert layers.max_pool_backward(y, 33, 47, argmax, pooled).shape == (0, 8, 33, 47)

    broken = x.detach().clone()
    broken[0, 3, 4, 5] = torch.nan
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    broken.view(whole)[1, 3, 4, 5] = -1  # all bits set: NaN with a sign
    assert broken[:, 3, 4, 5].isnan().all() and not torch.equal(*broken[:, 3, 4, 5].view(whole))
    wanted = torch.nn.functional.max_pool2d(broken, 2)
    for keep in ("none", "bits", "values"):
        y = layers.pool(broken, "max", keep, False)[0]
        assert y.isnan().sum() == 2 and torch.equal(y.isnan(), wanted.isnan())


@pytest.mark.parametrize(("dtype", "height"), [(torch.float32, 37), (torch.bfloat16, 64)])
def test_in_bands_as_in_one_piece(monkeypatch, dtype, height):
    """What is packed, pooled and let through a few rows at a time, against all of it at once."""
    x = images(2, 6, height, 10).relu().to(dtype).contiguous(memory_format=torch.channels_last)
    whole, (y, argmax) = pack(x), layers.pool(x, "max", "bits", True)
    grad = images(*y.shape, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)
    back = layers.max_pool_backward(grad, height, 10, argmax, None)
    monkeypatch.setattr(bits, "BAND", 500)
    assert [rows.stop - rows.start for _, rows, _ in bits.bands(x.shape, x.device)][:2] == [8, 8]
    assert torch.equal(pack(x), whole)
    odd = images(3, 3, 17, 11).gt(0.5).contiguous(memory_format=torch.channels_last)  # no image begins at a whole byte
    assert torch.equal(unpack(pack(odd), odd.shape) > 0, odd)
    monkeypatch.setattr(bits, "BAND", 2000)
    assert torch.equal(unpack(pack(odd), odd.shape) > 0, odd)
    assert [part[0] for part in bits.bands(odd.shape, odd.device)] == [slice(0, 3)]  # small images, together
    monkeypatch.setattr(bits, "BAND", 500)
    small, narrow = layers.pool(x, "max", "bits", True)
    assert torch.equal(small, y) and torch.equal(small, torch.nn.functional.max_pool2d(x, 2))
    assert torch.equal(narrow, argmax)
    assert torch.equal(layers.max_pool_backward(grad, height, 10, narrow, None), back)
    leaf = x.clone().requires_grad_()
    alive = torch.where(y > 0, grad, 0)
    assert torch.equal(back, torch.autograd.grad(torch.nn.functional.max_pool2d(leaf, 2), leaf, alive)[0])


# ── the first block strip by strip ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def thin(monkeypatch):
    """Sets strips of 8 rows for maps of 8 channels and that many columns, or of so many whole images of 16 rows."""

    def cut(width, together=None, dtype=torch.float64):
        monkeypatch.setattr(strips, "ROWS", 8)
        monkeypatch.setattr(strips, "BYTES", dtype.itemsize * 8 * width * (8 if together is None else 16 * together))

    return cut


def number_of_strips(plan, count, height, width, dtype=torch.float64):
    return len(list(strips._strips(plan, dtype, count, height, width)))


@pytest.mark.parametrize("keep", (*KEEPS, "taps"))
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ["vgg16", "vgg19_bn", "A-LRN"])
def test_by_strips(thin, trunks, arch, pooling, padding, keep):
    """Taps and gradients, with and without taps in the block, against the reference in float64."""
    trunk = trunks(ARCHS[arch])
    every = names_of(trunk.arch, blocks=2)
    choice = random.Random(f"{arch} {pooling} {padding} {keep}")
    height, cuts = choice.choice([(16, 2), (33, 4), (37, 5)])
    thin(22)
    for names in (every[-1:], choice.sample(every[:-1], 3) + every[-1:]):
        plan = Plan(trunk.arch, tuple(names), pooling, padding)
        assert number_of_strips(plan, 2, height, 22) == 2 * cuts
        if keep == "taps":
            check_vjp(trunk, plan, images(2, 3, height, 22))
            check_vjp_by_rows(trunk, plan, images(1, 3, height, 22))
        else:
            compare(trunk, names, pooling, padding, keep, shape=(2, 3, height, 22), seed=choice.randrange(99))


def check_vjp(trunk, plan, x):
    """Taps and gradient without autograd, against the reference in float64; every tap gets a gradient."""
    leaf = x.clone().requires_grad_()
    theirs = reference(leaf, trunk.state, trunk.arch, plan.by_depth, plan.pooling, plan.padding)
    grads = [images(*tap.shape, seed=i) for i, tap in enumerate(theirs)]
    slopes = dict(zip(plan.by_depth, grads, strict=True))
    with torch.no_grad():
        taps, pullback = walk.Walk(trunk.filters(plan, x.device, x.dtype), plan, "taps").vjp(x)
        for name, other in zip(plan.by_depth, theirs, strict=True):
            torch.testing.assert_close(taps[name], other, rtol=1e-9, atol=1e-10)
        found = pullback(lambda name, tap: slopes[name])
    (expected,) = torch.autograd.grad(theirs, leaf, grads)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())


def check_vjp_by_rows(trunk, plan, x, keep="taps"):
    """The same where taps are shown, and their gradients asked for, some rows at a time."""
    leaf = x.clone().requires_grad_()
    theirs = reference(leaf, trunk.state, trunk.arch, plan.by_depth, plan.pooling, plan.padding)
    grads = [images(*tap.shape, seed=i) for i, tap in enumerate(theirs)]
    known, slopes = dict(zip(plan.by_depth, theirs, strict=True)), dict(zip(plan.by_depth, grads, strict=True))
    shown = {name: [] for name in plan.by_depth}

    def seen(name, part, rows):
        torch.testing.assert_close(part, known[name][:, :, rows], rtol=1e-9, atol=1e-10)
        shown[name] += range(rows.start, rows.stop)

    def slope(name, part, rows):
        torch.testing.assert_close(part, known[name][:, :, rows], rtol=1e-9, atol=1e-10)
        return slopes[name][:, :, rows].clone()

    with torch.no_grad():
        filters = trunk.filters(plan, x.device, x.dtype)
        pullback = walk.Walk(filters, plan, keep).vjp_by_rows(x, seen)
        assert {name: [*range(tap.shape[2])] for name, tap in known.items()} == shown
        assert [*shown] == [*plan.by_depth]
        found = pullback(slope)
        assert walk.Walk(filters, plan, "none").forward(x, seen) == [({}, {})] * len(plan.stages)
    assert all(rows == 2 * [*range(known[name].shape[2])] for name, rows in shown.items())
    (expected,) = torch.autograd.grad(theirs, leaf, grads)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("band", [1, 1 << 20])
@pytest.mark.parametrize("keep", ["taps", "values"])
@pytest.mark.parametrize(("arch", "padding"), [("vgg11_bn", "reflect"), ("A-LRN", "zeros"), ("vgg19_bn", "replicate")])
def test_by_rows_with_every_tap(thin, trunks, monkeypatch, arch, padding, keep, band):
    """Of each kind of layer, in the first block and behind it, as few rows at a time as can be and all at once."""
    trunk = trunks(ARCHS[arch])
    monkeypatch.setattr("vggfeat.trunk.bits.BAND", band)
    thin(22)
    plan = Plan(trunk.arch, tuple(names_of(trunk.arch, blocks=3)), "max", padding)
    check_vjp_by_rows(trunk, plan, images(1, 3, 43, 22), keep)
    first = tuple(name for name in plan.by_depth if name.endswith("1_1"))
    for name in (*first, "pool1"):
        check_vjp_by_rows(trunk, Plan(trunk.arch, (name, "relu2_1"), "l2", padding), images(1, 3, 24, 22), keep)
    check_vjp_by_rows(
        trunk, Plan(trunk.arch, first, "max", padding), images(1, 3, 24, 22), keep
    )  # no block is complete


def test_what_is_never_whole_by_rows(thin, trunks, monkeypatch):
    """The first convolution's taps, and gradients of taps but the deepest."""
    plan = Plan(ARCHS["vgg16"], ("conv1_1", "relu1_1", "relu2_1", "relu3_1"))
    monkeypatch.setattr("vggfeat.trunk.bits.BAND", 1)  # 8 rows at a time, the fewest there are
    x = images(1, 3, 64, 22)
    filters = trunks(plan.arch).filters(plan, x.device, x.dtype)
    thin(22)
    seen, wholes, whole = [], [], ByRows.whole
    monkeypatch.setattr(ByRows, "whole", lambda self: wholes.append(self.tap.shape) or whole(self))
    with torch.no_grad(), _Sizes() as sizes:
        pullback = walk.Walk(filters, plan, "taps").vjp_by_rows(x, lambda name, part, rows: seen.append(rows))
        pullback(lambda name, part, rows: seen.append(rows) or torch.ones_like(part))
    assert 64 not in sizes.seen and {8, 10, 12} <= sizes.seen
    assert wholes == [(1, 32, 16, 5)]
    # conv1_1 and relu1_1 strip by strip, relu2_1 whole, and its gradient 8 rows at a time
    assert [rows.stop - rows.start for rows in seen if rows.stop == 32] == [8, 8, 32, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", PADDINGS)
def test_strips_and_images_together_change_no_bit(thin, trunks, dtype, padding):
    """In the types that people use, through the processor's own convolutions: the same values, the same gradients."""
    trunk = trunks(ARCHS["vgg16"])
    names = ("conv1_1", "relu1_2", "pool1", "relu2_1")
    x = images(3, 3, 37, 21, dtype=torch.float32)
    found = []
    for together, count in ((1 << 10, 1), (5, 2), (None, 3 * 5)):
        thin(21, together, dtype)
        for plan in (Plan(trunk.arch, names, "max", padding), Plan(trunk.arch, names[-1:], "max", padding)):
            assert number_of_strips(plan, 3, 37, 21, dtype) == count
            leaf = x.clone().requires_grad_()
            taps = run(leaf, trunk.filters(plan, x.device, dtype), plan)
            sum(tap.float().square().sum() for tap in taps[-1:]).backward()
            found.append((taps, leaf.grad))
    for taps, grad in found:
        assert torch.equal(taps[-1], found[0][0][-1]) and torch.equal(grad, found[0][1])
        for tap, other in zip(taps[:-1], found[0][0][:-1], strict=False):
            assert torch.equal(tap, other)


def test_a_gradient_that_only_the_first_block_has(thin, trunks):
    trunk = trunks(ARCHS["vgg16"])
    plan = Plan(trunk.arch, ("relu1_1", "relu2_1"))
    thin(22)
    a, b = (images(2, 3, 33, 22).requires_grad_() for _ in range(2))
    run(a, trunk.filters(plan, a.device, a.dtype), plan)[0].square().sum().backward()
    reference(b, trunk.state, trunk.arch, plan.names)[0].square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


def test_not_a_number_in_one_strip(thin, trunks):
    trunk = trunks(ARCHS["vgg16"])
    plan = Plan(trunk.arch, ("relu1_1", "relu2_1"))
    x = images(2, 3, 40, 22, dtype=torch.float32)
    x[1, 0, 30, 5] = torch.nan
    thin(22)
    leaf = x.clone().requires_grad_()
    taps = run(leaf, trunk.filters(plan, x.device, x.dtype), plan)
    for tap, other in zip(taps, reference(x, trunk.state, trunk.arch, plan.names), strict=True):
        assert torch.equal(tap.isnan(), other.isnan()) and tap.isnan().any()
    sum(tap.square().sum() for tap in taps).backward()
    ordinary = x.clone().requires_grad_()
    sum(tap.square().sum() for tap in reference(ordinary, trunk.state, trunk.arch, plan.names)).backward()
    assert torch.equal(leaf.grad.isnan(), ordinary.grad.isnan()) and leaf.grad[1].isnan().any()
    alone = x[:1].clone().requires_grad_()
    sum(tap.square().sum() for tap in reference(alone, trunk.state, trunk.arch, plan.names)).backward()
    torch.testing.assert_close(leaf.grad[:1], alone.grad, rtol=1e-4, atol=1e-4)


def test_not_a_number_where_a_tap_is_computed_again(thin, trunks):
    """The first convolution's, some rows at a time: the gradient is asked for where the tap is what was shown."""
    trunk = trunks(ARCHS["vgg16"])
    plan = Plan(trunk.arch, ("relu1_1", "relu2_1"))
    x = images(1, 3, 40, 22, dtype=torch.float32)
    x[0, 0, 30, 5] = torch.nan
    (tap, _) = reference(x, trunk.state, trunk.arch, plan.names)
    thin(22)
    shown, asked = [torch.zeros(40, dtype=torch.long) for _ in range(2)]

    def count(where, name, part, rows):
        if name == "relu1_1":
            where[rows] = part.isnan().sum((0, 1, 3))
        return part

    with torch.no_grad():
        filters = trunk.filters(plan, x.device, x.dtype)
        pullback = walk.Walk(filters, plan, "taps").vjp_by_rows(x, functools.partial(count, shown))
        pullback(functools.partial(count, asked))
    assert tap.isnan().any()
    assert shown.tolist() == asked.tolist() == tap.isnan().sum((0, 1, 3)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_any_size(trunks, dtype):
    """Up to what the type holds; what is not finite goes where it would in ordinary operations."""
    trunk = trunks(ARCHS["vgg16"])
    plan = Plan(trunk.arch, ("relu1_2",))
    leaf = images(2, 3, 16, 16, dtype=dtype).requires_grad_()
    (tap,) = run(leaf, trunk.filters(plan, leaf.device, leaf.dtype), plan)
    (unit,) = torch.autograd.grad(tap, leaf, torch.ones_like(tap), retain_graph=True)
    for size in (1e32, 1e290) if dtype == torch.float64 else (1e32,):
        (large,) = torch.autograd.grad(tap, leaf, torch.full_like(tap, size), retain_graph=True)
        torch.testing.assert_close(large / size, unit)
    dead, alive = (int(where.nonzero()[0]) for where in (tap[1, 0, 3] == 0, tap[1, 0, 3] > 0))
    for column, bad in ((dead, torch.inf), (alive, torch.nan)):
        one = torch.ones_like(tap)
        one[1, 0, 3, column] = bad
        (grad,) = torch.autograd.grad(tap, leaf, one, retain_graph=True)
        (wanted,) = torch.autograd.grad(plain(leaf, trunk.filters(plan, leaf.device, dtype), plan), leaf, one)
        assert wanted[1].isnan().any() == (column == alive) and torch.equal(grad[0], unit[0])
        torch.testing.assert_close(grad, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("direct", [False, True])
def test_a_gradient_of_activations_that_overflowed_is_no_number(keep, direct):
    """Images are finite, and a network that diverged must not look as if it had nothing to learn."""
    state = dict(load("random", "vgg16").state)
    for index in (0, 2, 5):
        state[f"features.{index}.weight"] = state[f"features.{index}.weight"] * 1e13
    features = VGGFeatures(["relu2_2"], weights=state, keep=keep)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if direct:
        taps, pullback = features.vjp(features.checked(x.detach()))
        grad = pullback(lambda name, tap: 2 * tap)
    else:
        (grad,) = torch.autograd.grad(features(x)["relu2_2"].square().mean(), x)
    assert grad.isnan().all()
    above = VGGFeatures(["relu1_1", "relu2_2"], weights=state, keep=keep)(x)
    (grad,) = torch.autograd.grad(above["relu1_1"].sqrt().mean(), x)
    assert above["relu1_1"].isfinite().all() and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("names", [("relu1_1",), ("relu3_3",), ("pool3",), ("relu2_2", "relu3_3")])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_root_at_zero_costs_no_more_than_that_position(trunks, names, keep):
    """The slope of √0 is infinite; where a ReLU gave the 0 it is of no consequence."""
    trunk = trunks(ARCHS["vgg16"])
    plan = Plan(trunk.arch, names)
    leaf = images(2, 3, 32, 32, dtype=torch.float64).requires_grad_()
    filters = trunk.filters(plan, leaf.device, leaf.dtype)
    grads = [
        torch.autograd.grad(sum(tap.sqrt().mean() for tap in taps), leaf)[0]
        for taps in (run(leaf, filters, plan, keep=keep), plain(leaf, filters, plan))
    ]
    assert grads[1].isfinite().all()
    torch.testing.assert_close(*grads)


class _Sizes(TorchDispatchMode):
    """Heights of the tensors of 8 channels that operations make, at the images' width of 22 or pooled."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if (
                isinstance(value, torch.Tensor)
                and value.ndim == 4
                and value.shape[1] == 8
                and value.shape[3] in (22, 11)
            ):
                self.seen.add(value.shape[2])
        return found


def test_no_map_of_the_first_block_is_made_whole(thin, trunks):
    plan = Plan(ARCHS["vgg16"], ("relu3_1",))
    x = images(3, 3, 64, 22)
    filters = trunks(plan.arch).filters(plan, x.device, x.dtype)
    for cut, expected in ((False, {64, 32}), (True, {10, 8, 4})):  # 32 and 4 are pooled
        if cut:
            thin(22)
        with torch.no_grad(), _Sizes() as sizes:
            taps, pullback = walk.Walk(filters, plan, "taps").vjp(x)
            pullback(lambda name, tap: torch.ones_like(tap))
        assert expected <= sizes.seen and (64 in sizes.seen) == (not cut)
        # the gradient of 8 rows is made of 10 and 12, and the way there of 10
        assert not cut or sizes.seen <= set(range(13)) | {32}


def test_strips_cover_every_row_once(monkeypatch):
    plan = Plan(Arch(channels=scaled(8), head=None), ("relu2_1",))
    several = False
    for height, width, count, values, dtype in itertools.product(
        (2, 15, 16, 100, 1000), (1, 64), (1, 5), (1, 1 << 11, 1 << 16), (torch.float32, torch.bfloat16)
    ):
        monkeypatch.setattr(strips, "BYTES", values * dtype.itemsize)
        seen = torch.zeros(count, height)
        for strip in strips._strips(plan, dtype, count, height, width):
            rows, together = strip.rows.stop - strip.rows.start, strip.images.stop - strip.images.start
            assert strip.rows.start % 32 == 0 and (rows >= 16 or rows == height)
            assert rows * together * width * 8 <= max(values, (32 + 15) * width * 8)
            several |= 1 < together < count
            seen[strip.images, strip.rows] += 1
        assert torch.equal(seen, torch.ones_like(seen))
    assert several


def test_each_thread_has_rows_and_images_of_its_own(monkeypatch):
    """A strip holds as many more as there are threads, which share it."""
    plan = Plan(Arch(channels=scaled(8), head=None), ("relu2_1",))
    monkeypatch.setattr(strips, "BYTES", 4 * 8 * 64 * 32)  # a strip of 32 rows of 64 pixels, or two images of 16 rows
    for threads, rows, together in ((1, 32, 2), (2, 64, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        large = next(strips._strips(plan, torch.float32, 1, 256, 64))
        small = next(strips._strips(plan, torch.float32, 8, 16, 64))
        assert (large.rows.stop, small.images.stop) == (rows, together)


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", ARCHS)
def test_plan_code_reads_back(arch):
    arch = ARCHS[arch]
    plan = Plan(arch, ("relu3_1", "conv1_1"), "l2", "reflect")
    assert Plan.decode(plan.code) == plan
    assert plan.by_depth == ("conv1_1", "relu3_1")


def test_which_plans_run_in_strips():
    """Those that pass the first block, whose bits fill bytes, and no wider than direct convolutions are for."""
    for width, names, count in (
        (64, ("relu1_2", "conv2_1"), 2),
        (64, ("pool1",), 0),
        (72, ("conv2_1",), 0),
        (128, ("conv2_1",), 0),
        (12, ("conv2_1",), 0),
    ):
        plan = Plan(Arch("D", head=None, channels=scaled(width)), names)
        assert (plan.in_strips("cpu"), plan.in_strips("cuda")) == (count, 0)


def test_what_is_kept():
    """Of a convolution, of one with a tap before its pool, and of one that only its pool reads."""
    plan = Plan(Arch("D", head=None), ("relu1_2", "relu3_1"))
    found = {keep: [kept_of(plan, number, keep) for number in (0, 1, 3)] for keep in ("bits", "taps", "values", "none")}
    assert found == {
        "bits": [("sign",), ("sign", "argmax"), ("argmax",)],
        "taps": [("sign",), ("relu", "argmax"), ("argmax",)],
        "values": [("relu",), ("relu", "argmax", "pool"), ("argmax", "pool")],
        "none": [(), (), ()],
    }


def test_small_values_have_roots_and_large_negative_ones_count():
    tiny = torch.full((1, 1, 2, 2), 1e-12)
    torch.testing.assert_close(layers.plain_pool(tiny, "l2"), tiny[..., :1, :1], rtol=1e-5, atol=0)
    for value, finite in ((-1e30, True), (1e30, True), (-1e34, False), (1e34, False), (-torch.inf, False)):
        image = torch.zeros(1, 3, 2, 2)
        image[0, 1, 1, 0] = value
        assert layers.stays_finite(image, [(1.0, 0.0)], [torch.inf]) == finite
    assert layers.stays_finite(image[:0], [(1.0, 0.0)], [torch.inf])  # no image


def test_bounds_count_what_biases_add():

    first, second = torch.zeros(2, 3, 3, 3), torch.zeros(1, 2, 3, 3)
    first[0, 0, 1, 1], second[0, :, 0, 0] = 2.0, torch.tensor([3.0, -4.0])
    biases = torch.tensor([5.0, -7.0]), torch.tensor([-1.0])
    found = [*bounds(Filters(w, b, w) for w, b in zip((first, second), biases, strict=True))]
    # |3| · 2 of the image, |-1| + |3| · 5 + |-4| · |-7| besides
    assert found == [(2.0, 7.0), (6.0, 44.0)]


def test_a_callers_gradient_is_left_alone_by_one_that_comes_in_rows():

    given, tap = torch.ones(1, 2, 4, 4).contiguous(memory_format=torch.channels_last), torch.zeros(1, 2, 4, 4)
    flow = GradientAccumulator()
    flow.add(given)
    flow.add(ByRows(lambda part, rows: part + 2, tap))
    assert torch.equal(flow.grad, torch.full_like(given, 3)) and torch.equal(given, torch.ones_like(given))


def test_a_product_is_the_gradient_that_it_stands_for():
    """Of a matrix that is not symmetric, onto a gradient that a caller holds, through a ReLU or not."""
    tap = images(2, 3, 4, 5).relu()
    matrix, given = images(3, 3, seed=1), images(2, 3, 4, 5, seed=2)
    expected = torch.einsum("nchw,cd->ndhw", tap, matrix)
    torch.testing.assert_close(Product(tap, matrix).whole(), expected)
    for masked in (False, True):
        flow, before = GradientAccumulator(), given.clone()
        flow.add(given)
        flow.add_product(Product(tap, matrix), masked=masked)
        torch.testing.assert_close(flow.grad, torch.where((tap > 0) | (not masked), given + expected, 0))
        assert torch.equal(given, before)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("config", "pooling"), [("D", "max"), ("D", "l2"), ("A-LRN", "max"), ("A-LRN", "l2")])
def test_what_was_kept_is_freed_before_the_convolution(monkeypatch, config, pooling, keep):
    """A stage's backward holds none of it when it comes to the gradient through the convolution."""
    arch = Arch(config, head=None, channels=scaled(5))  # not by strips
    trunk, plan = Trunk(arch, make_state(arch), ()), Plan(arch, ("conv3_1",), pooling)
    ready = walk.Walk(trunk.filters(plan, torch.device("cpu"), torch.float64), plan, keep)
    kept = [of_stage for _, of_stage in ready.forward(images(1, 3, 16, 16))]
    held = [[weakref.ref(value) for value in of_stage.values()] for of_stage in kept]
    assert all(held[:-1])
    through, alive = layers.conv_backward, []

    def conv_backward(*args, **options):
        alive.append([ref() is not None for refs in held[-1 - len(alive) :] for ref in refs])
        return through(*args, **options)

    monkeypatch.setattr(layers, "conv_backward", conv_backward)
    assert ready.backward(lambda name: images(1, 4 * 5, 4, 4), kept, (16, 16)).shape == (1, 3, 16, 16)
    assert len(alive) == len(plan.stages) and not any(map(any, alive)) and not kept


# ── sharing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trunk_has_weights_of_its_own():
    """Whoever brought them may train them on, in place."""
    arch = ARCHS["vgg16"]
    brought, state = make_state(arch), make_state(arch)
    trunk = Trunk.shared(arch, brought, ("own",))
    for value in brought.values():
        value.zero_()
    assert all(torch.equal(trunk.state[key], state[key]) for key in state)


def test_shared_trunk_grows_and_forgets():
    arch = ARCHS["vgg16"]
    state = make_state(arch)
    shallow = {key: value for key, value in state.items() if key.startswith("features.0.")}
    first = Trunk.shared(arch, shallow, ("grow",))
    held = first.state["features.0.weight"]
    second = Trunk.shared(arch, state, ("grow",))
    assert first is second and second.state["features.0.weight"] is held
    assert first.state.keys() == state.keys()
    key = (arch, "grow")
    assert key in Trunk._live
    del first, second
    assert key not in Trunk._live


# ── operators, compilers, export ──────────────────────────────────────────────────────────────────────────────────────

CASES = [
    ("vgg16", ("relu1_2", "pool1", "conv2_1", "pool2"), "max", "zeros"),
    ("vgg19_bn", ("conv1_1", "bn1_2", "relu2_1"), "l2", "reflect"),
    ("A-LRN", ("lrn1_1", "relu2_1"), "max", "replicate"),
    ("odd", ("relu2_2",), "average", "zeros"),
]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("arch", "names", "pooling", "padding"), CASES)
def test_opcheck(thin, trunks, arch, names, pooling, padding, keep):
    thin(14)
    arch = ARCHS[arch]
    plan = Plan(arch, names, pooling, padding)
    for dtype in (torch.float32, torch.float64):
        x = images(2, 3, 17, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
        filters = trunks(arch).filters(plan, x.device, dtype)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.trunk_forward, (x, filters, plan.code, "none"), test_utils=tests)
        torch.library.opcheck(operators.trunk_forward, (x, filters, plan.code, keep), test_utils=tests)
        found = operators.trunk_forward(x, filters, plan.code, keep)
        taps, kept = found[: len(names)], found[len(names) :]
        again = [taps[i] for i in walk.reread(plan, keep)]
        present = list(range(len(names)))
        args = (taps, present, again, kept, filters, list(x.shape), plan.code, keep)
        torch.library.opcheck(operators.trunk_backward, args, test_utils=tests)


class Host(torch.nn.Module):
    """A small model that trains on the features of what it makes."""

    def __init__(self, features):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.features = features

    def forward(self, x):
        return sum(tap.float().square().mean() for tap in self.features(self.body(x).sigmoid()).values())


def step(host, x, call=None):
    host.zero_grad()
    value = (host if call is None else call)(x)
    value.backward()
    return value.detach(), [parameter.grad.clone() for parameter in host.parameters()]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("arch", "names", "pooling", "padding", "keep"),
    [(*case, keep) for case, keep in zip(CASES[:3], ("values", "bits", "bits"), strict=True)],
)
def test_compiled_training_step(fresh_compiler, arch, names, pooling, padding, keep):
    arch = ARCHS[arch]
    # weights that no other test has used: the very first call must compile, too
    state = make_state(arch, seed=1000 + KEEPS.index(keep))
    host = Host(VGGFeatures(names, arch=arch, weights=state, pooling=pooling, padding=padding, keep=keep))
    x = images(2, 3, 17, 20, dtype=torch.float32)
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(host, x, compiled), step(host, x))
    # other weights in the same place must not be mistaken for the old ones
    host.features = VGGFeatures(
        names, arch=arch, weights=make_state(arch, 77), pooling=pooling, padding=padding, keep=keep
    )
    torch.testing.assert_close(step(host, x, compiled), step(host, x))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor(fresh_compiler):
    arch = ARCHS["vgg16"]
    host = Host(VGGFeatures(["relu1_2", "relu3_1"], weights=make_state(arch)))
    x = images(2, 3, 33, 32, dtype=torch.float32)
    compiled = torch.compile(host, fullgraph=True)
    torch.testing.assert_close(step(host, x, compiled), step(host, x), rtol=1e-4, atol=1e-6)


def _reloaded(exported):
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("arch", ["vgg16", "vgg19_bn", "A-LRN"])
def test_export(arch, strict):
    arch = ARCHS[arch]
    state = make_state(arch, seed=1234)  # not used before: exporting first must not spoil the shared trunk
    f = VGGFeatures(["conv1_1", "relu2_1", "pool2"], arch=arch, weights=state)
    x = torch.rand(2, 3, 17, 20)
    exported = _reloaded(torch.export.export(f, (x,), strict=strict))(x)
    ours = f(x)
    assert exported.keys() == ours.keys()
    for name, tap in ours.items():
        assert type(tap) is torch.Tensor
        torch.testing.assert_close(exported[name], tap)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [PerceptualLoss, StyleLoss])
def test_export_of_a_loss(kind):
    """Of images of any size, to a file."""
    loss = kind(["relu1_2", "relu2_1"], weights=make_state(ARCHS["vgg16"], seed=2345))  # not used before
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = _reloaded(torch.export.export(loss, tuple(torch.rand(2, 2, 3, 16, 24)), dynamic_shapes=(sizes, sizes)))
    pair = torch.rand(2, 2, 3, 30, 20)
    torch.testing.assert_close(exported(*pair), loss(*pair))


@pytest.mark.filterwarnings("ignore")
def test_traced():
    """By `torch.jit.trace`, which is deprecated but in use."""
    f = VGGFeatures(["conv1_1", "relu2_1"], weights=make_state(ARCHS["vgg16"], seed=4321))  # not used before
    traced = torch.jit.trace(f, (torch.rand(2, 3, 16, 20),), strict=False)
    x = torch.rand(1, 3, 24, 17)
    for name, tap in traced(x).items():
        torch.testing.assert_close(tap, f(x)[name], rtol=1e-4, atol=1e-5)
    x, y = torch.rand(2, 1, 3, 16, 20)
    for loss in (PerceptualLoss(["relu2_1"], weights="random"), StyleLoss(["relu2_1"], weights="random")):
        leaf = x.clone().requires_grad_()
        both = [each(leaf, y) for each in (torch.jit.trace(loss, (leaf, y), check_trace=False), loss)]
        torch.testing.assert_close(*both)
        traced, plainly = (torch.autograd.grad(value, leaf)[0] for value in both)
        assert (traced - plainly).norm() < 1e-4 * plainly.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, dynamo):
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("needs onnx, onnxscript and onnxruntime")
    import onnxruntime

    f = VGGFeatures(["relu1_1", "relu2_1"], weights=make_state(ARCHS["vgg16"]))
    x, path = torch.rand(1, 3, 16, 20), tmp_path / "vgg.onnx"
    torch.onnx.export(f, (x,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for tap, value in zip(f(x).values(), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), tap, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_host(reentrant):
    from torch.utils.checkpoint import checkpoint

    host = Host(VGGFeatures(["relu1_2", "relu2_1"], weights=make_state(ARCHS["vgg16"])))
    x = images(1, 3, 16, 18, dtype=torch.float32).requires_grad_()
    torch.testing.assert_close(step(host, x, lambda x: checkpoint(host, x, use_reentrant=reentrant)), step(host, x))


@pytest.mark.parametrize("layers", [["relu1_2", "relu2_1"], ["conv1_1", "pool1"]])
def test_autocast(layers):
    state = make_state(ARCHS["vgg16"])
    follows, fixed = (VGGFeatures(layers, weights=state, precision=p) for p in ("float32", "bfloat16"))
    x = torch.rand(2, 3, 16, 18)
    results = []
    for f, inside in ((follows, True), (fixed, True), (fixed, False)):
        a = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            taps = f(a)
            value = sum(tap.float().square().mean() for tap in taps.values())
        value.backward()
        assert all(tap.dtype == torch.bfloat16 for tap in taps.values())
        results.append((a.grad, *taps.values()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    plainly = follows(x)
    assert all(tap.dtype == torch.float32 for tap in plainly.values())


def test_autocast_does_not_cast_again_inside():
    """Float64 images stay float64, and a backward inside autocast is the backward outside it."""
    f = VGGFeatures(["relu2_1"], weights=make_state(ARCHS["vgg16"]))
    x = torch.rand(1, 3, 16, 18, dtype=torch.float64)
    grads = []
    for inside in (False, True):
        a = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            tap = f(a)["relu2_1"]
            tap.square().mean().backward()
        assert tap.dtype == torch.float64
        grads.append(a.grad)
    assert torch.equal(*grads)
    a = x.float().requires_grad_()
    value = f(a)["relu2_1"].square().mean()
    outside = torch.autograd.grad(value, a, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(value, a)[0], outside)


needs_onednn = pytest.mark.skipif(not direct._onednn_takes(torch.zeros(1)), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reordered_weight_is_the_same_weight(dtype):
    weight = images(288, 256, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if dtype == torch.bfloat16 and not direct.benefits_from_reordering(weight):
        pytest.skip("this processor does not multiply bfloat16")
    assert direct.benefits_from_reordering(weight) and not direct.benefits_from_reordering(weight[:128])
    maps = [images(n, 256, h, w, dtype=dtype) for n, h, w in ((1, 2, 2), (3, 4, 4), (8, 7, 9), (1, 40, 33))]
    before = [direct.convolve(x, weight, None, 1, relu=True) for x in maps]
    direct.reorder(weight)
    assert not direct.benefits_from_reordering(weight) and direct._reordered[weight].layout == torch._mkldnn
    for x, wanted in zip(maps, before, strict=True):
        torch.testing.assert_close(direct.convolve(x, weight, None, 1, relu=True), wanted)
    count = len(direct._reordered)
    del weight
    assert len(direct._reordered) == count - 1


@needs_onednn
def test_small_maps_are_convolved_by_reordered_weights(monkeypatch):
    """Forward and back, those of 256 channels and more; not on larger maps, and not the same weight twice."""
    arch = Arch("A", channels=(4, 4, 256, 8, 8), head=None)
    trunk, reordered = Trunk(arch, make_state(arch), ("reordered",)), []
    real = direct.reorder
    monkeypatch.setattr(direct, "reorder", lambda weight: reordered.append(tuple(weight.shape)) or real(weight))
    monkeypatch.setattr(layers.winograd, "is_faster", lambda *_: False)
    plan, x = Plan(arch, ("relu3_2",)), images(2, 3, 36, 40, dtype=torch.float32)
    trunk.filters(plan, x.device, x.dtype, size=(160, 160))
    trunk.filters(plan, x.device, x.dtype)  # of maps of any size
    assert reordered == []
    for _ in range(2):
        filters = trunk.filters(plan, x.device, x.dtype, size=(36, 40))
    assert reordered == [(256, 256, 3, 3)] * 2  # the second convolution's; the first has 4 channels
    leaf = x.clone().requires_grad_()
    (tap,) = run(leaf, filters, plan)
    wanted = reference(x.double().requires_grad_(), trunk.state, arch, plan.names)[0]
    torch.testing.assert_close(tap.double(), wanted, rtol=1e-4, atol=1e-4)
    tap.sum().backward()
    exact = x.double().requires_grad_()
    reference(exact, trunk.state, arch, plan.names)[0].sum().backward()
    assert (leaf.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_weight_in_another_layout_takes_its_place(monkeypatch):
    x, weight = images(1, 3, 6, 6, dtype=torch.float32), images(4, 3, 3, 3, seed=1, dtype=torch.float32)
    monkeypatch.setattr(direct, "_reordered", {weight: 2 * weight})  # to be told apart
    torch.testing.assert_close(direct.convolve(x, weight, None, 1), F.conv2d(x, 2 * weight, padding=1))


@pytest.mark.parametrize("tap", [0, 1, 2])
def test_flops_are_those_of_ordinary_convolutions(trunks, tap):
    """Forward, and backward from the first tap and another; of 1×1 convolutions, too."""
    trunk, counts = trunks(ARCHS["C"]), []
    plan = Plan(trunk.arch, ("conv1_1", "relu2_1", "relu3_3"))
    x = images(2, 3, 16, 20)
    filters = trunk.filters(plan, x.device, x.dtype)
    for ways in (
        lambda leaf: run(leaf, filters, plan),
        lambda leaf: reference(leaf, trunk.state, trunk.arch, plan.names),
    ):
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as forward:
            taps = ways(leaf)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(taps[0].sum() + taps[tap].sum(), leaf)
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] and min(counts[0]) > 0


def test_threads_share_what_the_first_prepares(monkeypatch):
    """Or one would replace weights that are in oneDNN's own layout already by some that never will be."""
    prepared = []
    prepare = Trunk._prepare

    def slowly(trunk, key, *where):
        prepared.append(key)
        time.sleep(0.01)
        return prepare(trunk, key, *where)

    monkeypatch.setattr(Trunk, "_prepare", slowly)
    features = VGGFeatures(["relu3_1"], weights=load("random", Arch("A", head=None, channels=scaled(8))))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: features(x)["relu3_1"], range(12)))
    assert len(prepared) == len(set(prepared)) >= 6
    assert all(torch.equal(each, found[0]) for each in found)


def test_the_first_call_imports_no_compiler():
    """Which takes seconds: operators of torch's do at their first call."""
    code = """if True:
        import sys, torch, vggfeat
        x = torch.rand(1, 3, 32, 32, requires_grad=True)
        features = vggfeat.VGGFeatures(["relu1_2", "relu2_1"], weights="bundled")
        sum(tap.mean() for tap in features(x).values()).backward()
        with torch.no_grad():
            features(x)
        vggfeat.PerceptualLoss(["relu2_1"], weights="bundled", criterion=lambda a, b: (a - b).abs())(x, x).backward()
        vggfeat.StyleLoss(["relu2_1"], weights="bundled")(x, x.detach()).backward()
        assert not {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_waits_for_no_thread_that_it_lacks():
    """Which held the lock of the weights, or had warnings ignored, at the time."""
    code = """if True:
        import os, signal, sys, threading, warnings, torch, vggfeat
        from vggfeat.errors import quiet
        from vggfeat.trunk import Trunk
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        torch.set_num_threads(1)
        features = vggfeat.VGGFeatures(["relu1_1"], weights="bundled")
        before, held, over = list(warnings.filters), threading.Event(), threading.Event()
        def hold():
            with Trunk._lock, quiet():
                held.set()
                over.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        if not (child := os.fork()):
            signal.alarm(60)
            features(torch.rand(1, 3, 32, 32))
            os._exit(warnings.filters != before)
        ended = os.waitpid(child, 0)[1]
        over.set()
        thread.join()
        sys.exit(ended != 0 or warnings.filters != before)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dim", [0, 1, 2, 4])
def test_vmap_over_any_dimension(trunks, keep, dim):
    """Three calls with two images each."""
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_1", "pool2"))
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)

    def taps(x):
        return run(x, filters, plan, keep=keep)

    def grad(x):
        return [torch.func.grad(lambda x: sum(tap.square().mean() for tap in taps(x)))(x)]

    calls = images(6, 3, 9, 13).unflatten(0, (3, 2))
    for call in (taps, grad):
        found = torch.func.vmap(call, in_dims=dim)(calls.movedim(0, dim))
        for values, expected in zip(zip(*found, strict=True), map(call, calls), strict=True):
            torch.testing.assert_close(list(values), expected)


@pytest.mark.parametrize("keep", KEEPS)
def test_vmap_over_gradients_alone(trunks, keep):
    """Those of both taps, or of one, and of the same two images."""
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_1", "pool2"))
    filters = trunks(arch).filters(plan, torch.device("cpu"), torch.float64)
    taps, pull = torch.func.vjp(lambda x: run(x, filters, plan, keep=keep), images(2, 3, 9, 13))
    first, last = (images(3 * len(tap), *tap.shape[1:]).unflatten(0, (3, -1)) for tap in taps)
    (found,) = torch.func.vmap(pull)([first, last])
    torch.testing.assert_close(found, torch.stack([pull(list(each))[0] for each in zip(first, last, strict=True)]))
    (found,) = torch.func.vmap(lambda grad: pull([grad, last[0]]))(first)
    torch.testing.assert_close(found, torch.stack([pull([each, last[0]])[0] for each in first]))


@pytest.mark.parametrize("keep", KEEPS)
def test_opcheck_of_bfloat16(thin, trunks, keep):
    """For which images stay float32."""
    thin(14)
    arch = ARCHS["vgg16"]
    plan = Plan(arch, ("relu1_2", "pool1"))
    x = images(2, 3, 17, 14, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    args = (x, trunks(arch).filters(plan, x.device, torch.bfloat16), plan.code, keep)
    torch.library.opcheck(operators.trunk_forward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
@pytest.mark.parametrize("size", [(2, 3), (5, 7)])
@pytest.mark.parametrize("pad", [1, 2])
def test_the_gradient_of_padding_added_up_in_a_fixed_order(padding, size, pad):
    if padding == "reflect" and pad >= min(size):
        pytest.skip("too small to be reflected")
    x = torch.rand(2, 4, *size, dtype=torch.float64, requires_grad=True)
    y = F.pad(x, (pad,) * 4, mode=padding)
    full = torch.rand_like(y)
    (wanted,) = torch.autograd.grad(y, x, full)
    torch.testing.assert_close(layers._folded(full.clone(), pad, padding), wanted)
