"""The format: its sizes in bytes from the documented layout, what it refuses, and that it cannot be changed."""

import dataclasses

import pytest
from hypothesis import given, settings

import slow_decoder
from occamkv.errors import UnsupportedFormat
from occamkv.formats import Format
from some_records import formats, head_dims


@given(formats(), head_dims)
@settings(deadline=None, max_examples=150)
def test_section_sizes_follow_from_the_layout(format, head_dim):
    k, v = slow_decoder.sides(format, head_dim)
    assert format.sections(head_dim).sizes == (*k.sizes, *v.sizes)
    assert format.sections(head_dim).record_bytes == sum(k.sizes) + sum(v.sizes)
    assert format.record_tokens == k.tokens
    assert format.page_records * format.record_tokens == 128
    norm_bytes = {"float32": 4, "float16": 2}[format.norm_dtype] if format.token_scale else 0
    supers = 4 * format.page_records if format.metadata_bits == 8 else 0
    expected = 3 * (format.page_records * (sum(k.sizes) + sum(v.sizes)) + supers) + 128 * norm_bytes
    assert format.page_bytes(kv_heads=3, head_dim=head_dim) == expected


def test_a_two_bit_record_takes_24_bytes_per_channel():
    assert Format().sections(64).record_bytes == 24 * 64
    assert Format().sections(64).sizes == (512, 128, 128, 512, 128, 128)
    assert Format(metadata_bits=8).sections(64).record_bytes == 20 * 64


@pytest.mark.parametrize(
    ("head_dim", "stored"), [(40, 64), (64, 64), (80, 96), (112, 128), (256, 256)], ids=lambda n: str(n)
)
def test_padding_is_counted(head_dim, stored):
    codes = Format().sections(head_dim)
    assert codes.k_codes == codes.v_codes == 32 * stored // 4
    if head_dim != stored:
        assert Format().bits_per_value(kv_heads=8, head_dim=head_dim) > 3.0


REFUSED = [
    ("k_bits", 1, "2, 3, 4, 2.5"),
    ("k_bits", 5, "2, 3, 4, 2.5"),
    ("v_bits", 8, "2, 3, 4, 2.5"),
    ("k_bits", 3.5, "2, 3, 4, 2.5"),
    ("k_axis", "head", "'channel', 'token'"),
    ("k_group", 16, "32, 64, 128"),
    ("k_group", 256, "32, 64, 128"),
    ("v_group", 48, "32, 64, 128, 256"),
    ("norm_dtype", "bfloat16", "'float32', 'float16'"),
    ("metadata_bits", 32, "16, 8"),
    ("levels", "nf4", "'uniform', 'lloyd'"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED, ids=lambda x: str(x))
def test_a_value_that_no_record_can_hold_is_refused_by_name(field, value, allowed):
    with pytest.raises(UnsupportedFormat) as refusal:
        Format(**{field: value})
    assert str(refusal.value) == f"{field} is {value!r}; allowed: {allowed}."


def test_bits_are_whole_numbers_or_two_and_a_half():
    """2.0 == 2 in Python, but a name would say 2.0."""
    for bits in (2.0, 3.0, True):
        with pytest.raises(UnsupportedFormat, match="k_bits"):
            Format(k_bits=bits)


REFUSED_LEVELS = {
    "2.5 bits of K, evenly spaced": ({"k_bits": 2.5}, r"k_bits is 2\.5 and v_bits 2; 2\.5 bits need levels='lloyd'"),
    "2.5 bits of V, evenly spaced": ({"v_bits": 2.5}, r"k_bits is 2 and v_bits 2\.5; 2\.5 bits need levels='lloyd'"),
    "Lloyd-Max levels with 8-bit metadata": (
        {"levels": "lloyd", "metadata_bits": 8},
        "metadata_bits is 8; Lloyd-Max levels have 16-bit metadata",
    ),
}


@pytest.mark.parametrize("what", REFUSED_LEVELS)
def test_levels_that_do_not_go_with_the_rest_are_refused(what):
    given, message = REFUSED_LEVELS[what]
    with pytest.raises(UnsupportedFormat, match=message):
        Format(**given)


def test_a_record_of_lloyd_max_levels_by_hand():
    """32 tokens of 128 channels: 16 bytes per token and bit, one float16 per token, nothing for a minimum."""
    format = Format(k_bits=2.5, v_bits=3, k_axis="token", k_group=256, v_group=256, levels="lloyd")
    assert format.sections(128).sizes == (32 * 40, 32 * 2, 0, 32 * 48, 32 * 2, 0)
    per_channel = Format(k_bits=4, v_bits=2.5, k_group=64, levels="lloyd")
    assert per_channel.sections(80).sizes == (64 * 48, 96 * 2, 0, 64 * 30, 64 * 3 * 2, 0)


def test_a_group_of_256_channels_is_allowed_per_token():
    assert Format(k_axis="token", k_group=256).record_tokens == 32


@pytest.mark.parametrize("head_dim", [0, -8, 7, 12, 264], ids=lambda d: f"head_dim {d}")
def test_a_head_dim_that_no_record_holds_is_refused(head_dim):
    with pytest.raises(UnsupportedFormat, match=f"head_dim is {head_dim};.*multiples of 8 up to 256"):
        Format().sections(head_dim)


def test_a_format_is_frozen_hashable_and_compared_by_value():
    format = Format(k_bits=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.k_bits = 2
    assert format == Format(k_bits=3)
    assert len({format, Format(k_bits=3), Format()}) == 2
    assert dataclasses.replace(format, k_group=64).record_tokens == 64
    assert format.record_tokens == 32
