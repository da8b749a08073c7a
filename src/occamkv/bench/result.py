"""What the JSON of `occamkv bench` holds: schemas, a check, and where packed becomes faster than stock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from occamkv.bench.gpu_result import GPU_KINDS
from occamkv.errors import UnsupportedInput
from occamkv.schema import NUMBER, check_fields, check_version

SCHEMA_VERSION = 1

_TIMES = {
    "cpu_ms?": NUMBER,
    "cpu_ms_min?": NUMBER,
    "wall_ms": NUMBER,
    "wall_ms_min": NUMBER,
    "repetitions": NUMBER,
}
_ALL_ROWS = {"shape": str, "method": str, "threads": NUMBER, "ours_ms": NUMBER, "contestants": {"*": _TIMES}}
_AGAINST_STOCK = {"context": NUMBER, "ratio_enable_gqa": NUMBER}
_BEST = {"ratio_best_stock": NUMBER, "best_stock": str}
_HEADS = {"query_heads": NUMBER, "kv_heads": NUMBER, "head_dim": NUMBER, "backend": str}
_OF_MODEL = {**_ALL_ROWS, **_AGAINST_STOCK, "dtype": str, "stock_ms": NUMBER}
_ROWS: dict[str, dict[str, Any]] = {
    "attend": {
        **_ALL_ROWS,
        **_AGAINST_STOCK,
        **_BEST,
        **_HEADS,
        "queries": NUMBER,
        "packed_bytes": NUMBER,
        "packed_gb_per_s": NUMBER,
        "errors?": {"*": NUMBER},
    },
    "encode": {
        **_ALL_ROWS,
        **_HEADS,
        "tokens": NUMBER,
        "ours_tokens_per_s": NUMBER,
        "reference_tokens_per_s": NUMBER,
        "ratio_reference": NUMBER,
    },
    "decode": {
        **_OF_MODEL,
        **_BEST,
        "backend": str,
        "steps": NUMBER,
        "cache_bytes": NUMBER,
        "stock_bytes": NUMBER,
    },
}
_RESULT = {
    "what": str,
    "command": str,
    "date": str,
    "machine": str,
    "versions": {"occamkv": str, "torch": str, "transformers": str, "python": str},
}
_CPU = {
    "cpu": {
        "model": str,
        "cores": NUMBER,
        "flags": [str],
        "torch_isa": str,
        "isa?": str,
        "load_start": NUMBER,
        "load_end": NUMBER,
    },
}


def check(result: Mapping[str, Any]) -> None:
    """Accept a result of `occamkv bench`, with every field in place and of its type.

    Raises:
        UnsupportedInput: It has another schema version or kind, lacks a field, or holds something else there.
    """
    check_version(result, SCHEMA_VERSION, "occamkv bench")
    kind = result.get("kind")
    if kind not in (*_ROWS, *GPU_KINDS):
        raise UnsupportedInput(f"the result's kind is {kind!r}; allowed: {', '.join((*_ROWS, *GPU_KINDS))}.")
    prefill = {"prefill": [_OF_MODEL]} if kind == "decode" else {}
    wanted = GPU_KINDS[kind] if kind in GPU_KINDS else {**_CPU, "rows": [_ROWS[kind]], **prefill}
    command = f"occamkv bench {str(kind).removeprefix('gpu-')}"
    check_fields(result, {**_RESULT, **wanted}, "the result", command=command)
    if not result["rows"]:
        raise UnsupportedInput("the result has no rows; allowed: one row or more, as `occamkv bench --json` writes.")


def crossover(contexts: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return from which context on packed stays faster than stock.

    Args:
        contexts: Ascending.
        ratios: Time of stock over time of packed at each.

    Returns:
        A number of tokens, between two contexts where the line through both (logarithmic in both) passes 1; the first
        context if packed is faster there already, so that the truth may lie below it; None if packed is slower at
        the last one.
    """
    slower = [index for index, ratio in enumerate(ratios) if ratio < 1]
    if not slower:
        return float(contexts[0])
    if slower[-1] == len(contexts) - 1:
        return None
    before, after = slower[-1], slower[-1] + 1
    low, high = math.log(ratios[before]), math.log(ratios[after])
    share = -low / (high - low)
    return math.exp((1 - share) * math.log(contexts[before]) + share * math.log(contexts[after]))


def tokens_text(tokens: float) -> str:
    """Return a number of tokens as people write it: 512, 4k, 6.3k, 128k."""
    if tokens < 1024:
        return f"{tokens:.0f}"
    return f"{tokens / 1024:.1f}".removesuffix(".0") + "k"


def crossover_text(contexts: Sequence[int], ratios: Sequence[float]) -> str:
    """Say the crossover in words."""
    found = crossover(contexts, ratios)
    if found is None:
        return f"not faster than the best stock up to {tokens_text(contexts[-1])}"
    if found <= contexts[0]:
        return f"faster than any stock from below {tokens_text(contexts[0])}"
    return f"faster than any stock from about {tokens_text(found)}"
