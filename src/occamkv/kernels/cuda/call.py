"""One call of the attend kernel: how the kernel is compiled for it, what it is given, how many blocks it runs in."""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from occamkv import ops
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.formats.pages import Pages
from occamkv.formats.records import pages_of
from occamkv.kernels.checks import check_attend, check_lengths
from occamkv.kernels.contract import FullTokens, PackedTokens, slab_of
from occamkv.kernels.cuda import launching
from occamkv.kernels.cuda.kernel import Call, Kernel

COLUMNS = 8
"""Query rows that a block answers at a time."""

MAX_QUERIES = 64
"""Longer chunks go through torch, block by block.

Every 8 query rows of a KV head read all pages once more, mostly from the L2 cache: blocks that read the same pages for
other rows follow each other. Torch reads and writes each value some dozens of times as float32, for any number of
queries. By bytes both take as long at some hundreds of queries with 4 query heads per KV head; not measured on a GPU.
"""

MAX_PARTS = 4
EVERYTHING = 2**62
"""A window wider than any context."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What the kernels read, `Dtype` of native/arguments.h."""

_FULL_TILE = 16  # tokens that a warp reads at a time
_WARPS = 4
_IN_GRAPHS: dict[tuple[tuple[int, ...], ...], Tensor] = {}  # slab tables that graphs may read for as long as they live
_MOST_FULL_SPLITS = 8


class Part(ctypes.Structure):
    """`Part` of native/arguments.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token")),
        *((name, ctypes.c_void_p) for name in ("positions", "logit_bias")),
        *((name, ctypes.c_int) for name in ("tokens", "dtype")),
    )


class Arguments(ctypes.Structure):
    """`Arguments` of native/arguments.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_batch", "q_head", "q_token")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_batch", "out_head", "out_token")),
        *((name, ctypes.c_void_p) for name in ("q_positions", "slabs", "table", "lengths", "first_position", "skips")),
        *((name, ctypes.c_void_p) for name in ("sinks", "balance", "partial_sums", "partial_softmax", "counters")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("slab_count", "table_width", "skip_count")),
        *((name, ctypes.c_int) for name in ("query_heads", "kv_heads", "queries", "q_dtype", "packed_splits")),
        *((name, ctypes.c_int) for name in ("splits", "tiles", "part_count", "hadamard_block", "output_block")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("parts", Part * MAX_PARTS),
    )


@dataclass(frozen=True)
class Options:
    """What else a call of `attend` may say; see `occamkv.kernels.blockwise.attend`."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    hadamard_block: int | None = None
    balance: Tensor | None = None
    rotate_output: bool = False


def prepare(
    q: Tensor,
    *,
    q_positions: Tensor,
    packed: PackedTokens | None,
    full: Sequence[FullTokens],
    options: Options,
    packed_splits: int,
) -> tuple[Call, Tensor]:
    """Check the arguments of `attend` and describe them.

    Args:
        q: `[B, Hq, Tq, D]`, Tq up to `MAX_QUERIES`.
        q_positions: int64 `[B, Tq]`.
        packed: Pages in native order, or None.
        full: Tokens in full precision, in up to `MAX_PARTS` parts.
        options: The rest.
        packed_splits: Blocks that share the pages of a sequence and KV head.

    Returns:
        The call, and where its result will be: `[B, Hq, Tq, D]` in the dtype of q.

    Raises:
        UnsupportedInput: They do not fit together, or the kernel does not take them.
    """
    kv_heads = check_attend(
        q,
        q_positions,
        packed,
        full,
        mask=None,
        sinks=options.sinks,
        balance=options.balance,
        hadamard_block=options.hadamard_block,
        key_bias=None,
    )
    batch, query_heads, queries, head_dim = q.shape
    parts = [part for part in full if part.k.shape[2]]
    if queries > MAX_QUERIES or len(parts) > MAX_PARTS:
        raise UnsupportedInput(
            f"there are {queries} queries and {len(parts)} parts in full precision; the kernel takes {MAX_QUERIES} "
            f"and {MAX_PARTS}."
        )
    keep: list[Tensor] = []
    q = readable(q)
    out = torch.empty((batch, queries, query_heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    tiles = -(-query_heads // kv_heads * queries // COLUMNS)
    packed_splits = packed_splits if packed is not None else 0
    splits = max(1, packed_splits + _full_splits(parts))
    rows = batch * kv_heads * tiles
    several = rows * splits if splits > 1 else 0
    sums = torch.empty(several * COLUMNS * head_dim, dtype=torch.float32, device=q.device)
    softmax = torch.empty(several * COLUMNS * 2, dtype=torch.float32, device=q.device)
    counters = _counters(1 << max(10, rows.bit_length()), q.device, launching.stream_of(q.device))
    keep += [q, out, sums, softmax, counters]
    arguments = Arguments(
        *(q.data_ptr(), *q.stride()[:3]),
        *(out.data_ptr(), *out.stride()[:3]),
        q_positions=_kept(q_positions.to(torch.int64).contiguous(), keep),
        sinks=_kept(_floats(options.sinks), keep),
        balance=_kept(_floats(options.balance), keep),
        partial_sums=sums.data_ptr(),
        partial_softmax=softmax.data_ptr(),
        counters=counters.data_ptr(),
        window=EVERYTHING if options.window is None else min(options.window, EVERYTHING),
        query_heads=query_heads,
        kv_heads=kv_heads,
        queries=queries,
        q_dtype=DTYPES[q.dtype],
        packed_splits=packed_splits,
        splits=splits,
        tiles=tiles,
        part_count=len(parts),
        hadamard_block=options.hadamard_block or 0,
        output_block=ops.hadamard_block(head_dim) if options.rotate_output else 0,
        scale=head_dim**-0.5 if options.scale is None else options.scale,
        softcap=options.softcap or 0.0,
        parts=(Part * MAX_PARTS)(*(_part(part, keep) for part in parts)),
    )
    if packed is not None:
        _describe_packed(arguments, packed, q, keep)
    format = Format() if packed is None else packed.format
    kernel = Kernel("attend", format, head_dim, softcap=arguments.softcap > 0)
    return Call(kernel, arguments, (splits * tiles, kv_heads, batch), q.device, keep), out


def check_places(packed: PackedTokens) -> None:
    """Raise `UnsupportedInput` unless the table has all pages of each sequence, and slabs have them."""
    lengths = packed.lengths.tolist()
    check_lengths(lengths, record_tokens=packed.format.record_tokens, pages=packed.table.shape[1])
    rows = zip(packed.table.tolist(), lengths, strict=True)
    check_pages([n for row, tokens in rows for n in row[: pages_of(tokens)]], packed.slabs, packed.starts)


def check_pages(numbers: Iterable[int], slabs: Sequence[Pages], starts: Sequence[int]) -> None:
    """Raise `UnsupportedInput` unless slabs have all these pages."""
    for number in numbers:
        slab_of(number, slabs, starts)


def slab_table(slabs: Sequence[Pages], starts: Sequence[int], like: Tensor) -> Tensor:
    """Return `Slab` structs, int64 `[slabs, 4]`, on the device of `like`, where the slabs must be."""
    table = tuple(
        (start, *(_place(t, like) for t in _tensors(pages))) for start, pages in zip(starts, slabs, strict=True)
    )
    found = _slab_table(table, like.device)
    if launching.stream_of(like.device)[1]:
        _IN_GRAPHS[table] = found
    return found


@lru_cache(maxsize=256)
def _counters(size: int, device: torch.device, stream: tuple[int, int]) -> Tensor:
    """Return zeros, int32 `[size]`, for calls on one stream: each call leaves them as zeros for the next one.

    A graph under capture has its own, so that it may run beside its stream's other calls; they are set to zero once in
    it, by the first call that is captured.
    """
    return torch.zeros(size, dtype=torch.int32, device=device)


def _full_splits(parts: Sequence[FullTokens]) -> int:
    """Return how many blocks read tokens in full precision: four warps each, a tile or more per warp."""
    tiles = sum(-(-part.k.shape[2] // _FULL_TILE) for part in parts)
    return min(-(-tiles // _WARPS), _MOST_FULL_SPLITS)


def _kept(x: Tensor | None, keep: list[Tensor]) -> int | None:
    if x is None:
        return None
    keep.append(x)
    return x.data_ptr()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def readable(x: Tensor) -> Tensor:
    """Return x, or a copy: a known dtype, channels side by side."""
    x = x if x.dtype in DTYPES else x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """Return whether all rows of `[B, H, T, D]` begin at multiples of 16 bytes."""
    return not any(n % 16 for n in (x.data_ptr(), *(n * x.element_size() for n in x.stride()[:3])))


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy, readable and with its rows at multiples of 16 bytes."""
    x = readable(x)
    return x if is_aligned(x) else x.contiguous().clone()


def _part(part: FullTokens, keep: list[Tensor]) -> Part:
    k, v = _aligned(part.k), _aligned(part.v)
    if k.dtype != v.dtype:
        k, v = k.to(torch.float32).contiguous(), v.to(torch.float32).contiguous()
    return Part(
        _kept(k, keep),
        _kept(v, keep),
        *k.stride()[:3],
        *v.stride()[:3],
        _kept(part.positions.to(torch.int64).contiguous(), keep),
        _kept(_floats(part.logit_bias), keep),
        k.shape[2],
        DTYPES[k.dtype],
    )


def _describe_packed(arguments: Arguments, packed: PackedTokens, q: Tensor, keep: list[Tensor]) -> None:
    batch = q.shape[0]
    slabs = packed.slabs
    arguments.slabs = _kept(slab_table(slabs, packed.starts, q), keep)
    arguments.slab_count = len(slabs)
    table = packed.table
    of_rows = (packed.lengths, packed.first_position)
    skips = [] if packed.skips is None else [packed.skips]
    for name, x, shape in (
        ("the block table", table, (batch, table.shape[-1])),
        *(("lengths and first positions", x, (batch,)) for x in of_rows),
        *(("skips", x, (batch, x.shape[-1])) for x in skips),
    ):
        if x.dtype != torch.int64 or tuple(x.shape) != shape or x.device != q.device:
            raise UnsupportedInput(
                f"{name}: {x.dtype} {tuple(x.shape)} on {x.device}; allowed: torch.int64 {shape} on {q.device}."
            )
    arguments.table, arguments.table_width = _kept(table.contiguous(), keep), table.shape[1]
    arguments.lengths, arguments.first_position = (_kept(x.contiguous(), keep) for x in of_rows)
    for x in skips:
        arguments.skips, arguments.skip_count = _kept(x.contiguous(), keep), x.shape[1]


@lru_cache(maxsize=1024)
def _slab_table(slabs: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return `Slab` structs on the device; one table as long as the pool does not grow, so no step waits for a copy.

    Raises:
        UnsupportedInput: A graph is captured: it could not hold the copy from the host.
    """
    if launching.stream_of(device)[1]:
        raise UnsupportedInput(
            "the pool of pages has grown since the last step; take a step before a graph is captured."
        )
    return torch.tensor(slabs, dtype=torch.int64).to(device)


def _tensors(pages: Pages) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return pages.records, pages.norms, pages.super_scales


def _place(x: Tensor | None, q: Tensor) -> int:
    """Return where a tensor of pages lies, 0 for one that its format does not have."""
    if x is None:
        return 0
    if not x.is_contiguous() or x.device != q.device or x.data_ptr() % 16:
        raise UnsupportedInput(
            f"a tensor of pages lies on {x.device} with strides {x.stride()}; allowed: dense, on {q.device}, at a "
            "multiple of 16 bytes."
        )
    return x.data_ptr()
