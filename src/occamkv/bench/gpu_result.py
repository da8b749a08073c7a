"""What the JSON of `occamkv bench --device cuda` holds beyond what every result says."""

from __future__ import annotations

from typing import Any

from occamkv.schema import NUMBER


def _numbers(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), NUMBER)


def _texts(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), str)


_GPU = {**_texts("name capability cuda driver"), **_numbers("processors l2_bytes memory_bytes")}
_CEILINGS = _numbers("read_gb_per_s copy_gb_per_s")
_TIMES = {"contestants": {"*": _numbers("ms ms_min ms_max repetitions")}, "ours_ms": NUMBER}
_LAYER = {
    **_TIMES,
    **_texts("shape method backend"),
    **_numbers("query_heads kv_heads head_dim copies read_bytes gb_per_s"),
}
_ATTEND = {
    **_LAYER,
    **_numbers("context batch bits stock_bytes floor_ms share_of_read best_stock_ms ratio ratio_step? ratio_of_bytes"),
    "best_stock": str,
    "skipped": {"*": str},
}
_ERRORS = {**_texts("shape method backend"), **_numbers("ours sdpa_bf16 limit"), "ok": bool}
_MODEL = {
    **_TIMES,
    **_numbers("context batch stock_ms ours_tokens_per_s stock_tokens_per_s ratio"),
    "method": str,
}
_STEPS = {**_MODEL, **_numbers("steps cache_bytes stock_bytes"), "best_stock": str, "skipped": {"*": str}}
_TRIED = {
    **_numbers("context batch cache_bytes weight_bytes most_allocated_bytes? ms tokens_per_s"),
    **_texts("method entrant"),
}
_CAPACITY = {**_numbers("context sequence_bytes"), "method": str, "batch_by_gib": {"*": NUMBER}}

GPU_KINDS: dict[str, dict[str, Any]] = {
    "gpu-attend": {"gpu": _GPU, "ceilings": _CEILINGS, "errors": [_ERRORS], "rows": [_ATTEND], "dropped": [str]},
    "gpu-encode": {
        "gpu": _GPU,
        "ceilings": _CEILINGS,
        "rows": [{**_LAYER, **_numbers("tokens written_bytes share_of_copy ours_tokens_per_s")}],
    },
    "gpu-decode": {
        "gpu": _GPU,
        "model": str,
        "weight_bytes": NUMBER,
        "rows": [_STEPS],
        "prefill": [_MODEL],
        "tried": [_TRIED],
        "capacity": [_CAPACITY],
        "dropped": [str],
    },
}
