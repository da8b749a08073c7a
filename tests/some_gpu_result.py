"""Results of `occamkv bench --device cuda`, made by formulas on a card that does not exist: nothing was measured."""

from typing import Any

import some_bench_result

GPU = {
    "name": "MADE UP, no measurement",
    "capability": "9.0",
    "processors": 132,
    "l2_bytes": 60 * 2**20,
    "memory_bytes": 141 * 2**30,
    "cuda": "13.0",
    "driver": "580",
}
READ = 4000.0
CONTEXTS = (4096, 32768, 131072)
SHAPES = {"32/8/128": (32, 8, 128), "8/8/64": (8, 8, 64)}


def times(ms: float) -> dict[str, float]:
    return {"ms": ms, "ms_min": 0.9 * ms, "ms_max": 1.2 * ms, "repetitions": 9}


def head(kind: str) -> dict[str, Any]:
    given = some_bench_result.attend_result()
    same = ("schema_version", "command", "date", "machine", "versions")
    return {key: given[key] for key in same} | {"kind": kind, "what": "ms of something", "gpu": GPU}


def attend_row(shape: str, context: int, batch: int, method: str) -> dict[str, Any]:
    """Ours reads a fifth or a sixth of the bytes, after 5 microseconds in which nothing is read; stock at 80 %."""
    heads, kv_heads, head_dim = SHAPES[shape]
    stock_bytes = 4 * batch * context * kv_heads * head_dim
    read = stock_bytes // {"oscar": 5, "occam": 6}[method]
    floor = read / READ / 1e6
    ours, stock = floor / 0.9 + 0.005, stock_bytes / READ / 1e6 / 0.8 + 0.004
    return {
        "shape": shape,
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": context,
        "batch": batch,
        "method": method,
        "backend": "cuda",
        "bits": 3.0 if method == "oscar" else 2.5,
        "copies": 2,
        "read_bytes": read,
        "stock_bytes": stock_bytes,
        "ours_ms": ours,
        "floor_ms": floor,
        "gb_per_s": read / ours / 1e6,
        "share_of_read": floor / ours,
        "best_stock": "flash_gqa",
        "best_stock_ms": stock,
        "ratio": stock / ours,
        "ratio_step": stock / (ours + 0.003),
        "ratio_of_bytes": stock_bytes / read,
        "contestants": {"ours": times(ours), "ours_step": times(ours + 0.003), "flash_gqa": times(stock)},
        "skipped": {"cudnn_gqa": "made up"},
    }


def attend_result() -> dict[str, Any]:
    rows = [attend_row(s, c, b, m) for s in SHAPES for c in CONTEXTS for b in (1, 8, 64) for m in ("oscar", "occam")]
    error = {"shape": "8/2/64", "method": "oscar", "backend": "cuda", "ours": 1e-3, "sdpa_bf16": 4e-3}
    ceilings = {"read_gb_per_s": READ, "copy_gb_per_s": 3900.0}
    found = {"ceilings": ceilings, "errors": [error | {"limit": 2e-3, "ok": True}], "dropped": ["8/8/64: no time"]}
    return head("gpu-attend") | found | {"rows": rows}


def encode_result() -> dict[str, Any]:
    row = {
        **{key: attend_row("32/8/128", 4096, 1, "occam")[key] for key in ("shape", "query_heads", "kv_heads")},
        "head_dim": 128,
        "method": "occam",
        "backend": "cuda",
        "copies": 2,
        "tokens": 32768,
        "read_bytes": 134217728,
        "written_bytes": 21000000,
        "ours_ms": 0.1,
        "gb_per_s": 1552.0,
        "share_of_copy": 0.4,
        "ours_tokens_per_s": 3.2768e8,
        "contestants": {"ours": times(0.1)},
    }
    return head("gpu-encode") | {"ceilings": {"read_gb_per_s": READ, "copy_gb_per_s": 3900.0}, "rows": [row]}


def decode_row(context: int, batch: int, method: str, **extra: Any) -> dict[str, Any]:
    stock_bytes = 131072 * context * batch
    ours, stock = 4 + stock_bytes / 5 / 3e9, 4 + stock_bytes / 3e9
    return {
        "context": context,
        "batch": batch,
        "method": method,
        "ours_ms": ours,
        "stock_ms": stock,
        "ours_tokens_per_s": 1000 * batch / ours,
        "stock_tokens_per_s": 1000 * batch / stock,
        "ratio": stock / ours,
        "contestants": {"ours": times(ours), "static_flash": times(stock)},
        **extra,
    }


def decode_result() -> dict[str, Any]:
    jobs = [(context, 1) for context in CONTEXTS] + [(context, batch) for context in CONTEXTS[:2] for batch in (8, 48)]
    extra = {"steps": 8, "cache_bytes": 2**30, "stock_bytes": 5 * 2**30, "best_stock": "static_flash", "skipped": {}}
    tried = {"context": 4096, "method": "occam", "entrant": "occam", "batch": 1200, "cache_bytes": 2**36}
    return head("gpu-decode") | {
        "model": "some-model",
        "weight_bytes": 2**34,
        "rows": [decode_row(*job, "occam", **extra) for job in jobs],
        "prefill": [decode_row(32768, 1, "occam")],
        "tried": [tried | {"weight_bytes": 2**34, "most_allocated_bytes": 2**37, "ms": 30.0, "tokens_per_s": 40000.0}],
        "capacity": [
            {"context": 4096, "method": name, "sequence_bytes": size, "batch_by_gib": {"80": 2**36 // size}}
            for name, size in (("occam", 10**8), ("static cache", 5 * 10**8))
        ],
        "dropped": [],
    }


RESULTS = {"gpu-attend": attend_result, "gpu-encode": encode_result, "gpu-decode": decode_result}
