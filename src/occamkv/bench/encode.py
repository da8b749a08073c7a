"""Encoding of new tokens of one layer: rotate, scale, choose codes, pack; against the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from occamkv.bench.attend import OURS
from occamkv.bench.inputs import CPU, Progress, Setting, Shape, backend_of, ticker
from occamkv.bench.scene import DTYPE, random_tokens, statistics_of
from occamkv.bench.timing import Contestant, race
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import Records, to_groups
from occamkv.kernels import Backend, backend
from occamkv.methods import Method

REFERENCE = "reference"
MOST_TOKENS = 2**14


def bench_encode(
    shapes: Sequence[Shape], setting: Setting, *, tokens: int = 1024, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Time encoding for all shapes, methods and numbers of threads; return one row for each.

    Args:
        shapes: Of layers.
        setting: Methods, threads, repetitions, backend; its contexts are not used.
        tokens: Tokens of a call, a multiple of 128.
        progress: Told after each round.

    Raises:
        UnsupportedInput: A value is not allowed.
    """
    if tokens % PAGE_TOKENS or not 0 < tokens <= MOST_TOKENS:
        raise UnsupportedInput(f"tokens is {tokens}; allowed: a multiple of {PAGE_TOKENS} up to {MOST_TOKENS}.")
    rows = []
    for shape in shapes:
        for one in setting.chosen:
            for threads in setting.threads:
                rows.append(_row(shape, one, setting, threads, tokens, progress))
    return rows


def _row(
    shape: Shape, method: Method, setting: Setting, threads: int, tokens: int, progress: Progress | None
) -> dict[str, Any]:
    mine = backend_of(method, setting.backend)
    tick = ticker(progress, f"{shape.name}, {method}, threads {threads}", setting.repetitions + 1)
    contestants = [
        Contestant(OURS, encoder(shape, method, mine, tokens)),
        Contestant(REFERENCE, encoder(shape, method, backend(REFERENCE), tokens)),
    ]
    found = race(contestants, repetitions=setting.repetitions, threads=threads, tick=tick)
    return {
        "shape": shape.name,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "method": str(method),
        "backend": mine.name,
        "threads": threads,
        "tokens": tokens,
        "ours_ms": found[OURS].ms,
        "ours_tokens_per_s": 1000 * tokens / found[OURS].ms,
        "reference_tokens_per_s": 1000 * tokens / found[REFERENCE].ms,
        "ratio_reference": found[REFERENCE].ms / found[OURS].ms,
        "contestants": {name: times.to_json() for name, times in found.items()},
    }


def encoder(
    shape: Shape, method: Method, backend: Backend, tokens: int, *, device: torch.device = CPU
) -> Callable[[], Records]:
    """Return a call that takes `tokens` tokens of one layer from model space to records."""
    drawn = random_tokens(shape, tokens, 1).to(device)
    crossing = method.crossing(drawn.k, statistics_of(method, shape))
    k, v = (to_groups(x.to(DTYPE), method.packed_format.record_tokens) for x in (drawn.k, drawn.v))

    def signed(v: Tensor) -> Tensor:
        return v if crossing.v_signs is None else v * crossing.v_signs.to(v)

    return lambda: backend.encode(
        k,
        signed(v),
        format=method.packed_format,
        grid=method.grid,
        clip=method.clip,
        norm=method.norm,
        feedback=crossing.feedback,
        hadamard_block=crossing.k_block,
        balance=crossing.k_vector,
        rotate_v=crossing.v_block is not None,
    )
