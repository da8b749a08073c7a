"""Encode cost of methods in the reference, interleaved, against oscar's: rotate, scale, choose codes, pack.

Run: `python benchmarks/encode.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from occamkv.cli.conditions import conditions
from occamkv.methods import Method, method
from occamkv.methods.crossing import Statistics

SHAPES = {"8 x 128": (8, 128), "3 x 64": (3, 64), "1 x 256": (1, 256)}


def seconds(chosen: Method, k: torch.Tensor, v: torch.Tensor, statistics_: Statistics) -> float:
    """Return the time of one encode of K and V, `[1, H, T, D]` in model space."""
    given = {"balance": statistics_.balance} if chosen.needs_model else {}
    if chosen.feedback:
        given["moment"] = statistics_.moment
    start = time.perf_counter()
    chosen.encode(k, v, **given)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="oscar,occam,occam_small,occam_quality,kivi,turboquant,kvarn")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/encode.json"))
    args = parser.parse_args()
    names = args.methods.split(",")
    rows: list[dict[str, Any]] = []
    for label, (heads, head_dim) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        k, v = (torch.randn(1, heads, args.tokens, head_dim, generator=generator) for _ in range(2))
        moment = torch.eye(head_dim).expand(heads, -1, -1) + 0.1
        known = Statistics(torch.rand(heads, head_dim, generator=generator) + 0.5, moment)
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeat + 1):  # the first round warms up
            for name in names:
                times[name].append(seconds(method(name), k, v, known))
        for name in names:
            median = statistics.median(times[name][1:])
            ratio = statistics.median(a / b for a, b in zip(times[name][1:], times["oscar"][1:], strict=True))
            rows.append({"shape": label, "method": name, "ms": 1000 * median, "ratio_to_oscar": ratio})
            print(f"{label}  {name:14s} {1000 * median:8.1f} ms  {ratio:.2f} of oscar", flush=True)
    result = {
        "schema_version": 1,
        "what": f"ms to encode {args.tokens} tokens of one layer, medians of {args.repeat} interleaved rounds",
        **conditions(),
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
