"""`ott`: KIVI with a pool of five tokens, the lowest K norms, in full precision."""

import dataclasses

import pytest
import torch

from occamkv import method
from paper_formulas import assert_error_is_that_of_the_formula, minmax_quantizer, per_channel, per_token, some_kv


def test_it_is_kivi_with_a_pool_of_the_five_lowest():
    ott, kivi = method("ott"), method("kivi")
    assert ott.pins == "lowest:5"
    assert dataclasses.replace(ott, name="kivi", pins="none", source=kivi.source) == kivi
    assert (ott.pinning.lowest, ott.pinned_tokens, ott.finds_pins) == (5, 0, True)
    assert not ott.needs_model


def test_packed_tokens_are_kivis():
    k, v = some_kv(2, 64)
    assert torch.equal(method("ott").encode(k, v).pages.records, method("kivi").encode(k, v).pages.records)


def test_stored_keys_and_values_have_the_error_of_the_formula():
    k, v = some_kv(2, 128)
    formula = (
        per_channel(minmax_quantizer, k.double(), 2, 32).values,
        per_token(minmax_quantizer, v.double(), 2, 32).values,
    )
    assert_error_is_that_of_the_formula(method("ott"), (k, v), formula)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method("ott_g64"), (k, v), formula)
