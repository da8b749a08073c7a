"""The parts of the analysis page that show figures. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from occamkv.analysis import plots
from occamkv.analysis.columns import by_column, error_ratios, mean, numbers, over_median, sink_norms
from occamkv.analysis.tables import Shown, measured, visible
from occamkv.drawing import positive
from occamkv.html import note, panels, section, side_by_side, text
from occamkv.ops.outliers import SHORT_KEY

Drawn = Callable[[Shown], tuple[str, str, str]]
_TIMES = " \N{MULTIPLICATION SIGN}"


def first_look(results: Sequence[Shown]) -> str:
    """Return the two figures that carry the page: norms of K with its sinks, and what the settings do to the error."""
    ratios = [value for one in results for layer in one.telling for value in _drawn_norms(layer)]
    changes = [value for one in results for layer in one.telling for value in error_ratios(layer).values()]

    def norms(one: Shown) -> tuple[str, str, str]:
        layers = [layer for layer in one.telling if (layer.get("profile") or {}).get("k_norm")]
        limits = _limits(ratios, (0.2, 2))
        said, more = "Norm of K by position", sinks_told(one)
        return (
            said,
            more,
            _figure(layers, f"{one.label}: {said}, {more}", lambda axes: plots.norms(axes, layers, limits=limits)),
        )

    def slopes(one: Shown) -> tuple[str, str, str]:
        layers = [layer for layer in one.telling if error_ratios(layer)]
        limits = _limits(changes, (0.5, 2))
        said, more = "Error of attention with K in 2 bits", errors_told(one)
        return (
            said,
            more,
            _figure(layers, f"{one.label}: {said}, {more}", lambda axes: plots.slopes(axes, layers, limits=limits)),
        )

    packed = "a packed layer" if all(one.packed for one in results) else "a layer, packed if any is"
    return _pairs(results, norms, slopes) + note(
        f"Each grey line is {packed}; all axes are logarithmic. Norms: further on in the text a line shows the "
        "mean of ever longer ranges; dots are sinks, orange below half of the median. Errors: of the attention output "
        "with K in 2 bits over that with K as it is; bars are medians, the arrow is what a rotation does to scaled K."
    )


def sinks_told(result: Shown) -> str:
    """Return the norm of the token that is a sink in most packed layers, and in how many layers a sink is low."""
    found: dict[tuple[int, str], list[float]] = {}
    low = 0
    for layer in result.telling:
        sinks = sink_norms(layer)
        low += any(ratio < SHORT_KEY for *_, ratio in sinks)
        for position, token, ratio in sinks:
            found.setdefault((position, token), []).append(ratio)
    if not found:
        return f"no sink was found in {result.count}"
    (position, token), ratios = min(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return (
        f"sink “{visible(token)}” at {position}: {median(ratios):.2f}{_TIMES} the median norm; "
        f"low in {low} of {result.count}"
    )


def errors_told(result: Shown) -> str:
    """Return the median error when rotated and scaled, as in the paper, and when balanced before that."""
    ratios = [error_ratios(layer) for layer in result.telling]
    names = {"rotation+token_scale": "rotated and scaled", "balanced+token_scale": "balanced before that"}
    known = {told: [ratio[name] for ratio in ratios if name in ratio] for name, told in names.items()}
    said = [f"{told} {median(values):.2f}{_TIMES}" for told, values in known.items() if values]
    return ", ".join(said) + " that of K as it is" if said else "not measured"


def why_section(results: Sequence[Shown]) -> str:
    """Return the gain of rotation by its reason, and the error of each layer in each setting."""
    known = [
        value for one in results for layer in one.layers for value in (layer.get("errors") or {}).values() if value
    ]
    pairs = [(layer["query_overlap"], layer["rotation_gain"]) for one in results for layer in _explained(one)]
    gains, span = (_limits([pair[i] for pair in pairs], (0.5, 2)) for i in (1, 0))

    def reason(one: Shown) -> tuple[str, str, str]:
        layers = _explained(one)
        title = f"{one.label}: gain of rotation by overlap of {len(layers)} layers"
        more = "each dot a layer" + ("" if all(layer["packs"] for layer in layers) else "; hollow: not packed")
        svg = _figure(
            layers, title, lambda axes: plots.overlaps(axes, layers, limits=gains, span=span), plots.LEGEND_ABOVE
        )
        return "Gain of rotation", more, svg

    def errors(one: Shown) -> tuple[str, str, str]:
        layers = [layer for layer in one.layers if layer.get("errors")]
        title = f"{one.label}: error of the attention output of {len(layers)} layers"
        more = "attention output, K in 2 bits" + ("; grey: layers without" if len(layers) < len(one.layers) else "")

        def fill(axes: Any) -> None:
            plots.errors_by_layer(axes, one.layers, limits=_limits(known, (0.1, 0.5)))

        return "Error of each layer", more, _figure(layers, title, fill, plots.LEGEND_ABOVE)

    return section(
        "Why rotation helps or harms",
        "A rotation makes K's error even over all channels. That harms where queries look hard at channels in which K "
        "varies little: an overlap below 1. A gain above 1 says by how much the rotation divides the error.",
        _pairs(results, *([reason] if pairs else []), errors),
    )


def maps_section(results: Sequence[Shown]) -> str:
    """Return layers by position: K norm, V norm, attention received, massive activations; then attention as lines."""
    around = plots.Scale(0.25, 4, around_one=True, ticks=(0.25, 0.5, 1, 2, 4), label="ratio")
    kinds = {
        "k_norm": ("Norm of K", "over the layer's median", around),
        "v_norm": ("Norm of V", "over the layer's median", around),
        "massive": (
            "Massive activations",
            "largest entry of the hidden state over the median",
            _decades(results, "massive", 1),
        ),
        "received": (
            "Attention received",
            "mean over heads and queries that see the token",
            _decades(results, "received", 1e-4),
        ),
    }
    limits = _limits(_measured(results, "received"), (1e-3, 1))

    def drawing(key: str) -> Drawn:
        said, more, scale = kinds[key]

        def drawn(one: Shown) -> tuple[str, str, str]:
            rows = [layer for layer in one.layers if _has(layer, key)]
            title = f"{one.label}: {said} of {len(rows)} layers by position, {more}"
            return said, more, _figure(rows, title, lambda axes: plots.heat(axes, one.layers, key, scale), plots.MAP)

        return drawn

    def received(one: Shown) -> tuple[str, str, str]:
        layers = [layer for layer in one.layers if _has(layer, "received")]
        svg = _figure(
            layers,
            f"{one.label}: attention received by position",
            lambda axes: plots.received(axes, layers, limits=limits),
        )
        return "Attention received by position", "each grey line a layer, blue their median", svg

    mixed = any(len(one.packed) < len(one.layers) for one in results)
    holes = any(not _has(layer, key) for one in results for layer in one.layers for key in kinds)
    return section(
        "Layer by layer, token by token",
        "The first tokens have a column each; further on a column holds a range of tokens and shows the most extreme "
        "of them. The last tokens are seen by few queries, so their attention is noise."
        + (" Bold: layers that are packed." if mixed else "")
        + (" Grey: not measured." if holes else ""),
        _pairs(results, *(drawing(key) for key in kinds), received),
    )


def steps_section(results: Sequence[Shown]) -> str:
    """Return one head of K as it is, rotated and scaled, and the norms of every layer before and after scaling."""
    several = len(results) > 1
    heads = [[_panel(one, panel, named=several) for panel in one.data.get("panels") or ()] for one in results]
    cells = [f"<div>{''.join(column)}</div>" for column in heads] if several else heads[0]
    profiles = [_profiles(one, named=several) for one in results if any(_has(layer, "k_norm") for layer in one.layers)]
    if not any(heads) and not profiles:
        return ""
    return section(
        "What rotation and scaling do to K",
        "|K| of one head, tokens (down) by channels (across), darker is larger. Rotation spreads channels that stand "
        "out and keeps the norm of each token; the token scale makes all tokens alike.",
        side_by_side(cells, columns=len(results)) if any(heads) else "",
        *profiles,
    )


def _panel(one: Shown, panel: Mapping[str, Any], *, named: bool) -> str:
    title = f"layer {panel['layer']}, head {panel['head']}"
    svg = plots.figure(f"{one.label}, {title}: K as it is, rotated, scaled", lambda axes: plots.steps(axes, panel))
    more = text(panel.get("why") or "")
    return _captioned((f"{text(one.label)}, " if named else "") + title, more, svg)


def _profiles(one: Shown, *, named: bool) -> str:
    """Return a small figure for each layer, folded away."""
    layers = [layer for layer in one.layers if _has(layer, "k_norm")]
    missing = [layer["index"] for layer in one.layers if layer not in layers]
    values = [
        v for layer in layers for key in ("k_norm", "k_norm_scaled") for v in over_median(layer["profile"].get(key))
    ]
    limits = _limits(values, (0.5, 2))

    def small(layer: Mapping[str, Any]) -> tuple[str, str]:
        title = f"{one.label}, layer {layer['index']}: K norm by position"
        caption = f"Layer {layer['index']}" + ("" if layer["packs"] else " (not packed)")
        return caption, plots.figure(title, lambda axes: plots.profile(axes, layer, limits=limits), plots.SMALL)

    inner = panels([small(layer) for layer in layers])
    told = f" Not measured: {', '.join(map(str, missing))}." if missing else ""
    return (
        f"<details><summary>Norms of every layer{f' of {text(one.label)}' if named else ''}</summary>"
        + note(
            "K norm over its median by position: before scaling (blue; grey: the range) and after it (orange). "
            f"Rotation changes no norm.{told}"
        )
        + f"{inner}</details>"
    )


def _pairs(results: Sequence[Shown], *kinds: Drawn) -> str:
    """Return figures side by side: the kinds of one result, or the same kind of several."""
    several = len(results) > 1
    cells = [
        _captioned((f"{text(one.label)}: " if several else "") + text(said), text(more), svg)
        for kind in kinds
        for one in results
        for said, more, svg in [kind(one)]
    ]
    return side_by_side(cells, columns=len(results))


def _captioned(said: str, more: str, svg: str) -> str:
    return f"<figure><figcaption><b>{said}</b> {more}</figcaption>{svg}</figure>"


def _figure(layers: Sequence[Any], title: str, fill: plots.Fill, size: plots.Size = plots.LINES) -> str:
    """Return the figure, or a sentence where there is nothing to draw."""
    return plots.figure(title, fill, size) if layers else note("Not measured.")


def _explained(one: Shown) -> list[Mapping[str, Any]]:
    return [
        layer for layer in one.layers if all(measured(layer.get(key)) for key in ("query_overlap", "rotation_gain"))
    ]


def _drawn_norms(layer: Mapping[str, Any]) -> list[float]:
    profile = layer.get("profile") or {}
    if not profile.get("k_norm"):
        return []
    means = by_column(profile["positions"], over_median(profile["k_norm"]), mean)
    return [value for *_, value in means] + [ratio for *_, ratio in sink_norms(layer)]


def _has(layer: Mapping[str, Any], key: str) -> bool:
    return any(math.isfinite(value) for value in numbers((layer.get("profile") or {}).get(key)))


def _measured(results: Sequence[Shown], key: str) -> list[float]:
    profiles = [layer.get("profile") or {} for one in results for layer in one.layers]
    return [value for profile in profiles for value in numbers(profile.get(key)) if positive(value)]


def _decades(results: Sequence[Shown], key: str, least: float) -> plots.Scale:
    """Return a scale of whole decades from `least` to the largest that was measured, at least one."""
    bottom = round(math.log10(least))
    top = max([math.ceil(math.log10(value)) for value in _measured(results, key)] + [bottom + 1])
    ticks = [10.0**n for n in range(bottom, top + 1)]
    return plots.Scale(ticks[0], ticks[-1], around_one=False, ticks=ticks, label=key)


def _limits(values: Sequence[float], least: tuple[float, float]) -> tuple[float, float]:
    """Return limits of a logarithmic axis that hold the values and at least these two."""
    known = [value for value in values if positive(value)]
    return min([*(value / 1.3 for value in known), least[0]]), max([*(value * 1.3 for value in known), least[1]])
