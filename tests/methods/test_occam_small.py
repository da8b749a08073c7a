"""`occam_small`: occam with groups of 64, and nothing else."""

import dataclasses

import pytest

from occamkv import method


def test_it_is_occam_with_groups_of_64():
    small, occam = method("occam_small"), method("occam")
    assert (small.name, small.format.k_group, small.format.v_group) == ("occam_small", 64, 64)
    as_occam = dataclasses.replace(
        small, name="occam", format=dataclasses.replace(small.format, k_group=32, v_group=32)
    )
    assert as_occam == occam
    assert small.flush_tokens == 64


@pytest.mark.parametrize(("heads", "head_dim", "bits"), [(3, 64, 2.296), (8, 128, 2.260)], ids=lambda n: str(n))
def test_it_takes_two_and_a_third_bits(heads, head_dim, bits):
    made = method("occam_small").bits_per_value(kv_heads=heads, head_dim=head_dim)
    assert made == pytest.approx(2 + 16 / 64 + 16 / (64 * head_dim) + 16 / (2 * heads * head_dim))
    assert made == pytest.approx(bits, abs=5e-4)
    assert made < method("occam").bits_per_value(kv_heads=heads, head_dim=head_dim) - 0.25
