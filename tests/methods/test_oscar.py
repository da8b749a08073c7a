"""`oscar` is the paper: rotation per head, one norm over heads and channels, its integer zero point, V per token."""

import pytest
import torch
from torch import Tensor

from occamkv import method
from occamkv.ops import hadamard, token_norm
from paper_formulas import (
    Coded,
    assert_error_is_that_of_the_formula,
    assert_same_codes_and_values,
    by_ops,
    paper_quantizer,
    per_channel,
    per_token,
    rotated,
    some_kv,
    sylvester,
)

every_shape = [
    pytest.mark.parametrize("head_dim", [64, 128, 256], ids=lambda d: f"head_dim {d}"),
    pytest.mark.parametrize("heads", [1, 2, 3, 8], ids=lambda h: f"{h} heads"),
]


def every_head_dim_and_head_count(test):
    for mark in every_shape:
        test = mark(test)
    return test


def paper_k(k: Tensor, bits: int = 2, group: int = 32) -> Coded:
    """K_h = K H per head, n = |K_h| over heads and channels, quantize K_h / n per channel, multiply n back."""
    rotated_k = rotated(k)
    norm = rotated_k.square().sum((1, 3), keepdim=True).sqrt()
    coded = per_channel(paper_quantizer, rotated_k / norm, bits, group)
    return coded._replace(values=coded.values * norm)


def paper_v(v: Tensor, bits: int = 2, group: int = 32) -> Coded:
    """V H per head, quantized per token in groups of channels."""
    return per_token(paper_quantizer, rotated(v), bits, group)


def our_k(k: Tensor, *, bits: int = 2, group: int = 32, grid: str = "paper", axis: str = "channel", norm=None) -> Coded:
    rotated_k = hadamard(k)
    norm = token_norm(rotated_k)[:, None, :, None] if norm is None else norm(rotated_k)
    coded = by_ops(rotated_k / norm, bits=bits, axis=axis, group=group, grid=grid)
    return coded._replace(values=coded.values * norm)


@every_head_dim_and_head_count
def test_keys_follow_the_formula_before_metadata_is_rounded(heads, head_dim):
    k, _ = some_kv(heads, head_dim)
    assert_same_codes_and_values(our_k(k), paper_k(k))


@every_head_dim_and_head_count
def test_values_follow_the_formula_before_metadata_is_rounded(heads, head_dim):
    _, v = some_kv(heads, head_dim)
    ours = by_ops(hadamard(v), bits=2, axis="token", group=32, grid="paper")
    assert_same_codes_and_values(ours, paper_v(v))


@pytest.mark.parametrize("bits", [3, 4], ids=lambda b: f"{b} bits")
@pytest.mark.parametrize("group", [32, 64, 128], ids=lambda g: f"groups of {g}")
def test_other_bits_and_groups_follow_the_same_formula(bits, group):
    k, _ = some_kv(2, 64)
    assert_same_codes_and_values(our_k(k, bits=bits, group=group), paper_k(k, bits, group))


WRONG_KEYS = {
    "norm of each head": lambda k: our_k(k, norm=lambda x: x.norm(dim=3, keepdim=True)),
    "norm over heads only": lambda k: our_k(k, norm=lambda x: x.norm(dim=1, keepdim=True)),
    "norm over tokens": lambda k: our_k(k, norm=lambda x: x.norm(dim=2, keepdim=True)),
    "no norm": lambda k: our_k(k, norm=lambda x: torch.ones(1)),
    "no rounded zero point": lambda k: our_k(k, grid="minmax"),
    "groups along channels": lambda k: our_k(k, axis="token"),
    "groups twice as long": lambda k: our_k(k, group=64),
    "no rotation": lambda k: our_k(hadamard(k)),
}


@pytest.mark.parametrize("wrong", WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
def test_twin_the_formula_check_sees_a_wrong_recipe(wrong):
    k, _ = some_kv(3, 64)
    with pytest.raises(AssertionError):
        assert_same_codes_and_values(wrong(k), paper_k(k))


def back_in_model_space(coded: Coded) -> Tensor:
    return coded.values @ sylvester(coded.values.shape[-1])


@every_head_dim_and_head_count
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    formula = back_in_model_space(paper_k(k)), back_in_model_space(paper_v(v))
    assert_error_is_that_of_the_formula(method("oscar"), (k, v), formula)


@pytest.mark.parametrize("name", ["oscar_k3v2", "oscar_k2v4_g64", "oscar_k4v3_g128x64"])
def test_stored_error_is_that_of_the_formula_for_other_bits_and_groups(name):
    k, v = some_kv(2, 128, batch=2, tokens=256)
    stored = method(name)
    format = stored.packed_format
    formula = (
        back_in_model_space(paper_k(k, format.k_bits, format.k_group)),
        back_in_model_space(paper_v(v, format.v_bits, format.v_group)),
    )
    assert_error_is_that_of_the_formula(stored, (k, v), formula)


@pytest.mark.parametrize(
    "override",
    [{"token_scale": False}, {"k_rotation": "none"}, {"v_rotation": "none"}, {"grid": "minmax"}, {"k_axis": "token"}],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_twin_the_error_check_sees_a_missing_switch(override):
    k, v = some_kv(3, 64)
    k, v = k * k.abs(), v * torch.exp(torch.linspace(-2, 2, 64))  # heavy tails: what rotation is for
    formula = back_in_model_space(paper_k(k)), back_in_model_space(paper_v(v))
    assert_error_is_that_of_the_formula(method("oscar"), (k, v), formula)
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method("oscar", **override), (k, v), formula)


def test_keys_too_large_for_float16_are_stored_because_their_norm_is_divided_out():
    oscar = method("oscar")
    k, v = some_kv(2, 64)
    plain, large = (oscar.decode(oscar.encode(x, v))[0] for x in (k, k * 2.0**20))
    assert torch.equal(large, plain * 2.0**20)
