"""The figures of `occamkv bench`: time or speed against context, one panel for each shape, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from occamkv.bench.result import check, crossover, crossover_text, tokens_text
from occamkv.drawing import GRID, MUTED, house_style, save_png
from occamkv.errors import UnsupportedInput

_OURS = ("#0072b2", "#aa4499", "#117733", "#332288", "#2a9d8f")
_STOCK = {"sdpa_gqa": "#d55e00", "sdpa_folded": "#a87900", "manual_folded": "#7b8694", "stock": "#d55e00"}
_LABELS = {
    "sdpa_gqa": "SDPA, enable_gqa",
    "sdpa_folded": "SDPA, heads folded into rows",
    "manual_folded": "matmul, softmax, matmul",
    "stock": "DynamicCache with SDPA",
}
_DASHED = ("fp32", "float32")
_COLUMNS = 3
_PANEL_WIDTH, _ONLY_WIDTH, _PANEL_HEIGHT, _LEFT, _RIGHT, _GAP = 3.7, 6.2, 2.5, 0.85, 0.3, 0.65  # inches
_LEGEND_ROW, _NOTE_HEIGHT = 0.2, 0.17
_LEAST_SPAN = 5  # of the y axis, so that it has some numbers


@dataclass(frozen=True)
class Line:
    """One contestant in one panel; `ours` are drawn above the others, stock in fp32 dashed."""

    name: str
    colour: str
    ours: bool
    dashed: bool
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One shape: its lines, and for each of ours where it becomes the fastest (tokens, or None) and that in words."""

    title: str
    lines: Sequence[Line]
    crossings: Sequence[tuple[str, float | None, str]]


def draw(result: Mapping[str, Any], path: Path | str) -> None:
    """Draw a result of `occamkv bench attend` or `decode`, on a CPU or a GPU, as PNG.

    Raises:
        UnsupportedInput: The result does not fit the schema, or is of another kind.
    """
    check(result)
    if result["kind"] in ("gpu-attend", "gpu-decode"):
        from occamkv.bench.gpu_plots import draw_gpu

        draw_gpu(result, path)
        return
    if result["kind"] not in _KINDS:
        raise UnsupportedInput(f"there is no figure of kind {result['kind']!r}; allowed: {', '.join(_KINDS)}.")
    panels_of, y_label = _KINDS[result["kind"]]
    with house_style(size=10):
        save_png(_figure(panels_of(result["rows"]), y_label, _caption(result)), path)


def attend_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return a panel for each shape and number of threads, in milliseconds of a call."""
    panels = []
    for (shape, threads), group in _grouped(rows, ("shape", "threads")).items():
        first = group[0]
        heads = f"{first['query_heads']}/{first['kv_heads']}/{first['head_dim']}"
        panels.append(_panel(shape if shape == heads else f"{shape} ({heads})", threads, group, "method", _stock_ms))
    return panels


def decode_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return a panel for each model and number of threads, in tokens per second."""
    named = [{**row, "entrant": f"{row['method']}, {row['dtype']}"} for row in rows]
    panels = []
    for (shape, threads), group in _grouped(named, ("shape", "threads")).items():
        panel = _panel(shape, threads, group, "entrant", lambda row: {f"stock_{row['dtype']}": row["stock_ms"]})
        lines = [
            Line(line.name, line.colour, line.ours, line.dashed, [(x, 1000 / ms) for x, ms in line.points])
            for line in panel.lines
        ]
        panels.append(Panel(panel.title, lines, panel.crossings))
    return panels


_KINDS = {"attend": (attend_panels, "ms per attention call"), "decode": (decode_panels, "tokens per second")}


def _stock_ms(row: Mapping[str, Any]) -> dict[str, float]:
    key = "wall_ms" if row["threads"] > 1 else "cpu_ms"
    return {name: times[key] for name, times in row["contestants"].items() if name != "ours"}


def _grouped(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: float(row["context"])):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    order = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    return {key: groups[key] for key in order}


def _panel(title: str, threads: int, group: Sequence[Mapping[str, Any]], key: str, stock: Any) -> Panel:
    ours: dict[str, list[Mapping[str, Any]]] = {}
    rivals: dict[str, dict[float, float]] = {}
    for row in group:
        ours.setdefault(row[key], []).append(row)
        for name, ms in stock(row).items():
            rivals.setdefault(name, {})[row["context"]] = ms
    lines = [
        Line(
            _label(name), _STOCK[_base(name)], ours=False, dashed=name.endswith(_DASHED), points=sorted(points.items())
        )
        for name, points in rivals.items()
    ]
    crossings = []
    methods = list(dict.fromkeys(row["method"] for row in group))
    for name, own in ours.items():
        colour = _OURS[methods.index(own[0]["method"]) % len(_OURS)]
        points = [(row["context"], row["ours_ms"]) for row in own]
        lines.append(Line(f"occamkv {name}", colour, ours=True, dashed=name.endswith(_DASHED), points=points))
        contexts, ratios = [row["context"] for row in own], [row["ratio_best_stock"] for row in own]
        told = crossover_text(contexts, ratios) if len(ours) == 1 else f"{name}: {crossover_text(contexts, ratios)}"
        crossings.append((colour, crossover(contexts, ratios), told))
    return Panel(title + (f", {threads} threads" if threads > 1 else ""), lines, crossings)


def _base(name: str) -> str:
    return name.rpartition("_")[0]


def _label(name: str) -> str:
    base, _, dtype = name.rpartition("_")
    return f"{_LABELS[base]}, {dtype}"


def _caption(result: Mapping[str, Any]) -> str:
    cpu, clocks = result["cpu"], {"CPU" if row["threads"] == 1 else "wall" for row in result["rows"]}
    return (
        f"{result['machine']} ({cpu['torch_isa']}), torch {result['versions']['torch']}, {result['date']}.\n"
        f"Medians of {' and '.join(sorted(clocks))} time, contestants taking turns. Stock: all that is not occamkv."
    )


def _figure(panels: Sequence[Panel], y_label: str, caption: str) -> Figure:
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names: dict[str, Line] = {}
    for line in (line for panel in panels for line in panel.lines):
        names.setdefault(line.name, line)
    panel_width = _PANEL_WIDTH if columns > 1 else _ONLY_WIDTH
    shown = sorted(names.values(), key=lambda line: not line.ours)
    legend_columns = max(columns, 2)
    above = 0.36 + _NOTE_HEIGHT * max(len(panel.crossings) for panel in panels)
    below = 1.2 + _LEGEND_ROW * -(-len(shown) // legend_columns)
    step_x, step_y = panel_width + _GAP, _PANEL_HEIGHT + above + 0.25
    width = _LEFT + columns * step_x - _GAP + _RIGHT
    height = below + rows * step_y
    figure = Figure(figsize=(width, height))
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, bottom = _LEFT + column * step_x, below + (rows - 1 - row) * step_y
        axes = figure.add_axes((left / width, bottom / height, panel_width / width, _PANEL_HEIGHT / height))
        _fill_panel(axes, panel)
        if column == 0:
            axes.set_ylabel(y_label, labelpad=6)
        if index + columns >= len(panels):
            axes.set_xlabel("context, tokens", labelpad=4)
    figure.legend(
        [_handle(line) for line in shown],
        [line.name for line in shown],
        ncols=legend_columns,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.45 / height),
        fontsize=9,
        handlelength=2.6,
        columnspacing=2.2,
    )
    figure.text(0.5, 0.12 / height, caption, ha="center", fontsize=8, color=MUTED, linespacing=1.4)
    return figure


def _fill_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(*zip(*line.points, strict=True), **_look(line))
    axes.set_xscale("log")
    axes.set_yscale("log")
    contexts = sorted({x for line in panel.lines for x, _ in line.points})
    if len(contexts) == 1:
        axes.set_xlim(contexts[0] / 2, contexts[0] * 2)
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    widen = max(1.0, (_LEAST_SPAN * low / high) ** 0.5)
    low, high = low / widen, high * widen
    axes.set_ylim(low, high)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 15 else (1, 2, 5) if high / low < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, lw=0.7)
    axes.tick_params(length=0, pad=5, labelsize=9)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=6 + 12 * len(panel.crossings))
    for index, (colour, tokens, told) in enumerate(panel.crossings):
        above = 5 + 12 * (len(panel.crossings) - 1 - index)
        axes.annotate(
            told,
            (0, 1),
            xytext=(0, above),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
        )
        if tokens is not None and tokens > contexts[0]:
            axes.axvline(tokens, color=colour, lw=1, dashes=(3, 3), zorder=1.5)


def _look(line: Line) -> dict[str, Any]:
    look: dict[str, Any] = {"color": line.colour, "lw": 1.3, "marker": "o", "ms": 3, "mew": 0, "zorder": 2}
    if line.ours:
        look |= {"lw": 2.4, "ms": 5, "zorder": 3}
    if line.dashed:
        look |= {"dashes": (2.4, 1.4) if line.ours else (4, 2), "marker": None}
    return look


def _handle(line: Line) -> Line2D:
    return Line2D([], [], **{name: value for name, value in _look(line).items() if name != "zorder"})
