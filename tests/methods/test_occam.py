"""`occam`, the default: OScaR with a balanced rotation, clipped ranges, 8-bit metadata, first tokens pinned."""

import pytest
import torch
from torch import Tensor

from occamkv import Format, Method, method
from occamkv.methods import DEFAULT_METHOD
from paper_formulas import (
    assert_error_is_that_of_the_formula,
    per_channel,
    per_token,
    rotated,
    some_kv,
    sylvester,
    unbiased_quantizer,
)

RECIPE = Method(
    name="occam",
    format=Format(
        k_bits=2,
        v_bits=2,
        k_axis="channel",
        k_group=32,
        v_group=32,
        token_scale=True,
        norm_dtype="float16",
        metadata_bits=8,
        levels="uniform",
    ),
    k_rotation="balanced",
    v_rotation="hadamard",
    grid="unbiased",
    clip=None,
    norm="l2",
    feedback=False,
    flush="rolling",
    pins="first:4",
    window=None,
    key_bias="remove",
    source="occamkv, after arXiv:2605.19660",
)


def test_the_recipe_is_exactly_this_and_it_is_the_default():
    assert method("occam") == RECIPE
    assert DEFAULT_METHOD == "occam"
    assert RECIPE.needs_model
    assert not RECIPE.finds_pins
    assert (RECIPE.pinned_tokens, RECIPE.flush_tokens) == (4, 32)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (8, 128), (1, 256)], ids=lambda n: str(n))
def test_bits_by_hand(heads, head_dim):
    """2 bits of code, 8 + 8 bits of metadata per 32 values, a 16-bit norm per token, 2 x 16 bits per record."""
    of_k_and_v = 2 + 16 / 32 + 16 / (32 * head_dim)
    norm = 16 / (2 * heads * head_dim)
    assert method("occam").bits_per_value(kv_heads=heads, head_dim=head_dim) == pytest.approx(of_k_and_v + norm)


def a_balance(heads: int, head_dim: int) -> Tensor:
    return torch.exp(0.4 * torch.randn(heads, head_dim, generator=torch.Generator().manual_seed(1)))


def formula(k: Tensor, v: Tensor, d: Tensor, *, share: float = 0.85) -> tuple[Tensor, Tensor]:
    """H(d k) over its token norm, clipped, refitted and quantized per channel; H v likewise per token; and back."""
    inside = rotated(k.double() * d.double()[:, None])
    norm = inside.square().sum((1, 3), keepdim=True).sqrt()
    stored = per_channel(unbiased_quantizer(share), inside / norm, 2, 32).values * norm
    values = per_token(unbiased_quantizer(share), rotated(v), 2, 32).values
    matrix = sylvester(k.shape[-1])
    return stored @ matrix / d.double()[:, None], values @ matrix


class Balanced:
    """A method with its balance vector, for checks that know nothing of one."""

    def __init__(self, d: Tensor, **overrides) -> None:
        self.d, self.method = d, method("occam", **overrides)
        self.decode = self.method.decode

    def encode(self, k: Tensor, v: Tensor):
        return self.method.encode(k, v, balance=self.d)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128), (2, 256)], ids=lambda n: str(n))
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = some_kv(heads, head_dim)
    d = a_balance(heads, head_dim)
    assert_error_is_that_of_the_formula(Balanced(d, metadata_bits=16), (k, v), formula(k, v, d))
    assert_error_is_that_of_the_formula(Balanced(d), (k, v), formula(k, v, d), within=0.03)


TWINS = {
    "the whole range": {"clip": 1.0, "grid": "minmax"},
    "clipped, not refitted": {"grid": "minmax"},
    "no balance": {"k_rotation": "none", "feedback": False},
    "no token norm": {"token_scale": False},
    "V not rotated": {"v_rotation": "none"},
}


@pytest.mark.parametrize("what", TWINS)
def test_twin_the_error_check_sees_a_missing_part(what):
    k, v = some_kv(3, 64)
    k, v = k * k.abs(), v * torch.exp(torch.linspace(-2, 2, 64))
    d = a_balance(3, 64)
    assert_error_is_that_of_the_formula(Balanced(d, metadata_bits=16), (k, v), formula(k, v, d))
    other = method("occam", metadata_bits=16, **TWINS[what])
    chosen = other if not other.needs_model else Balanced(d, metadata_bits=16, **TWINS[what])
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(chosen, (k, v), formula(k, v, d))
