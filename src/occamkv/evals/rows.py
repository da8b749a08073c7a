"""From what was found about a method to its row in the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from occamkv.cache import Plan
from occamkv.evals.intervals import bootstrap

POSITION_BIN = 128
INDEX_BIN = 8
_FEW_WINDOWS = 5
_BLOCK = 256


@dataclass
class Outcome:
    """Everything that was found about one method, as the journal keeps it."""

    windows: list[dict[str, Any]] = field(default_factory=list)
    generated: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """Return a figure of all scored positions of all windows."""
        return [value for window in self.windows for value in window[key]]

    def mean(self, key: str) -> float:
        """Return the mean over windows of a figure that each has one of."""
        return fmean(window[key] for window in self.windows)


def make_row(name: str, plan: Plan, outcome: Outcome, *, first: int, seed: int) -> dict[str, Any]:
    """Return the row of one method.

    Args:
        name: Its name.
        plan: Its plan.
        outcome: What was found.
        first: Position of the first scored prediction of a window.
        seed: Seed of the intervals.
    """
    kl = outcome.values("kl")
    sources = {entry.method.source for entry in plan.layers if entry.packs}
    row = {
        "method": name,
        "source": ", ".join(sorted(sources)) or None,
        "bits_per_value": outcome.mean("bits_per_value"),
        "bits_with_residual": outcome.mean("bits_with_residual"),
        "kl_mean": fmean(kl),
        "kl_mean_ci": bootstrap(clusters([window["kl"] for window in outcome.windows]), seed=seed),
        "kl_median": median(kl),
        "kl_p99": float(torch.tensor(kl, dtype=torch.float64).quantile(0.99)),
        "same_top": fmean(outcome.values("same")),
        "same_top_ci": bootstrap(clusters([window["same"] for window in outcome.windows]), seed=seed),
        "perplexity": _perplexity(outcome.values("nll")),
        "perplexity_full": _perplexity(outcome.values("nll_full")),
        "cache_bytes": round(outcome.mean("cache_bytes")),
        "full_bytes": round(outcome.mean("full_bytes")),
        "tokens": outcome.windows[0]["tokens"],
        "positions": len(kl),
        "packed_layers": outcome.windows[0]["packed_layers"],
        "layers": outcome.windows[0]["layers"],
        "kl_by_position": bins([window["kl"] for window in outcome.windows], width=POSITION_BIN, first=first),
        "layer_errors": _layer_errors(outcome.windows) or None,
        "generated": _generated(outcome.generated),
        "probes": _probes(outcome.probes, seed=seed),
        "tasks": [_task(task) for task in outcome.tasks] or None,
    }
    return {key: value for key, value in row.items() if value is not None}


def clusters(windows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Return the groups that an interval resamples: whole windows; of fewer than five, blocks of 256 positions."""
    if len(windows) >= _FEW_WINDOWS:
        return list(windows)
    return [window[at : at + _BLOCK] for window in windows for at in range(0, len(window), _BLOCK)]


def bins(windows: Sequence[Sequence[float]], *, width: int, first: int) -> list[dict[str, float]]:
    """Return the mean KL of each `width` positions over all windows; `first` is the position of the first value."""
    longest = max(len(window) for window in windows)
    found = []
    for at in range(0, longest, width):
        values = [value for window in windows for value in window[at : at + width]]
        last = min(at + width, longest) - 1
        found.append({"first": first + at, "last": first + last, "kl": fmean(values), "count": len(values)})
    return found


def _perplexity(nll: Sequence[float]) -> float:
    return float(torch.tensor(fmean(nll), dtype=torch.float64).exp())


def _layer_errors(windows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the root mean square over windows of each layer's relative error."""
    errors: dict[int, list[float]] = {}
    for window in windows:
        for layer, error in window["layer_errors"]:
            errors.setdefault(layer, []).append(error)
    return [{"layer": k, "error": fmean(e * e for e in found) ** 0.5} for k, found in sorted(errors.items())]


def _generated(prompts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not prompts:
        return None
    lengths = [prompt["same"].index(0) if 0 in prompt["same"] else len(prompt["same"]) for prompt in prompts]
    return {
        "tokens": len(prompts[0]["same"]),
        "prompts": len(prompts),
        "agreement_length_mean": fmean(lengths),
        "agreement_share": fmean(one for prompt in prompts for one in prompt["same"]),
        "kl_by_index": bins([prompt["kl"] for prompt in prompts], width=INDEX_BIN, first=0),
    }


def _probes(results: Sequence[dict[str, Any]], *, seed: int) -> dict[str, Any] | None:
    if not results:
        return None
    cells: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["kind"], result["length"], result["depth"]), []).append(result)
    return {
        "logprob": fmean(result["logprob"] for result in results),
        "logprob_ci": bootstrap([result["logprob"] for result in results], seed=seed),
        "exact": fmean(result["exact"] for result in results),
        "count": len(results),
        "cells": [
            {
                "kind": kind,
                "length": length,
                "depth": depth,
                "exact": fmean(result["exact"] for result in found),
                "logprob": fmean(result["logprob"] for result in found),
                "count": len(found),
            }
            for (kind, length, depth), found in cells.items()
        ],
    }


def _task(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    return {
        "task": result["task"],
        "score": result["score"],
        "metric": next(iter(result["scores"])),
        "scores": result["scores"],
        "count": len(rows),
        "generated_mean": result["mean_new_tokens"],
        "truncated": sum(row["truncated"] for row in rows),
        "invalid": sum(not row["valid"] for row in rows),
    }
