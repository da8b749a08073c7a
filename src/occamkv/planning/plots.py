"""The figure of `occamkv plan`: memory against context, one line for each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from occamkv import drawing
from occamkv.cache import Plan
from occamkv.cache.sizes import ModelSizes
from occamkv.planning.estimate import estimate
from occamkv.planning.result import FULL, Room, contexts
from occamkv.planning.units import size_text, tokens_text
from occamkv.planning.workload import Workload

_POINTS_PER_OCTAVE = 8
_FIRST = 4096
_APART = 0.055  # of the axis, between names


def draw(
    title: str, sizes: ModelSizes, plans: Mapping[str, Plan], load: Workload, room: Room, path: Path | str
) -> None:
    """Draw what weights and cache take while a prompt is read, against its length, as PNG.

    Args:
        title: Above the figure.
        sizes: The model.
        plans: Plans by name, `full` among them.
        load: Batch, chunk and source are taken from it; its context is marked.
        room: Weights, memory and reserve.
        path: The file.
    """
    ticks = contexts(sizes.limit, load.context)
    lengths = _lengths(ticks[-1])
    base = room.weights + room.reserve
    curves = {
        name: [base + estimate(sizes, plan, load.with_context(length)).peak for length in lengths]
        for name, plan in plans.items()
    }
    with drawing.house_style(size=10):
        figure = Figure(figsize=(8.2, 4.6))
        axes = figure.add_axes((0.09, 0.2, 0.68, 0.66))
        top = _height(curves, room)
        axes.axhspan(0, base / 2**30, color=drawing.GRID, lw=0)
        for number, name in enumerate(curves):
            shade = drawing.MUTED if name == FULL else drawing.light(number - 1)
            axes.plot(lengths, [value / 2**30 for value in curves[name]], color=shade, lw=2.2, label=name)
        if room.memory is not None:
            axes.axhline(room.memory / 2**30, color=drawing.INK, lw=1.2, dashes=(5, 3))
        axes.set_xlim(lengths[0], lengths[-1])
        axes.set_ylim(0, top)
        axes.axvline(load.context, color=drawing.MUTED, lw=0.8, dashes=(2, 3), zorder=1)
        _name_lines(axes, curves, room, top)
        _finish(axes, [tick for tick in ticks if tick & (tick - 1) == 0 and tick >= _FIRST] or ticks)
        figure.text(0.09, 0.93, title, fontsize=12, fontweight="bold")
        figure.text(0.09, 0.025, _caption(load, room), fontsize=8.5, color=drawing.MUTED, linespacing=1.4)
        drawing.save_png(figure, path)


def _lengths(last: int) -> list[int]:
    """Return lengths that are evenly spread on a logarithmic axis, the last one exact."""
    first, found, step = min(_FIRST, last), set[int](), 0
    while (length := round(first * 2 ** (step / _POINTS_PER_OCTAVE))) < last:
        found.add(length)
        step += 1
    return sorted(found | {last})


def _height(curves: Mapping[str, list[int]], room: Room) -> float:
    """Return the top of the y axis in GiB: a memory stays visible, however far the full cache grows."""
    highest = max(max(values) for values in curves.values())
    shown = highest if room.memory is None else min(highest, max(2 * room.memory, 2 * (room.weights + room.reserve)))
    return float(1.06 * max(shown, room.memory or 0) / 2**30)


def _name_lines(axes: Axes, curves: Mapping[str, list[int]], room: Room, top: float) -> None:
    """Write names to the right of the lines' ends, apart from each other, and those of base and memory."""
    wanted = sorted((min(values[-1] / 2**30 / top, 1.0), number) for number, values in enumerate(curves.values()))
    names = list(curves)
    for at, (_, number) in zip(_apart([height for height, _ in wanted]), wanted, strict=True):
        name = names[number]
        beyond = curves[name][-1] / 2**30 > top
        axes.annotate(
            f"{name} (to {size_text(curves[name][-1])})" if beyond else name,
            (1, at),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=drawing.MUTED if name == FULL else drawing.light(number - 1),
        )
    base = "weights and reserve" if room.reserve else "weights"
    _beside(axes, f"{base} {size_text(room.weights + room.reserve)}", (room.weights + room.reserve) / 2**30 / top, -4)
    if room.memory is not None:
        _beside(axes, f"memory {size_text(room.memory)}", room.memory / 2**30 / top, 3)


def _apart(heights: list[float]) -> list[float]:
    """Move ascending heights, shares of the axis, apart from each other; those too close share their middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _foot(groups[-1]) < _foot(groups[-2]) + len(groups[-2]) * _APART:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_foot(group) + index * _APART for group in groups for index in range(len(group))]


def _foot(group: list[float]) -> float:
    return sum(group) / len(group) - (len(group) - 1) * _APART / 2


def _beside(axes: Axes, label: str, height: float, points: int) -> None:
    """Write a label at the left edge, so many points above a height (a share of the axis), or below it."""
    axes.annotate(
        label,
        (0, height),
        xycoords="axes fraction",
        xytext=(5, points),
        textcoords="offset points",
        va="bottom" if points > 0 else "top",
        fontsize=8.5,
    )


def _finish(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(int(x))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("GiB")
    axes.grid(color=drawing.GRID, lw=0.7)
    axes.tick_params(length=0, pad=5)


def _caption(load: Workload, room: Room) -> str:
    batch = f"{load.batch} sequences" if load.batch > 1 else "One sequence"
    pieces = "in one piece" if load.chunk is None else f"in pieces of {tokens_text(load.chunk)} tokens"
    return (
        f"{batch}, the prompt read {pieces}; the peak while it is read.\nActivations and the runtime are not counted"
        + ("." if room.reserve else ": leave a reserve.")
    )
