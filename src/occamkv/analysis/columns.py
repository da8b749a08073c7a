"""What the figures of an analysis show, as numbers: ratios to a median, and tokens drawn together in columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from occamkv.analysis.tables import SETTINGS
from occamkv.drawing import positive

Layer = Mapping[str, Any]

_SINGLE, _GROWTH = 8, 1.15  # tokens with a column of their own; how much longer the next column is


def numbers(values: Sequence[float | None] | None) -> list[float]:
    """Return what was measured as floats, what was not as NaN."""
    return [math.nan if value is None else float(value) for value in values or ()]


def over_median(values: Sequence[float | None] | None) -> list[float]:
    """Return the values divided by their median."""
    given = numbers(values)
    measured = [value for value in given if math.isfinite(value)]
    middle = median(measured) if measured else math.nan
    return [value / middle if middle else math.nan for value in given]


def columns(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return the half-open ranges of positions that share a column: the first 8 alone, then ever longer ones."""
    ends = list(range(1, _SINGLE + 1))
    while ends[-1] <= positions[-1]:
        ends.append(math.ceil(ends[-1] * _GROWTH))
    return [(end - 1 if end <= _SINGLE else ends[i - 1], end) for i, end in enumerate(ends)]


def by_column(
    positions: Sequence[int], values: Sequence[float], pick: Callable[[list[float]], float]
) -> list[tuple[int, int, float]]:
    """Return `(first, end, value)` of each column that holds a measured token; `pick` makes one value of several."""
    found = []
    for first, end in columns(positions):
        inside = [v for p, v in zip(positions, values, strict=True) if first <= p < end and math.isfinite(v)]
        if inside:
            found.append((first, end, pick(inside)))
    return found


def furthest(values: Sequence[float]) -> float:
    """Return the value that is furthest from 1, by factor."""
    return max(values, key=lambda value: abs(math.log(max(value, 1e-30))))


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def sink_norms(layer: Layer) -> list[tuple[int, str, float]]:
    """Return position, text and K norm over the layer's median of each sink, where it was measured."""
    sinks = [s for s in layer.get("sinks") or () if s.get("k_norm") is not None]
    return [(int(s["position"]), str(s["token"]), float(s["k_norm"])) for s in sinks]


def error_ratios(layer: Layer) -> dict[str, float]:
    """Return the error in each measured setting over that of K as it is; nothing if that was not measured."""
    errors = {name: value for name, value in (layer.get("errors") or {}).items() if value is not None}
    base = errors.get("none", math.nan)
    known = {name: value / base for name, value in errors.items() if positive(base) and positive(value)}
    return {name: known[name] for name in SETTINGS if name in known}
