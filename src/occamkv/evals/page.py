"""What the report is made of: entries, intervals, and a table of entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from occamkv import html
from occamkv.html import code, printable

FULL = "full"
INTERVAL = "95\N{NO-BREAK SPACE}% interval"


@dataclass(frozen=True)
class Entry:
    """A row of the result with the number and the CSS of its colour."""

    data: Mapping[str, Any]
    number: int
    css: str

    @property
    def name(self) -> str:
        """The method, in one line."""
        return printable(self.data["method"]).replace("\n", " ")

    @property
    def full(self) -> bool:
        """Whether this is the full-precision control."""
        return self.name == FULL


def codes(entries: Sequence[Entry]) -> str:
    """Return the names of methods in a row."""
    return ", ".join(code(entry.name) for entry in entries)


def named(entry: Entry) -> str:
    """Return the method after a dot of its colour."""
    return f'<span class="name"><i style="background:{entry.css}"></i>{code(entry.name)}</span>'


def decimals(values: Sequence[float]) -> int:
    """Return how many decimals show two digits of the smallest of the values, 4 to 6."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return max(4, min(6, 1 - math.floor(math.log10(min(positive))))) if positive else 4


def span(ends: Sequence[float], places: int) -> str:
    """Return an interval."""
    return f"{ends[0]:.{places}f}\N{EN DASH}{ends[1]:.{places}f}"


def table(heads: Sequence[str], rows: Sequence[tuple[Entry | None, Sequence[str]]]) -> str:
    """Return a table in which full precision is no more than a reference; see `occamkv.html.table`."""
    full = [index for index, (entry, _) in enumerate(rows) if entry is not None and entry.full]
    return html.table(heads, [cells for _, cells in rows], quiet=full)
