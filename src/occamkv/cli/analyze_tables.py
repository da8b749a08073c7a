"""What `occamkv analyze` shows in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from occamkv.cli.shell import out

_WIDTH = 140  # of the table in a file
_SINKS = 6  # tokens shown


def show(result: Mapping[str, Any]) -> None:
    """Show an analysis: the headline, a line per layer, the sinks."""
    for sentence in result["headline"]:
        _print(sentence)
    read = f"{result['model']} on {result['tokens']} tokens of {result['text']['name']}"
    table = Table(title=f"{read}; norms relative to the median")
    cells = [_cells(layer) for layer in result["layers"]]
    for name in cells[0]:
        table.add_column(name, justify="left" if name in ("kind", "advice") else "right", no_wrap=name != "advice")
    for row in cells:
        table.add_row(*row.values())
    wide = out if out.is_terminal else Console(file=out.file, width=max(_WIDTH, out.width))
    wide.print(table)
    for line in _sinks(result):
        _print(line)
    _print(result["bos"]["told"])


def _cells(layer: Mapping[str, Any]) -> dict[str, str]:
    at = layer["sink_positions"]
    return {
        "layer": str(layer["index"]),
        "kind": layer["kind"],
        "K min": f"{layer['token_norm_min_over_median']:.2f}",
        "K max": f"{layer['token_norm_max_over_median']:.2f}",
        "V min": f"{layer['v_norm_min_over_median']:.2f}",
        "massive": _number(layer["massive_max_over_median"], ".0f"),
        "sink rate": _number(layer["sink_rate"], ".2f"),
        "sinks at": ", ".join(map(str, at[:3])) + (", ..." if len(at) > 3 else ""),
        "rotation gain": _number(layer["rotation_gain"], ".2f"),
        "advice": _advice(layer),
    }


def _advice(layer: Mapping[str, Any]) -> str:
    if not layer["packs"]:
        return "full"
    advice = layer["advice"]
    changes = [f"{name}={value}" for name, value in advice["overrides"].items()]
    return ", ".join([advice["method"], *changes, f"pins {advice['pins']}"])


def _sinks(result: Mapping[str, Any]) -> Iterator[str]:
    """Say which tokens are sinks, in how many layers, and by which rules."""
    seen: dict[int, list[Mapping[str, Any]]] = {}
    for layer in result["layers"]:
        for sink in layer["sinks"]:
            seen.setdefault(sink["position"], []).append(sink)
    if not seen:
        yield "no sinks"
    most = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    for position, found in most[:_SINKS]:
        rules = sorted({rule for sink in found for rule in sink["rules"]})
        yield f"sink: token {position} {found[0]['token']!r} in {len(found)} layers ({', '.join(rules)})"
    if len(most) > _SINKS:
        yield f"... and {len(most) - _SINKS} more tokens"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _print(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=True)
