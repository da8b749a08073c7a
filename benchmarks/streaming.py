"""Perplexity of an endless text read through a window: with first tokens pinned, without, and with all tokens kept.

StreamingLLM (arXiv:2309.17453) found that a window loses the model as soon as the first tokens leave it. The text is
read 128 tokens at a time, each step through the cache, and scored as it comes.

Run: `python benchmarks/streaming.py smollm2`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from occamkv.cli.conditions import conditions
from occamkv.cli.models import load
from occamkv.drawing import MUTED, house_style, light, save_png
from occamkv.evals.texts import read_text, windows
from occamkv.integrations.transformers import PackedCache
from occamkv.methods import Method, method

STEP, BIN = 128, 1024
NOTE = {"xytext": (4, 0), "textcoords": "offset points", "va": "top", "fontsize": 9, "color": MUTED}


def main() -> None:
    """Measure, write the result file and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--method", default="occam")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/streaming.png"))
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    ids = windows(read_text().text, tokenizer, count=1, length=args.tokens)[0]
    contestants = {
        "4 pins and a window": method(args.method, window=args.window, pins="first:4"),
        "a window alone": method(args.method, window=args.window, pins="none"),
        "all tokens": method(args.method),
    }
    rows = {name: read(model, ids, chosen, name) for name, chosen in contestants.items()}
    trained = model.config.get_text_config().max_position_embeddings
    result: dict[str, Any] = {
        "schema_version": 1,
        "what": f"perplexity of {args.tokens} tokens in bins of {BIN}, read {STEP} at a time with {args.method}",
        **conditions(),
        "model": args.model,
        "window": args.window,
        "trained_tokens": trained,
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, args.plot)


@torch.no_grad()
def read(model: Any, ids: Tensor, chosen: Method, name: str) -> dict[str, Any]:
    """Read a text through a cache; return the perplexity of each bin and what the cache took."""
    cache, losses, start = PackedCache(model, chosen), [], time.perf_counter()
    for at in range(0, ids.shape[1], STEP):
        part, following = ids[:, at : at + STEP], ids[0, at + 1 : at + STEP + 1]
        logits = model(part, past_key_values=cache, use_cache=True).logits[0, : len(following)].float()
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
        if (at + STEP) % (8 * BIN) == 0:
            print(f"{name}: {at + STEP} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    loss = torch.cat(losses)
    bins = [math.exp(float(loss[at : at + BIN].mean())) for at in range(0, len(loss), BIN)]
    report = cache.report()
    return {
        "perplexity": bins,
        "whole": math.exp(float(loss.mean())),
        "cache_bytes": report.nbytes,
        "full_bytes": report.full_bytes,
        "seconds": time.perf_counter() - start,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity against the tokens read."""
    with house_style(size=10):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, (name, row) in enumerate(result["rows"].items()):
            at = [(index + 0.5) * BIN / 1024 for index in range(len(row["perplexity"]))]
            size = f"{row['cache_bytes'] / 2**20:.0f} MiB"
            axes.plot(at, row["perplexity"], color=light(number), label=f"{name}: {size}")
        axes.axvline(result["trained_tokens"] / 1024, color=MUTED, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="thousand tokens read (1k = 1024)", ylabel="perplexity of 1k tokens")
        axes.set_title(f"{result['model']}: window of {result['window']} tokens", loc="left")
        axes.annotate(
            "trained length", (result["trained_tokens"] / 1024, 0.98), xycoords=("data", "axes fraction"), **NOTE
        )
        axes.legend(frameon=False)
        save_png(figure, path)


if __name__ == "__main__":
    main()
