"""The figures of `occamkv bench --device cuda`: ratio and share of bandwidth, or speed, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from occamkv.bench.attend import OURS
from occamkv.bench.result import tokens_text
from occamkv.drawing import GRID, MUTED, house_style, save_png

_COLOURS = ("#0072b2", "#d55e00", "#117733", "#aa4499", "#a87900", "#332288", "#2a9d8f", "#7b8694")
_WIDTH, _HEIGHT = 3.0, 2.3  # inches of a panel with its labels
_BELOW = 0.75  # for the caption


class Curve(NamedTuple):
    """A line of a panel; `place` chooses its colour, None stands for a bound, drawn thin and dashed."""

    name: str
    place: int | None
    points: Sequence[tuple[float, float]]


class GpuPanel(NamedTuple):
    """One set of axes. `tokens` tells that x is a context; `share` that y is a share of 1."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    share: bool = False


def draw_gpu(result: Mapping[str, Any], path: Path | str) -> None:
    """Draw a checked result as PNG."""
    panels = attend_grid(result["rows"]) if result["kind"] == "gpu-attend" else decode_grid(result["rows"])
    columns = max(len(row) for row in panels)
    size = (columns * _WIDTH + 0.3, len(panels) * _HEIGHT + _BELOW)
    with house_style(size=9):
        figure = Figure(figsize=size)
        for row, line in enumerate(panels):
            for column, panel in enumerate(line):
                left, bottom = column * _WIDTH + 0.6, size[1] - (row + 1) * _HEIGHT + 0.5
                box = (left / size[0], bottom / size[1], (_WIDTH - 0.65) / size[0], (_HEIGHT - 0.85) / size[1])
                _fill(figure.add_axes(box), panel)
        figure.text(0.5, 0.12 / size[1], _caption(result), ha="center", fontsize=7.5, color=MUTED, linespacing=1.4)
        save_png(figure, path)


def attend_grid(rows: Sequence[Mapping[str, Any]]) -> list[list[GpuPanel]]:
    """Return two lines of panels for each method: how much faster, and what share of the bandwidth."""
    shapes, methods, batches = (sorted({row[key] for row in rows}) for key in ("shape", "method", "batch"))
    grid: list[list[GpuPanel]] = []
    for method in methods:
        above, below = [], []
        for shape in shapes:
            own = sorted(
                (row for row in rows if (row["shape"], row["method"]) == (shape, method)),
                key=lambda row: row["context"],
            )
            if not own:
                continue
            of_batch = {batch: [row for row in own if row["batch"] == batch] for batch in batches}
            bound = Curve("by bytes alone", None, sorted({(row["context"], row["ratio_of_bytes"]) for row in own}))
            title = f"{shape}, {method}"
            ratios, shares = (
                [
                    Curve(f"batch {batch}", batches.index(batch), [(row["context"], row[key]) for row in found])
                    for batch, found in of_batch.items()
                    if found
                ]
                for key in ("ratio", "share_of_read")
            )
            above.append(GpuPanel(title, "context, tokens", "x fastest bfloat16", [*ratios, bound]))
            below.append(GpuPanel(title, "context, tokens", "share of read bandwidth", shares, share=True))
        grid += [above, below]
    return grid


def decode_grid(rows: Sequence[Mapping[str, Any]]) -> list[list[GpuPanel]]:
    """Return milliseconds of a step at batch 1, and tokens per second against the batch for each context."""
    single = [row for row in rows if row["batch"] == 1]
    contexts = sorted({row["context"] for row in rows if row["batch"] > 1})
    panels = [GpuPanel("one sequence", "context, tokens", "ms per token", _curves(single, "context", "ms"))]
    for context in contexts:
        own = [row for row in rows if row["context"] == context]
        title = f"{tokens_text(context)} tokens each"
        panels.append(GpuPanel(title, "batch", "tokens per second", _curves(own, "batch", "tokens_per_s")))
    return [[panel for panel in panels if panel.curves]]


def _curves(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Curve]:
    methods = sorted({row["method"] for row in rows})
    curves = [
        Curve(name, 2 * place, sorted((row[x], row[f"{OURS}_{y}"]) for row in rows if row["method"] == name))
        for place, name in enumerate(methods)
    ]
    return [*curves, Curve("static cache, bfloat16", 1, sorted({(row[x], row[f"stock_{y}"]) for row in rows}))]


def _fill(axes: Axes, panel: GpuPanel) -> None:
    for name, place, points in panel.curves:
        look: dict[str, Any] = {"color": MUTED, "lw": 1, "dashes": (3, 2)}
        if place is not None:
            look = {"color": _COLOURS[place % len(_COLOURS)], "lw": 1.8, "marker": "o", "ms": 3.5, "mew": 0}
        axes.plot(*zip(*points, strict=True), label=name, **look)
    ticks = sorted({x for curve in panel.curves for x, _ in curve.points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.share:
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    elif panel.y_label.startswith("x "):
        axes.set_ylim(0, 1.15 * max(y for curve in panel.curves for _, y in curve.points))
        axes.axhline(1, color=MUTED, lw=0.8)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, lw=0.7)
    axes.tick_params(length=0, pad=4, labelsize=8)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold", pad=4)
    axes.set_xlabel(panel.x_label, fontsize=8, labelpad=2)
    axes.set_ylabel(panel.y_label, fontsize=8, labelpad=3)
    axes.legend(frameon=False, fontsize=7, handlelength=1.8)


def _caption(result: Mapping[str, Any]) -> str:
    gpu, versions = result["gpu"], result["versions"]
    return (
        f"{gpu['name']}, driver {gpu['driver']}, torch {versions['torch']}, {result['date']}.\n"
        "Medians, CUDA graphs, contestants taking turns."
    )
