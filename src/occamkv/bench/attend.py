"""One attention call over a long packed context, against what torch offers on the same tokens in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from occamkv.bench.inputs import Progress, Setting, Shape, backend_of, check_list, packed_of, ticker
from occamkv.bench.scene import Scene, packed_scene
from occamkv.bench.stock import GQA_BF16, causal, exact, gqa, relative_error, stock_contestants
from occamkv.bench.timing import Contestant, Sweep, Times, race
from occamkv.errors import UnsupportedInput

MOST_QUERIES = 128
OURS = "ours"


def bench_attend(
    shapes: Sequence[Shape], setting: Setting, *, queries: int = 1, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Time attention for all shapes, contexts, numbers of threads and methods; return one row for each.

    All methods and all formulations of torch take turns in one race.

    Args:
        shapes: Of layers.
        setting: Contexts, methods, threads, repetitions, backend.
        queries: Newest tokens that attend at once (1 in plain decoding).
        progress: Told after each round.

    Raises:
        UnsupportedInput: A value is not allowed, or a context is so short that nothing is packed.
    """
    check_list("queries", (queries,), 1, MOST_QUERIES)
    names = [shape.name for shape in shapes]
    if not shapes or len(set(names)) < len(names):
        raise UnsupportedInput(f"shapes are {', '.join(names)!r}; allowed: one or more, each once.")
    for one in setting.chosen:
        packed_of(one, min(setting.contexts), queries)
    rows = []
    for shape in shapes:
        for context in sorted(setting.contexts):
            rows += _rows(shape, context, setting, queries, progress)
    return rows


def _rows(
    shape: Shape, context: int, setting: Setting, queries: int, progress: Progress | None
) -> list[dict[str, Any]]:
    scenes = {
        str(one): packed_scene(shape, one, backend_of(one, setting.backend), context=context, queries=queries)
        for one in setting.chosen
    }
    some = next(iter(scenes.values()))
    stock = stock_contestants(some.q, *some.dequantized())
    ours = [Contestant(name, scene.step) for name, scene in scenes.items()]
    sweep = Sweep()
    with_errors = context == min(setting.contexts)
    rows = []
    for threads in setting.threads:
        stage = f"{shape.name}, {context} tokens, threads {threads}"
        tick = ticker(progress, stage, setting.repetitions + 1)
        entrants = [replace(one, prepare=sweep) for one in (*ours, *stock)]
        found = race(entrants, repetitions=setting.repetitions, threads=threads, tick=tick)
        rivals = {one.name: found[one.name] for one in stock}
        for name, scene in scenes.items():
            row = {
                "shape": shape.name,
                "query_heads": shape.query_heads,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "context": context,
                "queries": queries,
                "method": name,
                "backend": scene.backend.name,
                "threads": threads,
                **_compared(found[name], rivals),
                "packed_bytes": scene.packed_bytes,
                "packed_gb_per_s": scene.packed_bytes / found[name].ms / 1e6,
            }
            rows.append(row | {"errors": _errors(scene)} if with_errors else row)
    return rows


def _compared(ours: Times, rivals: dict[str, Times]) -> dict[str, Any]:
    best = min(rivals, key=lambda name: rivals[name].ms)
    return {
        "ours_ms": ours.ms,
        "ratio_enable_gqa": rivals[GQA_BF16].ms / ours.ms,
        "ratio_best_stock": rivals[best].ms / ours.ms,
        "best_stock": best,
        "contestants": {name: times.to_json() for name, times in ({OURS: ours} | rivals).items()},
    }


@torch.no_grad()
def _errors(scene: Scene) -> dict[str, float]:
    """Return relative L2 errors against float64 attention on the dequantized tokens.

    Ours gets the same queries as float32, so that the rounding of its output to bfloat16 does not hide its own error.
    """
    k, v = scene.dequantized()
    truth = exact(scene.q, k, v)
    low_q, low_k, low_v = (x.to(torch.bfloat16) for x in (scene.q, k, v))
    low = gqa(low_q, low_k, low_v, causal(low_q.shape[2], low_k.shape[2]))
    return {OURS: relative_error(scene.attend(scene.q.float()), truth), GQA_BF16: relative_error(low, truth)}
