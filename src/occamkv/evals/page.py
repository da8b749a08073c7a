"""What the pages are made of: entries, intervals, a table of entries, and what the controls said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from occamkv import html
from occamkv.html import code, note, printable, text

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


def banner(void: str, result: Mapping[str, Any]) -> str:
    """Return which controls failed, headed by `void` if that makes the result worthless; nothing if none did."""
    failed = [control for control in result["controls"] if not control["passed"]]
    if not failed and not result["void"]:
        return ""
    what = void if result["void"] else "A control failed."
    told = "".join(f"<li><b>{text(control['name'])}</b>: {text(control['told'])}</li>" for control in failed)
    why = f"<ul>{told}</ul>" if failed else " No control says why."
    return f'<div class="banner" role="alert"><strong>{what}</strong>{why}</div>'


def controls_told(controls: Sequence[Mapping[str, Any]]) -> str:
    """Return a list of controls with what each one saw."""
    states = {True: '<span class="passed">✓ passed</span>', False: '<span class="failed">✗ failed</span>'}
    told = "".join(
        f"<li>{states[control['passed']]} {text(control['name'])}: {text(control['told'])}</li>" for control in controls
    )
    return f'<h3>Controls</h3><ul class="controls">{told}</ul>' if told else note("No controls were run.")
