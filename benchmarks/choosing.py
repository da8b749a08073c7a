"""How long `auto` takes to choose, beside the prefill in which it does.

Run: `python benchmarks/choosing.py smollm2`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from occamkv.cache.chooser import Chooser
from occamkv.cli.conditions import conditions
from occamkv.cli.models import load
from occamkv.evals.texts import read_text, windows
from occamkv.integrations.transformers import PackedCache


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/choosing.json"))
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    ids = windows(read_text().text, tokenizer, count=1, length=args.tokens)[0]
    spent: list[float] = []
    plain = Chooser.choose

    def timed(self: Chooser, cache: Any) -> Any:
        start = time.perf_counter()
        chosen = plain(self, cache)
        spent.append(time.perf_counter() - start)
        return chosen

    Chooser.choose = timed  # type: ignore[method-assign]
    rows = []
    for _ in range(args.repeat + 1):  # the first one warms up
        spent.clear()
        cache = PackedCache(model, "auto")
        start = time.perf_counter()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        prefill = time.perf_counter() - start
        rows.append({"prefill_s": prefill, "choosing_s": sum(spent), "share": sum(spent) / prefill})
        print(f"prefill {prefill:.2f} s, choosing {sum(spent):.2f} s, {100 * rows[-1]['share']:.1f} %", flush=True)
    result = {
        "schema_version": 1,
        "what": f"time of the choice of auto in a prefill of {args.tokens} tokens, median of {args.repeat}",
        **conditions(),
        "model": args.model,
        "median_share": statistics.median(row["share"] for row in rows[1:]),
        "rows": rows[1:],
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
