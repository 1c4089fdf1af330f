"""The Triton kernels against torch in float64: on a GPU as they are, elsewhere in Triton's own interpreter."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat import devices
from vggfeat.trunk import bits, layers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]

if not INTERPRETED:

    def test_in_the_interpreter():
        """All that follows. Triton asks for it when it is imported, so that it takes another process."""
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert found.returncode == 0 and " passed" in found.stdout, found.stdout


@pytest.fixture(params=DEVICES)
def device(request):
    """Where the kernels run."""
    return request.param


@pytest.fixture
def loops(device):
    if INTERPRETED:
        from vggfeat.training import kernels as training

        try:
            training.batch_norm_relu(torch.ones(2, 1, 1, 1), *torch.ones(4, 1), None, 0.1, 1e-5)
        except Exception as error:
            if "only 0-dimensional arrays" not in str(error):  # Triton 3.6 with NumPy 2.5
                raise
            pytest.skip(f"this interpreter of Triton's fails at a loop: {error}")


def maps(shape, dtype, device, *, mean=0.0, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return values.to(device, dtype).contiguous(memory_format=torch.channels_last)


def relative(ours, wanted):
    return float((ours.double() - wanted).norm() / wanted.norm())


SHAPES = [(2, 20, 9, 11), (1, 64, 8, 8), (3, 130, 6, 7), (1, 1, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_max_pool(device, shape, dtype):
    from vggfeat import kernels

    x = maps(shape, dtype, device).relu()  # with equals in many windows
    exact = x.double().contiguous().requires_grad_()
    wanted = F.max_pool2d(exact, 2)
    y, argmax = kernels.max_pool(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y.double(), wanted)
    grad = maps(y.shape, dtype, device, seed=1)
    wanted.backward(grad.double())
    found = kernels.max_pool_backward(grad, argmax, *shape[2:])
    assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(found.double(), exact.grad)
    masked = kernels.max_pool_backward(grad, argmax, *shape[2:], y)
    assert torch.equal(masked.double(), exact.grad * (exact > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 9, 11), (1, 64, 8, 8), (3, 136, 6, 7)])
def test_signs_as_bits(device, shape, dtype):
    """Against the same in torch's operations, on the CPU."""
    from vggfeat import kernels

    x = maps(shape, dtype, device).relu()
    packed = kernels.pack(x)
    assert torch.equal(packed.cpu(), bits.pack(x.cpu()))
    grad = maps(shape, dtype, device, seed=1)
    wanted = torch.where(x > 0, grad, 0)
    kernels.mask(grad, packed)
    assert torch.equal(grad, wanted)
    y, planes = kernels.max_pool_packed(x)
    theirs, argmax = layers.pool(x.cpu(), "max", "bits", True)
    assert torch.equal(y.cpu(), theirs) and torch.equal(planes.cpu(), argmax)
    grad = maps(y.shape, dtype, device, seed=2)
    found = kernels.max_pool_backward_packed(grad, planes, *shape[2:])
    assert torch.equal(found.cpu(), layers.max_pool_backward(grad.cpu(), *shape[2:], argmax, None))


def test_signs_of_a_number_of_values_that_fills_no_byte(device):
    from vggfeat import kernels

    x = maps((3, 5, 3, 3), torch.float32, device).relu()
    packed, grad = kernels.pack(x), torch.ones_like(x)
    assert torch.equal(packed.cpu(), bits.pack(x.cpu()))
    bad = x.clone()
    bad[1, 2] = torch.nan
    assert torch.equal(kernels.pack(bad).cpu(), bits.pack(bad.cpu())) and not torch.equal(kernels.pack(bad), packed)
    kernels.mask(grad, packed)
    assert torch.equal(grad > 0, x > 0)


def test_grids_of_the_largest_maps(monkeypatch):
    """CUDA has up to 2^31 blocks in the first dimension, and 65535 in the second."""
    pytest.importorskip("triton")
    from vggfeat import kernels
    from vggfeat.training import kernels as training

    grids = []
    for module in (kernels, training):
        monkeypatch.setattr(module, "launch", lambda kernel, on, grid, *rest, **options: grids.append(grid))
    x, half = (torch.empty(4, 512, side, side, dtype=torch.bfloat16, device="meta") for side in (4000, 2000))
    kernels.distance_and_gradient(x, x, "mse", 1e-3, None, None)
    kernels.max_pool(x)
    kernels.max_pool_packed(x)
    kernels.max_pool_backward(half, torch.empty_like(half, dtype=torch.uint8), 4000, 4000)
    kernels.pack(x)
    _, stats = training.batch_norm_relu(x, *torch.empty(4, 512, device="meta"), None, 0.1, 1e-5, True)
    training.batch_norm_relu_backward(half, x, stats, True)
    assert len(grids) == 11 and all(0 < first < 2**31 and 0 < second < 2**16 for first, second in grids)


def test_no_images(device):
    from vggfeat import kernels

    x = maps((0, 8, 4, 4), torch.float32, device)
    y, argmax = kernels.max_pool(x)
    packed, planes = kernels.max_pool_packed(x)
    assert y.shape == packed.shape == (0, 8, 2, 2) and kernels.pack(x).shape == (0, 16) and planes.shape == (0, 3, 4)
    assert (
        kernels.max_pool_backward(y, argmax, 4, 4).shape
        == kernels.max_pool_backward_packed(y, planes, 4, 4).shape
        == x.shape
    )
    kernels.mask(x, kernels.pack(x))


def test_however_maps_are_laid_out(device, loops):
    """As saved tensors may come back from hooks, or from vmap."""
    from vggfeat import kernels
    from vggfeat.training import kernels as training

    x = maps((2, 8, 6, 5), torch.float32, device).relu()
    grad = maps((2, 8, 3, 2), torch.float32, device, seed=1)
    y, argmax = kernels.max_pool(x)
    (packed, planes), signs = kernels.max_pool_packed(x), kernels.pack(x)
    wanted = kernels.max_pool_backward(grad, argmax, 6, 5, y)
    assert not torch.equal(wanted, torch.zeros_like(wanted))
    other = x.contiguous(), grad.contiguous(), argmax.contiguous(), y.contiguous()
    assert torch.equal(kernels.max_pool(other[0])[1], argmax) and torch.equal(kernels.pack(other[0]), signs)
    assert torch.equal(kernels.max_pool_packed(other[0])[1], planes) and torch.equal(packed, y)
    assert torch.equal(kernels.max_pool_backward(other[1], other[2], 6, 5, other[3]), wanted)
    assert torch.equal(kernels.max_pool_backward_packed(other[1], planes, 6, 5), wanted)
    ones = torch.ones(4, 8, device=device)
    moved, theirs = ones.clone(), ones.clone()
    y, stats = training.batch_norm_relu(x, *moved, None, 0.1, 1e-5)
    assert torch.equal(training.batch_norm_relu(other[0], *theirs, None, 0.1, 1e-5)[0], y)
    along = maps(x.shape, torch.float32, device, seed=2)
    found = training.batch_norm_relu_backward(along.contiguous(), other[0], stats)
    assert all(map(torch.equal, found, training.batch_norm_relu_backward(along, x, stats)))


def test_whatever_the_default_type_is(device, loops):
    from vggfeat.training import kernels as training

    x = maps((4, 8, 6, 6), torch.float32, device)
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            ones = torch.ones(4, 8, dtype=torch.float32, device=device)
            results.append(training.batch_norm_relu(x, *ones, None, 0.1, 1e-5)[0])
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*results)


def test_max_pool_of_nan_is_nan(device):
    from vggfeat import kernels

    x = maps((1, 8, 4, 4), torch.float32, device)
    for i, place in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        x[0, i, *place] = torch.nan
    y, argmax = kernels.max_pool(x)
    assert torch.equal(y.isnan(), F.max_pool2d(x, 2).isnan()) and y.isnan().sum() == 4
    found = kernels.max_pool_backward(torch.full_like(y, torch.nan), argmax, 4, 4, y)
    assert found.isnan().sum() == (F.max_pool2d(x, 2).nan_to_num(1) > 0).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 20, 5, 3), (3, 130, 4, 6), (40, 64, 8, 8), (2, 1, 1, 1), (1, 8, 2, 2)])
@pytest.mark.parametrize("lacks", [True, False])
@pytest.mark.parametrize("pool", [False, True])
def test_batch_norm_and_relu(device, loops, shape, dtype, lacks, pool, monkeypatch):
    from vggfeat.training import kernels as training

    if pool and any(side % 2 for side in shape[2:]):
        pytest.skip("the caller pools maps of odd sides")
    monkeypatch.setattr(training, "PROGRAMS", 3)  # so that each adds more than one block
    channels = shape[1]
    x = maps(shape, dtype, device, mean=3.0)
    weight, bias, before, mean, var = maps((5, channels, 1, 1), torch.float32, device, mean=0.5, seed=1)[..., 0, 0]
    exact = [value.double().contiguous().requires_grad_() for value in (x, weight, bias)]
    moved, theirs = (mean.clone(), var.clone()), (mean.double(), var.double())
    shifted = exact[0] + before.double()[:, None, None] if lacks else exact[0]
    wanted = F.batch_norm(shifted, *theirs, *exact[1:], True, 0.1, 1e-5).relu()
    wanted = F.max_pool2d(wanted, 2) if pool else wanted
    y, stats = training.batch_norm_relu(x, weight, bias, *moved, before if lacks else None, 0.1, 1e-5, pool)
    coarse = 6e-3 if dtype == torch.bfloat16 else 2e-6
    assert y.dtype == dtype and relative(y, wanted.detach()) < coarse
    assert relative(moved[0], theirs[0]) < 1e-6 and relative(moved[1], theirs[1]) < 1e-5
    # where a value is 0 to rounding, whether it came through is rounding too: no gradient there
    grad = torch.where((wanted > 0) == (y > 0), maps(y.shape, dtype, device, seed=2), 0).to(x)
    wanted.backward(grad.double())
    found = training.batch_norm_relu_backward(grad.contiguous(memory_format=torch.channels_last), x, stats, pool)
    for ours, value, most in zip(found, exact, (coarse, 2e-5, 2e-5), strict=True):
        assert ours.shape == value.shape and (ours.double() - value.grad).norm() <= most * value.grad.norm() + 1e-5


def test_where_a_window_has_equals_the_first_gets_the_gradient(device, loops):
    from vggfeat.training import kernels as training

    x = maps((2, 8, 6, 6), torch.float32, device).mul(2).round()  # with equals in many windows
    ones, bias, mean, var = torch.ones(4, 8, device=device)
    exact = x.double().contiguous().requires_grad_()
    wanted = F.max_pool2d(F.batch_norm(exact, None, None, ones.double(), bias.double(), True, 0.0, 1e-5).relu(), 2)
    y, stats = training.batch_norm_relu(x, ones, bias, mean, var, None, 0.1, 1e-5, pool=True)
    grad = maps(y.shape, torch.float32, device, seed=1)
    wanted.backward(grad.double())
    found, _, _ = training.batch_norm_relu_backward(grad, x, stats, pool=True)
    assert relative(found, exact.grad) < 1e-5


def test_statistics_of_values_far_from_0(device, loops):
    from vggfeat.training import kernels as training

    x = maps((50, 8, 6, 6), torch.float32, device, mean=1000.0)
    ones, zeros, mean, var = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device).repeat(8, 1).T.contiguous()
    training.batch_norm_relu(x, ones, zeros, mean, var, None, 1.0, 1e-5)
    assert relative(mean, x.double().mean((0, 2, 3))) < 1e-7
    assert relative(var, x.double().var((0, 2, 3))) < 1e-5


def test_of_nan_all_of_the_channel_is_nan(device, loops):
    from vggfeat.training import kernels as training

    x = maps((2, 3, 2, 2), torch.float32, device)
    x[1, 1, 0, 1] = torch.nan
    ones, mean, var = torch.ones(3, 3, device=device)
    y, _ = training.batch_norm_relu(x, ones, ones.clone(), mean, var, None, 0.1, 1e-5)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all() and mean.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_trained_by_kernels_is_the_network(device, loops, frozen, side):
    from vggfeat.training.fused import Fused

    torch.manual_seed(0)
    net, theirs = (
        vggfeat.vgg11(4, batch_norm=True, head="slim", width=0.125, dropout=0.0).to(device) for _ in range(2)
    )
    theirs.load_state_dict(net.state_dict())
    for each in (net, theirs):
        each.train()
        with torch.no_grad():
            for module in each.features:
                if isinstance(module, nn.Conv2d):
                    module.bias.fill_(0.3)
        if frozen:
            each.features[1].eval()
    theirs.double()
    x = maps((6, 3, side, side), torch.float32, device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours, wanted = Fused(net)(x), theirs(x.double())
        assert relative(ours.detach(), wanted.detach()) < 1e-4
        ours[:, 0].sum().backward()
        wanted[:, 0].sum().backward()
    for (name, mine), value in zip(net.named_parameters(), theirs.parameters(), strict=True):
        if mine.grad is None:  # a bias that makes no difference
            assert name.endswith("bias") and value.grad.norm() < 1e-10
        else:
            assert (mine.grad.double() - value.grad).norm() < 1e-3 * value.grad.norm() + 1e-6, name
    for mine, value in zip(net.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), value.double(), rtol=1e-4, atol=1e-4)
    net.eval(), theirs.eval()
    assert torch.equal(Fused(net).eval()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["mse", "l1", "charbonnier"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "theirs"), [((3, 20, 7, 9), 3), ((2, 512, 4, 5), 1), ((1, 64, 16, 16), 1)])
def test_distances_and_their_gradients(device, shape, theirs, normalize, criterion, dtype):
    """Against torch's operations in float64."""
    from vggfeat import functional, kernels

    a = maps(shape, dtype, device).relu()
    b = maps((theirs, *shape[1:]), torch.float32, device, seed=1).relu()
    a[:, :, 1, 1] = b[:, :, 2, 2] = b[:, :, 1, 1] = 0  # lengths of 0, and equals
    for weights in (None, maps((1, shape[1], 1, 1), torch.float32, device, seed=2).abs()[0]):
        wide = weights if weights is None else weights.double()
        wanted, gradient = functional.distance_and_gradient(a.double(), b.double(), criterion, normalize, None, wide)
        eps = functional.CHARBONNIER_EPS, functional.EPS if normalize else None
        found, grad = kernels.distance_and_gradient(a, b, criterion, *eps, weights)
        assert found.dtype == torch.float32 and relative(found, wanted) < 1e-6
        assert grad.dtype == dtype and relative(grad, gradient) < (6e-3 if dtype == torch.bfloat16 else 1e-5)
        assert grad.isfinite().all()


def test_the_distance_of_nan_is_that_images(device):
    from vggfeat import kernels

    a, b = maps((2, 8, 4, 4), torch.float32, device), maps((1, 8, 4, 4), torch.float32, device, seed=1)
    a[1, 3, 2, 2] = torch.nan
    for criterion in kernels.CRITERIA:
        found, grad = kernels.distance_and_gradient(a, b, criterion, 1e-3, 1e-10, None)
        assert found.isnan().tolist() == [False, True] and grad[0].isfinite().all() and grad[1, :, 2, 2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["ieee"] if INTERPRETED else ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("channels", [3, 20, 64, 160])
def test_a_product_added_to_a_gradient_that_goes_through_a_relu(device, loops, dtype, channels, precision):
    from vggfeat import kernels

    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 by their bits, as integers")
    x = maps((2, channels, 9, 17), dtype, device).relu_()
    matrix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    before = maps((2, channels, 9, 17), dtype, device, seed=2)
    product = torch.einsum("nchw,cd->ndhw", x.double(), matrix.double())
    for masked in (False, True):
        for onto in (None, before):
            wanted = product if onto is None else product + onto.double()
            wanted = torch.where(x > 0, wanted, 0.0) if masked else wanted
            given = None if onto is None else onto.clone(memory_format=torch.preserve_format)
            found = kernels.add_product(x, matrix, given, masked=masked, precision=precision)
            assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
            assert given is None or found is given
            exact = dtype == torch.float32 and precision != "tf32"
            assert relative(found, wanted) < (2e-6 if exact else 4e-3)
    x[1, 1, 2, 3] = torch.nan
    found = kernels.add_product(x, matrix, before.clone(), masked=True)
    assert found[1, :, 2, 3].isnan().sum() == 1 + int((x[1, :, 2, 3] > 0).sum()) and not found[0].isnan().any()


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 64, 40)])
def test_images_in_two_halves(device, shape):
    from vggfeat import kernels

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found = kernels.split_bfloat16(given, 16)
        high = x.bfloat16()
        low = (x - high.float()).bfloat16()
        wanted = F.pad(torch.cat([high, low, high], 1), (0, 0, 0, 0, 0, 7))
        assert found.shape == wanted.shape and found.is_contiguous(memory_format=torch.channels_last)
        if INTERPRETED:  # which cuts bits off where hardware rounds
            assert torch.equal(found[:, :3], found[:, 6:9]) and not found[:, 9:].any()
            assert relative(found[:, :3].double() + found[:, 3:6].double(), x.double()) < 2e-5
        else:
            assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_losses_on_a_gpu_use_them(monkeypatch):
    """To the values of torch's operations there, but for rounding, which TF32 enlarges on the way back."""
    from vggfeat import functional, kernels

    used, kernel = [], kernels.distance_and_gradient
    monkeypatch.setattr(kernels, "distance_and_gradient", lambda *given: used.append(given[2]) or kernel(*given))
    x, y = (torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed)).cuda() for seed in (0, 1))
    loss, results = vggfeat.LPIPS(weights="random"), []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(functional, "triton_kernels", lambda device, dtype: None)
        image = x.clone().requires_grad_()
        value = loss(image, y)
        value.sum().backward()
        results.append((value.detach().double(), image.grad.double()))
    assert used == ["mse"] * 5
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 3, 3, 3), (24, 40, 3, 3)])
def test_steps_of_muon(device, loops, shape, dtype, monkeypatch):
    """Against the definition, in float64."""
    from vggfeat.training import kernels as training

    monkeypatch.setattr(training, "PROGRAMS", 2)  # so that each adds more than one block
    filters, grads, sums, directions = (
        [maps(shape, torch.float32, device, seed=4 * i + j) for j in (0, 1)] for i in range(4)
    )
    exact = [[value.double() for value in values] for values in (filters, grads, sums)]
    steps = training.add_momentum(grads, sums, 0.9, dtype)
    rows = [direction.permute(0, 2, 3, 1).flatten(1).to(dtype) for direction in directions]
    norms = torch.stack([value.norm() for value in filters]) * 1.5
    training.move(filters, torch.stack(rows), norms * 0.1, norms)
    for i, (value, grad, total) in enumerate(zip(*exact, strict=True)):
        total = 0.9 * total + grad
        assert relative(sums[i], total) < 1e-6
        wanted = (grad + 0.9 * total).permute(0, 2, 3, 1).flatten(1)
        assert steps.dtype == dtype and relative(steps[i], wanted) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
        along = rows[i].double().view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        moved = value - 0.1 * norms[i].double() * along / along.norm()
        assert relative(filters[i], moved * norms[i].double() / moved.norm()) < 1e-6


def test_without_a_direction_filters_stay(device, loops):
    from vggfeat.training import kernels as training

    value = maps((4, 2, 3, 3), torch.float32, device)
    before, norm = value.clone(), value.norm()[None]
    training.move([value], torch.zeros(1, 4, 18, device=device), norm * 0.1, norm)
    torch.testing.assert_close(value, before)


@pytest.mark.parametrize(
    "options", [{}, {"pad_mode": "reflect", "cutout": 8, "flip": "alternating"}, {"pad": 0, "flip": "none"}]
)
@pytest.mark.parametrize("size", [32, 36])
def test_crops(device, options, size, monkeypatch):
    """Against torch's operations, to the bit."""
    from vggfeat.training import kernels as training
    from vggfeat.training.batches import Batches
    from vggfeat.training.config import TrainConfig
    from vggfeat.training.data import ImageSet
    from vggfeat.training.distributed import World

    pixels = torch.randint(0, 256, (20, 36, 44, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet("noise", ["a", "b"], torch.arange(20) % 2, list(map(str, range(20))), None, pixels)
    found = []
    for kernels in (None, training):
        batches = Batches(images, TrainConfig(batch_size=10, size=size, **options), size, World(torch.device(device)))
        monkeypatch.setattr(batches, "kernels", kernels)
        found.append([part.images for epoch in (0, 1) for parts in batches.epoch(epoch) for part in parts])
    assert len(found[0]) == 4
    for theirs, ours in zip(*found, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last) and torch.equal(ours, theirs)
    assert not torch.equal(found[0][0], found[0][2])


def test_where_they_do_not_work_torchs_operations_serve(monkeypatch):
    monkeypatch.setattr(devices, "_known", {})
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        assert devices.triton_kernels(torch.device(device), dtype) is None
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "vggfeat.kernels", raising=False)
    monkeypatch.delattr(vggfeat, "kernels", raising=False)
    with pytest.raises(ImportError):
        importlib.import_module("vggfeat.kernels")
    assert devices.triton_kernels(torch.device("cuda"), torch.float32) is None


def test_whether_they_work_is_tried_once_and_not_while_others_record(monkeypatch):
    monkeypatch.setattr(devices, "_known", {})
    tried = []
    monkeypatch.setattr(devices, "_working", lambda *where: tried.append(where) or "kernels")
    recording = [True, False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording.pop(0))
    where = torch.device("cuda"), torch.float32
    assert [devices.triton_kernels(*where) for _ in range(3)] == [None, "kernels", "kernels"] and tried == [where]
