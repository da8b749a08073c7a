"""The parts of the report that show figures. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from occamkv.drawing import COLOURS, positive
from occamkv.evals import plots
from occamkv.evals.page import FULL, INTERVAL, Entry, codes, named, table
from occamkv.html import note, number, panels, percent, printable, section, text

_Bins = Sequence[Mapping[str, Any]]


def bits_section(entries: Sequence[Entry]) -> str:
    """Return the figure of mean KL against bits, or nothing if no method has a KL that can be drawn."""
    methods = [entry for entry in entries if not entry.full]
    drawn = [e for e in methods if positive(e.data["kl_mean"]) and math.isfinite(e.data["bits_per_value"])]
    if not drawn:
        return ""
    points = [
        plots.Point(e.name, e.number, e.data["bits_per_value"], e.data["kl_mean"], e.data.get("kl_mean_ci"))
        for e in drawn
    ]
    told = "; ".join(f"{p.name} {p.kl:.3g} nats at {p.bits:.2f} bits" for p in points)
    full = next((e.data["bits_per_value"] for e in entries if e.full), None)
    below = "" if full is None else f"\N{DOWNWARDS ARROW} {FULL}: {full:g} bits, KL 0"
    figure = plots.bits_and_kl(points, title=f"Mean KL against bits per value: {told}", below=below)
    left_out = [entry for entry in methods if entry not in drawn]
    return section(
        "Mean KL against bits per value",
        f"Lower left is better. Vertical lines: the {INTERVAL} of the mean, where there is one. Dashed line: the "
        f"least KL that any method here reaches with so many bits.",
        f"<figure>{figure}</figure>",
        note(f"Without a KL above 0 to draw: {codes(left_out)}.") if left_out else "",
        note("With so many methods, colours repeat and some names find no room; the table has them all.")
        if len(drawn) > COLOURS
        else "",
    )


def position_section(entries: Sequence[Entry]) -> str:
    """Return the figure of KL by position, or nothing if it was not measured."""
    return _curve_section(
        entries,
        lambda row: _middles(row.get("kl_by_position") or ()),
        title="KL along the text",
        lead="Mean KL by position in the text. A line that rises is a method whose error grows with the context.",
        axes=("position, tokens", "KL, nats"),
    )


def generated_section(entries: Sequence[Entry]) -> str:
    """Return the figure of KL by generated token and the lengths of agreement, or nothing if not measured."""
    measured = [entry for entry in entries if entry.data.get("generated")]
    if not measured:
        return ""
    data = measured[0].data["generated"]
    rows = [
        (entry, [named(entry), f"{g['agreement_length_mean']:.1f}", percent(g["agreement_share"])])
        for entry in measured
        for g in [entry.data["generated"]]
    ]
    heads = ["Method", "Agreement length,<br>tokens", "Agreement<br>share"]
    return _curve_section(
        entries,
        lambda row: _middles((row.get("generated") or {}).get("kl_by_index") or ()),
        title="KL along generated text",
        lead=f"Mean KL by token of the answer, {data['tokens']:,} tokens after each of {data['prompts']:,} prompts.",
        axes=("generated token", "KL, nats"),
        below=f"<h3>How long the answer stays that of the full cache</h3>{table(heads, rows)}",
    )


def layer_section(entries: Sequence[Entry]) -> str:
    """Return the figure of the error of each layer, or nothing if it was not measured."""
    return _curve_section(
        entries,
        lambda row: [(e["layer"], e["error"]) for e in row.get("layer_errors") or ()],
        title="Error of each layer",
        lead="Relative error of a layer's attention output, after the output projection (0.1 is 10 %). A layer that "
        "stands out is one to keep in full precision.",
        axes=("layer", "relative error"),
    )


def _middles(bins: _Bins) -> list[tuple[float, float]]:
    return [((b["first"] + b["last"]) / 2, b["kl"]) for b in bins]


def _curve_section(
    entries: Sequence[Entry],
    points: Callable[[Mapping[str, Any]], Sequence[tuple[float, float]]],
    *,
    title: str,
    lead: str,
    axes: tuple[str, str],
    below: str = "",
) -> str:
    """Return a panel for each method, the others in grey behind it; nothing if there is nothing to show."""
    methods = [entry for entry in entries if not entry.full]
    found = [(entry, points(entry.data)) for entry in methods]
    lines = [(e, plots.Curve(e.name, e.number, [x for x, _ in xy], [y for _, y in xy])) for e, xy in found if xy]
    drawn = [(entry, line) for entry, line in lines if line.drawn]
    if not drawn and not below:
        return ""
    figures = plots.curves([line for _, line in drawn], x_label=axes[0], y_label=axes[1])
    missing = [entry for entry, xy in found if not xy]
    zero = [entry for entry, line in lines if not line.drawn]
    return section(
        title,
        lead + (" One panel per method, the others in grey; all panels have the same axes." if len(drawn) > 1 else ""),
        panels([(named(entry), svg) for (entry, _), svg in zip(drawn, figures, strict=True)]) if drawn else "",
        note(f"Not measured for {codes(missing)}.") if missing else "",
        note(f"Zero throughout, so not drawn: {codes(zero)}.") if zero else "",
        below,
    )


def probe_section(entries: Sequence[Entry]) -> str:
    """Return the heat maps of probes by length and depth, full precision first, or nothing if not measured."""
    measured = sorted((e for e in entries if e.data.get("probes")), key=lambda e: not e.full)
    cells = [cell for entry in measured for cell in entry.data["probes"]["cells"]]
    if not measured:
        return ""
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    missing = [entry for entry in entries if entry not in measured]
    return section(
        "Does the model still find things in its context?",
        "Share of probes answered exactly, in percent, by length of the context and depth of what is asked for "
        "(0 is its start). Full precision comes first: what it cannot find is not the cache's fault.",
        _probe_table(measured),
        plots.heat_scale() if cells else "",
        *(_heat_maps(measured, kind) for kind in kinds),
        note(f"Not measured for {codes(missing)}.") if missing else "",
    )


def _heat_maps(entries: Sequence[Entry], kind: str) -> str:
    maps = [(e, [cell for cell in e.data["probes"]["cells"] if cell["kind"] == kind]) for e in entries]
    like = [(cell["length"], cell["depth"]) for _, cells in maps for cell in cells]
    figures = [
        (
            named(entry),
            plots.heat_map(
                {(cell["length"], cell["depth"]): cell["exact"] for cell in cells},
                title=f"{entry.name}, {printable(kind)}: share of probes answered exactly by length and depth, "
                f"{percent(min(shares))} to {percent(max(shares))}",
                like=like,
            ),
        )
        for entry, cells in maps
        if (shares := [cell["exact"] for cell in cells])
    ]
    return f"<h3>{text(kind)}</h3>{panels(figures)}"


def _probe_table(entries: Sequence[Entry]) -> str:
    def row(entry: Entry) -> list[str]:
        probes = entry.data["probes"]
        ends = probes.get("logprob_ci")
        small = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
        shown = number(f"{probes['logprob']:.3f}", small)
        return [named(entry), percent(probes["exact"]), shown, f"{probes['count']:,}"]

    heads = ["Method", "Answered exactly", "Log-probability of the answer, nats", "Probes"]
    return table(heads, [(entry, row(entry)) for entry in entries])
