"""Pages: where records lie in them, that their bytes are counted, and that they can be taken apart and joined."""

import pytest
import torch
from hypothesis import given, settings

from occamkv.formats import Format
from occamkv.formats.pages import Pages
from occamkv.formats.records import Records, decode, decode_pages, encode, places, write
from some_records import formats, head_dims, keys_and_values


def filled_pages(format: Format, *, pages: int, heads: int, head_dim: int) -> tuple[Pages, Records]:
    k, v = keys_and_values(format, groups=pages * format.page_records, heads=heads, head_dim=head_dim)
    records = encode(k, v, format=format)
    made = Pages.empty(pages, format=format, kv_heads=heads, head_dim=head_dim, device="cpu")
    page, slot = places(made)
    write(made, records, page=page, slot=slot)
    return made, records


def assert_holds(pages: Pages, records: Records) -> None:
    """Record i is at slot i % R of page i // R; its norms are at the places of its tokens in the page."""
    tokens = pages.format.record_tokens
    for i in range(len(records.data)):
        page, slot = divmod(i, 128 // tokens)
        assert torch.equal(pages.records[page, :, slot], records.data[i])
        if pages.norms is not None:
            assert torch.equal(pages.norms[page, slot * tokens : (slot + 1) * tokens], records.norms[i])
        if pages.super_scales is not None:
            assert torch.equal(pages.super_scales[page, :, slot], records.super_scales[i])


@given(formats(), head_dims)
@settings(deadline=None, max_examples=30)
def test_records_lie_in_pages_in_token_order_and_read_alike(format, head_dim):
    pages, records = filled_pages(format, pages=2, heads=2, head_dim=head_dim)
    assert_holds(pages, records)
    k, v = decode_pages(pages)
    assert k.shape == v.shape == (2, 2, 128, head_dim)
    tokens = format.record_tokens
    for read, plain in zip((k, v), decode(records, format=format, head_dim=head_dim), strict=True):
        for i in range(len(plain)):
            page, start = divmod(i * tokens, 128)
            assert torch.equal(read[page, :, start : start + tokens], plain[i])


def test_twin_the_check_sees_two_swapped_records():
    pages, records = filled_pages(Format(), pages=1, heads=1, head_dim=64)
    assert_holds(pages, records)
    pages.records[0, 0, [0, 1]] = pages.records[0, 0, [1, 0]]
    with pytest.raises(AssertionError):
        assert_holds(pages, records)


@given(formats(), head_dims)
@settings(deadline=None, max_examples=30)
def test_bytes_are_what_the_format_says_and_what_the_tensors_hold(format, head_dim):
    pages = Pages.empty(3, format=format, kv_heads=2, head_dim=head_dim, device="cpu")
    assert pages.nbytes == 3 * format.page_bytes(kv_heads=2, head_dim=head_dim)
    assert pages.nbytes == sum(t.nbytes for t in (pages.records, pages.norms, pages.super_scales) if t is not None)
    values = 2 * 3 * 128 * 2 * head_dim
    assert format.bits_per_value(kv_heads=2, head_dim=head_dim) == pytest.approx(8 * pages.nbytes / values)


def test_twin_the_byte_count_sees_a_missing_norm():
    pages = Pages.empty(3, format=Format(token_scale=True), kv_heads=2, head_dim=64, device="cpu")
    assert pages.nbytes != 3 * Format().page_bytes(kv_heads=2, head_dim=64)


@pytest.mark.parametrize("metadata_bits", [16, 8], ids=lambda m: f"{m}-bit metadata")
def test_a_record_is_written_to_its_place_and_nowhere_else(metadata_bits):
    format = Format(token_scale=True, metadata_bits=metadata_bits)
    k, v = keys_and_values(format, groups=2, heads=2, head_dim=64)
    records = encode(k, v, format=format)
    pages = Pages.empty(3, format=format, kv_heads=2, head_dim=64, device="cpu")
    write(pages, records, page=torch.tensor([2, 0]), slot=torch.tensor([1, 3]))
    expected = [torch.zeros(3, 2, 128, 64) for _ in "kv"]
    for whole, plain in zip(expected, decode(records, format=format, head_dim=64), strict=True):
        whole[2, :, 32:64], whole[0, :, 96:128] = plain
    assert all(map(torch.equal, decode_pages(pages), expected))


@pytest.mark.parametrize("metadata_bits", [16, 8], ids=lambda m: f"{m}-bit metadata")
@pytest.mark.parametrize("token_scale", [True, False], ids=["token scale", "no token scale"])
def test_selected_pages_are_copies_and_join_again(token_scale, metadata_bits):
    format = Format(token_scale=token_scale, metadata_bits=metadata_bits)
    pages, records = filled_pages(format, pages=3, heads=2, head_dim=64)
    picked = pages.select(torch.tensor([1, 0]))
    parts = [picked.select(torch.tensor([1])), picked.select(torch.tensor([0])), pages.select(torch.tensor([2]))]
    again = Pages.concatenate(parts)
    assert_holds(again, records)
    assert again.nbytes == pages.nbytes
    for part in picked.tensors:
        part.zero_()
    assert_holds(pages, records)
