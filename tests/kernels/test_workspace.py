"""Attending to a long context takes a small workspace that does not grow with it."""

from functools import cache

import pytest
import torch

from occamkv import kernels
from occamkv.formats.pages import Pages
from occamkv.formats.records import decode_pages
from occamkv.kernels import PackedTokens
from some_attention import METHODS, Case, Held, backend_or_skip, backends, make_case
from storage_meter import StorageMeter

LIMIT_BYTES = 16 * 2**20
LONG = 64 * 1024


@cache
def long_case(name: str, tokens: int, queries: int, batch: int = 1) -> Case:
    """One page of real records, repeated, and read through the table: 2 KV heads of 64 channels, 6 query heads."""
    page_groups = METHODS[name].packed_format.page_records
    small = make_case(METHODS[name], held=(Held(0, page_groups, 0),), queries=queries, gqa=3)
    page = small.packed.gather([int(small.packed.table[0, 0])])
    pages = Pages(
        page.format, page.head_dim, *(repeated(t, tokens // 128) for t in (page.records, page.norms, page.super_scales))
    )
    table = torch.randperm(tokens // 128, generator=torch.Generator().manual_seed(0)).expand(batch, -1)
    lengths = torch.full((batch,), tokens)
    packed = PackedTokens([pages], [0], table, lengths, torch.zeros_like(lengths))
    k, v = (x[:, :, :128].repeat(batch, 1, tokens // 128, 1) for x in (small.k, small.v))
    at = (tokens - queries + torch.arange(queries)).expand(batch, -1)
    q = small.q.repeat(batch, 1, 1, 1)
    return Case(q, at, packed, [], small.crossing, k, v, torch.arange(tokens).expand(batch, -1))


def repeated(tensor: torch.Tensor | None, times: int) -> torch.Tensor | None:
    return None if tensor is None else tensor.repeat(times, *[1] * (tensor.dim() - 1))


def peak(case: Case, backend: str) -> int:
    with StorageMeter() as meter:
        case.attend(kernels.backend(backend))
    return meter.peak


@backends
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", METHODS)
def test_the_workspace_of_a_long_context_is_small(backend, name, queries):
    backend_or_skip(backend, METHODS[name])
    assert peak(long_case(name, LONG, queries), backend) < LIMIT_BYTES


@backends
@pytest.mark.parametrize(("queries", "batch"), [(1, 1), (1, 5), (130, 1)])
def test_the_workspace_does_not_grow_with_the_context(backend, queries, batch):
    backend_or_skip(backend, METHODS["oscar"])
    short, long = (peak(long_case("oscar", n, queries, batch), backend) for n in (LONG // 4, LONG))
    assert long <= short * 1.01


@backends
@pytest.mark.parametrize(("queries", "batch"), [(1, 1), (5, 3), (130, 1)])
def test_a_context_of_many_blocks_is_attended_to_exactly(backend, queries, batch):
    long_case("oscar", LONG // 4, queries, batch).check(backend_or_skip(backend, METHODS["oscar"]))


def test_twin_the_meter_sees_a_full_dequantization():
    packed = long_case("oscar", LONG, 1).packed
    with StorageMeter() as meter:
        kept = decode_pages(packed.gather(packed.table[0].tolist()))
    values = 2 * LONG * 2 * 64
    assert meter.peak >= values * 4 > LIMIT_BYTES
    assert meter.live == sum(x.untyped_storage().nbytes() for x in kept), "what is freed no longer counts"


def test_twin_the_meter_counts_a_storage_once_however_often_it_is_viewed():
    given = torch.zeros(1000)
    with StorageMeter() as meter:
        views = [given[i:] for i in range(10)]
        assert meter.peak == 0, "views of what was there before take nothing"
        made = given + 1
        views += [made[i:] for i in range(10)]
        made.add_(1)
        del made
        assert meter.live == meter.peak == 4000
        views.clear()
        assert (meter.live, meter.peak, meter.made) == (0, 4000, 4000)
