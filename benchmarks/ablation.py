"""occam taken apart: one stage changed at a time, measured as `occamkv eval` does.

Run: `python benchmarks/ablation.py smollm2 gemma3`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.progress import Progress

from occamkv.cli.conditions import conditions
from occamkv.cli.models import load
from occamkv.evals.suite import Protocol, evaluate
from occamkv.evals.texts import read_text
from occamkv.integrations.transformers import plan_for
from occamkv.methods import method

VARIANTS: dict[str, dict[str, Any]] = {
    "occam": {},
    "K rotated by a plain Hadamard": {"k_rotation": "hadamard"},
    "K not rotated": {"k_rotation": "none"},
    "V not rotated": {"v_rotation": "none"},
    "no token scale": {"token_scale": False},
    "no pins": {"pins": "none"},
    "first 4 and found pins": {"pins": "first:4+found"},
    "whole range instead of clipping": {"clip": 1.0, "grid": "minmax"},
    "clipped, not refitted": {"grid": "minmax"},
    "16-bit metadata": {"metadata_bits": 16},
    "block flush": {"flush": "block"},
    "error feedback on K": {"feedback": True},
    "groups of 64": {"k_group": 64, "v_group": 64},
}


def measure(name: str, protocol: Protocol, journal: Path) -> list[dict[str, Any]]:
    """Return one row per variant for a model; variants that change nothing are left out."""
    model, tokenizer = load(name)
    base = method("occam")
    variants = {label: base.with_overrides(**changes) for label, changes in VARIANTS.items()}
    plans = {label: plan_for(model.config, one) for label, one in variants.items() if label == "occam" or one != base}
    with Progress(transient=True) as progress:
        bar = progress.add_task(name)
        found = evaluate(
            model,
            tokenizer,
            plans,
            read_text(),
            protocol,
            journal=journal,
            progress=lambda _, done, total: progress.update(bar, completed=done, total=total),
        )
    if found["void"]:
        raise SystemExit(f"void: {[check for check in found['controls'] if not check['passed']]}")
    rows = [{"model": name, **row} for row in found["rows"]]
    for row in rows:
        print(f"{name} {row['method']:34s} {row['bits_per_value']:.3f} bits  KL {row['kl_mean']:.4f}", flush=True)
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ablation.json"))
    args = parser.parse_args()
    protocol = Protocol(windows=args.windows, length=args.length, generated=0)
    rows = [row for name in args.models for row in measure(name, protocol, args.json.with_suffix(f".{name}.journal"))]
    result = {
        "schema_version": 1,
        "what": "occam with one stage changed at a time; KL(full || packed) in nats, read through the cache",
        **conditions(),
        "text": read_text().name,
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
