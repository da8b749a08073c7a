"""Results of `occamkv analyze`, made up: a model with low-norm sinks, and one with a sliding window and none."""

import math
from typing import Any

LENGTH = 300
SETTINGS = ("none", "rotation", "token_scale", "rotation+token_scale", "balanced+token_scale")


def low_norm_result(*, layers: int = 4) -> dict[str, Any]:
    """Every layer packed; token 0 has a norm of .25 + .01 layer; rotation and scale lower the error."""
    made = [_layer(i, sink=0.25 + 0.01 * i, errors=(0.4, 0.36, 0.3, 0.2 + 0.01 * i, 0.1)) for i in range(layers)]
    return _result("low", made, token="<|start|>")


def even_norm_result() -> dict[str, Any]:
    """Layers 1 and 3 packed, the others a sliding window without errors; rotation raises the error."""
    made = [_layer(i, sink=1.02, errors=(0.2, 0.6, 0.18, 0.7, 0.1)) for i in range(4)]
    for layer in made[::2]:
        layer |= {"kind": "sliding window of 512 tokens", "packs": False, "errors": None, "rotation_gain": None}
        layer |= {"error_bound": None, "key_cosine": None}
        layer["advice"] = {"method": "full", "pins": None, "overrides": {}, "why": "a window is short"}
    return _result("even", made, token="<bos>")


def _result(model: str, layers: list[dict[str, Any]], *, token: str) -> dict[str, Any]:
    for layer in layers:
        for sink in layer["sinks"]:
            sink["token"] = token
    plan = {"index": 0, "method": "occam", "pins": "first:4", "overrides": {}, "reason": None}
    return {
        "schema_version": 1,
        "kind": "analysis",
        "machine": "a machine",
        "command": f"occamkv analyze {model}",
        "versions": {"torch": "9.9"},
        "date": "2026-01-02",
        "model": model,
        "model_type": f"{model}_type",
        "fingerprint": "f0f0",
        "base_method": "occam",
        "tokens": LENGTH,
        "text": {"name": "a text", "sha256": "ab12"},
        "bos": {"added": True, "token": token, "told": f"{token} was added"},
        "headline": [f"A sentence about {model}."],
        "layers": layers,
        "panels": [_panel(layers[1]["index"], token)],
        "modality": {"text": LENGTH - 64, "image": 64},
        "plan": {"schema_version": 1, "model": {"fingerprint": "f0f0"}, "layers": [plan]},
    }


def _layer(index: int, *, sink: float, errors: tuple[float, ...]) -> dict[str, Any]:
    waves = [1 + 0.05 * math.sin(position + index) for position in range(LENGTH)]
    return {
        "index": index,
        "kind": "full",
        "packs": True,
        "query_heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "token_norm_min_over_median": 0.1111,
        "token_norm_max_over_median": 1.2345,
        "token_norm_group_ratio": 3.456,
        "v_norm_min_over_median": 0.0789,
        "sink_rate": 0.654,
        "sink_positions": [0],
        "sinks": [
            {
                "position": 0,
                "token": "?",
                "received": 0.5 + 0.01 * index,
                "k_norm": sink,
                "v_norm": 0.1,
                "massive": 1234.0,
                "rules": ["attention", "short value"],
            }
        ],
        "eq5_positions": [],
        "massive_max_over_median": 4321.0,
        "key_cosine": 0.765,
        "error_bound": 0.0123,
        "error_measured": 0.0456,
        "errors": dict(zip(SETTINGS, errors, strict=True)),
        "rotation_gain": errors[0] / errors[1],
        "token_scale_gain": errors[0] / errors[2],
        "advice": {"method": "occam", "pins": "first:4", "overrides": {"k_bits": 3}, "why": f"reason {index}"},
        "heads": [],
        "profile": {
            "positions": list(range(LENGTH)),
            "k_norm": [sink, *waves[1:]],
            "k_norm_scaled": [1.0] * LENGTH,
            "v_norm": [0.1, *waves[1:]],
            "massive": [1234.0, *waves[1:]],
            "received": [0.5, *(0.002 * wave for wave in waves[1:])],
        },
    }


def _panel(layer: int, token: str) -> dict[str, Any]:
    raw = [[abs(math.sin(3 * t + c)) + (c == 5) for c in range(16)] for t in range(32)]
    return {
        "layer": layer,
        "head": 2,
        "why": "why this head",
        "tokens": [token] * 32,
        "raw": raw,
        "rotated": [[value + 0.5 for value in row] for row in raw],
        "scaled": [[0.25] * 16 for _ in raw],
    }
