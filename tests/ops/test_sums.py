"""The fixed order of sums, against a recursion in numpy's float32, and its signs of zero and roots."""

import numpy as np
import pytest
import torch

from occamkv.ops import group_range, round_metadata, token_norm
from occamkv.ops.sums import folded_sum


def by_recursion(x: np.ndarray) -> np.ndarray:
    """Sum over the first dimension: the second half on the first, an odd last one waiting."""
    half = len(x) // 2
    if len(x) == 1:
        return x[0]
    return by_recursion(np.concatenate([x[:half] + x[half : 2 * half], x[2 * half :]]))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 24, 31, 32, 80, 128, 256])
def test_values_are_added_in_halves(count):
    x = np.random.default_rng(count).standard_normal((count, 40)).astype("f4") * 10
    expected = by_recursion(x)
    assert np.array_equal(folded_sum(torch.from_numpy(x), dim=0).numpy(), expected)
    assert np.array_equal(folded_sum(torch.from_numpy(x).T, dim=-1).numpy(), expected)
    middle = torch.from_numpy(np.stack([x, -x]))
    assert np.array_equal(folded_sum(middle, dim=1).numpy(), np.stack([expected, -expected]))
    if count > 8:
        one_by_one = x[0].copy()
        for row in x[1:]:
            one_by_one += row
        assert not np.array_equal(one_by_one, expected), "the twin: another order gives other bits"


def test_a_token_norm_is_the_float32_number_nearest_to_the_root():
    total = torch.rand(20001, generator=torch.Generator().manual_seed(0)) * 1000
    k = torch.zeros(1, 1, len(total), 8)
    k[0, 0, :, 0] = total.sqrt()
    squares = k[0, 0, :, 0].numpy() ** 2
    assert np.array_equal(token_norm(k)[0].numpy(), np.sqrt(squares))


@pytest.mark.parametrize(("axis", "shape"), [("channel", (32, 8)), ("token", (8, 32))])
def test_the_range_of_zeros_of_both_signs_has_no_negative_zero(axis, shape):
    x = torch.zeros(shape)
    x[::2], x[:, ::3] = -0.0, -0.0
    for end in group_range(x, axis=axis, group=32):
        assert not end.signbit().any()


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_a_scale_that_underflows_is_stored_without_a_sign(metadata_bits):
    tiny = torch.full((1, 40), -1e-45)  # the smallest float32: a third of it is zero
    meta = round_metadata(tiny, tiny, bits=4, metadata_bits=metadata_bits)
    assert not meta.scale.any()
    assert not meta.scale.signbit().any()
