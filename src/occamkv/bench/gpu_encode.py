"""Encoding of a prompt of one layer on a GPU, against the speed of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from occamkv import kernels
from occamkv.bench.attend import OURS
from occamkv.bench.encode import encoder
from occamkv.bench.gpu_ceilings import Ceilings
from occamkv.bench.gpu_timing import Rig, check_turns, spread, take_turns
from occamkv.bench.inputs import Shape, packing_method
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.methods import Method

MOST_TOKENS = 2**18
_CALLS = 10


def bench_gpu_encode(
    shapes: Sequence[Shape], methods: Sequence[str], rig: Rig, ceilings: Ceilings, *, tokens: int, repetitions: int
) -> list[dict[str, Any]]:
    """Time encoding for all shapes and methods; return one row for each.

    Raises:
        UnsupportedInput: A value is not allowed.
    """
    if tokens % PAGE_TOKENS or not 0 < tokens <= MOST_TOKENS:
        raise UnsupportedInput(f"tokens is {tokens}; allowed: a multiple of {PAGE_TOKENS} up to {MOST_TOKENS}.")
    check_turns(methods, repetitions)
    chosen = [packing_method(name) for name in methods]
    return [_row(shape, one, rig, ceilings, tokens, repetitions) for shape in shapes for one in chosen]


def _row(shape: Shape, method: Method, rig: Rig, ceilings: Ceilings, tokens: int, repetitions: int) -> dict[str, Any]:
    backend = kernels.backend_for(method.packed_format, rig.device, shape.head_dim)
    given = 4 * tokens * shape.kv_heads * shape.head_dim
    calls = [encoder(shape, method, backend, tokens, device=rig.device) for _ in range(rig.copies(given))]
    made = calls[0]()
    written = sum(x.nbytes for x in (made.data, made.norms, made.super_scales) if x is not None)
    rounds = -(-_CALLS // len(calls))
    times = take_turns({OURS: rig.queued(calls * rounds)}, repetitions)[OURS]
    speed = (given + written) / times.ms / 1e6
    return {
        "shape": shape.name,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "method": str(method),
        "backend": backend.name,
        "tokens": tokens,
        "copies": len(calls),
        "read_bytes": given,
        "written_bytes": written,
        "ours_ms": times.ms,
        "gb_per_s": speed,
        "share_of_copy": speed / ceilings.copy_gb_per_s,
        "ours_tokens_per_s": 1000 * tokens / times.ms,
        "contestants": {OURS: spread(times)},
    }
