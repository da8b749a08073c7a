"""From a trace to an analysis: measures every layer, advises, and says what matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from occamkv.analysis import norms
from occamkv.analysis.advice import advise
from occamkv.analysis.errors import LayerErrors, paper_errors
from occamkv.analysis.headline import headline, telling_layers
from occamkv.analysis.profile import panel, profile
from occamkv.analysis.result import Analysis, HeadAnalysis, LayerAnalysis
from occamkv.analysis.sinks import find_sinks, heads_with_sink, massive_activation
from occamkv.analysis.trace import LayerTrace, Trace
from occamkv.cache import LayerPlan, Plan
from occamkv.errors import CacheMismatch, UnsupportedFormat, UnsupportedInput
from occamkv.formats import PAGE_TOKENS, check_head_dim

BOUND_BITS = 2
MIN_TOKENS = 2 * PAGE_TOKENS
"""A page that is packed, and the residual that queries see in full precision."""


@torch.no_grad()
def analyze(trace: Trace, plan: Plan, *, progress: Callable[[int, int], None] | None = None) -> Analysis:
    """Measure the first sequence of a trace and advise.

    Args:
        trace: All positions of at least 256 tokens, without pads; with `received` and `hidden` if these are to be told.
        plan: The plan without advice, from `plan_for`; its methods are what the advice changes.
        progress: Called with the number of layers done and of all.

    Raises:
        UnsupportedInput: The trace is too short, has gaps or pads, or a method of the plan chooses for itself.
        CacheMismatch: The plan is of another model.
    """
    _check(trace, plan)
    found: list[LayerAnalysis] = []
    advised = {entry.index: entry for entry in plan.layers}
    tell = progress or (lambda _done, _total: None)
    tell(0, len(trace.layers))
    for done, layer in enumerate(trace.layers, start=1):
        measured, advised[layer.index] = _measure(layer, advised[layer.index], trace.texts)
        found.append(measured)
        tell(done, len(trace.layers))
    by_index = {layer.index: layer for layer in trace.layers}
    modality, k_norms = _modality(trace)
    return Analysis(
        tuple(found),
        Plan(tuple(advised.values()), plan.model_type, plan.fingerprint),
        base_method=str(next((entry.method for entry in plan.layers if entry.packs), "full")),
        headline=headline(found, advised),
        panels=tuple(panel(by_index[index], why) for index, why in telling_layers(found)),
        modality=modality,
        modality_k_norm=k_norms,
        tokens=len(trace.positions),
    )


def _check(trace: Trace, plan: Plan) -> None:
    if trace.fingerprint != plan.fingerprint or trace.layer_count != len(plan.layers):
        raise CacheMismatch(
            f"the trace has {trace.layer_count} layers and fingerprint {trace.fingerprint!r}, the plan "
            f"{len(plan.layers)} and {plan.fingerprint!r}. Make a plan for the model that was traced."
        )
    tokens = len(trace.positions)
    if tokens < MIN_TOKENS:
        raise UnsupportedInput(
            f"the text has {tokens} tokens; allowed: {MIN_TOKENS} or more, {PAGE_TOKENS} to pack and {PAGE_TOKENS} "
            "that stay in full precision."
        )
    if tuple(trace.positions) != tuple(range(tokens)) or not bool(trace.real[0].all()):
        raise UnsupportedInput(
            f"the trace has {tokens} positions with gaps or pads; allowed: all positions of a text without pads. "
            "Record it without positions=..., one text alone."
        )
    if any(entry.method.budget is not None for entry in plan.layers):
        raise UnsupportedInput("method auto chooses for each layer itself. Give a method that says its bits, as occam.")


def _measure(layer: LayerTrace, entry: LayerPlan, texts: Sequence[str]) -> tuple[LayerAnalysis, LayerPlan]:
    """Return what one layer shows, and its plan with advice."""
    k, v = layer.k[0], layer.v[0]
    sinks, tried = find_sinks(layer, texts), LayerErrors(layer)
    errors, why = None, entry.reason or ""
    if _can_be_tried(layer):
        errors = paper_errors(tried)
        if entry.packs:
            advice = advise(entry, tried, sinks)
            entry, why = LayerPlan(entry.index, advice.method, entry.reason), advice.why
    elif entry.packs:
        why = f"{entry.method} stays: attention is not plain and causal here, so nothing could be tried."
    k_norm, v_norm, cosine = norms.layer_norms(k), norms.layer_norms(v), norms.key_cosine(k)
    ratios, energy = norms.group_ratios(k_norm), float(k.float().square().sum(-1).mean())
    bound, error = (make(k, bits=BOUND_BITS) / energy for make in (norms.error_bound, norms.measured_error))
    measured = LayerAnalysis(
        index=layer.index,
        kind="full attention" if layer.window is None else f"sliding window of {layer.window} tokens",
        packs=entry.packs,
        query_heads=layer.q.shape[1],
        kv_heads=k.shape[0],
        head_dim=k.shape[2],
        token_norm_min_over_median=float(k_norm.min()),
        token_norm_max_over_median=float(k_norm.max()),
        token_norm_group_ratio=float(ratios.median()),
        token_norm_first_group_ratio=float(ratios[0]),
        v_norm_min_over_median=float(v_norm.min()),
        sink_rate=sinks.rate,
        sink_positions=[sink.position for sink in sinks.found],
        sinks=list(sinks.found),
        latent_positions=list(sinks.latent),
        eq5_positions=list(sinks.column_positions),
        massive_max_over_median=None if layer.hidden is None else float(massive_activation(layer.hidden[0]).max()),
        key_cosine=float(cosine[0]),
        key_cosine_median=float(cosine.median()),
        error_bound=float(bound.mean()),
        error_measured=float(error.mean()),
        error_bound_first_group=float(bound[:, 0].mean()),
        error_measured_first_group=float(error[:, 0].mean()),
        query_overlap=tried.overlap,
        errors=errors,
        rotation_gain=_ratio(errors, "token_scale", "rotation+token_scale"),
        token_scale_gain=_ratio(errors, "rotation", "rotation+token_scale"),
        why=why,
        heads=_heads(layer),
        profile=profile(layer, [sink.position for sink in sinks.found]),
    )
    return measured, entry


def _can_be_tried(layer: LayerTrace) -> bool:
    """Tell whether attention follows from q, k and v alone, K can be packed, and queries see more than the newest."""
    try:
        check_head_dim(layer.k.shape[-1])
    except UnsupportedFormat:
        return False
    sees_packed = layer.window is None or layer.window > PAGE_TOKENS
    return sees_packed and layer.causal and layer.k.shape == layer.v.shape


def _ratio(errors: dict[str, float] | None, without: str, with_it: str) -> float | None:
    """Return a gain; None where nothing was measured, or nothing was lost."""
    return None if errors is None or not errors[without] * errors[with_it] else errors[without] / errors[with_it]


def _heads(layer: LayerTrace) -> list[HeadAnalysis]:
    k_norm, v_norm = norms.head_norms(layer.k[0]), norms.head_norms(layer.v[0])
    rates: list[float | None] = [None] * len(k_norm)
    if layer.received is not None:
        fired = heads_with_sink(layer.received[0]).unflatten(0, (len(k_norm), -1))
        rates = list(fired.float().mean(1).amax(-1).tolist())
    return [
        HeadAnalysis(head, float(k.min()), float(k.max()), float(v.min()), rate)
        for head, (k, v, rate) in enumerate(zip(k_norm, v_norm, rates, strict=True))
    ]


def _modality(trace: Trace) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Count the tokens of each kind; with more than one, return each kind's median K norm of each layer, too."""
    counts = dict(Counter(trace.modality))
    if len(counts) < 2:
        return counts, {}
    masks = {kind: torch.tensor([one == kind for one in trace.modality]) for kind in counts}
    all_norms = [norms.layer_norms(layer.k[0]) for layer in trace.layers]
    return counts, {kind: [float(norm[mask].median()) for norm in all_norms] for kind, mask in masks.items()}
