"""What `occamkv analyze` found, as data: one `Analysis` of a model on a text, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from occamkv.analysis.profile import Panel, Profile
from occamkv.analysis.sinks import Sink
from occamkv.cache import Plan

SCHEMA_VERSION = 1

_DIGITS, _PICTURE_DIGITS = 4, 3  # of numbers in the JSON; a page draws no finer


@dataclass(frozen=True)
class HeadAnalysis:
    """One KV head: norms relative to its median; the sink rate is that of its query heads."""

    head: int
    token_norm_min_over_median: float
    token_norm_max_over_median: float
    v_norm_min_over_median: float
    sink_rate: float | None


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer; docs/analyze.md says how each number is made.

    Numbers that could not be measured are None: attention and hidden states that were not recorded, errors of a layer
    whose attention is not plain and causal or whose K cannot be packed.
    """

    index: int
    kind: str
    packs: bool
    query_heads: int
    kv_heads: int
    head_dim: int
    token_norm_min_over_median: float
    token_norm_max_over_median: float
    token_norm_group_ratio: float
    token_norm_first_group_ratio: float
    v_norm_min_over_median: float
    sink_rate: float | None
    sink_positions: list[int]
    sinks: list[Sink]
    latent_positions: list[int]
    eq5_positions: list[int]
    massive_max_over_median: float | None
    key_cosine: float
    key_cosine_median: float
    error_bound: float
    error_measured: float
    error_bound_first_group: float
    error_measured_first_group: float
    query_overlap: float
    errors: Mapping[str, float] | None
    rotation_gain: float | None
    token_scale_gain: float | None
    why: str
    heads: list[HeadAnalysis]
    profile: Profile


@dataclass(frozen=True)
class Analysis:
    """A model on a text.

    Args:
        layers: The layers that were traced.
        plan: The advised plan of all layers of the model.
        base_method: Name of the method that the advice builds on.
        headline: One to three sentences that say what matters.
        panels: Keys of a few telling layers, to be drawn.
        modality: How many tokens there are of each kind.
        modality_k_norm: With more than one kind: each kind's median K norm, relative to that of all, layer by layer.
        tokens: How many tokens were read.
    """

    layers: tuple[LayerAnalysis, ...]
    plan: Plan
    base_method: str
    headline: tuple[str, ...]
    panels: tuple[Panel, ...]
    modality: Mapping[str, int]
    modality_k_norm: Mapping[str, list[float]]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers have 4 significant digits, those of pictures 3."""
        plan = self.plan.to_json()
        data: dict[str, Any] = {
            "model_type": self.plan.model_type,
            "fingerprint": self.plan.fingerprint,
            "base_method": self.base_method,
            "tokens": self.tokens,
            "headline": list(self.headline),
            "layers": [_layer_json(layer, plan["layers"][layer.index]) for layer in self.layers],
            "panels": [_rounded(asdict(panel), _PICTURE_DIGITS) for panel in self.panels],
            "modality": dict(self.modality),
            "plan": plan,
        }
        if self.modality_k_norm:
            data["modality_k_norm"] = _rounded(self.modality_k_norm, _DIGITS)
        return data


def _layer_json(layer: LayerAnalysis, entry: Mapping[str, Any]) -> dict[str, Any]:
    data = asdict(layer)
    why, profile = data.pop("why"), _rounded(data.pop("profile"), _PICTURE_DIGITS)
    advice = {"method": entry["method"], "pins": entry["pins"], "overrides": entry["overrides"], "why": why}
    return {**_rounded(data, _DIGITS), "advice": advice, "profile": profile}


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner, digits) for inner in value]
    return value
