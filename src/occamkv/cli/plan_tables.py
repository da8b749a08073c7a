"""The tables that `occamkv plan` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from occamkv.cli.shell import out
from occamkv.planning.result import count_text
from occamkv.planning.units import size_text, tokens_text

_WIDTH = 120  # of a table in a file


def show(result: Mapping[str, Any]) -> None:
    """Show a result of `occamkv plan`."""
    wide = out if out.is_terminal or out.width >= _WIDTH else Console(file=out.file, width=_WIDTH)
    _say(
        f"{result['model']}: {result['parameters']:,} parameters, weights {size_text(result['weights_bytes'])}"
        + ("" if result["context_limit"] is None else f", made for {result['context_limit']:,} tokens")
    )
    for kind in result["layers"]:
        _say(f"  {kind['layers']} layers: {_kind(kind)}")
    wide.print(_caches(result))
    wide.print(_fits(result))
    wide.print(_contexts(result))
    for note in result["notes"]:
        _say(f"note: {note}")
    _say(f"not counted: {result['not_counted']}")
    out.print(result["verdict"], style="bold", markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _kind(kind: Mapping[str, Any]) -> str:
    parts = []
    if kind["k_heads"]:
        shape = f"{kind['k_heads']} x {kind['k_dim']}"
        of_v = f"{kind['v_heads']} x {kind['v_dim']}"
        parts.append(f"K and V of {shape} per token" if shape == of_v else f"K of {shape} and V of {of_v} per token")
    if kind["most_tokens"] is not None:
        parts.append(f"of the last {kind['most_tokens']:,} tokens")
    if kind["other_values"]:
        parts.append(f"{kind['other_values']} values of an indexer per token")
    if kind["state_bytes"]:
        parts.append(f"a state of {size_text(kind['state_bytes'])}")
    if kind["source_values"]:
        parts.append(f"K and V of the encoder's text, {kind['source_values']} values per token")
    told = "packed" if kind["packed"] else f"full precision ({kind['reason']})"
    return f"{told}: {', '.join(parts) or 'nothing'}"


def _caches(result: Mapping[str, Any]) -> Table:
    sequences = "1 sequence" if result["batch"] == 1 else f"{result['batch']} sequences"
    table = _table(
        f"cache of {sequences} of {result['context']:,} tokens ({tokens_text(result['context'])})",
        ("method", "bits", "records", "residual", "pins", "other layers", "cache", "smaller"),
    )
    for row in result["methods"]:
        parts = [row[f"{name}_bytes"] for name in ("records", "residual", "pin", "full")]
        cells = [row["method"], f"{row['bits_per_value']:.2f}", *(size_text(part) if part else "-" for part in parts)]
        table.add_row(*cells, _most(row) + size_text(row["cache_bytes"]), f"{row['ratio']:.2f}x")
    return table


def _fits(result: Mapping[str, Any]) -> Table:
    asked = result["memory_bytes"] is not None
    columns = ["method", "cache", "while reading", "total"]
    columns += ["fits", "longest context", "largest batch"] if asked else []
    title = f"weights {size_text(result['weights_bytes'])}, reserve {size_text(result['reserve_bytes'])}"
    table = _table(title + (f", of {size_text(result['memory_bytes'])}" if asked else ""), columns)
    for row in result["methods"]:
        most = _most(row)
        cells = [row["method"], most + size_text(row["cache_bytes"]), "+ " + size_text(row["transient_bytes"])]
        cells.append(most + size_text(row["total_bytes"]))
        if asked:
            found = (row["longest_context"], row["largest_batch"])
            cells += ["yes" if row["fits"] else "no", *map(count_text, found)]
        table.add_row(*cells)
    return table


def _most(row: Mapping[str, Any]) -> str:
    return "\u2264 " if row["at_most"] else ""


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    return table


def _contexts(result: Mapping[str, Any]) -> Table:
    names = [row["method"] for row in result["methods"]]
    limit = result["context_limit"]
    end = "no limit is known" if limit is None else f"the model was made for {limit:,} tokens"
    table = _table(f"cache by context ({end})", ("context", *names))
    for row in result["contexts"]:
        cells = [
            size_text(cache["cache_bytes"]) + ("" if name == "full" else f" ({cache['ratio']:.2f}x)")
            for name, cache in row["caches"].items()
        ]
        table.add_row(tokens_text(row["context"]), *cells)
    return table
