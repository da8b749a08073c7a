"""The tables that `occamkv bench` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from occamkv.cli.shell import out

_WIDTH = 140  # of a table in a file


def show(result: Mapping[str, Any]) -> None:
    """Show a result of `occamkv bench`."""
    wide = out if out.is_terminal else Console(file=out.file, width=_WIDTH)
    if "gpu" in result:
        from occamkv.cli.bench_gpu_tables import show_gpu

        show_gpu(result, wide, _table)
        return
    cells, words = _KINDS[result["kind"]]
    wide.print(_table(f"{result['what']}, medians", [cells(row) for row in result["rows"]]))
    for line in words(result["rows"]):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if result.get("prefill"):
        wide.print(_table("prefill: seconds to read a prompt, medians", [_prefill(row) for row in result["prefill"]]))
    cpu = result["cpu"]
    clocks = "CPU time of the thread" if all(row["threads"] == 1 for row in result["rows"]) else "with one thread CPU "
    clocks += "" if clocks.endswith("thread") else "time, else wall time"
    out.print(f"{clocks}; load {cpu['load_start']:.1f} before, {cpu['load_end']:.1f} after", highlight=False)


def _table(title: str, cells: list[dict[str, str]]) -> Table:
    table = Table(title=title)
    for name in cells[0]:
        table.add_column(name, justify="left" if name in ("shape", "method", "best stock") else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row.values())
    return table


def _attend(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "context": str(row["context"]),
        "method": row["method"],
        "threads": str(row["threads"]),
        "ours": f"{row['ours_ms']:.2f} ms",
        "GB/s": f"{row['packed_gb_per_s']:.1f}",
        "x enable_gqa": f"{row['ratio_enable_gqa']:.2f}",
        "x best stock": f"{row['ratio_best_stock']:.2f}",
        "best stock": row["best_stock"],
    }


def _encode(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "method": row["method"],
        "threads": str(row["threads"]),
        "ours": f"{row['ours_ms']:.1f} ms",
        "tokens/s": f"{row['ours_tokens_per_s']:.0f}",
        "x reference": f"{row['ratio_reference']:.2f}",
    }


def _decode(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "dtype": row["dtype"],
        "context": str(row["context"]),
        "method": row["method"],
        "threads": str(row["threads"]),
        "tokens/s": f"{1000 / row['ours_ms']:.1f}",
        "stock": f"{1000 / row['stock_ms']:.1f}",
        "x stock": f"{row['ratio_enable_gqa']:.2f}",
        "x best stock": f"{row['ratio_best_stock']:.2f}",
        "best stock": row["best_stock"],
        "cache": f"{row['cache_bytes'] / 2**20:.1f} of {row['stock_bytes'] / 2**20:.1f} MiB",
    }


def _prefill(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "dtype": row["dtype"],
        "context": str(row["context"]),
        "method": row["method"],
        "threads": str(row["threads"]),
        "ours": f"{row['ours_ms'] / 1000:.2f} s",
        "stock": f"{row['stock_ms'] / 1000:.2f} s",
    }


def _errors(rows: list[Mapping[str, Any]]) -> list[str]:
    """Say the errors that were measured."""
    return [
        f"error against float64, {row['shape']}, {row['method']}: "
        + ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        for row in rows
        if row.get("errors")
    ]


def _nothing(rows: list[Mapping[str, Any]]) -> list[str]:
    return []


_KINDS: dict[str, tuple[Callable[..., dict[str, str]], Callable[..., list[str]]]] = {
    "attend": (_attend, _errors),
    "encode": (_encode, _nothing),
    "decode": (_decode, _nothing),
}
