"""`rotatekv`: Hadamard per head, per token over 128 channels, .8 of the range, first and found tokens full."""

import pytest

from occamkv import Format, Method, method
from paper_formulas import (
    assert_error_is_that_of_the_formula,
    clipped_quantizer,
    per_token,
    rotated,
    some_kv,
    sylvester,
)


def test_the_recipe_is_exactly_this():
    assert method("rotatekv") == Method(
        name="rotatekv",
        format=Format(k_bits=2, v_bits=2, k_axis="token", k_group=128, v_group=128),
        k_rotation="hadamard",
        v_rotation="hadamard",
        clip=0.8,
        pins="first:4+found",
        source="Su et al. 2025, arXiv:2501.16383",
    )
    assert method("rotatekv").pinned_tokens == 4
    assert method("rotatekv").finds_pins


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 2.5), (128, 2.25), (256, 2.25)], ids=lambda n: str(n))
def test_bits_by_hand(head_dim, bits):
    assert method("rotatekv").bits_per_value(kv_heads=3, head_dim=head_dim) == bits


def rotatekv_in_float64(k, v):
    head_dim = k.shape[-1]
    group = min(128, head_dim)
    return tuple(per_token(clipped_quantizer(0.8), rotated(x), 2, group).values @ sylvester(head_dim) for x in (k, v))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128), (2, 256)], ids=lambda n: str(n))
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    assert_error_is_that_of_the_formula(method("rotatekv"), (k, v), rotatekv_in_float64(k, v))


@pytest.mark.parametrize(
    "other",
    [{"clip": 1.0}, {"clip": 0.9}, {"k_group": 32, "v_group": 32}, {"k_rotation": "none", "v_rotation": "none"}],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_twin_the_error_check_sees_another_recipe(other):
    k, v = some_kv(3, 64)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method("rotatekv", **other), (k, v), rotatekv_in_float64(k, v))
