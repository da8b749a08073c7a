"""`quarot`: Hadamard per head on K and V, then per token over the whole head."""

import pytest

from occamkv import method
from occamkv.ops import hadamard
from paper_formulas import (
    assert_error_is_that_of_the_formula,
    assert_same_codes_and_values,
    by_ops,
    minmax_quantizer,
    per_token,
    rotated,
    some_kv,
    sylvester,
)

shapes = pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128), (2, 256)], ids=lambda n: str(n))


@shapes
def test_codes_and_values_follow_the_formula_before_metadata_is_rounded(heads, head_dim):
    for x in some_kv(heads, head_dim):
        ours = by_ops(hadamard(x), bits=2, axis="token", group=head_dim, grid="minmax")
        assert_same_codes_and_values(ours, per_token(minmax_quantizer, rotated(x), 2, head_dim))


def quarot_in_float64(k, v):
    head_dim = k.shape[-1]
    return tuple(per_token(minmax_quantizer, rotated(x), 2, head_dim).values @ sylvester(head_dim) for x in (k, v))


@shapes
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    assert_error_is_that_of_the_formula(method("quarot"), (k, v), quarot_in_float64(k, v))


@pytest.mark.parametrize("other", ["rtn", "oscar", "quarot_g32x32"])
def test_twin_the_error_check_sees_another_method(other):
    k, v = some_kv(3, 64)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method(other), (k, v), quarot_in_float64(k, v))
