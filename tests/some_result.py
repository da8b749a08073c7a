"""A result of `occamkv eval` with realistic numbers, made by formulas and not measured."""

import copy
import math
import random
from typing import Any

METHODS: dict[str, tuple[float, float]] = {  # bits per value, mean KL
    "full": (16.0, 0.0),
    "oscar": (3.083, 0.0810),
    "oscar_roll": (3.083, 0.0721),
    "kivi": (3.0, 0.1460),
    "quarot": (3.0, 0.2120),
    "rtn": (3.0, 0.3950),
    "turboquant": (2.5, 0.1210),
    "turboquant_k3v3": (3.5, 0.0301),
    "occam": (2.541, 0.0118),
    "occam_g64": (2.416, 0.0161),
    "occam_k3v2_g64x32+": (3.072, 0.0064),
    "my_plan_from_layer_errors_v2": (2.72, 0.0139),
    "first and last two layers in full, rest occam": (4.331, 0.0041),
}
LAYERS = 18


def some_result() -> dict[str, Any]:
    """Return a new result with every optional field."""
    return copy.deepcopy(_RESULT)


def _interval(value: float, width: float) -> list[float]:
    return [value * (1 - width), value * (1 + width)]


def _row(name: str, bits: float, kl: float) -> dict[str, Any]:
    noise = random.Random(name)
    changed = 0.57 * math.sqrt(kl) * noise.uniform(0.95, 1.05)
    full_bytes = 2 * LAYERS * 4096 * 256 * 2
    row: dict[str, Any] = {
        "method": name,
        "bits_per_value": bits,
        "bits_with_residual": bits + (16 - bits) * 0.04,
        "kl_mean": kl,
        "kl_mean_ci": _interval(kl, 0.08),
        "kl_median": 0.31 * kl,
        "kl_p99": 9.4 * kl,
        "same_top": 1 - changed,
        "same_top_ci": [1 - 1.06 * changed, 1 - 0.94 * changed],
        "perplexity": 15.83 * math.exp(0.9 * kl),
        "perplexity_full": 15.83,
        "cache_bytes": int(full_bytes * bits / 16),
        "full_bytes": full_bytes,
        "tokens": 4096,
        "positions": 28672,
        "packed_layers": 0 if name == "full" else LAYERS,
        "layers": LAYERS,
        "kl_by_position": [
            {"first": at, "last": at + 511, "kl": kl * (0.7 + at / 6000) * noise.uniform(0.85, 1.15), "count": 4096}
            for at in range(512, 4096, 512)
        ],
        "generated": {
            "tokens": 128,
            "prompts": 3,
            "agreement_length_mean": min(128.0, 2.1 / (kl + 0.01)),
            "agreement_share": 1 / (1 + 6 * kl),
            "kl_by_index": [
                {"first": at, "last": at + 7, "kl": kl * (0.6 + at / 200) * noise.uniform(0.5, 1.6), "count": 24}
                for at in range(0, 128, 8)
            ],
        },
        "layer_errors": [
            {"layer": i, "error": math.sqrt(kl) * (0.4 + 0.5 * abs(math.sin(i))) * noise.uniform(0.8, 1.2)}
            for i in range(LAYERS)
        ],
        "probes": _probes(kl, noise),
        "tasks": [
            {
                "task": "gsm8k",
                "score": 0.41 / (1 + 3 * kl),
                "metric": "exact match",
                "count": 200,
                "generated_mean": 143.0 + 90 * kl,
                "truncated": round(30 * kl),
                "invalid": round(12 * kl),
            }
        ],
    }
    if name == "oscar":
        row["source"] = "Su et al. 2026, arXiv:2605.19660"
    return row


def _probes(kl: float, noise: random.Random) -> dict[str, Any]:
    cells = [
        {
            "kind": kind,
            "length": length,
            "depth": depth,
            "exact": round(4 * max(0.0, 1 - hard - kl * length / 900 * noise.uniform(0.3, 2.0))) / 4,
            "logprob": -0.02 - hard - 3 * kl,
            "count": 4,
        }
        for kind, hard in (("needle", 0.0), ("multikey", 0.12), ("quote", 0.05))
        for length in (768, 1536, 3072)
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    logprob = sum(cell["logprob"] for cell in cells) / len(cells)
    return {
        "logprob": logprob,
        "logprob_ci": [logprob - 0.06, logprob + 0.06],
        "exact": sum(cell["exact"] for cell in cells) / len(cells),
        "count": 4 * len(cells),
        "cells": cells,
    }


_RESULT: dict[str, Any] = {
    "schema_version": 1,
    "what": "occamkv eval",
    "command": "occamkv eval some-model --methods all --windows 8 --length 4096 --probes --json result.json",
    "date": "2026-11-20",
    "machine": "Intel Xeon, 2 cores, 8 GiB",
    "threads": 2,
    "seed": 0,
    "versions": {"occamkv": "0.3.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    "model": {
        "name": "some-model-270m",
        "model_type": "some_text",
        "fingerprint": "4b1f0c9a77de2c35",
        "dtype": "bfloat16",
        "layers": LAYERS,
        "kv_heads": 1,
        "head_dim": 256,
    },
    "text": {"name": "A long novel", "sha256": "9f2b1c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9"},
    "protocol": {"windows": 8, "length": 4096, "first_token": 1000, "score_from": 512},
    "controls": [
        {"name": "full against itself", "passed": True, "told": "KL 0 at all 28,672 positions"},
        {"name": "cut into other steps", "passed": True, "told": "largest difference of logits 0.0002"},
        {"name": "packed for real", "passed": True, "told": "18 of 18 layers hold codes"},
    ],
    "void": False,
    "rows": [_row(name, bits, kl) for name, (bits, kl) in METHODS.items()],
}
