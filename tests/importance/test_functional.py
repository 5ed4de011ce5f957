"""The importance formulas against plain float64 ones: products, norms and acos, with Y = X + b formed first."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from layershed.errors import CalibrationError, UnknownNameError
from layershed.importance.functional import angular, cosine_importance, relative_magnitude

FUNCTIONS = (cosine_importance, relative_magnitude, angular)
UNDEFINED = {cosine_importance: 1.0, angular: 0.5}


def reference(function, x, b):
    """Per token, in float64; for the angle Kahan's 2 atan2(|u - v|, |u + v|) of unit vectors u and v."""
    x, y = x.double(), x.double() + b.double()
    if function is relative_magnitude:
        return (y - x).norm(dim=-1) / x.norm(dim=-1)
    u, v = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    # 1 - cos = |u - v|^2 / 2, which keeps its digits where 1 - u.v has none
    chord = (u - v).norm(dim=-1)
    return chord**2 / 2 if function is cosine_importance else 2 * torch.atan2(chord, (u + v).norm(dim=-1)) / math.pi


def random_pair(shape, ratio, seed=0, scale=1.0):
    """X of the given scale and a branch of about ``ratio`` times its length."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale
    return x, torch.randn(shape, generator=generator) * scale * ratio


def test_importance_reference_equals_the_textbook_formula():
    x, b = random_pair((50, 16), 1.0)
    cosine = cosine_similarity(x.double(), x.double() + b.double(), dim=-1)
    torch.testing.assert_close(reference(cosine_importance, x, b), 1 - cosine)
    torch.testing.assert_close(reference(angular, x, b), torch.arccos(cosine) / math.pi)


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    hidden=st.integers(2, 65),
    exponent=st.floats(-5, 1),
    scale=st.floats(-6, 6),
    seed=st.integers(0, 2**32),
)
def test_importance_equals_float64_over_shapes_and_scales(function, shape, hidden, exponent, scale, seed):
    x, b = random_pair((*shape, hidden), 10**exponent, seed, 10**scale)
    values = function(x, b, reduction="none")
    assert values.shape == tuple(shape)
    # a branch that happens to lie along X (few dimensions) turns it by less than float32 can say
    size = (b.double().norm(dim=-1) / x.double().norm(dim=-1)).clamp(max=1)
    floor = {cosine_importance: 3e-7 * size**2, angular: 1e-3 * size, relative_magnitude: 0 * size}[function]
    expected = reference(function, x, b)
    assert ((values - expected).abs() <= 1e-3 * expected + floor).all()
    torch.testing.assert_close(function(x, b).double(), values.double().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("ratio", [1e-5, 1e-4, 1e-3])
def test_importance_keeps_its_digits_where_a_float32_cosine_loses_them(function, ratio):
    x, b = random_pair((256, 64), ratio)
    expected = reference(function, x, b)

    def error(values):
        return ((values.double() - expected) / expected).abs().max().item()

    assert error(function(x, b, reduction="none")) < 1e-3
    if function is cosine_importance:
        naive = 1 - cosine_similarity(x, x + b, dim=-1)
        assert error(naive) > 50 * error(function(x, b, reduction="none"))
        assert error(naive) > 1e-2


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-4])
def test_importance_is_exact_if_the_branch_nearly_cancels_x(function, left):
    """Y is small and points another way: 10 % to 0.01 % of X is left, turned by about 6 degrees."""
    x, noise = random_pair((64, 64), 0.1)
    b = left * noise - (1 - left) * x
    torch.testing.assert_close(function(x, b, reduction="none").double(), reference(function, x, b), rtol=1e-2, atol=0)


def test_importance_of_an_antiparallel_branch_is_that_of_a_half_turn_or_zero():
    x, _ = random_pair((8, 16), 1.0)
    torch.testing.assert_close(cosine_importance(x, -3 * x), torch.tensor(2.0))
    torch.testing.assert_close(angular(x, -3 * x), torch.tensor(1.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(relative_magnitude(x, -3 * x), torch.tensor(3.0))
    assert cosine_importance(x, -0.5 * x).item() < 1e-6
    assert angular(x, -0.5 * x).item() < 1e-3


def test_importance_of_a_parallel_branch_is_zero():
    x, _ = random_pair((8, 16), 1.0)
    assert cosine_importance(x, 2 * x).item() < 1e-6
    assert angular(x, 2 * x).item() < 1e-3


@pytest.mark.parametrize("function", [cosine_importance, angular])
def test_importance_has_its_undefined_value_if_x_or_y_is_zero(function):
    x, b = random_pair((3, 16), 1.0)
    assert function(torch.zeros_like(x), b).item() == UNDEFINED[function]
    assert function(torch.zeros_like(x), torch.zeros_like(x)).item() == UNDEFINED[function]
    assert function(x, -x).item() == UNDEFINED[function]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_importance_of_a_zero_branch_is_zero(function):
    x, _ = random_pair((3, 16), 1.0)
    assert function(x, torch.zeros_like(x)).item() == 0


def test_relative_magnitude_is_infinite_if_only_x_is_zero():
    zero, b = torch.zeros(3, 4), torch.ones(3, 4)
    assert relative_magnitude(zero, b).item() == math.inf
    assert relative_magnitude(zero, zero).item() == 0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("x", "b"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (1.0, math.inf)])
def test_importance_of_a_nan_or_infinite_token_is_not_finite(function, x, b):
    assert not math.isfinite(function(torch.full((2, 4), x), torch.full((2, 4), b)).item())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_importance_of_half_precision_input_is_computed_in_float32(function, dtype):
    x, b = (tensor.to(dtype) for tensor in random_pair((4, 7, 32), 0.01))
    values = function(x, b, reduction="none")
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), reference(function, x, b), rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_importance_of_float64_input_stays_float64(function):
    x, b = (tensor.double() for tensor in random_pair((4, 32), 1e-3))
    values = function(x, b, reduction="none")
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, reference(function, x, b), rtol=1e-8, atol=0)


def test_importance_of_mixed_dtypes_is_computed_in_the_wider_one():
    x, b = random_pair((4, 32), 0.1)
    narrow = b.bfloat16()
    torch.testing.assert_close(
        cosine_importance(x, narrow, reduction="none").double(),
        reference(cosine_importance, x, narrow),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_importance_is_the_same_under_autocast(function):
    x, b = random_pair((4, 7, 32), 0.01)
    outside = function(x, b, reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(x, b, reduction="none"), outside)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_importance_leaves_masked_tokens_out_even_if_they_are_nan(function, dtype):
    x, b = random_pair((2, 5, 16), 0.3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=dtype)
    kept = mask.bool()
    expected = reference(function, x, b)[kept].mean()
    x[~kept], b[~kept] = math.nan, math.nan
    torch.testing.assert_close(function(x, b, mask).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_importance_mean_weighs_every_token_equally(function):
    x, b = random_pair((3, 5, 16), 0.3)
    torch.testing.assert_close(function(x, b).double(), reference(function, x, b).mean(), rtol=1e-5, atol=0)
    assert function(x, b).shape == ()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-8, 1e6, 1e9])
def test_importance_is_exact_for_huge_and_tiny_activations(function, scale):
    x, b = random_pair((16, 4096), 0.1, scale=scale)
    torch.testing.assert_close(function(x, b, reduction="none").double(), reference(function, x, b), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(deadline=None, max_examples=30)
@given(power=st.integers(-12, 12), seed=st.integers(0, 1000))
def test_importance_does_not_depend_on_a_common_scale_of_x_and_branch(function, power, seed):
    x, b = random_pair((6, 24), 0.2, seed)
    scaled = function(x * 2.0**power, b * 2.0**power, reduction="none")
    torch.testing.assert_close(scaled, function(x, b, reduction="none"), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=100)
@given(ratio=st.floats(-4, 4), seed=st.integers(0, 1000), hidden=st.integers(1, 8))
def test_cosine_importance_is_within_0_and_2_and_angular_within_0_and_1(ratio, seed, hidden):
    x, b = random_pair((20, hidden), 10**ratio, seed)
    cosine, angle = (f(x, b, reduction="none") for f in (cosine_importance, angular))
    assert ((cosine >= 0) & (cosine <= 2 + 1e-5)).all()
    assert ((angle >= 0) & (angle <= 1 + 1e-5)).all()


WRONG = {
    "mask that would broadcast": ((2, 4, 8), torch.ones(4), "mask has the shape"),
    "mask of another batch": ((2, 4, 8), torch.ones(2, 1), "mask has the shape"),
    "additive mask": ((2, 4, 8), torch.tensor([[0.0, 0.0, 0.0, -1e9]] * 2), "negative numbers"),
    "branch that would broadcast": ((2, 1, 8), None, "both must be equal"),
    "branch of another size": ((2, 4, 6), None, "both must be equal"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", WRONG)
def test_shapes_and_masks_that_do_not_fit_are_refused(function, name):
    shape, mask, words = WRONG[name]
    with pytest.raises(CalibrationError, match=words):
        function(torch.ones(2, 4, 8), torch.ones(*shape), mask)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_reduction_is_refused_with_the_known_ones(function):
    with pytest.raises(UnknownNameError, match="sum"):
        function(torch.ones(2, 4, 8), torch.ones(2, 4, 8), reduction="sum")
