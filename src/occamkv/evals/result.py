"""What the JSON of `occamkv eval` holds: the schema, and a check that names the first thing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from occamkv.errors import UnsupportedInput

SCHEMA_VERSION = 1

_NUMBER = float  # also takes an int, never a bool
_INTERVAL = (_NUMBER, _NUMBER)
_CELL = {"kind": str, "length": _NUMBER, "depth": _NUMBER, "exact": _NUMBER, "logprob": _NUMBER, "count": _NUMBER}
_BIN = {"first": _NUMBER, "last": _NUMBER, "kl": _NUMBER, "count": _NUMBER}
_ROW = {
    "method": str,
    "source?": str,
    "bits_per_value": _NUMBER,
    "bits_with_residual?": _NUMBER,
    "kl_mean": _NUMBER,
    "kl_mean_ci?": _INTERVAL,
    "kl_median": _NUMBER,
    "kl_p99": _NUMBER,
    "same_top": _NUMBER,
    "same_top_ci?": _INTERVAL,
    "perplexity": _NUMBER,
    "perplexity_full": _NUMBER,
    "cache_bytes": _NUMBER,
    "full_bytes": _NUMBER,
    "tokens": _NUMBER,
    "positions": _NUMBER,
    "packed_layers": _NUMBER,
    "layers": _NUMBER,
    "kl_by_position?": [_BIN],
    "generated?": {
        "tokens": _NUMBER,
        "prompts": _NUMBER,
        "agreement_length_mean": _NUMBER,
        "agreement_share": _NUMBER,
        "kl_by_index": [_BIN],
    },
    "layer_errors?": [{"layer": _NUMBER, "error": _NUMBER}],
    "probes?": {"logprob": _NUMBER, "logprob_ci?": _INTERVAL, "exact": _NUMBER, "count": _NUMBER, "cells": [_CELL]},
    "tasks?": [
        {
            "task": str,
            "score": _NUMBER,
            "metric": str,
            "count": _NUMBER,
            "generated_mean": _NUMBER,
            "truncated": _NUMBER,
            "invalid": _NUMBER,
        }
    ],
}
_RESULT = {
    "what": str,
    "command": str,
    "date": str,
    "machine": str,
    "threads": _NUMBER,
    "seed": _NUMBER,
    "versions": {"occamkv": str, "torch": str, "transformers": str, "python": str},
    "model": dict.fromkeys(("name", "model_type", "fingerprint", "dtype", "layers", "kv_heads", "head_dim"), object),
    "text": {"name": str, "sha256": str},
    "protocol": {"windows": _NUMBER, "length": _NUMBER, "first_token": _NUMBER, "score_from": _NUMBER},
    "controls": [{"name": str, "passed": bool, "told": str}],
    "void": bool,
    "rows": [_ROW],
}


def check(result: Mapping[str, Any]) -> None:
    """Accept a result of `occamkv eval`, with every field in place and of its type.

    Raises:
        UnsupportedInput: It has another schema version, lacks a field, or holds something else there.
    """
    given = result.get("schema_version") if isinstance(result, Mapping) else None
    if type(given) is not int or given != SCHEMA_VERSION:
        raise UnsupportedInput(
            f"this is no result of occamkv eval that can be read: schema_version is {given!r}; "
            f"this version reads {SCHEMA_VERSION}."
        )
    _check(result, _RESULT, "the result")
    if not result["rows"]:
        raise UnsupportedInput("the result has no rows; allowed: one row or more, as `occamkv eval --json` writes.")


def _check(value: Any, wanted: Any, at: str) -> None:
    """Compare with a schema: a dict of fields (`?` may be missing or null), a list of one kind, a pair, a type."""
    if isinstance(wanted, dict):
        _expect(at, value, "an object", fits=isinstance(value, Mapping))
        _check_fields(value, wanted, at)
    elif isinstance(wanted, list):
        _expect(at, value, "a list", fits=isinstance(value, list))
        for index, item in enumerate(value):
            _check(item, wanted[0], f"{at}[{index}]")
    elif isinstance(wanted, tuple):
        _expect(at, value, "two numbers", fits=isinstance(value, list | tuple) and len(value) == len(wanted))
        for item, kind in zip(value, wanted, strict=True):
            _check(item, kind, at)
    elif wanted is _NUMBER:
        _expect(at, value, "a number", fits=isinstance(value, int | float) and not isinstance(value, bool))
    else:
        _expect(at, value, "true or false" if wanted is bool else "a text", fits=isinstance(value, wanted))


def _check_fields(value: Mapping[str, Any], wanted: dict[str, Any], at: str) -> None:
    for key, inner in wanted.items():
        name = key.removesuffix("?")
        if name != key and value.get(name) is None:
            continue
        if name not in value:
            raise UnsupportedInput(f"{at} lacks {name!r}; allowed: a JSON file that `occamkv eval --json` wrote.")
        _check(value[name], inner, f"{at}.{name}")


def _expect(at: str, value: Any, allowed: str, *, fits: bool) -> None:
    if not fits:
        raise UnsupportedInput(f"{at} is {str(value)[:40]!r}; allowed: {allowed}.")
