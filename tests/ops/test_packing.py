"""Bit planes against a slow writer made from the documented layout."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv.ops import pack, packed_bytes, unpack
from occamkv.ops.packing import channel_runs, pack_channels, unpack_channels

# What the layout says: (first bit of the code, width of the field) of each plane, in the order in which they lie.
LAYOUT = {2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 2), (2, 2)]}

Packer = Callable[[torch.Tensor, int], torch.Tensor]


def write_slowly(codes: list[int], bits: int) -> bytes:
    """Set one bit at a time: in a plane of width w, value i has its fields at bits i*w, i*w+1, ... of the plane."""
    out = bytearray()
    for first, width in LAYOUT[bits]:
        plane = bytearray(len(codes) * width // 8)
        for i, code in enumerate(codes):
            for j in range(width):
                position = i * width + j
                plane[position // 8] |= ((code >> (first + j)) & 1) << (position % 8)
        out += plane
    return bytes(out)


def assert_packs_as_documented(packer: Packer, codes: list[int], bits: int) -> None:
    packed = packer(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == write_slowly(codes, bits)


@st.composite
def codes_and_bits(draw) -> tuple[list[int], int]:
    bits = draw(st.sampled_from([2, 3, 4]))
    size = 8 * draw(st.integers(1, 12))
    return draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size)), bits


@given(codes_and_bits())
@settings(deadline=None, max_examples=150)
def test_packed_bytes_are_those_of_the_slow_writer(case):
    codes, bits = case
    assert_packs_as_documented(lambda c, b: pack(c, bits=b), codes, bits)
    assert packed_bytes(len(codes), bits) == len(write_slowly(codes, bits))


@given(codes_and_bits())
@settings(deadline=None, max_examples=150)
def test_unpack_reads_what_the_slow_writer_wrote(case):
    codes, bits = case
    packed = torch.tensor(list(write_slowly(codes, bits)), dtype=torch.uint8)
    assert unpack(packed, bits=bits).tolist() == codes


def two_bits_swapped(codes: torch.Tensor, bits: int) -> torch.Tensor:
    packed = pack(codes, bits=bits)
    swapped = (packed & 0b11111100) | ((packed & 1) << 1) | ((packed >> 1) & 1)
    return swapped


def highest_value_first(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return pack(codes.reshape(-1, 8).flip(-1).flatten(), bits=bits)


def planes_swapped(codes: torch.Tensor, bits: int) -> torch.Tensor:
    packed = pack(codes, bits=bits)
    first = packed_bytes(codes.shape[-1], 2)
    return torch.cat((packed[first:], packed[:first]))


MUTATED_PACKERS = [
    pytest.param(two_bits_swapped, 2, id="two swapped bits in 2-bit codes"),
    pytest.param(two_bits_swapped, 3, id="two swapped bits in 3-bit codes"),
    pytest.param(two_bits_swapped, 4, id="two swapped bits in 4-bit codes"),
    pytest.param(highest_value_first, 2, id="values backwards in a byte"),
    pytest.param(planes_swapped, 3, id="planes of 3-bit codes swapped"),
    pytest.param(planes_swapped, 4, id="planes of 4-bit codes swapped"),
]


@pytest.mark.parametrize(("packer", "bits"), MUTATED_PACKERS)
def test_twin_a_mutated_packer_fails_the_same_check(packer, bits):
    codes = [(i * i + i // 3) % 2**bits for i in range(16)]
    assert_packs_as_documented(lambda c, b: pack(c, bits=b), codes, bits)
    with pytest.raises(AssertionError):
        assert_packs_as_documented(packer, codes, bits)


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
def test_leading_dimensions_are_packed_row_by_row(bits):
    codes = (torch.arange(2 * 3 * 32) * 7 % 2**bits).to(torch.uint8).reshape(2, 3, 32)
    packed = pack(codes, bits=bits)
    assert packed.shape == (2, 3, 4 * bits)
    for i in range(2):
        for j in range(3):
            assert bytes(packed[i, j].tolist()) == write_slowly(codes[i, j].tolist(), bits)
    assert torch.equal(unpack(packed, bits=bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
def test_a_strided_view_packs_like_its_copy_and_is_left_alone(bits):
    codes = (torch.arange(64) * 3 % 2**bits).to(torch.uint8).reshape(16, 4).T
    before = codes.clone()
    assert torch.equal(pack(codes, bits=bits), pack(codes.contiguous(), bits=bits))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
def test_every_byte_string_is_a_valid_record_section(bits):
    raw = (torch.arange(8 * bits * 4) * 37 % 256).to(torch.uint8)
    assert torch.equal(pack(unpack(raw, bits=bits), bits=bits), raw)


def channels_slowly(rows: list[list[int]], bits: float) -> bytes:
    """Whole widths: all tokens at once. 2.5: the first half of every token with 3 bits, then the second with 2."""
    if bits != 2.5:
        return write_slowly([code for row in rows for code in row], int(bits))
    half = len(rows[0]) // 2
    first, second = ([code for row in rows for code in row[part]] for part in (slice(half), slice(half, None)))
    return write_slowly(first, 3) + write_slowly(second, 2)


def some_channels(tokens: int, width: int, bits: float) -> torch.Tensor:
    codes = (torch.arange(tokens * width) * 37 // 5).reshape(tokens, width)
    most = torch.tensor([8] * (width // 2) + [4] * (width // 2)) if bits == 2.5 else torch.tensor(2 ** int(bits))
    return (codes % most).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 2.5], ids=lambda b: f"{b} bits")
@pytest.mark.parametrize(("tokens", "width"), [(32, 32), (64, 96), (8, 256), (128, 128)], ids=lambda n: str(n))
def test_channels_are_packed_run_after_run_and_read_back(tokens, width, bits):
    codes = some_channels(tokens, width, bits)
    packed = pack_channels(codes, bits=bits)
    assert packed.numel() == tokens * width * bits / 8
    assert bytes(packed.tolist()) == channels_slowly(codes.tolist(), bits)
    assert torch.equal(unpack_channels(packed, bits=bits, tokens=tokens, width=width), codes)
    batch = torch.stack((codes, codes.flip(0))).unsqueeze(1)
    packed = pack_channels(batch, bits=bits)
    assert torch.equal(unpack_channels(packed, bits=bits, tokens=tokens, width=width), batch)


def test_twin_the_slow_writer_tells_halves_from_interleaved_channels():
    codes = some_channels(8, 32, 2.5)
    packed = bytes(pack_channels(codes, bits=2.5).tolist())
    assert packed == channels_slowly(codes.tolist(), 2.5)
    order = [i for pair in zip(range(16), range(16, 32), strict=True) for i in pair]
    assert packed != channels_slowly(codes[:, order].tolist(), 2.5)
    assert packed != channels_slowly(codes.flip(0).tolist(), 2.5)


def test_two_and_a_half_bits_are_three_and_two():
    assert channel_runs(2.5, 96) == [(3, 48), (2, 48)]
    assert [channel_runs(bits, 96) for bits in (2, 3, 4)] == [[(2, 96)], [(3, 96)], [(4, 96)]]
