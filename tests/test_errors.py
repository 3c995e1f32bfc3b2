"""Every check says what came and what was expected, and lets the right values pass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import errors


def test_expect_raises_its_message():
    errors.expect(True, "not said")
    with pytest.raises(ValueError, match=r"^said$"):
        errors.expect(False, "said")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("stable-difusion", "Did you mean 'stable-diffusion'?"),
        ("dal", "Did you mean 'dalle2'?"),
        ("dalle2 ", "Did you mean 'dalle2'?"),
        ("zzz", "'imagen'."),
        ("", "'imagen'."),
        (2, "'imagen'."),
        (None, "'imagen'."),
    ],
)
def test_one_of_lists_and_guesses(value, hint):
    with pytest.raises(ValueError) as caught:
        errors.one_of("the model", value, ("stable-diffusion", "dalle2", "imagen"))
    said = str(caught.value)
    assert said.startswith(f"the model is {value!r}; expected one of 'stable-diffusion', 'dalle2',")
    assert said.endswith(hint)


def test_one_of_tells_true_from_one():
    errors.one_of("n", 1, (1, 2))
    errors.one_of("name", "b", {"a": 0, "b": 1})
    with pytest.raises(ValueError, match="n is True"):
        errors.one_of("n", True, (1, 2))


@given(st.one_of(st.integers(-5, 15), st.floats(), st.booleans(), st.text(max_size=2), st.none()))
def test_number_passes_exactly_the_numbers_in_range(value):
    fine = type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 10
    whole = type(value) is int and 0 <= value <= 10
    for wanted, integer in ((fine, False), (whole, True)):
        try:
            errors.number("steps", value, 0, 10, integer=integer)
            passed = True
        except (TypeError, ValueError) as error:
            passed = False
            assert str(error).startswith(f"steps is {value!r}")
        assert passed == wanted


@given(
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from(["B 3 H W", "B C H W", "B 2", "N N", "B", "1 S S", ""]),
)
def test_shape_is_matched_letter_by_letter(sizes, pattern):
    letters = pattern.split()
    known: dict[str, int] = {}
    wanted = len(letters) == len(sizes)
    for letter, size in zip(letters, sizes, strict=False):
        if letter.isdigit():
            wanted &= size == int(letter)
        else:
            wanted &= size > 0 and known.setdefault(letter, size) == size
    try:
        errors.tensor("x", torch.zeros(sizes), shape=pattern)
        passed = True
    except ValueError as error:
        passed = False
        expected = f"({pattern.replace(' ', ', ')})"
        assert str(error) == f"x has shape {tuple(sizes)}; expected {expected}."
    assert passed == wanted


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6),
    st.sampled_from([None, -1.0, 0.0]),
    st.sampled_from([None, 0.5, 1.0]),
)
def test_range_is_checked_on_every_value(values, low, high):
    wanted = all((low is None or v >= low) and (high is None or v <= high) for v in values)
    try:
        errors.tensor("x", torch.tensor(values), low=low, high=high)
        passed = True
    except ValueError as error:
        passed = False
        assert "x runs from" in str(error) and "expected values" in str(error)
    assert passed == wanted


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(bad):
    x = torch.tensor([0.0, bad, 1.0, bad])
    with pytest.raises(ValueError, match="x has 2 of 4 values that are NaN or infinite"):
        errors.tensor("x", x)
    if math.isnan(bad):
        with pytest.raises(ValueError, match="runs from nan"):
            errors.tensor("x", x, low=0, high=1, finite=False)
    errors.tensor("x", x, finite=False)


@pytest.mark.parametrize(
    ("dtype", "right", "wrong", "fix"),
    [
        ("float", (torch.float16, torch.float64), (torch.int64, torch.bool), r"\.float\(\)"),
        ("int", (torch.int64, torch.uint8), (torch.float32, torch.bool), r"\.long\(\)"),
        ("bool", (torch.bool,), (torch.uint8,), r"\.bool\(\)"),
        (torch.float64, (torch.float64,), (torch.float32,), r"\.to\(torch.float64\)"),
    ],
)
def test_dtypes(dtype, right, wrong, fix):
    for kind in right:
        errors.tensor("x", torch.zeros(2, dtype=kind), dtype=dtype)
    for kind in wrong:
        with pytest.raises(TypeError, match=rf"x has dtype {kind}; expected .*{fix}"):
            errors.tensor("x", torch.zeros(2, dtype=kind), dtype=dtype)


def test_what_is_no_tensor_and_what_is_empty():
    with pytest.raises(TypeError, match="x is list; expected a torch.Tensor"):
        errors.tensor("x", [1.0])
    errors.tensor("x", torch.zeros(0), low=1)


def test_a_checked_tensor_is_left_alone():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    assert errors.tensor("x", x, shape="N", dtype="float", low=0, high=1) is None
    assert x.requires_grad and x.tolist() == [0, 1]
