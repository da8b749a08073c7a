"""Records put at shuffled places of shuffled slabs, among pages of garbage, as a pool may hold them after a while."""

import random
from collections.abc import Sequence

import torch

from occamkv.formats import Format
from occamkv.formats.pages import Pages
from occamkv.formats.records import Records
from occamkv.kernels import PackedTokens


def put(pages: Pages, page: int, slot: int, records: Records, index: int) -> None:
    """Write one record with its norms and super-scales."""
    pages.records[page, :, slot] = records.data[index]
    size = pages.format.record_tokens
    if pages.norms is not None:
        pages.norms[page, slot * size : (slot + 1) * size] = records.norms[index]
    if pages.super_scales is not None:
        pages.super_scales[page, :, slot] = records.super_scales[index]


def garbage(pages: Pages, generator: torch.Generator) -> None:
    """Fill pages with random bytes, many of which read as NaN or infinity."""
    for tensor in pages.tensors:
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))


def scatter(rows: Sequence[Records | None], format: Format, *, heads: int, head_dim: int, seed: int) -> PackedTokens:
    """Lay out the records of each sequence (None: no packed tokens); pins and so first positions are 0.

    Page 0 belongs to nobody; table entries behind a sequence's last page are 0.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups = [0 if row is None else row.data.shape[0] for row in rows]
    counts = [-(-n // format.page_records) for n in groups]
    sizes, starts = [1], [0]
    while sum(sizes) < sum(counts) + 3:
        starts.append(starts[-1] + sizes[-1] + rng.randint(0, 2))  # a gap is a slab that was given back
        sizes.append(rng.randint(1, 4))
    slabs = [Pages.empty(n, format=format, kv_heads=heads, head_dim=head_dim, device="cpu") for n in sizes]
    for slab in slabs[1:]:
        garbage(slab, generator)
    free = [(slab, page) for slab, size in enumerate(sizes) for page in range(size) if slab]
    rng.shuffle(free)
    table = torch.zeros(len(rows), max(1, *counts), dtype=torch.int64)
    for row, records in enumerate(rows):
        for index in range(counts[row]):
            slab, page = free.pop()
            table[row, index] = starts[slab] + page
            first = index * format.page_records
            for slot in range(format.page_records):  # behind the last record lie stale ones, as after a crop
                put(slabs[slab], page, slot, records, min(first + slot, groups[row] - 1))
    lengths = torch.tensor(groups) * format.record_tokens
    return PackedTokens(slabs, starts, table, lengths, torch.zeros_like(lengths))


def clone_slabs(packed: PackedTokens) -> list[Pages]:
    """A copy of all bytes, to be tampered with."""
    return [
        Pages(s.format, s.head_dim, *(None if t is None else t.clone() for t in (s.records, s.norms, s.super_scales)))
        for s in packed.slabs
    ]


def page_at(packed: PackedTokens, row: int, index: int) -> tuple[int, int]:
    """Slab and local number of a sequence's page."""
    number = int(packed.table[row, index])
    slab = max(i for i, start in enumerate(packed.starts) if start <= number)
    return slab, number - packed.starts[slab]


def fill_behind(pages: Pages, page: int, used: int) -> None:
    """Set all bytes of a page behind its first `used` records, which reads as NaN."""
    pages.records[page, :, used:] = 0xFF
    if pages.norms is not None:
        pages.norms[page, used * pages.format.record_tokens :] = float("nan")
    if pages.super_scales is not None:
        pages.super_scales[page, :, used:] = float("nan")
