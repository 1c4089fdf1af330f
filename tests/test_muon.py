"""Muon against the singular value decomposition and torch's SGD."""

import pytest
import torch

from vggfeat.training.muon import Muon, polar_direction


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filters(*shape, seed=0):
    return torch.nn.Parameter(random(*shape, seed=seed).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_the_polar_direction_has_the_singular_vectors_and_moves_all_of_them(shape):
    matrix = random(*shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ polar_direction(matrix) @ v.T / matrix.norm()  # diagonal in the same vectors
    values = found.diagonal()
    torch.testing.assert_close(found, values.diag(), rtol=0, atol=1e-10)
    large = s >= 0.02 * matrix.norm()
    assert large.sum() >= 7
    assert ((values[large] >= 0.68) & (values[large] <= 1.21)).all()
    assert (values > 0).all()


def test_short_directions_survive_float32():
    """Directions a thousand times as short as the longest come out as in float64, which has them all."""
    u, _, v = torch.linalg.svd(random(32, 288, dtype=torch.float64), full_matrices=False)
    matrix = ((u * torch.logspace(0, -3, 32)) @ v).float()
    exact = polar_direction(matrix.double())
    found = polar_direction(matrix).double()
    assert ((u.T @ (found - exact)).norm(dim=1) < 1e-3 * (u.T @ exact).norm(dim=1)).all()


def test_the_polar_direction_of_nothing_is_nothing():
    assert not polar_direction(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 3, 3, 3)], ids=["wide", "tall"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_step_has_the_length_it_is_told_and_the_norm_stays(dtype, shape, layout):
    weight = torch.nn.Parameter(random(*shape).contiguous(memory_format=layout))
    before = weight.detach().clone()
    weight.grad = random(*shape, seed=1)
    Muon([weight], lr=0.1, momentum=0.0, dtype=dtype).step()
    # before the norm is brought back: w' ∝ w - 0.1 ‖w‖ O / ‖O‖, with O the polar factor of the gradient as a matrix
    rows = before.flatten(1)
    direction = polar_direction(weight.grad.flatten(1))
    wanted = rows - 0.1 * rows.norm() * direction / direction.norm()
    wanted *= rows.norm() / wanted.norm()
    step, right = weight.detach().flatten(1) - rows, wanted - rows
    assert (step - right).norm() < (0.03 if dtype == torch.bfloat16 else 1e-5) * right.norm()
    assert weight.detach().norm() == pytest.approx(before.norm().item(), rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_scale_of_the_gradient_makes_no_difference(momentum):
    results = []
    for scale in (1.0, 1e4):
        weight = filters(8, 4, 3, 3)
        optimizer = Muon([weight], lr=0.1, momentum=momentum)
        for seed in range(4):
            weight.grad = scale * random(8, 4, 3, 3, seed=seed)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_where_filters_have_no_gradient_nothing_moves():
    weight, unused = filters(8, 4, 3, 3), filters(8, 4, 3, 3)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([weight, unused], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), before)
    assert torch.equal(unused.detach(), before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_no_filter_moves_as_with_torchs_sgd(weight_decay):
    ours, theirs = (torch.nn.Parameter(random(5, 7)) for _ in range(2))
    mover = Muon([ours], lr=0.1, momentum=0.8, weight_decay=weight_decay)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, nesterov=True, weight_decay=weight_decay)
    for seed in range(5):
        ours.grad = random(5, 7, seed=seed)
        theirs.grad = ours.grad.clone()
        mover.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_momentum_is_nesterovs():
    """Against the sums written out, on filters of one output, whose polar factor is the vector's direction."""
    weight = filters(1, 4, 3, 3)
    x, total = weight.detach().clone().double(), torch.zeros(1, 4, 3, 3, dtype=torch.float64)
    norm = x.norm()
    optimizer = Muon([weight], lr=0.05, momentum=0.7)
    for seed in range(5):
        weight.grad = random(1, 4, 3, 3, seed=seed)
        optimizer.step()
        total = 0.7 * total + weight.grad
        step = weight.grad + 0.7 * total
        x -= 0.05 * norm * step / step.norm()
        x *= norm / x.norm()
    torch.testing.assert_close(weight.detach().double(), x, rtol=1e-5, atol=1e-6)


def test_a_state_that_was_saved_goes_on_the_same():
    def made():
        return [filters(8, 4, 3, 3), torch.nn.Parameter(random(6))]

    def steps(parameters, optimizer, seeds):
        for seed in seeds:
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=seed)
            optimizer.step()

    unbroken, first, second = made(), made(), made()
    steps(unbroken, Muon(unbroken, lr=0.1), range(6))
    before = Muon(first, lr=0.1)
    steps(first, before, range(3))
    after = Muon(second, lr=0.3)
    for old, new in zip(first, second, strict=True):
        new.data.copy_(old.data)
    after.load_state_dict(before.state_dict())
    steps(second, after, range(3, 6))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(unbroken, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 30), (3, 30, 8)])
def test_polar_directions_of_many_matrices_are_those_of_each(shape, dtype):
    matrices = random(*shape, dtype=torch.float64).to(dtype)
    matrices[1] *= 1e-3
    found, wanted = polar_direction(matrices), torch.stack([polar_direction(matrix) for matrix in matrices])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 3e-2)


def test_filters_of_one_shape_are_moved_at_once_to_the_same():
    """As on a GPU; one by one on a CPU."""
    results = []
    for together in (False, True):
        weights = [filters(8, 4, 3, 3, seed=seed) for seed in range(3)]
        for seed, weight in enumerate(weights):
            weight.grad = random(8, 4, 3, 3, seed=10 + seed) * 10.0**seed
        optimizer = Muon(weights, lr=0.1)
        if together:
            for weight in weights:
                optimizer.state[weight] = {"sum": torch.zeros_like(weight), "norm": weight.norm()}
            with torch.no_grad():
                optimizer._move_filters(weights, 0.1, 0.9)
        else:
            optimizer.step()
        results.append([weight.detach() for weight in weights])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_rate_may_be_a_tensor():
    """As recorded steps want it, which look it up."""
    results = []
    for lr in (0.1, torch.tensor(0.1)):
        weights = [filters(8, 4, 3, 3), torch.nn.Parameter(random(6, seed=1))]
        optimizer = Muon(weights, lr=0.1, weight_decay=0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for weight in weights:
            weight.grad = random(*weight.shape, seed=2)
        optimizer.step()
        results.append([weight.detach() for weight in weights])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_on_a_gpu_steps_are_those_of_a_cpu(layout):
    """By kernels where filters are laid out for them, else by torch's operations."""
    shapes, results = [(8, 4, 3, 3), (8, 4, 3, 3), (64, 3, 3, 3), (6, 5), (6,)], []
    for device in ("cpu", "cuda"):
        weights = []
        for seed, shape in enumerate(shapes):
            value = random(*shape, seed=seed)
            value = value.contiguous(memory_format=layout) if len(shape) == 4 else value
            weights.append(torch.nn.Parameter(value.to(device)))
        optimizer = Muon(weights, lr=0.1, weight_decay=0.01)
        for step in range(4):
            for seed, weight in enumerate(weights):
                weight.grad = random(*weight.shape, seed=10 * step + seed).to(weight)
            optimizer.step()
        results.append([weight.detach().cpu() for weight in weights])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_a_closure_computes_the_gradients_first():
    weight = filters(4, 3, 3, 3)
    before = weight.detach().clone()

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], lr=0.1).step(closure) == before.square().sum()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_polar_direction_is_three_of_jordans_iterations(shape):
    """Of each singular value s: x ← 3.4445 x - 4.775 x³ + 2.0315 x⁵, three times, from s / ‖matrix‖."""

    torch.manual_seed(0)
    matrix = torch.randn(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    x = s / matrix.norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = matrix.norm() * (u * x) @ vh
    torch.testing.assert_close(polar_direction(matrix), expected, rtol=1e-9, atol=1e-9)


def _stepped(values, grads, **options):

    groups = options.pop("groups", None)
    made = [torch.nn.Parameter(value.clone()) for value in values]
    for value, grad in zip(made, grads, strict=True):
        value.grad = grad.clone()
    Muon([{"params": [v], **g} for v, g in zip(made, groups, strict=True)] if groups else made, **options).step()
    return [value.detach() for value in made]


def test_filters_of_1x1_are_filters():
    """VGG-C has them."""
    torch.manual_seed(0)
    before, grad = torch.randn(2, 6, 8, 1, 1)
    small, large = (_stepped([before], [grad * by], lr=0.1, weight_decay=0.5)[0] for by in (1, 1000))
    torch.testing.assert_close(small, large)
    assert float(small.norm()) == pytest.approx(float(before.norm()), rel=1e-5)


def test_each_group_of_filters_has_its_rate():
    torch.manual_seed(0)
    filters, grads = torch.randn(2, 2, 6, 4, 3, 3)
    rates = (0.01, 0.2)
    moved = _stepped(filters, grads, groups=[{"lr": rate} for rate in rates])
    for before, after, rate in zip(filters, moved, rates, strict=True):
        alone = _stepped([before], [grads[0] if rate == rates[0] else grads[1]], lr=rate)[0]
        torch.testing.assert_close(after, alone)
        angle = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
        assert float(angle.clamp(max=1).acos()) == pytest.approx(rate, rel=0.15)  # orthogonal to about that


@pytest.mark.parametrize("scale", [1e-5, 1e-10, 1e-15])
def test_tiny_gradients_of_filters_are_as_good(scale):
    torch.manual_seed(0)
    before, grad = torch.randn(2, 6, 4, 3, 3)
    torch.testing.assert_close(*(_stepped([before], [grad * by])[0] for by in (1, scale)), rtol=1e-3, atol=1e-4)


def test_polar_directions_in_bfloat16_are_near():

    torch.manual_seed(0)
    errors = []
    for _ in range(4):
        u, _, vh = torch.linalg.svd(torch.randn(32, 288, dtype=torch.float64), full_matrices=False)
        matrix = ((u * torch.logspace(0, -2, 32)) @ vh).bfloat16()
        exact = polar_direction(matrix.double())
        errors.append(float((polar_direction(matrix).double() - exact).norm() / exact.norm()))
    assert max(errors) < 0.02
