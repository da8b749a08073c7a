"""What the JSON of `occamkv eval` holds: the schema, and a check that names the first thing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from occamkv.errors import UnsupportedInput
from occamkv.schema import NUMBER, check_fields, check_version

SCHEMA_VERSION = 1

_COMMAND = "occamkv eval"
_INTERVAL = (NUMBER, NUMBER)
_CELL = {"kind": str, "length": NUMBER, "depth": NUMBER, "exact": NUMBER, "logprob": NUMBER, "count": NUMBER}
_BIN = {"first": NUMBER, "last": NUMBER, "kl": NUMBER, "count": NUMBER}
_ROW = {
    "method": str,
    "source?": str,
    "bits_per_value": NUMBER,
    "bits_with_residual?": NUMBER,
    "kl_mean": NUMBER,
    "kl_mean_ci?": _INTERVAL,
    "kl_median": NUMBER,
    "kl_p99": NUMBER,
    "same_top": NUMBER,
    "same_top_ci?": _INTERVAL,
    "perplexity": NUMBER,
    "perplexity_full": NUMBER,
    "cache_bytes": NUMBER,
    "full_bytes": NUMBER,
    "tokens": NUMBER,
    "positions": NUMBER,
    "packed_layers": NUMBER,
    "layers": NUMBER,
    "kl_by_position?": [_BIN],
    "generated?": {
        "tokens": NUMBER,
        "prompts": NUMBER,
        "agreement_length_mean": NUMBER,
        "agreement_share": NUMBER,
        "kl_by_index": [_BIN],
    },
    "layer_errors?": [{"layer": NUMBER, "error": NUMBER}],
    "probes?": {"logprob": NUMBER, "logprob_ci?": _INTERVAL, "exact": NUMBER, "count": NUMBER, "cells": [_CELL]},
    "tasks?": [
        {
            "task": str,
            "score": NUMBER,
            "metric": str,
            "count": NUMBER,
            "generated_mean": NUMBER,
            "truncated": NUMBER,
            "invalid": NUMBER,
        }
    ],
}
_RESULT = {
    "what": str,
    "command": str,
    "date": str,
    "machine": str,
    "threads": NUMBER,
    "seed": NUMBER,
    "versions": {"occamkv": str, "torch": str, "transformers": str, "python": str},
    "model": dict.fromkeys(("name", "model_type", "fingerprint", "dtype", "layers", "kv_heads", "head_dim"), object),
    "text": {"name": str, "sha256": str},
    "protocol": {"windows": NUMBER, "length": NUMBER, "first_token": NUMBER, "score_from": NUMBER},
    "controls": [{"name": str, "passed": bool, "told": str}],
    "void": bool,
    "rows": [_ROW],
}


def check(result: Mapping[str, Any]) -> None:
    """Accept a result of `occamkv eval`, with every field in place and of its type.

    Raises:
        UnsupportedInput: It has another schema version, lacks a field, or holds something else there.
    """
    check_version(result, SCHEMA_VERSION, _COMMAND)
    check_fields(result, _RESULT, "the result", command=_COMMAND)
    if not result["rows"]:
        raise UnsupportedInput("the result has no rows; allowed: one row or more, as `occamkv eval --json` writes.")
