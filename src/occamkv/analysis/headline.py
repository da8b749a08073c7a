"""The sentences at the top of an analysis, and the layers that show best what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from occamkv.analysis.result import LayerAnalysis
from occamkv.cache import LayerPlan
from occamkv.ops.outliers import SHORT_KEY

_HURTS, _HELPS = 0.8, 1.25  # gains of a plain rotation that are more than noise


_NAMES = {
    "none": "no rotation",
    "hadamard": "plain Hadamard rotation",
    "balanced": "balanced rotation (weighted by what queries look at)",
}


def headline(layers: Sequence[LayerAnalysis], plan: Mapping[int, LayerPlan]) -> tuple[str, ...]:
    """Say whether there are low-norm sinks in K, whether to rotate, and what the advice changes.

    Args:
        layers: Those that were measured.
        plan: The advised plan by layer.
    """
    seen = [layer for layer in layers if layer.packs] or list(layers)
    return tuple(sentence for sentence in (_sinks(seen), _rotation(seen), _overall(layers, plan)) if sentence)


def telling_layers(layers: Sequence[LayerAnalysis]) -> list[tuple[int, str]]:
    """Return up to three layers with the reason to look at them: lowest norm, rotation worst, rotation best."""
    seen = [layer for layer in layers if layer.packs] or list(layers)
    lowest = min(seen, key=lambda layer: layer.token_norm_min_over_median)
    found = {lowest.index: f"shortest key: {lowest.token_norm_min_over_median:.2f} x the median norm"}
    tried = sorted((layer.rotation_gain, layer.index) for layer in seen if layer.rotation_gain is not None)
    if tried:
        (worst, hurt), (best, helped) = tried[0], tried[-1]
        least = f"rotation helps least: it divides the output error by {worst:.1f}"
        found.setdefault(
            hurt, f"a plain rotation multiplies the output error by {1 / worst:.1f}" if worst < 1 else least
        )
        least = f"rotation hurts least: {1 / best:.1f} x the output error"
        found.setdefault(helped, f"a plain rotation divides the output error by {best:.1f}" if best > 1 else least)
    return list(found.items())


def _sinks(layers: Sequence[LayerAnalysis]) -> str:
    with_sink = [layer for layer in layers if layer.sinks]
    if not with_sink:
        return f"No attention sinks: in none of {_count(layers)} does a head look at one token most of the time."
    main = [min(layer.sinks, key=lambda sink: sink.k_norm) for layer in with_sink]
    low = [sink for sink in main if sink.k_norm < SHORT_KEY]
    typical, first = median(sink.k_norm for sink in main), main[len(main) // 2]
    told = f"the K norm of token {first.position} ({first.token!r}) is {typical:.2f} of the median token's"
    if 2 * len(low) > len(main):
        return f"Low-norm sinks in K: in {len(low)} of {_count(layers)} {told}."
    few = [layer.index for layer, sink in zip(with_sink, main, strict=True) if sink.k_norm < SHORT_KEY]
    return f"No low-norm sinks in K{f' (but in layer{_s(few)} {_listed(few)})' if few else ''}: {told}."


def _rotation(layers: Sequence[LayerAnalysis]) -> str:
    gains = {layer.index: layer.rotation_gain for layer in layers if layer.rotation_gain is not None}
    if not gains:
        return ""
    hurt = [index for index, gain in gains.items() if gain < _HURTS]
    helped = [index for index, gain in gains.items() if gain > _HELPS]
    overlap = {layer.index: layer.query_overlap for layer in layers}
    if len(hurt) > len(helped):
        worst = [1 / gains[index] for index in hurt]
        return (
            f"Do not rotate K (plain Hadamard) in layer{_s(hurt)} {_listed(hurt)}: it multiplies the error of the "
            f"attention output by {_range(worst)}, since queries look at channels in which K varies little (overlap "
            f"{_range([overlap[index] for index in hurt])}, 1 is even) and a rotation brings K's error there."
        )
    best = [gains[index] for index in helped]
    but = f", but not in layer{_s(hurt)} {_listed(hurt)}" if hurt else ""
    if not helped:
        return f"Rotating K or not hardly matters: the error changes by less than a fifth{but}."
    return (
        f"Rotate K: a plain Hadamard, with token scale, divides the error of the attention output by {_range(best)} "
        f"in {len(helped)} of {_count(layers)}{but}; queries look about evenly at the channels in which K varies "
        f"(overlap {median(overlap[index] for index in helped):.2g}, 1 is even), so spreading K's error costs nothing."
    )


def _overall(layers: Sequence[LayerAnalysis], plan: Mapping[int, LayerPlan]) -> str:
    """Say which rotation the advised plan has in each layer."""
    packed = [layer for layer in layers if layer.packs]
    if not packed:
        return "None of these layers is packed."
    rotations = sorted({plan[layer.index].method.k_rotation for layer in packed})
    parts = []
    for rotation in rotations:
        mine = [layer.index for layer in packed if plan[layer.index].method.k_rotation == rotation]
        name = _NAMES.get(rotation, f"{rotation} rotation")
        parts.append(f"{name} in layer{_s(mine)} {_listed(mine)}")
    return f"Advice: {'; '.join(parts)}."


def _count(layers: Sequence[LayerAnalysis]) -> str:
    return f"{len(layers)} {'packed ' if layers[0].packs else ''}layer{_s(layers)}"


def _s(items: Sequence[object]) -> str:
    return "" if len(items) == 1 else "s"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _listed(numbers: Sequence[int]) -> str:
    """Write numbers with runs drawn together: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
