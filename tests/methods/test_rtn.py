"""`rtn`: K and V per token over 32 channels, the minimum and maximum of each group."""

import pytest

from occamkv import method
from paper_formulas import assert_error_is_that_of_the_formula, minmax_quantizer, per_token, some_kv


def rtn_in_float64(k, v):
    return tuple(per_token(minmax_quantizer, x.double(), 2, 32).values for x in (k, v))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128), (2, 256)], ids=lambda n: str(n))
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    assert_error_is_that_of_the_formula(method("rtn"), (k, v), rtn_in_float64(k, v))


@pytest.mark.parametrize("other", ["kivi", "quarot", "rtn_g64"])
def test_twin_the_error_check_sees_another_method(other):
    k, v = some_kv(3, 64)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method(other), (k, v), rtn_in_float64(k, v))
