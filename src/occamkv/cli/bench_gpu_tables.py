"""The tables that `occamkv bench --device cuda` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from occamkv.cli.shell import out


def show_gpu(result: Mapping[str, Any], console: Console, table: Callable[[str, list[dict[str, str]]], Table]) -> None:
    """Show a result of a GPU; `table` makes one of a title and cells by column."""
    console.print(table(f"{result['what']}, medians", [_CELLS[result["kind"]](row) for row in result["rows"]]))
    for title, name, cells in (
        ("prefill: ms to read a prompt", "prefill", _prefill),
        ("largest batch, computed: weights and caches alone", "capacity", _capacity),
        ("largest batch, tried", "tried", _tried),
    ):
        if result.get(name):
            console.print(table(title, [cells(row) for row in result[name]]))
    gpu = result["gpu"]
    told = [f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"]
    if "ceilings" in result:
        told.append("ceilings, GB/s: {read_gb_per_s:.0f} read, {copy_gb_per_s:.0f} copied".format(**result["ceilings"]))
    if "errors" in result:
        worst = max(result["errors"], key=lambda row: row["ours"])
        told.append(
            f"largest error against float64: {worst['ours']:.1e} ({worst['shape']}, {worst['method']}); "
            f"SDPA in bfloat16 there: {worst['sdpa_bf16']:.1e}"
        )
    if result["kind"] == "gpu-attend":
        told.append("x: time of best stock over ours; x step: ours with append; x bytes: if bytes alone took time")
    told += [f"left out: {case}" for case in result.get("dropped", [])]
    for line in told:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _attend(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "context": str(row["context"]),
        "batch": str(row["batch"]),
        "method": row["method"],
        "ours": f"{1000 * row['ours_ms']:.1f} us",
        "GB/s": f"{row['gb_per_s']:.0f}",
        "of read": f"{100 * row['share_of_read']:.0f} %",
        "best stock": row["best_stock"],
        "takes": f"{1000 * row['best_stock_ms']:.1f} us",
        "x": f"{row['ratio']:.2f}",
        "x step": "" if row["ratio_step"] is None else f"{row['ratio_step']:.2f}",
        "x bytes": f"{row['ratio_of_bytes']:.2f}",
    }


def _encode(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "shape": row["shape"],
        "method": row["method"],
        "ours": f"{1000 * row['ours_ms']:.1f} us",
        "tokens/s": f"{row['ours_tokens_per_s']:.0f}",
        "GB/s": f"{row['gb_per_s']:.0f}",
        "of copy": f"{100 * row['share_of_copy']:.0f} %",
    }


def _decode(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        **_prefill(row),
        "tokens/s": f"{row['ours_tokens_per_s']:.1f}",
        "best stock": row["best_stock"],
        "cache": f"{row['cache_bytes'] / 2**30:.2f} of {row['stock_bytes'] / 2**30:.2f} GiB",
    }


def _prefill(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "context": str(row["context"]),
        "batch": str(row["batch"]),
        "method": row["method"],
        "ours": f"{row['ours_ms']:.2f} ms",
        "stock": f"{row['stock_ms']:.2f} ms",
        "x": f"{row['ratio']:.2f}",
    }


def _capacity(row: Mapping[str, Any]) -> dict[str, str]:
    batches = {f"{gib} GiB": str(batch) for gib, batch in row["batch_by_gib"].items()}
    return {"context": str(row["context"]), "method": row["method"], **batches}


def _tried(row: Mapping[str, Any]) -> dict[str, str]:
    allocated = row["most_allocated_bytes"]
    return {
        "context": str(row["context"]),
        "method": row["method"],
        "batch": str(row["batch"]),
        "tokens/s": f"{row['tokens_per_s']:.0f}",
        "weights and cache": f"{(row['cache_bytes'] + row['weight_bytes']) / 2**30:.2f} GiB",
        "allocated": "" if allocated is None else f"{allocated / 2**30:.2f} GiB",
    }


_CELLS = {"gpu-attend": _attend, "gpu-encode": _encode, "gpu-decode": _decode}
