"""One flipped bit of a record changes exactly the values that the layout says it belongs to."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import slow_decoder
from occamkv.formats import Format
from occamkv.formats.records import Records, decode, encode
from some_records import formats, head_dims, keys_and_values

SECTIONS = ("k_codes", "k_scale", "k_minimum", "v_codes", "v_scale", "v_minimum")


class Target(NamedTuple):
    """Where a bit belongs: K (0) or V (1), the values [tokens, head_dim] of its group, and its weight in a code."""

    side: int
    owned: np.ndarray
    weight: int


def target_of(format: Format, head_dim: int, section: str, bit: int) -> Target:
    """Read off the documented layout what bit number `bit` of a section means."""
    number = 0 if section[0] == "k" else 1
    side = slow_decoder.sides(format, head_dim)[number]
    if section.endswith("codes"):
        for bits, channels in side.runs:
            channels = range(side.width)[channels]
            if bit < side.tokens * len(channels) * bits:
                break
            bit -= side.tokens * len(channels) * bits
        weight, values = 1, side.tokens * len(channels)
        for plane in slow_decoder.PLANE_WIDTHS[bits]:
            if bit < values * plane:
                break
            bit, weight = bit - values * plane, weight << plane
        token, channel = divmod(bit // plane, len(channels))
        channel = channels[channel]
        owned = np.zeros((side.tokens, head_dim), dtype=bool)
        if channel < head_dim:
            owned[token, channel] = True
        return Target(number, owned, weight << bit % plane)
    return Target(number, side.group_of() == bit // (8 * side.meta_bytes), 0)


def flip(records: Records, format: Format, head_dim: int, head: int, section: str, bit: int) -> Records:
    k, v = slow_decoder.sides(format, head_dim)
    starts = np.cumsum([0, *k.sizes, *v.sizes])
    data = records.data.clone()
    data[0, head, starts[SECTIONS.index(section)] + bit // 8] ^= 1 << bit % 8
    return records._replace(data=data)


def section_bits(format: Format, head_dim: int, section: str) -> int:
    k, v = slow_decoder.sides(format, head_dim)
    return 8 * (*k.sizes, *v.sizes)[SECTIONS.index(section)]


def assert_changes_only(before: list, after: list, target: Target, head: int) -> None:
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = (old != new).numpy()
        allowed = np.zeros_like(changed)
        if number == target.side:
            allowed[0, head] = target.owned
        assert not (changed & ~allowed).any(), "a value changed that this bit does not belong to"


def an_example(format: Format, head_dim: int) -> tuple[Records, list[torch.Tensor]]:
    k, v = keys_and_values(format, groups=2, heads=2, head_dim=head_dim)
    records = encode(k, v, format=format)
    return records, list(decode(records, format=format, head_dim=head_dim))


@given(formats(), head_dims, st.sampled_from(SECTIONS), st.integers(0, 1), st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=100)
def test_a_flipped_bit_changes_only_what_it_belongs_to(format, head_dim, section, head, where):
    assume(section_bits(format, head_dim, section))
    bit = int(where * section_bits(format, head_dim, section))
    records, before = an_example(format, head_dim)
    flipped = flip(records, format, head_dim, head, section, bit)
    after = list(decode(flipped, format=format, head_dim=head_dim))
    target = target_of(format, head_dim, section, bit)
    assert_changes_only(before, after, target, head)
    if section.endswith("codes"):
        assert_moves_by_its_weight(records, format, head_dim, head, (before, after), target)
    elif section.endswith("minimum") and format.metadata_bits == 16 and target.owned.any():
        changed = (before[target.side] != after[target.side]).numpy()
        assert changed[0, head][target.owned].all(), "a minimum moves its whole group"


def assert_moves_by_its_weight(records, format, head_dim, head, decoded, target) -> None:
    """A code bit of a real channel makes its value that of the other code; one of padding moves nothing."""
    before, after = (pair[target.side][0, head].double().numpy() for pair in decoded)
    supers = None if records.super_scales is None else records.super_scales[0, head].numpy()
    said = slow_decoder.read_record(records.data[0, head].numpy(), format, head_dim, supers)[target.side]
    side = slow_decoder.sides(format, head_dim)[target.side]
    other = np.pad(target.owned, ((0, 0), (0, side.width - head_dim))) * target.weight ^ said.codes
    meant = [side.meaning(codes, said.scale, said.minimum) for codes in (said.codes, other)]
    if target.side == 0 and records.norms is not None:
        meant = [x * records.norms[0].double().numpy()[:, None] for x in meant]
    moved, expected = ((new - old)[target.owned] for old, new in ((before, after), meant))
    assert np.abs(moved - expected).max(initial=0) <= 1e-5 * np.abs(before).max() + 1e-5 * np.abs(expected).max(
        initial=0
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_twin_the_check_sees_a_bit_of_the_neighbouring_group(section):
    format = Format(k_bits=3)
    records, before = an_example(format, 64)
    per_group = 3 if section.endswith("codes") else 16
    bit = next(b for b in range(0, 999, per_group) if _changes(records, before, format, section, b))
    after = list(decode(flip(records, format, 64, 0, section, bit), format=format, head_dim=64))
    assert_changes_only(before, after, target_of(format, 64, section, bit), 0)
    with pytest.raises(AssertionError):
        assert_changes_only(before, after, target_of(format, 64, section, bit + per_group), 0)
    with pytest.raises(AssertionError):
        assert_changes_only(before, after, target_of(format, 64, section, bit), 1)


def _changes(records: Records, before: list, format: Format, section: str, bit: int) -> bool:
    after = decode(flip(records, format, 64, 0, section, bit), format=format, head_dim=64)
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_norm_belongs_to_one_token_of_k_in_all_heads():
    records, before = an_example(Format(token_scale=True), 64)
    norms = records.norms.clone()
    norms[1, 7] *= 2
    k, v = decode(records._replace(norms=norms), format=Format(token_scale=True), head_dim=64)
    expected = before[0].clone()
    expected[1, :, 7] *= 2
    assert torch.equal(k, expected)
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("side", [0, 1], ids=["of K", "of V"])
def test_a_super_scale_belongs_to_one_side_of_one_record(side):
    format = Format(metadata_bits=8)
    records, before = an_example(format, 64)
    supers = records.super_scales.clone()
    supers[1, 0, side] *= 2
    after = decode(records._replace(super_scales=supers), format=format, head_dim=64)
    expected = [x.clone() for x in before]
    expected[side][1, 0] *= 2
    assert all(map(torch.equal, after, expected))
