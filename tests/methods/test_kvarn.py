"""`kvarn`: Hadamard, one norm per token from alternating normalisation, 4-bit K over 128 tokens, 2-bit V per token."""

import numpy as np
import pytest
import torch

from occamkv import Format, Method, method
from paper_formulas import (
    assert_error_is_that_of_the_formula,
    minmax_quantizer,
    per_channel,
    per_token,
    rotated,
    slow_sinkhorn,
    some_kv,
    sylvester,
)


def test_the_recipe_is_exactly_this():
    assert method("kvarn") == Method(
        name="kvarn",
        format=Format(
            k_bits=4, v_bits=2, k_axis="channel", k_group=128, v_group=128, token_scale=True, norm_dtype="float16"
        ),
        k_rotation="hadamard",
        v_rotation="hadamard",
        norm="sinkhorn",
        source="KVarN 2026, arXiv:2606.03458",
    )


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (8, 128)], ids=lambda n: str(n))
def test_bits_by_hand(heads, head_dim):
    """K: 4 bits and 32 per channel of 128 tokens. V: 2 bits and 32 per token and head (or 128 channels). One norm."""
    of_k, of_v = 4 + 32 / 128, 2 + 32 / min(128, head_dim)
    norm = 16 / (2 * heads * head_dim)
    made = method("kvarn").bits_per_value(kv_heads=heads, head_dim=head_dim)
    assert made == pytest.approx((of_k + of_v) / 2 + norm)


def kvarn_in_float64(k, v, norm_of=slow_sinkhorn):
    head_dim = k.shape[-1]
    inside = rotated(k)
    groups = inside.unflatten(2, (-1, 128)).transpose(1, 2).flatten(0, 1).numpy()
    norm = torch.from_numpy(np.stack([norm_of(group) for group in groups]))
    norm = norm.reshape(k.shape[0], 1, k.shape[2], 1)
    keys = per_channel(minmax_quantizer, inside / norm, 4, 128).values * norm
    values = per_token(minmax_quantizer, rotated(v), 2, min(128, head_dim)).values
    return keys @ sylvester(head_dim), values @ sylvester(head_dim)


def unequal_kv(heads: int, head_dim: int):
    k, v = some_kv(heads, head_dim, batch=2, tokens=256)
    return k * torch.exp(torch.linspace(-2, 2, 256))[:, None], v


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 64), (2, 128)], ids=lambda n: str(n))
def test_stored_keys_and_values_have_the_error_of_the_formula(heads, head_dim):
    k, v = unequal_kv(heads, head_dim)
    assert_error_is_that_of_the_formula(method("kvarn"), (k, v), kvarn_in_float64(k, v))


@pytest.mark.parametrize(
    "other",
    [{"norm": "l2"}, {"token_scale": False}, {"k_group": 64}, {"v_group": 32}, {"v_rotation": "none"}],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_twin_the_error_check_sees_another_recipe(other):
    k, v = unequal_kv(3, 64)
    k = k + 0.5 * torch.randn(1, 3, 1, 64, generator=torch.Generator().manual_seed(0)).pow(5)  # a loud channel or two
    v = v * torch.exp(torch.linspace(-2, 2, 64))
    assert_error_is_that_of_the_formula(method("kvarn"), (k, v), kvarn_in_float64(k, v))
    with pytest.raises(AssertionError):
        assert_error_is_that_of_the_formula(method("kvarn", **other), (k, v), kvarn_in_float64(k, v))
