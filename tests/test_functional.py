"""The mathematics on tensors, against plain formulas and finite differences in float64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from vggfeat import functional as VF

ELEMENTWISE = {"mse": VF.mse, "l1": VF.l1, "charbonnier": VF.charbonnier}


def looped_gram(features, mask=None):
    """Σ over positions of weight · F_i F_j, one pair of channels and one position after the other, in float64."""
    features = features.double()
    n, c, h, w = features.shape
    weights = torch.ones(n, 1, h, w).double() if mask is None else mask.double().expand(n, 1, h, w)
    out = torch.zeros(n, c, c, dtype=torch.float64)
    for k in range(n):
        for y in range(h):
            for x in range(w):
                vector = features[k, :, y, x]
                out[k] += weights[k, 0, y, x] * vector[:, None] * vector[None]
        out[k] /= c * weights[k].sum()
    return out


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# ── Gram matrices ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("band", [1, 5 * 7 * 2])  # less than a row, and two rows
@pytest.mark.parametrize("add", [VF._add_by_matmul, VF._add_by_convolution])
def test_both_ways_to_a_gram_matrix(add, band, monkeypatch):
    """Whichever is the faster one here: both are the double loop, in pieces that do not divide the height."""
    monkeypatch.setattr(VF, "_convolution_is_faster", lambda: add is VF._add_by_convolution)
    monkeypatch.setattr(VF, "GRAM_BAND", band)
    features = torch.randn(3, 5, 9, 7)
    assert torch.allclose(VF.gram(features).double(), looped_gram(features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("convolution", "matmul", "faster"), [(1.0, 1.1, False), (1.0, 3.0, True), (3.0, 1.0, False)])
def test_two_ways_about_as_fast_are_no_matter_of_chance(convolution, matmul, faster, monkeypatch):
    """The convolution is taken where it is clearly faster, so that two runs on one machine take the same way."""
    now = [0.0]
    monkeypatch.setattr(VF.time, "perf_counter", lambda: now[0])
    for add, seconds in ((VF._add_by_convolution, convolution), (VF._add_by_matmul, matmul)):
        monkeypatch.setattr(VF, add.__name__, lambda *_, seconds=seconds: now.append(now.pop() + seconds))
    assert VF._convolution_is_faster.__wrapped__() is faster


def test_gram_where_the_same_bits_are_asked_for(monkeypatch):
    """The way does not go by what was faster in this process."""
    ways = {add: [] for add in (VF._add_by_matmul, VF._add_by_convolution)}
    for add, called in ways.items():
        monkeypatch.setattr(VF, add.__name__, lambda total, part, called=called: called.append(part))
    for faster in (False, True):
        monkeypatch.setattr(VF, "_convolution_is_faster", lambda faster=faster: faster)
        VF.gram(torch.rand(1, 4, 3, 3))
    assert [len(called) for called in ways.values()] == [1, 1]
    torch.use_deterministic_algorithms(True)
    try:
        VF.gram(torch.rand(1, 4, 3, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [len(called) for called in ways.values()] == [2, 1]


def test_gram_backward_keeps_the_layout():
    """A gradient in another layout would be copied at every step."""
    features = torch.randn(1, 4, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(VF.gram(features).square().sum(), features)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_gram_of_four_numbers():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # two channels of two pixels
    products = torch.tensor([[[1 + 4.0, 3 - 2.0], [3 - 2.0, 9 + 1.0]]])
    assert torch.equal(VF.gram(features), products / (2 * 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (3, 6, 4, 2), (2, 1, 1, 7)])
def test_gram_is_the_double_loop(shape, layout):
    features = torch.randn(shape).contiguous(memory_format=layout)
    gram = VF.gram(features)
    assert gram.shape == (shape[0], shape[1], shape[1])
    assert gram.dtype == torch.float32
    assert torch.allclose(gram.double(), looped_gram(features), rtol=1e-5, atol=1e-6)
    assert torch.allclose(gram, gram.mT, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 3])
def test_gram_with_a_mask(count):
    features = torch.randn(3, 5, 4, 3)
    mask = torch.rand(count, 1, 4, 3)
    mask[:, :, 0] = 0
    assert torch.allclose(VF.gram(features, mask).double(), looped_gram(features, mask), rtol=1e-5, atol=1e-6)


def test_gram_of_one_image_under_several_masks():
    features, masks = torch.randn(1, 5, 4, 3), torch.rand(3, 1, 4, 3)
    expected = torch.cat([VF.gram(features, mask[None]) for mask in masks])
    assert torch.allclose(VF.gram(features, masks), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_mask_changes_nothing(dtype):
    features = torch.randn(2, 16, 32, 32).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3  # √0.3 alone is 1e-3 off in bfloat16, its square 2e-3
    assert relative(VF.gram(features, torch.full((1, 1, 32, 32), 0.3)), VF.gram(features)) < tolerance


def test_a_mask_weighs_by_its_rounded_roots():
    """Of what bfloat16 makes of a mask, the sum is taken of what features are multiplied by, and in float32."""
    features = torch.ones(2, 4, 64, 64).bfloat16()
    mask = torch.full((1, 1, 64, 64), 0.3)
    mask[..., 0, 0] = 1  # not a constant one
    assert relative(VF.gram(features, mask), VF.gram(features)) < 1e-5


def test_gram_of_float64_features_under_a_float32_mask():
    features, mask = torch.rand(2, 4, 3, 3, dtype=torch.float64), torch.rand(1, 1, 3, 3)
    assert relative(VF.gram(features, mask), VF.gram(features, mask.double())) < 1e-14


@pytest.mark.parametrize("scale", [1e-30, 1e-16, 3e37])
def test_the_scale_of_a_mask_does_not_matter(scale):
    features, mask = torch.rand(2, 4, 8, 8), torch.rand(2, 1, 8, 8)
    assert relative(VF.gram(features, scale * mask), looped_gram(features, mask)) < 1e-5
    expected = (features * mask).double().sum((1, 2, 3)) / mask.double().sum((1, 2, 3)) / 4
    assert relative(VF.masked_mean(features, scale * mask), expected) < 1e-6
    found, _ = VF.distance_and_gradient(features, torch.zeros_like(features), "l1", mask=scale * mask)
    assert relative(found, expected) < 1e-6
    assert relative(VF.masked_mean(features.half(), 1e5 * mask).float(), expected.float()) < 1e-2
    uneven = torch.tensor([1, scale])[:, None, None, None] * mask  # each image by its own largest value
    assert relative(VF.gram(features, uneven), looped_gram(features, mask)) < 1e-5
    assert relative(VF.masked_mean(features, uneven), expected) < 1e-6


def test_gram_where_the_mask_is_all_zero():
    features = (1e3 * torch.randn(2, 4, 3, 3)).requires_grad_()
    mask = torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    gram = VF.gram(features, mask)
    assert gram[0].abs().max() < 1e-12
    assert torch.allclose(gram[1].double(), looped_gram(features.detach())[1])
    gram.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_gradient_with_respect_to_a_mask_that_holds_zeros():
    features = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    mask = torch.rand(1, 1, 2, 4, dtype=torch.float64)
    mask[..., 0] = 0
    mask.requires_grad_()
    vectors = features.permute(0, 2, 3, 1).flatten(1, 2)
    weights = mask.flatten(1)[..., None]
    plain = (vectors * weights).mT @ vectors / (3 * weights.sum())
    probe = torch.randn(1, 3, 3, dtype=torch.float64)
    expected = torch.autograd.grad(plain, mask, probe)[0]
    assert torch.allclose(torch.autograd.grad(VF.gram(features, mask), mask, probe)[0], expected)


def test_gram_sums_bfloat16_features_in_float32():
    features = (torch.rand(1, 32, 48, 64) + 0.5).bfloat16()  # positive: sums are far larger than their terms
    exact = torch.einsum("nchw,ndhw->ncd", features.double(), features.double()) / features.numel()
    rows = features.flatten(2)
    rounded = (rows @ rows.mT) / features.numel()
    assert relative(VF.gram(features), exact) < 1e-5 < 1e-2 * relative(rounded, exact)


@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_large_activations(size, dtype):
    features = (size * torch.rand(1, 8, 64, 64)).to(dtype)
    gram = VF.gram(features)
    assert gram.dtype == torch.float32
    exact = torch.einsum("nchw,ndhw->ncd", features.double(), features.double()) / features.numel()
    assert relative(gram, exact) < 1e-5


@pytest.mark.parametrize("mapped", [False, True])
def test_gram_inside_autocast(mapped):
    features = torch.randn(2, 1, 4, 5, 5)
    gram = torch.func.vmap(VF.gram) if mapped else lambda x: torch.stack([VF.gram(one) for one in x])
    with torch.autocast("cpu", torch.bfloat16):
        found = gram(features)
    assert found.dtype == torch.float32
    assert torch.allclose(found, gram(features), rtol=1e-6)


def test_gram_backward_inside_autocast():
    features = torch.randn(2, 64, 6, 6, requires_grad=True)
    value = VF.gram(features).square().sum()
    (expected,) = torch.autograd.grad(value, features, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(value, features)
    assert torch.equal(found, expected)


def test_gram_under_vmap():
    features = torch.randn(3, 2, 4, 3, 5)
    expected = torch.stack([VF.gram(one) for one in features])
    assert torch.allclose(torch.func.vmap(VF.gram)(features), expected, rtol=1e-5, atol=1e-7)
    squared = torch.func.vmap(torch.func.grad(lambda x: VF.gram(x).square().sum()))(features)
    leaf = features.clone().requires_grad_()
    sum(VF.gram(one).square().sum() for one in leaf).backward()
    assert torch.allclose(squared, leaf.grad, rtol=1e-5, atol=1e-7)


# ── derivatives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


MASK = torch.tensor([[0.2, 1.0, 0.0], [0.5, 0.0, 0.9]], dtype=torch.float64)[None, None]
FUNCTIONS = {
    "gram": (VF.gram, lambda: (leaf(2, 3, 2, 3),)),
    "gram masked": (lambda x: VF.gram(x, MASK), lambda: (leaf(2, 3, 2, 3),)),
    "unit_normalize": (VF.unit_normalize, lambda: (leaf(2, 3, 2, 2),)),
    "mse": (VF.mse, lambda: (leaf(2, 3, 2, 2), leaf(2, 3, 2, 2))),
    "charbonnier": (lambda a, b: VF.charbonnier(a, b, 0.1), lambda: (leaf(2, 3, 2, 2), leaf(1, 3, 2, 2))),
    "cosine": (VF.cosine, lambda: (leaf(2, 3, 2, 2), leaf(1, 3, 2, 2))),
    "total_variation": (VF.total_variation, lambda: (leaf(2, 3, 4, 3),)),
    "masked_mean": (lambda x: VF.masked_mean(x.square(), MASK), lambda: (leaf(2, 2, 2, 3),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_finite_differences(name):
    function, inputs = FUNCTIONS[name]
    assert gradcheck(function, inputs())
    assert gradgradcheck(function, inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gram_gradient_is_that_of_einsum(dtype, layout):
    features = torch.randn(3, 8, 6, 5).to(dtype).contiguous(memory_format=layout).requires_grad_()
    probe = torch.randn(3, 8, 8)  # not symmetric
    plain = features.detach().double().requires_grad_()
    (torch.einsum("nchw,ndhw->ncd", plain, plain) / (8 * 6 * 5) * probe).sum().backward()
    (VF.gram(features) * probe).sum().backward()
    assert features.grad.dtype == dtype
    assert relative(features.grad, plain.grad) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", VF.CRITERIA)
def test_gradients_are_finite_at_equality_and_at_zero(name):
    a = torch.randn(2, 4, 3, 3)
    a[:, :, 0] = 0  # vectors of zeros
    for other in (a, torch.zeros_like(a)):
        left, right = a.clone().requires_grad_(), other.clone().requires_grad_()
        VF.CRITERIA[name](left, right).sum().backward()
        assert torch.isfinite(left.grad).all()
        assert torch.isfinite(right.grad).all()


# ── distances ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_distances_of_known_numbers():
    a, b = torch.tensor([[3.0, -1.0, 0.5]]), torch.tensor([[1.0, -1.0, 2.0]])
    assert torch.equal(VF.mse(a, b), torch.tensor([[4.0, 0.0, 2.25]]))
    assert torch.equal(VF.l1(a, b), torch.tensor([[2.0, 0.0, 1.5]]))
    # √(3² + 4²) - 4 = 1 and √(0² + 4²) - 4 = 0
    four = VF.charbonnier(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]]), eps=4.0)
    assert torch.equal(four, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(VF.charbonnier(a, b), VF.l1(a, b), atol=1e-3)


def test_cosine_of_known_angles():
    # the channel vectors at four positions: at 0°, 90°, 180° and 60°
    a = torch.tensor([[1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0]])[None, :, None]
    b = torch.tensor([[5.0, 0.0, -3.0, 0.5], [0.0, 2.0, -3.0, 0.75**0.5]])[None, :, None]
    found = VF.cosine(a, b)
    assert found.shape == (1, 1, 1, 4)
    assert torch.allclose(found.flatten(), torch.tensor([0.0, 1.0, 2.0, 0.5]), atol=1e-6)
    zero = torch.zeros(1, 2, 1, 4)
    assert torch.equal(VF.cosine(a, zero), torch.ones(1, 1, 1, 4))
    assert torch.equal(VF.cosine(zero, zero), torch.zeros(1, 1, 1, 4))
    many = torch.randn(2, 64, 16, 16)
    assert torch.equal(VF.cosine(many, many), torch.zeros(2, 1, 16, 16))
    near = many + 1e-4 * torch.randn(many.shape)  # at an angle of 1e-4, whose cosine float32 rounds to 1
    exact = 1 - torch.nn.functional.cosine_similarity(many.double(), near.double(), dim=1)[:, None]
    assert relative(VF.cosine(many, near), exact) < 1e-3


@pytest.mark.parametrize("name", VF.CRITERIA)
def test_distances_are_symmetric_and_float32(name):
    a, b = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()
    distance = VF.CRITERIA[name]
    assert distance(a, b).dtype == torch.float32
    assert torch.equal(distance(a, b), distance(b, a))
    assert torch.equal(distance(a, b), distance(a.float(), b.float()))
    assert distance(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_distances_are_zero_at_equality(name):
    a = torch.randn(2, 4, 3, 3, requires_grad=True)
    values = ELEMENTWISE[name](a, a.detach())
    assert torch.equal(values, torch.zeros_like(values))
    values.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_unit_normalize():
    found = VF.unit_normalize(torch.tensor([3.0, 4.0])[None, :, None, None])
    assert torch.allclose(found.flatten(), torch.tensor([0.6, 0.8]))
    assert torch.equal(VF.unit_normalize(torch.zeros(1, 2, 1, 1)), torch.zeros(1, 2, 1, 1))
    assert torch.allclose(VF.unit_normalize(torch.randn(2, 5, 3, 3)).norm(dim=1), torch.ones(2, 3, 3))
    short = torch.tensor([6e-6, 8e-6])[None, :, None, None]  # of length 1e-5, whose square is the guard
    assert torch.allclose(VF.unit_normalize(short).flatten(), torch.tensor([0.6, 0.8]) * 0.5**0.5)
    many = torch.randn(3, 2, 5, 3, 3)
    assert torch.allclose(torch.func.vmap(VF.unit_normalize)(many), torch.stack([VF.unit_normalize(x) for x in many]))
    large = torch.full((1, 4, 1, 1), 1e4).bfloat16()
    assert torch.allclose(VF.unit_normalize(large), torch.full((1, 4, 1, 1), 0.5))


# ── means ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_masked_mean_of_known_numbers():
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])  # (1,2,2,2)
    assert torch.equal(VF.masked_mean(values), torch.tensor([4.5]))
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    assert torch.equal(VF.masked_mean(values, left), torch.tensor([(1 + 3 + 5 + 7) / 4]))
    partial = torch.tensor([[0.5, 0.0], [0.0, 0.25]])[None, None]
    expected = (0.5 * (1 + 5) + 0.25 * (4 + 8)) / (2 * 0.75)
    assert torch.allclose(VF.masked_mean(values, partial), torch.tensor([expected]))
    assert torch.allclose(VF.masked_mean(values, torch.ones(1, 1, 2, 2)), torch.tensor([4.5]))


def test_masked_mean_of_a_batch():
    values = torch.rand(3, 2, 2, 2, requires_grad=True)
    masks = torch.tensor([1.0, 0.0, 0.5])[:, None, None, None].expand(3, 1, 2, 2)
    found = VF.masked_mean(values, masks)
    plain = values.detach().mean((1, 2, 3))
    assert torch.allclose(found, plain * torch.tensor([1.0, 0.0, 1.0]))  # nothing to see is no difference, not NaN
    found.sum().backward()
    assert torch.isfinite(values.grad).all()
    shared = VF.masked_mean(values, torch.ones(1, 1, 2, 2))
    assert torch.allclose(shared, plain)


def test_mean_of_values_without_positions():
    assert torch.equal(VF.masked_mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert torch.equal(VF.masked_mean(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("name", VF.DERIVATIVES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masks", [None, 1, 2])
def test_distance_and_gradient_are_those_of_autograd(name, normalize, masks, monkeypatch):
    monkeypatch.setattr(VF, "BAND", 2 * 5 * 4 * 3)  # three rows at a time, and one at the end
    a = torch.randn(2, 5, 7, 4).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    b = torch.randn(1, 5, 7, 4).double()
    with torch.no_grad():
        a[0, :, 2, 1] = b[0, :, 2, 1]  # equal, and zero
        a[1, :, 6, 3] = 0
    mask = None if masks is None else torch.rand(masks, 1, 7, 4).double()
    if masks == 2:
        mask[1] = 0  # looks nowhere
    x, y = (VF.unit_normalize(a), VF.unit_normalize(b)) if normalize else (a, b)
    expected = VF.masked_mean(VF.CRITERIA[name](x, y), mask)
    (gradient,) = torch.autograd.grad(expected.sum(), a)
    found, by_hand = VF.distance_and_gradient(a.detach(), b, name, normalize, mask)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_hand, gradient, rtol=1e-10, atol=1e-14)
    assert by_hand.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", VF.DERIVATIVES)
def test_distance_and_gradient_change_nothing_and_sum_in_float32(name):
    a, b = torch.rand(1, 4, 3, 3), torch.rand(1, 4, 3, 3)
    before = a.clone(), b.clone()
    exact, slope = VF.distance_and_gradient(a, b, name)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    coarse, half = VF.distance_and_gradient(a.bfloat16(), b.bfloat16(), name)
    assert (exact.dtype, slope.dtype, coarse.dtype, half.dtype) == (*[torch.float32] * 3, torch.bfloat16)
    wide, _ = VF.distance_and_gradient(a.bfloat16().double(), b.bfloat16().double(), name)
    assert relative(coarse, wide) < 1e-6  # only the features are coarse


def test_total_variation_of_known_numbers():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])[None, None]
    down = (4 + 1 + 1) / 3
    across = (1 + 4 + 0 + 0) / 4
    assert torch.allclose(VF.total_variation(image), torch.tensor([down + across]))
    batch = torch.cat([image, torch.full_like(image, 0.7), 2 * image])
    assert torch.allclose(VF.total_variation(batch), torch.tensor([1.0, 0.0, 4.0]) * (down + across))


def test_total_variation_does_not_depend_on_the_size():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert torch.allclose(VF.total_variation(ramp), VF.total_variation(ramp[..., :4, :5]))


def test_total_variation_takes_differences_in_float32():
    image = (1 + torch.rand(1, 3, 16, 16)).bfloat16()
    assert torch.allclose(VF.total_variation(image), VF.total_variation(image.float()), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (2, 3, 5, 1), (2, 3, 1, 1), (0, 3, 4, 4)])
def test_total_variation_of_a_line(shape):
    """What has no neighbour differs from none."""
    image = torch.rand(shape, dtype=torch.float64)
    lines = image.flatten(2)
    expected = (lines[..., 1:] - lines[..., :-1]).square().sum((1, 2)) / (3 * max(1, lines.shape[2] - 1))
    torch.testing.assert_close(VF.total_variation(image), expected if shape[0] else image.new_zeros(0))
