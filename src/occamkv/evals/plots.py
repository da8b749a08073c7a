"""The figures of the report, as SVG to be put inside a page: same data, same bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from occamkv.drawing import GRID, GROUND, MUTED, OTHERS, house_style, light, positive, svg

_HEAT = ("#f3e9dc", "#a9bfd0", "#5b8fb9", "#24608f")  # darker is better: an answer that was lost is a hole
_MOST_WRITTEN = 7  # with more columns the cells are too narrow for numbers
_LABEL_SIZE, _LETTER_WIDTH, _LINE_HEIGHT, _LONGEST_LABEL = 12, 0.6, 15.0, 30
_DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
_DISTANCES = (8.0, 14.0, 24.0, 36.0, 50.0)


@dataclass(frozen=True)
class Point:
    """A method at `bits` per value with a mean KL in nats (positive) and its interval; `colour` is a number."""

    name: str
    colour: int
    bits: float
    kl: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Curve:
    """A line of one method; values that are not positive and finite are left out."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """The points that a logarithmic axis can show."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and positive(y)]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y upward."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        beside = self.left >= other.right or other.left >= self.right
        return not (beside or self.bottom >= other.top or other.bottom >= self.top)

    def inside(self, other: Box) -> bool:
        """Whether this lies in the other."""
        sideways = other.left <= self.left and self.right <= other.right
        return sideways and other.bottom <= self.bottom and self.top <= other.top


def bits_and_kl(points: Sequence[Point], *, title: str, below: str = "") -> str:
    """Draw mean KL (log) against bits per value with intervals, names, and the Pareto front as a step line.

    Args:
        points: The methods, each with a positive KL.
        title: What a reader who cannot see the figure is told.
        below: What lies below the axis, since its KL is 0; said in the lower right corner.
    """
    with house_style(title):
        figure = Figure(figsize=(860 / 72, 430 / 72))
        axes = figure.add_axes((66 / 860, 50 / 430, 786 / 860, 372 / 430))
        bits = [p.bits for p in points]
        pad = 0.1 * (max(bits) - min(bits)) or 0.5
        axes.set_xlim(min(bits) - pad, max(bits) + 1.6 * pad)
        _log_axis(axes, [v for p in points for v in (p.kl, *(p.interval or ()))], room=1.5, ticks=9)
        front = pareto(points)
        xs = [*(p.bits for p in front), axes.get_xlim()[1]]
        ys = [*(p.kl for p in front), front[-1].kl]
        axes.plot(xs, ys, drawstyle="steps-post", color=MUTED, lw=0.9, dashes=(4, 3), zorder=1.5)
        for p in points:
            if p.interval is not None:
                low = max(p.interval[0], axes.get_ylim()[0])
                axes.plot([p.bits, p.bits], [low, p.interval[1]], color=light(p.colour), lw=1.6, solid_capstyle="butt")
            axes.plot([p.bits], [p.kl], "o", color=light(p.colour), ms=7, mew=0, zorder=3)
        axes.grid(color=GRID, lw=0.8)
        axes.tick_params(length=0, bottom=False, left=False, pad=6)
        axes.set_xlabel("bits per value, all overhead counted", labelpad=8)
        axes.set_ylabel("mean KL to full precision, nats")
        corner = Box(axes.bbox.x1 - _width(below), axes.bbox.y0, axes.bbox.x1, axes.bbox.y0 + 1.5 * _LINE_HEIGHT)
        axes.text(corner.right - 2, corner.bottom + 5, below, color=MUTED, ha="right", transform=None)
        _name_points(axes, points, list(zip(xs, ys, strict=True)), corner)
        return svg(figure, title)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that none with as few bits beats in KL, by bits."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.bits, p.kl)):
        if not front or p.kl < front[-1].kl:
            front.append(p)
    return front


def curves(lines: Sequence[Curve], *, x_label: str, y_label: str) -> list[str]:
    """Draw a panel for each line that has a point to show, the others in grey behind it, all on the same axes."""
    lines = [line for line in lines if line.drawn]
    xs = [x for line in lines for x, _ in line.drawn]
    return [_panel(line, lines, (min(xs), max(xs)), x_label=x_label, y_label=y_label) for line in lines]


def _panel(line: Curve, lines: Sequence[Curve], span: tuple[float, float], *, x_label: str, y_label: str) -> str:
    (first, start), (last, end) = line.drawn[0], line.drawn[-1]
    title = f"{line.name}: {y_label}, from {start:.3g} at {x_label} {first:g} to {end:.3g} at {last:g}"
    with house_style(title):
        figure = Figure(figsize=(220 / 72, 150 / 72))
        axes = figure.add_axes((52 / 220, 32 / 150, 163 / 220, 112 / 150))
        pad = 0.03 * (span[1] - span[0]) or 0.5
        axes.set_xlim(span[0] - pad, span[1] + pad)
        _log_axis(axes, [y for other in lines for _, y in other.drawn], room=1.15, ticks=5)
        for other in lines:
            axes.plot(*zip(*other.drawn, strict=True), color=OTHERS, lw=0.7)
        axes.plot(*zip(*line.drawn, strict=True), "-o", color=light(line.colour), lw=1.8, ms=2.6, mew=0, zorder=3)
        axes.grid(axis="y", color=GRID, lw=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.tick_params(length=0, bottom=False, left=False, pad=4, labelsize=9)
        axes.set_xlabel(x_label, fontsize=9, labelpad=3, color=MUTED)
        axes.set_ylabel(y_label, fontsize=9, labelpad=2, color=MUTED)
        return svg(figure, title)


def heat_map(shares: Mapping[tuple[float, float], float], *, title: str, like: Sequence[tuple[float, float]]) -> str:
    """Draw shares of success (0 to 1) by length (across) and depth (down, 0 is the start of the text).

    Args:
        shares: `(length, depth)` to share; what is missing stays empty.
        title: What a reader who cannot see the figure is told.
        like: The `(length, depth)` of all maps that are shown together, so that they get the same grid.
    """
    lengths, depths = (sorted({cell[i] for cell in like}) for i in (0, 1))
    height = 44 + 21 * len(depths)
    with house_style(title):
        figure = Figure(figsize=(220 / 72, height / 72))
        axes = figure.add_axes((52 / 220, 38 / height, 163 / 220, (height - 42) / height))
        values = [[shares.get((length, depth), math.nan) for length in lengths] for depth in depths]
        axes.pcolormesh(values, cmap=_heat(), vmin=0, vmax=1, edgecolor=GROUND, lw=1.5)
        axes.invert_yaxis()
        for row, column in itertools.product(range(len(depths)), range(len(lengths))):
            share = values[row][column]
            if math.isfinite(share) and len(lengths) <= _MOST_WRITTEN:
                ink = "#fefefe" if share > 0.55 else "#14181f"
                axes.text(
                    column + 0.5, row + 0.5, f"{100 * share:.0f}", color=ink, fontsize=9, ha="center", va="center"
                )
        axes.xaxis.set_major_locator(FixedLocator([i + 0.5 for i in range(len(lengths))]))
        axes.yaxis.set_major_locator(FixedLocator([i + 0.5 for i in range(len(depths))]))
        axes.set_xticklabels([f"{length:g}" for length in lengths])
        axes.set_yticklabels([f"{depth:g}" for depth in depths])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, bottom=False, left=False, pad=4, labelsize=9)
        axes.set_xlabel("length, tokens", fontsize=9, labelpad=3, color=MUTED)
        axes.set_ylabel("depth", fontsize=9, labelpad=2, color=MUTED)
        return svg(figure, title)


def heat_scale() -> str:
    """Draw the colours of `heat_map` from 0 to 100 %."""
    title = "Colour scale: share of probes answered exactly, from 0 % (pale) to 100 % (blue)"
    with house_style(title):
        figure = Figure(figsize=(260 / 72, 34 / 72))
        axes = figure.add_axes((12 / 260, 18 / 34, 232 / 260, 14 / 34))
        steps = 20
        axes.pcolormesh([[i / (steps - 1) for i in range(steps)]], cmap=_heat(), vmin=0, vmax=1, edgecolor="face")
        axes.xaxis.set_major_locator(FixedLocator([0, steps / 2, steps]))
        axes.set_xticklabels(["0 %", "50 %", "100 %"])
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, bottom=False, left=False, pad=3, labelsize=9)
        return svg(figure, title)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    frame: Box,
    taken: Sequence[Box],
    avoid: Sequence[Box] = (),
) -> list[Box | None]:
    """Find a place near each anchor where its label covers nothing, nearest first; None where there is none.

    Args:
        anchors: Pixels `(x, y)`.
        sizes: Width and height of each label.
        frame: Labels stay inside.
        taken: What no label may cover.
        avoid: What a label covers only if there is no other place.
    """
    placed: list[Box | None] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        hard = [*taken, *(box for box in placed if box is not None)]
        places = [
            Box(left, bottom, left + width, bottom + height)
            for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS)
            for left in [x + right * distance - (1 - right) / 2 * width]
            for bottom in [y + up * (distance if right == 0 else 0.8 * distance) - (1 - up) / 2 * height]
        ]
        free = [box for box in places if box.inside(frame) and not any(box.meets(other) for other in hard)]
        best = [box for box in free if not any(box.meets(other) for other in avoid)]
        placed.append(next(iter(best or free), None))
    return placed


def _name_points(axes: Axes, points: Sequence[Point], front: Sequence[tuple[float, float]], corner: Box) -> None:
    """Write the names beside the points, with a thin line to those that stand further off."""

    def pixels(x: float, y: float) -> tuple[float, float]:
        left, bottom = axes.transData.transform((x, y))
        return float(left), float(bottom)

    anchors = [pixels(p.bits, p.kl) for p in points]
    taken = [corner, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors)]
    for p in (p for p in points if p.interval is not None):
        (x, low), (_, high) = (pixels(p.bits, max(end, axes.get_ylim()[0])) for end in p.interval or ())
        taken.append(Box(x - 3, low, x + 3, high))
    steps = [pixels(*corner) for corner in front]
    flats = [Box(x, y - 2, after, y + 2) for (x, y), (after, _) in itertools.pairwise(steps)]
    drops = [Box(x - 2, y, x + 2, before) for (_, before), (x, y) in itertools.pairwise(steps)]
    names = [p.name if len(p.name) <= _LONGEST_LABEL else p.name[: _LONGEST_LABEL - 1] + "…" for p in points]
    sizes = [(_width(name), _LINE_HEIGHT) for name in names]
    frame = Box(*axes.bbox.extents)
    boxes = place_labels(anchors, sizes, frame=frame, taken=taken, avoid=flats + drops)
    for name, box, (x, y) in zip(names, boxes, anchors, strict=True):
        if box is not None:
            _write_label(axes, name, box, (x, y))


def _write_label(axes: Axes, name: str, box: Box, anchor: tuple[float, float]) -> None:
    x, y = anchor
    side = "left" if box.left >= x else "right" if box.right <= x else "center"
    at = {"left": box.left + 2, "right": box.right - 2, "center": (box.left + box.right) / 2}[side]
    nearest = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
    if math.dist(anchor, nearest) > 1.5 * _DISTANCES[0]:
        axes.plot(*zip(anchor, nearest, strict=True), color=MUTED, lw=0.7, transform=None, zorder=2)
    middle = (box.bottom + box.top) / 2
    axes.text(at, middle, name, fontsize=_LABEL_SIZE, ha=side, va="center", transform=None, zorder=4)


def _log_axis(axes: Axes, values: Sequence[float], *, room: float, ticks: int) -> None:
    """Make y logarithmic around the positive values, at least a factor of 4 high, with plain numbers at its ticks."""
    shown = [value for value in values if positive(value)]
    low, high = min(shown) / room, max(shown) * room
    widen = max(1.0, math.sqrt(4 * low / high))
    low, high = low / widen, high * widen
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    steps = next(s for s in ((1, 2, 5), (1, 3), (1,)) if len(s) * math.log10(high / low) <= ticks or s == (1,))
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _heat() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("shares", _HEAT)


def _width(name: str) -> float:
    """Return about how many pixels a label takes, whatever the page's font is."""
    return _LETTER_WIDTH * _LABEL_SIZE * len(name) + 4
