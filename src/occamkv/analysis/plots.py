"""The figures of an analysis: each function draws into given axes; `figure` makes an SVG for a page of it.

Positions stand on a logarithmic axis, so that the first tokens can be read one by one. Further on a column holds a
range of tokens; what it shows of them is said where it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from occamkv.analysis.columns import (
    Layer,
    by_column,
    columns,
    error_ratios,
    furthest,
    mean,
    numbers,
    over_median,
    sink_norms,
)
from occamkv.analysis.tables import SETTINGS
from occamkv.drawing import GRID, INK, MUTED, OTHERS, house_style, light, positive, svg
from occamkv.html import printable
from occamkv.ops.outliers import SHORT_KEY

Fill = Callable[[Axes], None]

_LOW, _ORDINARY = light(1), light(0)
_MOST_NAMED = 3
_SHAPES = {"none": "o", "token_scale": "s", "rotation": "^", "rotation+token_scale": "D", "balanced+token_scale": "v"}
_AROUND = ("#a34a00", "#e08a3c", "#f3efe9", "#6aa5cf", "#08497f")  # low, the median, high
_MORE = ("#f3efe9", "#c3d3df", "#7fa9c9", "#2f73a8", "#0b3f6f")


class Scale(NamedTuple):
    """How numbers become colours: from, to, whether 1 is the middle, and the ticks of the legend."""

    low: float
    high: float
    around_one: bool
    ticks: Sequence[float]
    label: str

    @property
    def colours(self) -> Colormap:
        """The colours; what is missing is grey."""
        shades = _AROUND if self.around_one else _MORE
        return LinearSegmentedColormap.from_list(self.label, shades).with_extremes(bad=OTHERS)


class Size(NamedTuple):
    """Width and height of a figure, what is left free at its left, bottom, right and top, and its letters."""

    width: float = 440
    height: float = 250
    left: float = 58
    bottom: float = 46
    right: float = 10
    top: float = 12
    letters: float = 11


LINES, MAP, LEGEND_ABOVE, SMALL = (
    Size(),
    Size(height=320, right=66),
    Size(height=286, top=48),
    Size(210, 110, 34, 22, 6, 6, 9),
)


def figure(title: str, fill: Fill, size: Size = LINES) -> str:
    """Return an SVG that `fill` has drawn; `title` is what a reader who cannot see it is told."""
    title = printable(title)
    width, height, left, bottom, right, top, letters = size
    with house_style(title, size=letters):
        drawn = Figure(figsize=(width / 72, height / 72))
        fill(drawn.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)))
        return svg(drawn, title)


def norms(axes: Axes, layers: Sequence[Layer], *, limits: tuple[float, float]) -> None:
    """Draw a line for each layer, K norm over the layer's median by position, and mark the sinks."""
    last = 1
    for layer in layers:
        profile = layer["profile"]
        found = by_column(profile["positions"], over_median(profile["k_norm"]), mean)
        axes.plot([(a + b - 1) / 2 for a, b, _ in found], [v for *_, v in found], color=OTHERS, lw=0.9, zorder=2)
        last = max(last, *profile["positions"])
    axes.axhline(1, color=MUTED, lw=0.8, dashes=(4, 3), zorder=1.5)
    axes.axhspan(limits[0], SHORT_KEY, color=_LOW, alpha=0.08, lw=0, zorder=0)
    axes.text(0.985, 0.03, "low norm", transform=axes.transAxes, ha="right", color=_LOW)
    for at, _, ratio in (sink for layer in layers for sink in sink_norms(layer)):
        axes.plot([at], [ratio], "o", color=_LOW if ratio < SHORT_KEY else _ORDINARY, ms=5, mew=0, alpha=0.8, zorder=3)
    _name_exceptions(axes, layers)
    _position_axis(axes, last)
    _ratio_axis(axes, limits)
    axes.set_ylabel("K norm / median of the layer")


def _name_exceptions(axes: Axes, layers: Sequence[Layer]) -> None:
    """Write the number of their layer beside low sinks that are few: the layers are not alike then."""
    sinks = {layer["index"]: found for layer in layers if (found := sink_norms(layer))}
    low = {index: [sink for sink in found if sink[2] < SHORT_KEY] for index, found in sinks.items()}
    named = [(index, sink) for index, found in low.items() for sink in found[:1]]
    if 2 * len(named) > len(sinks) or len(named) > _MOST_NAMED:
        return
    for index, (at, _, ratio) in named:
        axes.annotate(
            f"layer {index}", (at, ratio), xytext=(7, 0), textcoords="offset points", va="center", color=_LOW, zorder=4
        )


def slopes(axes: Axes, layers: Sequence[Layer], *, limits: tuple[float, float]) -> None:
    """Draw a line for each layer: error of its attention output in each setting over that of K as it is."""
    middles: dict[str, list[float]] = {}
    for layer in layers:
        ratios = error_ratios(layer)
        shown = [(i, ratios[name]) for i, name in enumerate(SETTINGS) if name in ratios]
        axes.plot(*zip(*shown, strict=True), color=OTHERS, lw=0.9, zorder=2)
        for name, ratio in ratios.items():
            middles.setdefault(name, []).append(ratio)
    axes.axhline(1, color=MUTED, lw=0.8, dashes=(4, 3), zorder=1.5)
    for i, name in enumerate(SETTINGS):
        if name in middles:
            middle = median(middles[name])
            shade = INK if name == "none" else _LOW if middle > 1 else _ORDINARY
            axes.plot([i - 0.3, i + 0.3], [middle, middle], color=shade, lw=4, solid_capstyle="butt", zorder=3)
            axes.annotate(
                f"{middle:.2f}",
                (i, middle),
                xytext=(0, 9 if middle >= 1 else -9),
                textcoords="offset points",
                ha="center",
                va="center",
                color=shade,
                fontweight="bold",
                fontsize=12,
                zorder=4,
            )
    if {"token_scale", "rotation+token_scale"} <= set(middles):
        _step(axes, median(middles["token_scale"]), median(middles["rotation+token_scale"]))
    axes.set_xlim(-0.5, len(SETTINGS) - 0.5)
    axes.xaxis.set_major_locator(FixedLocator(range(len(SETTINGS))))
    axes.set_xticklabels([label.replace(", ", ",\n") for label in SETTINGS.values()])
    _ratio_axis(axes, limits)
    axes.set_ylabel("error / that of K as it is")


def _step(axes: Axes, scaled: float, both: float) -> None:
    """Draw what a rotation does to what is scaled already, as an arrow from the one bar to the other."""
    at = list(SETTINGS).index("token_scale")
    shade = _LOW if both > scaled else _ORDINARY
    arrow = {"arrowstyle": "-|>", "color": shade, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (at + 0.72, both), xytext=(at + 0.3, scaled), arrowprops=arrow, zorder=4)
    sign, factor = ("\N{MULTIPLICATION SIGN}", both / scaled) if both > scaled else ("\N{DIVISION SIGN}", scaled / both)
    x, y = (at + 0.42, (both * scaled) ** 0.5) if both > scaled else (at + 0.75, scaled * 1.5)
    axes.text(
        x,
        y,
        f"rotation {sign}{factor:.1f}",
        color=shade,
        ha="right" if both > scaled else "center",
        fontweight="bold",
        zorder=4,
    )


def errors_by_layer(axes: Axes, layers: Sequence[Layer], *, limits: tuple[float, float]) -> None:
    """Draw the error of the attention output of each layer in each setting; a grey strip is a layer without."""
    for number, (name, label) in enumerate(SETTINGS.items()):
        points = [(layer["index"], (layer.get("errors") or {}).get(name)) for layer in layers]
        known = [(at, error) for at, error in points if error is not None and positive(error)]
        if known:
            look: dict[str, Any] = {"color": MUTED if name == "none" else light(number - 1), "marker": _SHAPES[name]}
            axes.plot(*zip(*known, strict=True), ls="", ms=4.5, mew=0, label=label, **look)
    for has, run in groupby(layers, lambda layer: bool(layer.get("errors"))):
        within = [layer["index"] for layer in run]
        if not has:
            axes.axvspan(within[0] - 0.5, within[-1] + 0.5, color=GRID, lw=0, zorder=0)
    indices = [layer["index"] for layer in layers]
    axes.set_xlim(min(indices) - 0.6, max(indices) + 0.6)
    axes.xaxis.set_major_locator(FixedLocator(indices[:: max(1, len(indices) // 12)]))
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _plain_ticks(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.03, 1), frameon=False, fontsize=10, handletextpad=0)


def received(axes: Axes, layers: Sequence[Layer], *, limits: tuple[float, float]) -> None:
    """Draw a line for each layer, mean attention that a token receives by position, and their median in front."""
    last, medians = 1, dict[float, list[float]]()
    for layer in layers:
        profile = layer["profile"]
        found = by_column(profile["positions"], numbers(profile.get("received")), mean)
        shown = [((a + b - 1) / 2, v) for a, b, v in found if positive(v)]
        if shown:
            axes.plot(*zip(*shown, strict=True), color=OTHERS, lw=0.9, zorder=2)
        for at, value in shown:
            medians.setdefault(at, []).append(value)
        last = max(last, *profile["positions"])
    ordered = sorted(medians)
    axes.plot(ordered, [median(medians[at]) for at in ordered], color=_ORDINARY, lw=2.2, zorder=3)
    _position_axis(axes, last)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _plain_ticks(axes)
    axes.set_ylabel("attention received, mean")


def overlaps(axes: Axes, layers: Sequence[Layer], *, limits: tuple[float, float], span: tuple[float, float]) -> None:
    """Draw the gain of a rotation by how much queries look where K varies; layers that are not packed are hollow."""
    for layer in layers:
        gain = layer["rotation_gain"]
        shade = _ORDINARY if gain > 1 else _LOW
        inner = shade if layer["packs"] else "none"
        axes.plot([layer["query_overlap"]], [gain], "o", ms=6, mec=shade, mfc=inner, alpha=0.8, zorder=3)
    axes.axhline(1, color=MUTED, lw=0.8, dashes=(4, 3), zorder=1.5)
    axes.axvline(1, color=MUTED, lw=0.8, dashes=(4, 3), zorder=1.5)
    _ratio_axis(axes, limits)
    axes.set_xscale("log", base=2)
    axes.set_xlim(*span)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    for height, said, shade in ((0.95, "rotation helps", _ORDINARY), (0.05, "rotation harms", _LOW)):
        axes.text(0.02, height, said, transform=axes.transAxes, va="center", color=shade, fontweight="bold")
    axes.set_xlabel("overlap of queries with K's variance")
    axes.set_ylabel("gain of rotation")


def heat(axes: Axes, layers: Sequence[Layer], key: str, scale: Scale) -> None:
    """Draw layers (down) by position (across): a profile in colours, of each column the most extreme token."""
    last = max(p for layer in layers for p in (layer.get("profile") or {}).get("positions") or (1,))
    ranges = columns([last])
    grid = np.full((len(layers), len(ranges)), math.nan)
    for row, layer in enumerate(layers):
        profile = layer.get("profile") or {}
        values = over_median(profile.get(key)) if scale.around_one else numbers(profile.get(key))
        if values:
            for first, _, value in by_column(profile["positions"], values, furthest if scale.around_one else max):
                grid[row, [first for first, _ in ranges].index(first)] = value
    edges = [ranges[0][0] - 0.5, *(end - 0.5 for _, end in ranges)]
    colours = axes.pcolormesh(
        edges,
        np.arange(len(layers) + 1) - 0.5,
        np.ma.masked_invalid(grid),
        cmap=scale.colours,
        norm=LogNorm(scale.low, scale.high, clip=True),
        rasterized=True,
    )
    _position_axis(axes, last)
    axes.set_xlim(edges[0], edges[-1])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _layer_axis(axes, layers)
    _legend(axes, colours, scale)


def panel(axes: Axes, values: Sequence[Sequence[float]], *, top: float, label: str) -> None:
    """Draw one head of K, tokens (down) by channels (across): the darker the larger, `top` is darkest."""
    grid = np.array(values, dtype=float)
    scale = Scale(0, top, around_one=False, ticks=(), label=label)
    axes.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5,
        np.arange(grid.shape[0] + 1) - 0.5,
        grid,
        cmap=scale.colours,
        norm=PowerNorm(0.5, 0, top, clip=True),
        rasterized=True,
    )
    axes.set_yscale("function", functions=_POSITIONS)
    axes.set_ylim(grid.shape[0] - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(_marks(grid.shape[0] - 1)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xlabel(f"{grid.shape[1]} channels", fontsize=9)
    axes.set_title(label, fontsize=11, pad=5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3, labelsize=9)


def steps(axes: Axes, shown: Mapping[str, Any]) -> None:
    """Draw one head of K three times side by side: as it is, rotated, scaled; the first two in the same colours."""
    axes.set_axis_off()
    parts = {"raw": "as it is", "rotated": "rotated", "scaled": "rotated, scaled"}
    largest = {key: float(np.quantile(np.array(shown[key]), 0.998)) for key in parts}
    same = max(largest["raw"], largest["rotated"])
    for number, (key, label) in enumerate(parts.items()):
        inset = axes.inset_axes((0.345 * number, 0.02, 0.31, 0.9))
        panel(inset, shown[key], top=largest[key] if key == "scaled" else same, label=label)
        if number:
            inset.set_yticklabels([])
        else:
            inset.set_ylabel("position of the token")


def profile(axes: Axes, layer: Layer, *, limits: tuple[float, float]) -> None:
    """Draw K's norm over its median by position before scaling (range and mean of a column) and after it (mean)."""
    given = layer["profile"]
    ratios = over_median(given["k_norm"])
    ends = [by_column(given["positions"], ratios, pick) for pick in (min, max, mean)]
    at = [(a + b - 1) / 2 for a, b, _ in ends[0]]
    low, high, middle = ([value for *_, value in one] for one in ends)
    axes.fill_between(at, low, high, color=OTHERS, lw=0)
    scaled = by_column(given["positions"], over_median(given.get("k_norm_scaled")) or [math.nan] * len(ratios), mean)
    axes.plot([(a + b - 1) / 2 for a, b, _ in scaled], [value for *_, value in scaled], color=_LOW, lw=1)
    axes.plot(at, middle, color=_ORDINARY, lw=1.4)
    _position_axis(axes, given["positions"][-1])
    axes.xaxis.set_major_locator(FixedLocator(_marks(given["positions"][-1])[::3]))
    axes.set_xlabel("")
    _ratio_axis(axes, limits)
    axes.tick_params(labelsize=9)


def _log_of(position: Any) -> Any:
    return np.log2(np.maximum(np.asarray(position, dtype=float) + 1, 2.0**-20))


def _position_of(log: Any) -> Any:
    return np.exp2(log) - 1


_POSITIONS = (_log_of, _position_of)


def _marks(last: int) -> list[int]:
    return [0] + [2**n for n in range(20) if 2**n <= last]


def _position_axis(axes: Axes, last: int) -> None:
    axes.set_xscale("function", functions=_POSITIONS)
    axes.set_xlim(-0.3, last + 1)
    axes.xaxis.set_major_locator(FixedLocator(_marks(last)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.0f}"))
    axes.tick_params(length=0, pad=5, labelsize=10)
    axes.set_xlabel("position of the token")


def _ratio_axis(axes: Axes, limits: tuple[float, float]) -> None:
    axes.set_yscale("log", base=2)
    axes.set_ylim(*limits)
    _plain_ticks(axes)


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.tick_params(length=0, pad=5, labelsize=10)


def _layer_axis(axes: Axes, layers: Sequence[Layer]) -> None:
    """Number the rows; where only some layers are packed, those are bold and the others pale."""
    step = max(1, math.ceil(len(layers) / 24))
    rows = [row for row in range(len(layers)) if row % step == 0]
    axes.yaxis.set_major_locator(FixedLocator(rows))
    axes.set_yticklabels([str(layers[row]["index"]) for row in rows])
    mixed = len({bool(layer.get("packs")) for layer in layers}) > 1
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_fontsize(8.5)
        if mixed:
            packs = layers[row].get("packs")
            label.set(fontweight="bold" if packs else "normal", color=INK if packs else MUTED)
    axes.set_ylabel("layer")


def _legend(axes: Axes, colours: Any, scale: Scale) -> None:
    inset = axes.inset_axes((1.03, 0.0, 0.035, 1.0))
    steps = np.geomspace(scale.low, scale.high, 65)
    norm: Normalize = LogNorm(scale.low, scale.high)
    middles = np.sqrt(steps[:-1] * steps[1:])[:, None]
    inset.pcolormesh([0, 1], steps, middles, cmap=colours.cmap, norm=norm, rasterized=True)
    inset.set_yscale("log")
    inset.xaxis.set_major_locator(NullLocator())
    inset.yaxis.set_major_locator(FixedLocator(scale.ticks))
    inset.yaxis.set_minor_locator(NullLocator())
    inset.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    inset.yaxis.tick_right()
    inset.spines[:].set_visible(False)
    inset.tick_params(length=0, pad=3, labelsize=9)
