"""Advice for one layer: rotate K or not, token scale or not, which tokens to pin; each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from occamkv.analysis.errors import LayerErrors
from occamkv.analysis.sinks import Sinks
from occamkv.cache import LayerPlan
from occamkv.methods import Method
from occamkv.ops.outliers import BLOCK_TOKENS, outliers

MARGIN = 0.6
"""A change is advised if it lowers the error of the attention output below this share (docs/analyze.md)."""

FIRST_PINS = 4
_MANY = 8  # so many tokens behind the first ones stick out of their groups, not one or two by chance
_ROTATIONS = {
    "none": ("none", "hadamard"),
    "hadamard": ("hadamard", "none"),
    "random": ("random", "none"),
    "balanced": ("balanced", "hadamard", "none"),
}


@dataclass(frozen=True)
class Advice:
    """What a layer should use, and why in one or two sentences."""

    method: Method
    why: str


def advise(entry: LayerPlan, errors: LayerErrors, sinks: Sinks) -> Advice:
    """Return the advice for a layer, on top of the method that its plan has.

    Args:
        entry: The plan without advice; a layer that is not packed stays so.
        errors: Of this layer.
        sinks: Of this layer.
    """
    if not entry.packs:
        return Advice(entry.method, entry.reason or "")
    layer = errors.layer
    pins, why_pins = _pins(sinks, layer.k[0], layer.v[0])
    best, why = _switches(entry.method.with_overrides(pins=pins), errors)
    return Advice(best, f"{why} {why_pins}")


def _pins(sinks: Sinks, k: Tensor, v: Tensor) -> tuple[str, str]:
    whole = k.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
    odd = outliers(k[:, :whole], v[:, :whole]).nonzero()[:, 0].tolist()
    places = [sink.position for sink in sinks.found]
    later = [at for at in places if at >= FIRST_PINS]
    odd_later = [at for at in odd if at >= FIRST_PINS]
    if later:
        return (
            f"first:{FIRST_PINS}+found",
            f"Sinks also lie behind the first tokens (at {_some(later)}): pin found ones.",
        )
    if len(odd_later) >= _MANY:
        return (
            f"first:{FIRST_PINS}+found",
            f"{len(odd_later)} tokens stick out of their groups by norm (at {_some(odd_later)}): pin found ones.",
        )
    if places or set(odd) - set(odd_later):
        what = "The sink is among the first tokens" if places else "The first tokens stick out by norm"
        return f"first:{FIRST_PINS}", f"{what}: pin the first {FIRST_PINS}."
    return "none", "No sink and no norm that sticks out: no pins."


def _some(positions: list[int]) -> str:
    return ", ".join(map(str, positions[:3])) + (", ..." if len(positions) > 3 else "")


def _switches(base: Method, errors: LayerErrors) -> tuple[Method, str]:
    """Return the method with rotation and token scale as they are best, and why; one change is better than two."""
    scaled = base.packed_format.token_scale
    scales = (scaled, not scaled) if base.packed_format.k_axis == "channel" else (scaled,)
    options = {(rotation, scale) for rotation in _ROTATIONS[base.k_rotation] for scale in scales}
    found = {
        option: errors.error(_with(base, option), pins=base.pinning.leading) for option in sorted(options, reverse=True)
    }
    own: tuple[str, bool] = (base.k_rotation, scaled)
    best = own
    for changes in (1, 2):
        near = [one for one in found if sum(x != y for x, y in zip(one, own, strict=True)) == changes]
        challenger = min(near, key=lambda one: found[one], default=best)
        if found[challenger] < MARGIN * found[best]:
            best = challenger
    told = f"error of the attention output {found[best]:.3f}"
    if best == own:
        return base, f"{_named(own)} as in {base.name}: {told}, and nothing else lowers it by two fifths."
    return _with(base, best), f"{_named(best)} instead of {_named(own)}: {told} instead of {found[own]:.3f}."


def _with(base: Method, option: tuple[str, bool]) -> Method:
    changes: dict[str, Any] = {"k_rotation": option[0], "token_scale": option[1]}
    return base.with_overrides(**changes)


def _named(option: tuple[str, bool]) -> str:
    rotation, scale = option
    return f"{'no' if rotation == 'none' else rotation} rotation of K with{'' if scale else 'out'} token scale"
