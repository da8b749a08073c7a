"""Where the balance vector may come from: random token ids, the text itself, another text, in several lengths.

Run: `python benchmarks/balance.py smollm2 gemma3`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from occamkv.cli.conditions import conditions
from occamkv.cli.models import load
from occamkv.evals.fidelity import Tally, chunk_ends
from occamkv.evals.texts import read_text, windows
from occamkv.integrations.transformers import PackedCache
from occamkv.integrations.transformers.probing import random_ids
from occamkv.integrations.transformers.statistics import model_statistics
from occamkv.methods import method

OTHER = "The quick brown fox jumps over the lazy dog while a quiet river runs past the old mill at dusk. "


def sources(model: Any, tokenizer: Any, scored: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Return token ids `[1, T]` by name; None stands for d = 1."""
    found: dict[str, torch.Tensor | None] = {"d = 1 (plain Hadamard)": None}
    for count in (32, 64, 128, 512):
        found[f"{count} random ids"] = random_ids(model, tokens=count)
    found |= {f"128 random ids, seed {seed}": random_ids(model, seed=seed) for seed in (1, 2)}
    found["the text itself, first 512"] = scored[0][:, :516]
    found["the text itself, first 128"] = scored[0][:, :132]
    found["one sentence again and again"] = tokenizer(OTHER * 8, return_tensors="pt").input_ids[:, :132]
    return found


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any, ends: list[int], score_from: int) -> torch.Tensor:
    """Return the logits of all scored positions, `[n, V]`."""
    parts, start = [], 0
    for end in ends:
        keep = max(1, end - max(start, score_from))
        logits = model(ids[:, start:end], past_key_values=cache, logits_to_keep=keep).logits[0]
        if end > score_from:
            parts.append(logits[-keep:])
        start = end
    return torch.cat(parts)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per source for a model."""
    model, tokenizer = load(name)
    text = read_text(args.text)
    scored = windows(text.text, tokenizer, count=1, length=args.length, first_token=args.first_token)
    ids, chosen = scored[0], method("occam")
    ends = chunk_ends(chosen, start=0, end=args.length)
    expected = read(model, ids, DynamicCache(config=model.config), ends, args.score_from)
    rows = []
    for source, tokens in sources(model, tokenizer, scored).items():
        if tokens is None:
            balance = {i: torch.ones_like(s.balance) for i, s in model_statistics(model).items()}
        else:
            balance = {i: s.balance for i, s in model_statistics(model, tokens).items()}
        logits = read(model, ids, PackedCache(model, chosen, balance=balance), ends, args.score_from)
        tally = Tally()
        tally.add(expected[:-1], logits[:-1], ids[0, args.score_from + 1 :])
        rows.append({"model": name, "source": source, **tally.result().to_json()})
        print(f"{name} {source:32s} KL {rows[-1]['kl_mean']:.4f}  same top {rows[-1]['same_top']:.3f}", flush=True)
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--first-token", type=int, default=3000)
    parser.add_argument("--score-from", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/balance.json"))
    args = parser.parse_args()
    result = {
        "schema_version": 1,
        "what": "KL(full || occam) in nats by where the balance vector comes from, read through the cache",
        **conditions(),
        "text": read_text(args.text).name,
        "rows": [row for name in args.models for row in measure(name, args)],
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
