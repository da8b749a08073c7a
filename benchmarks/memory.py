"""Resident memory of a process that reads a long prompt: full cache against packed cache, each in a fresh process.

Run: `python benchmarks/memory.py smollm2`. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

FULL = "full"


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def one(args: argparse.Namespace) -> None:
    """In a fresh process: read the prompt, decode some tokens, print what memory did as JSON."""
    import torch

    from occamkv import PackedCache
    from occamkv.cli.models import load
    from occamkv.evals.texts import read_text

    torch.manual_seed(0)
    model, tokenizer = load(args.model, device="cpu", dtype="bfloat16")
    ids = torch.tensor([tokenizer(read_text().text).input_ids[: args.tokens]])
    with torch.no_grad():  # the same work once, small, so that first-call allocations are not counted
        model(ids[:, :256], past_key_values=PackedCache(model, args.one), logits_to_keep=1)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        cache = PackedCache(model, args.one)
        step = args.chunk or ids.shape[1]
        for first in range(0, ids.shape[1], step):
            model(ids[:, first : first + step], past_key_values=cache, logits_to_keep=1)
        peak = status("VmHWM")
        for _ in range(16):
            model(ids[:, :1], past_key_values=cache)
    result = {
        "method": args.one,
        "tokens": int(ids.shape[1]) + 16,
        "peak_growth_bytes": peak - before,
        "growth_bytes": status("VmRSS") - before,
        "cache_bytes": cache.nbytes(),
    }
    print(json.dumps(result))


def main() -> None:
    """Run each method in fresh processes and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--methods", default="full,occam")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--chunk", type=int, default=0, help="tokens a call; 0: the whole prompt in one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    rows: list[dict[str, Any]] = []
    for method in args.methods.split(","):
        command = [sys.executable, *sys.argv, "--one", method]
        env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        runs = [
            json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[-1]
            )
            for _ in range(args.repeat)
        ]
        row = {
            **runs[0],
            **{key: int(statistics.median(run[key] for run in runs)) for key in ("peak_growth_bytes", "growth_bytes")},
            "runs": runs,
        }
        rows.append(row)
        print(
            ", ".join(
                f"{key} {row[key] / 2**20:.1f} MiB" for key in ("peak_growth_bytes", "growth_bytes", "cache_bytes")
            ),
            method,
        )
    from occamkv.cli.conditions import conditions

    result = {
        "schema_version": 1,
        "what": "growth of resident memory, medians of fresh processes",
        **conditions(),
        "model": args.model,
        "chunk": args.chunk,
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
