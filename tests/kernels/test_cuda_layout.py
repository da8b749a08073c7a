"""The native order of CUDA records: the canonical bytes in other places, and an exact way back."""

from itertools import product

import pytest
import torch

from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.formats.records import encode
from occamkv.kernels.cuda import layout, refuses_format
from some_records import keys_and_values

HEAD_DIMS = (8, 32, 40, 64, 80, 96, 112, 128, 192, 256)
FORMATS = [
    Format(k_bits=k_bits, v_bits=v_bits, k_group=k_group, v_group=v_group, metadata_bits=metadata)
    for k_bits, v_bits, (k_group, v_group), metadata in product(
        (2, 3, 4), (2, 3, 4), ((32, 64), (64, 256), (128, 32)), (16, 8)
    )
]


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_way_there_and_back_keeps_every_bit(head_dim):
    for format in FORMATS:
        records = noise(2, 3, format.sections(head_dim).record_bytes)
        native = layout.to_native(records, format=format, head_dim=head_dim)
        assert native.shape == records.shape and not torch.equal(native, records)
        assert torch.equal(layout.to_canonical(native, format=format, head_dim=head_dim), records)


def bits_of(data: torch.Tensor) -> torch.Tensor:
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


@pytest.mark.parametrize("head_dim", [32, 96])
def test_every_bit_has_one_place_in_its_own_section(head_dim):
    """Records of which number j holds bit j of each bit's own number: what comes out tells where each one went."""
    for format in FORMATS:
        sizes = format.sections(head_dim).sizes
        numbers = torch.arange(8 * sum(sizes))
        tags = torch.stack([numbers >> j & 1 for j in range(20)]).unflatten(-1, (-1, 8))
        records = (tags << torch.arange(8)).sum(-1).to(torch.uint8)
        native = bits_of(layout.to_native(records, format=format, head_dim=head_dim)).long()
        came_from = (native << torch.arange(20)[:, None]).sum(0)
        assert torch.equal(came_from.sort().values, numbers)
        section = torch.repeat_interleave(torch.arange(6), 8 * torch.tensor(sizes))
        assert torch.equal(section[came_from], section)


def test_a_2_bit_word_is_what_the_document_draws():
    """Channel 32 b + 16 step + 8 high + 2 p + low of token 16 tile + 8 upper + r; docs/format.md."""
    format, head_dim, width = Format(), 64, 64
    for token, channel in ((0, 0), (0, 1), (9, 0), (21, 46), (31, 63)):
        canonical = torch.zeros(format.sections(head_dim).record_bytes, dtype=torch.uint8)
        value = token * width + channel
        canonical[value // 4] = 3 << 2 * (value % 4)
        words = layout.to_native(canonical[None], format=format, head_dim=head_dim)[0, : 32 * width // 4].view(
            torch.int32
        )
        tile, upper, r = token // 16, token // 8 % 2, token % 8
        block, step, high, p, low = channel // 32, channel // 16 % 2, channel // 8 % 2, channel // 2 % 4, channel % 2
        lane, word = 4 * r + p, 2 * block + tile
        expected = torch.zeros(32, 4, dtype=torch.int64)
        expected[lane, word] = 3 << (16 * low + 8 * upper + 4 * step + 2 * high)
        assert torch.equal(words.view(32, 4).long() & 0xFFFFFFFF, expected)


SCALES = {
    "K with a norm": ({"token_scale": True}, (200.0, 1.0), "largest scale of K is 2"),
    "K": ({}, (1.5e3, 1.0), "largest scale of K is"),
    "V": ({}, (1.0, 1000.0), "largest scale of V is"),
    "V with 8-bit metadata": ({"metadata_bits": 8}, (1.0, 1000.0), "largest scale of V is"),
}


@pytest.mark.parametrize("what", SCALES)
def test_scales_whose_products_would_not_fit_are_refused(what):
    fields, (k_size, v_size), told = SCALES[what]
    format = Format(**fields)
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=64)
    records = encode(k, v, format=format)
    layout.check_range(records.data, records.super_scales, format=format, head_dim=64)
    if format.token_scale:
        data = records.data.clone()
        start = format.sections(64).k_codes
        data[..., start : start + 128].view(torch.float16).fill_(k_size)
    else:
        k, v = k * k_size, v * v_size
        records = encode(k, v, format=format)
        data = records.data
    with pytest.raises(UnsupportedInput, match=told):
        layout.check_range(data, records.super_scales, format=format, head_dim=64)


def test_a_factor_of_v_that_no_encoder_makes_is_refused():
    format = Format(metadata_bits=8)
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=64)
    records = encode(k, v, format=format)
    factors = records.super_scales.clone()
    factors[..., 1] = 128
    with pytest.raises(UnsupportedInput, match="largest scale of V"):
        layout.check_range(records.data & 0x8F, factors, format=format, head_dim=64)


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (Format(), None),
        (Format(levels="lloyd"), "not lloyd levels"),
        (Format(k_axis="token"), "not one for each token"),
    ],
    ids=["per channel", "levels", "per token"],
)
def test_what_the_kernel_refuses(format, told):
    reason = refuses_format(format)
    assert reason is None if told is None else told in reason
