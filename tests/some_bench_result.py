"""Results of `occamkv bench` with realistic numbers, made by formulas and not measured."""

from typing import Any

CONTEXTS = (4096, 16384, 65536)
_CPU = {
    "model": "Some CPU",
    "cores": 2,
    "flags": ["avx2", "fma"],
    "torch_isa": "AVX2",
    "isa": "avx2",
    "load_start": 0.1,
    "load_end": 1.0,
}
_HEAD = {
    "schema_version": 1,
    "what": "ms of something",
    "command": "occamkv bench",
    "date": "2026-11-22",
    "machine": "Some CPU, 2 cores",
    "versions": {"occamkv": "0.1", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
    "cpu": _CPU,
}
SHAPES = {"wide": (32, 8, 128), "narrow": (9, 3, 64)}


def times(ms: float, *, threads: int = 1) -> dict[str, Any]:
    """Return what a race says of a contestant that always takes `ms`."""
    cpu = ms if threads == 1 else None
    return {"cpu_ms": cpu, "cpu_ms_min": cpu, "wall_ms": ms, "wall_ms_min": ms, "repetitions": 9}


def attend_row(shape: str, context: int, ours: float, *, method: str = "occam", threads: int = 1) -> dict[str, Any]:
    """Return a row in which the best stock takes a millisecond per 4096 tokens."""
    unit = context / 4096
    stock = {
        f"{name}_{dtype}": slower * unit * (1 if dtype == "bf16" else 1.3)
        for name, slower in (("sdpa_gqa", 3.0), ("sdpa_folded", 1.2), ("manual_folded", 1.0))
        for dtype in ("bf16", "fp32")
    }
    return {
        "shape": shape,
        **dict(zip(("query_heads", "kv_heads", "head_dim"), SHAPES[shape], strict=True)),
        "context": context,
        "queries": 1,
        "method": method,
        "backend": "reference",
        "threads": threads,
        "ours_ms": ours,
        "ratio_enable_gqa": 3 * unit / ours,
        "ratio_best_stock": unit / ours,
        "best_stock": "manual_folded_bf16",
        "packed_bytes": 700 * context,
        "packed_gb_per_s": 700 * context / ours / 1e6,
        "errors": {"ours": 2e-4, "sdpa_gqa_bf16": 4e-3} if context == CONTEXTS[0] else None,
        "contestants": {name: times(ms, threads=threads) for name, ms in {"ours": ours, **stock}.items()},
    }


def attend_result(*, methods: tuple[str, ...] = ("occam",), threads: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """Return a result in which ours takes 2 ms and little more with the context: it wins from 8192 tokens on."""
    rows = [
        attend_row(shape, context, 2.0 + 1e-6 * context, method=method, threads=count)
        for shape in SHAPES
        for context in CONTEXTS
        for count in threads
        for method in methods
    ]
    return {**_HEAD, "kind": "attend", "rows": rows}


def encode_result() -> dict[str, Any]:
    """Return a result of two shapes."""
    rows = [
        {
            "shape": shape,
            **dict(zip(("query_heads", "kv_heads", "head_dim"), heads, strict=True)),
            "method": "occam",
            "backend": "reference",
            "threads": 1,
            "tokens": 1024,
            "ours_ms": 10.0,
            "ours_tokens_per_s": 102400.0,
            "reference_tokens_per_s": 20480.0,
            "ratio_reference": 5.0,
            "contestants": {"ours": times(10.0), "reference": times(50.0)},
        }
        for shape, heads in SHAPES.items()
    ]
    return {**_HEAD, "kind": "encode", "rows": rows}


def decode_result() -> dict[str, Any]:
    """Return a result of one model in two dtypes, with prefill."""
    rows = []
    for dtype, base in (("bfloat16", 20.0), ("float32", 30.0)):
        for context in CONTEXTS:
            ours, stock = base + context / 8192, base - 5 + context / 2048
            rows.append(
                {
                    "shape": "small-model",
                    "dtype": dtype,
                    "context": context,
                    "method": "occam",
                    "threads": 1,
                    "ours_ms": ours,
                    "stock_ms": stock,
                    "ratio_enable_gqa": stock / ours,
                    "ratio_best_stock": (15 + context / 2048) / ours,
                    "best_stock": "stock_bfloat16",
                    "contestants": {"ours": times(ours), "stock": times(stock)},
                }
            )
    extra = {"steps": 32, "backend": "reference", "cache_bytes": 3 * 2**20, "stock_bytes": 16 * 2**20}
    prefill = [{key: value for key, value in rows[0].items() if "best" not in key}]
    return {**_HEAD, "kind": "decode", "rows": [row | extra for row in rows], "prefill": prefill}


RESULTS = {"attend": attend_result, "encode": encode_result, "decode": decode_result}
