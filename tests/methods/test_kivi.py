"""`kivi`: K per channel over 32 tokens, V per token over 32 channels, no rotation."""

import pytest

from occamkv import method
from paper_formulas import (
    assert_error_is_that_of_the_formula,
    assert_same_codes_and_values,
    by_ops,
    minmax_quantizer,
    per_channel,
    per_token,
    some_kv,
)

shapes = pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128), (2, 256)], ids=lambda n: str(n))


@shapes
def test_codes_and_values_follow_the_formula_before_metadata_is_rounded(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    ours = by_ops(k, bits=2, axis="channel", group=32, grid="minmax")
    assert_same_codes_and_values(ours, per_channel(minmax_quantizer, k.double(), 2, 32))
    ours = by_ops(v, bits=2, axis="token", group=32, grid="minmax")
    assert_same_codes_and_values(ours, per_token(minmax_quantizer, v.double(), 2, 32))


@pytest.mark.parametrize(
    "wrong",
    [{"axis": "token"}, {"group": 64}, {"grid": "paper"}, {"bits": 3}],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_twin_the_formula_check_sees_a_wrong_recipe(wrong):
    k, _ = some_kv(3, 64)
    ours = by_ops(k, **({"bits": 2, "axis": "channel", "group": 32, "grid": "minmax"} | wrong))
    with pytest.raises(AssertionError):
        assert_same_codes_and_values(ours, per_channel(minmax_quantizer, k.double(), 2, 32))


def kivi_in_float64(k, v):
    keys = per_channel(minmax_quantizer, k.double(), 2, 32)
    return keys.values, per_token(minmax_quantizer, v.double(), 2, 32).values


@shapes
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    assert_error_is_that_of_the_formula(method("kivi"), (k, v), kivi_in_float64(k, v))


@pytest.mark.parametrize("other", ["rtn", "oscar", "quarot", "kivi_k3v3"])
def test_twin_the_error_check_sees_another_method(other):
    k, v = some_kv(3, 64)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method(other), (k, v), kivi_in_float64(k, v))
