"""The verdict of the report: a few plain sentences, computed from the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from occamkv.evals.page import FULL, INTERVAL
from occamkv.html import code, mib, percent

PAPER = "oscar"


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict as HTML: the best method at the paper's bits or fewer against the paper's, or the extremes."""
    if result["void"]:
        return "There is no verdict: this run is void, and its numbers say nothing about the methods."
    rows = [row for row in result["rows"] if row["method"] != FULL and math.isfinite(row["kl_mean"])]
    if not rows:
        return "Only full precision was measured, so there is nothing to compare."
    paper = next((row for row in rows if row["method"] == PAPER), None)
    said = _against(paper, rows) if paper is not None else _smallest(rows)
    closest = min(rows, key=_kl)
    if closest not in said[1]:
        said = (
            [*said[0], f"Closest to full precision is {_named(closest)}: {_changed(closest)} of positions changed."],
            [*said[1], closest],
        )
    return " ".join([*said[0], *_sizes(said[1][0])])


def _kl(row: Mapping[str, Any]) -> float:
    return float(row["kl_mean"])


def _changed(row: Mapping[str, Any]) -> str:
    return percent(1 - row["same_top"])


def _named(row: Mapping[str, Any]) -> str:
    return f"{code(row['method'])} ({row['bits_per_value']:.2f} bits)"


def _against(paper: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return the sentences about the paper's method, and the rows they speak of."""
    rivals = [row for row in rows if row is not paper and row["bits_per_value"] <= paper["bits_per_value"]]
    best = min(rivals, key=_kl, default=None)
    here = f"the paper's {code(PAPER)} at {paper['bits_per_value']:.2f} bits"
    if best is None or _kl(best) >= _kl(paper):
        none = "" if best is None else " No other method here has a lower mean KL at as few bits."
        alone = f"{here[0].upper()}{here[1:]} changes the most likely token at {_changed(paper)} of positions.{none}"
        return [alone], [paper]
    first = (
        f"At {best['bits_per_value']:.2f} bits per value {code(best['method'])} changes the most likely token at "
        f"{_changed(best)} of positions; {here} at {_changed(paper)}."
    )
    return [first, _certainty(best, paper)], [best, paper]


def _certainty(best: Mapping[str, Any], paper: Mapping[str, Any]) -> str:
    """Return how far apart the two mean KLs are, and whether their intervals are."""
    times = f"{_kl(paper) / _kl(best):.1f} times lower" if _kl(best) > 0 else "zero"
    ends = best.get("kl_mean_ci"), paper.get("kl_mean_ci")
    if ends[0] is None or ends[1] is None:
        return f"Its mean KL is {times}; no intervals were measured."
    if overlap(ends[0], ends[1]):
        return f"Its mean KL is {times}, but the {INTERVAL}s overlap: this run does not tell the two apart."
    return f"Its mean KL is {times}, and the {INTERVAL}s do not overlap."


def _smallest(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Mapping[str, Any]]]:
    least = min(rows, key=lambda row: (row["bits_per_value"], _kl(row)))
    sentence = (
        f"At {least['bits_per_value']:.2f} bits per value {code(least['method'])} changes the most likely token at "
        f"{_changed(least)} of positions."
    )
    return [sentence], [least]


def _sizes(row: Mapping[str, Any]) -> list[str]:
    """Return what the method does to perplexity and bytes."""
    change = row["perplexity"] / row["perplexity_full"] - 1 if row["perplexity_full"] else math.nan
    return [
        f"With {code(row['method'])} the perplexity goes from {row['perplexity_full']:.2f} to {row['perplexity']:.2f} "
        f"({100 * change:+.1f}\N{NO-BREAK SPACE}%), and the cache of {row['tokens']:,} tokens from "
        f"{mib(row['full_bytes'])} to {mib(row['cache_bytes'])}."
    ]
