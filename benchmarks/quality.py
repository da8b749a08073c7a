"""What each method costs on a real model: KL against the full-precision cache, read through the packed cache.

Run: `python benchmarks/quality.py smollm2 gemma3`. Default text: the help texts that come with Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from conditions import conditions
from rich.progress import Progress, TaskID

from occamkv.cli.models import load
from occamkv.evals import Tally, compare
from occamkv.integrations.transformers.model import text_config

METHODS = ("full", "oscar", "oscar_roll", "kivi", "quarot", "rtn")


def read_text(path: Path | None) -> str:
    """Return the text to score; in WikiText files ` @-@ ` and its kin are undone."""
    if path is None:
        return "\n\n".join(text for _, text in sorted(topics.items()))
    text = path.read_text(encoding="utf-8")
    for mark in "-.,":
        text = text.replace(f" @{mark}@ ", mark)
    return text


def windows(tokenizer: Any, text: str, args: argparse.Namespace) -> list[torch.Tensor]:
    """Cut windows of equal length, each beginning with the tokenizer's BOS where it adds one."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    head = tokenizer("", add_special_tokens=True).input_ids
    width = args.length - len(head)
    first = args.first_token
    return [
        torch.tensor([head + ids[first + i * args.length :][:width]], dtype=torch.int64) for i in range(args.windows)
    ]


def measure(name: str, text: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per method for a model."""
    model, tokenizer = load(name, device=args.device, dtype=args.dtype)
    cut, rows = windows(tokenizer, text, args), []
    config = text_config(model.config)
    for method in args.methods.split(","):
        total = Tally()
        with Progress(transient=True) as progress:
            task = progress.add_task(f"{name} {method}", total=args.windows * args.length)
            for number, ids in enumerate(cut):
                advance = partial(_advance, progress, task, number * args.length)
                _, report, full_bytes = compare(
                    model, ids, method, score_from=args.score_from, progress=advance, tally=total
                )
        packed = report.packed_layers
        row = {
            "model": name,
            "model_type": config.model_type,
            "method": method,
            "bits_per_value": packed[0].bits_per_value if packed else 8.0 * model.dtype.itemsize,
            **total.result().to_json(),
            "packed_layers": len(packed),
            "layers": len(report.layers),
            "cache_bytes": report.nbytes,
            "full_bytes": full_bytes,
            "tokens": args.length,
        }
        rows.append(row)
        print(
            f"{name:10s} {method:12s} {row['bits_per_value']:.3f} bits  KL {row['kl_mean']:.4f}  "
            f"same top {row['same_top']:.3f}  perplexity {row['perplexity']:.3f} (full {row['perplexity_full']:.3f})"
        )
    return rows


def _advance(progress: Progress, task: TaskID, before: int, done: int) -> None:
    progress.update(task, completed=before + done)


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--first-token", type=int, default=3000)
    parser.add_argument("--score-from", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/quality.json"))
    args = parser.parse_args()
    text = read_text(args.text)
    result = {
        "schema_version": 1,
        "what": "KL(full || quantized) in nats, next token, every position from score_from on, through the cache",
        **conditions(),
        "text": {
            "name": "Python help topics" if args.text is None else args.text.name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "protocol": {key: getattr(args, key) for key in ("windows", "length", "first_token", "score_from", "dtype")},
        "rows": [row for name in args.models for row in measure(name, text, args)],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
