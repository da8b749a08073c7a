"""A whole analysis: its JSON, its plan, its headline, and what it refuses."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import saved_models
from occamkv.analysis.measure import MIN_TOKENS, analyze
from occamkv.analysis.trace import Selection, record
from occamkv.cache import LayerPlan, Plan
from occamkv.errors import CacheMismatch, NothingQuantized, UnsupportedInput
from occamkv.integrations.transformers import PackedCache, plan_for
from occamkv.methods import method
from some_trace import TOKENS, fixed_where_looked_at, layer, trace

NUMBER, NUMBERS = (int, float), [(int, float)]
SINK = {"position": int, "token": str, "received": NUMBER, "k_norm": NUMBER, "v_norm": NUMBER, "massive": NUMBER}
LAYER = {
    **{"index": int, "kind": str, "packs": bool, "query_heads": int, "kv_heads": int, "head_dim": int},
    **dict.fromkeys(("token_norm_min_over_median", "token_norm_max_over_median", "token_norm_group_ratio"), NUMBER),
    **dict.fromkeys(("v_norm_min_over_median", "sink_rate", "massive_max_over_median", "key_cosine"), NUMBER),
    **dict.fromkeys(("error_bound", "error_measured", "rotation_gain", "token_scale_gain"), NUMBER),
    **{key: [int] for key in ("sink_positions", "eq5_positions")},
    "sinks": [{**SINK, "rules": [str]}],
    "errors": dict.fromkeys(
        ("none", "rotation", "token_scale", "rotation+token_scale", "balanced+token_scale"), NUMBER
    ),
    "advice": {"method": str, "pins": str, "overrides": dict, "why": str},
    "heads": [
        dict.fromkeys(
            ("head", "token_norm_min_over_median", "token_norm_max_over_median", "v_norm_min_over_median", "sink_rate"),
            NUMBER,
        )
    ],
    "profile": {
        "positions": [int],
        **dict.fromkeys(("k_norm", "k_norm_scaled", "v_norm", "massive", "received"), NUMBERS),
    },
}
PANEL = {
    "layer": int,
    "head": int,
    "why": str,
    "tokens": int,
    **{key: [NUMBERS] for key in ("raw", "rotated", "scaled")},
}
SCHEMA = {
    **dict.fromkeys(("model_type", "fingerprint", "base_method"), str),
    "tokens": int,
    "headline": [str],
    "layers": [LAYER],
    "panels": [PANEL],
    "modality": dict,
    "plan": dict,
}


def misfits(value, wanted, at: str = "") -> list[str]:
    """Return where JSON data does not fit a schema; more fields than it names are fine."""
    if isinstance(wanted, dict):
        missing = [f"{at}.{key} is missing" for key in wanted if key not in value]
        return missing + [x for key in wanted if key in value for x in misfits(value[key], wanted[key], f"{at}.{key}")]
    if isinstance(wanted, list):
        return [x for i, item in enumerate(value) for x in misfits(item, wanted[0], f"{at}[{i}]")]
    if not isinstance(value, wanted) or (isinstance(value, float) and not math.isfinite(value)):
        return [f"{at} is {value!r}"]
    return []


def plan(*layers: LayerPlan, base: str = "oscar", count: int = 1) -> Plan:
    return Plan(layers or tuple(LayerPlan(i, method(base)) for i in range(count)), "made up", "f" * 16)


@pytest.fixture(scope="module")
def tiny():
    model = saved_models.build("half sliding", dtype=torch.bfloat16)
    ids = torch.randint(4, 90, (1, 320), generator=torch.Generator().manual_seed(0))
    return model, ids, record(model, ids, selection=Selection(hidden=True, received=True))


def test_the_json_of_a_model_has_every_field_and_its_plan_packs(tiny):
    model, ids, recorded = tiny
    found = analyze(recorded, plan_for(model.config, "occam"))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    sliding, full = data["layers"]
    assert (sliding.pop("errors"), sliding.pop("rotation_gain"), sliding.pop("token_scale_gain")) == (None,) * 3
    assert misfits(sliding, {key: kind for key, kind in LAYER.items() if key in sliding}) == []
    assert misfits({**data, "layers": [full]}, SCHEMA) == []
    assert (sliding["kind"], sliding["packs"], sliding["advice"]["method"]) == (
        "sliding window of 32 tokens",
        False,
        "full",
    )
    assert "sliding window" in sliding["advice"]["why"]
    assert (full["kind"], full["packs"], full["query_heads"], full["kv_heads"], full["head_dim"]) == (
        "full attention",
        True,
        4,
        2,
        32,
    )
    assert data["modality"] == {"text": 320}
    read = Plan.from_json(data["plan"])
    assert read == found.plan
    assert [read.layers[1].method.k_rotation, str(read.layers[0].method)] == [
        found.plan.layers[1].method.k_rotation,
        "full",
    ]
    cache = PackedCache(model, plan=read)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.report().packed_layers


def test_a_schema_that_does_not_fit_is_noticed(tiny):
    model, _, recorded = tiny
    data = analyze(recorded, plan_for(model.config, "oscar")).to_json()
    data["layers"][1]["sink_rate"], data["layers"][1]["profile"] = None, {}
    assert len(misfits({**data, "layers": data["layers"][1:]}, SCHEMA)) == 7


def test_numbers_have_4_digits_and_pictures_3():
    data = analyze(trace(layer(sink_at=0)), plan()).to_json()
    one = data["layers"][0]
    assert one["error_measured"] == float(f"{one['error_measured']:.4g}")
    drawn = one["profile"]["k_norm"] + data["panels"][0]["raw"][0]
    assert drawn == [float(f"{value:.3g}") for value in drawn]


def test_a_profile_keeps_the_first_64_positions_and_the_sinks():
    (one,) = analyze(trace(layer(sink_at=1501, tokens=1700)), plan()).layers
    at = one.profile.positions
    assert at[:64] == list(range(64))
    assert (len(at), at == sorted(set(at)), 1501 in at) == (512, True, True)
    assert one.profile.k_norm[at.index(1501)] == pytest.approx(one.sinks[0].k_norm, rel=1e-3)
    assert max(b - a for a, b in pairwise(at)) <= 4


def test_panels_show_rotation_and_scaling():
    (drawn, *_) = analyze(trace(layer(sink_at=0)), plan()).panels
    raw, rotated, scaled = (torch.tensor(x) for x in (drawn.raw, drawn.rotated, drawn.scaled))
    assert raw.shape == (128, 32)
    assert torch.allclose(raw.norm(dim=-1), rotated.norm(dim=-1), rtol=1e-3)  # a rotation keeps norms
    assert rotated[0].max() < 0.5 * raw[0].max()  # and spreads a lone channel
    assert scaled[0].norm() > 3 * rotated[0].norm()  # the short token gets the length of the others
    assert scaled[0].norm() == pytest.approx(float(scaled.norm(dim=-1).median()), rel=0.1)


def test_the_headline_says_low_norm_sinks_and_where():
    words = " ".join(analyze(trace(layer(sink_at=2)), plan()).headline)
    assert "Low-norm sinks in K: in 1 of 1 packed layer" in words
    assert "token 2 ('t2')" in words


def test_the_headline_says_no_sinks_and_do_not_rotate():
    words = " ".join(analyze(trace(fixed_where_looked_at()), plan()).headline)
    assert "No attention sinks" in words
    assert "Do not rotate K (plain Hadamard) in layer 0" in words
    assert "Advice: do not rotate K in layer 0." in words


def test_the_headline_names_the_layer_in_which_a_sink_is_low_where_others_are_not():
    sinks = [layer(seed=index, sink_at=0) for index in range(3)]
    for given in sinks[1:]:
        given.k[:, :, 0] *= 4  # attention stays, the norm is an ordinary one
    words = analyze(trace(*(replace(one, index=i) for i, one in enumerate(sinks))), plan(count=3)).headline
    assert words[0].startswith("No low-norm sinks in K: the K norm of token 0 ('t0') is ")
    assert words[0].endswith("(except in layer 0: 0.27).")
    assert "e+" not in words[1]


def test_the_headline_names_the_pins_that_are_advised():
    assert "; pins first:4 in layer 0." in analyze(trace(layer(sink_at=2)), plan()).headline[-1]
    assert "pins" not in analyze(trace(layer()), plan()).headline[-1]


def test_where_nothing_can_be_packed_the_headline_says_why():
    full = LayerPlan(0, method("full"), "a window is short")
    found = analyze(trace(layer()), plan(full))
    assert found.headline[-1] == "Nothing can be packed: a window is short."
    assert found.layers[0].rotation_gain is not None


@pytest.mark.parametrize(("window", "tried"), [(128, False), (129, True)])
def test_a_window_that_holds_the_newest_tokens_alone_is_not_tried(window, tried):
    full = LayerPlan(0, method("full"), "sliding window")
    (one,) = analyze(trace(layer(window=window)), plan(full)).layers
    assert (one.errors is not None, one.rotation_gain is not None) == (tried, tried)


def test_a_layer_whose_attention_is_not_plain_is_not_tried():
    found = analyze(trace(replace(layer(), causal=False)), plan())
    (one,) = found.layers
    assert (one.errors, one.rotation_gain, found.plan.layers[0].method) == (None, None, method("oscar"))
    assert "nothing could be tried" in one.why


def test_what_was_not_recorded_is_none():
    (one,) = analyze(trace(replace(layer(sink_at=0), received=None, hidden=None)), plan()).layers
    assert (one.sink_rate, one.massive_max_over_median, one.profile.massive, one.profile.received) == (None,) * 4
    assert one.sink_positions == [0]


def test_kinds_of_tokens_are_told_apart():
    kinds = ("image",) * 100 + ("text",) * (TOKENS - 100)
    given = layer()
    given.k[:, :, :100] *= 3
    data = analyze(trace(given, modality=kinds), plan()).to_json()
    assert data["modality"] == {"image": 100, "text": TOKENS - 100}
    ratio = data["modality_k_norm"]["image"][0] / data["modality_k_norm"]["text"][0]
    assert ratio == pytest.approx(3, rel=0.05)


def test_layers_that_were_not_traced_keep_the_method_they_had():
    found = analyze(trace(replace(fixed_where_looked_at(), index=1), layer_count=2), plan(count=2))
    assert [entry.method.k_rotation for entry in found.plan.layers] == ["hadamard", "none"]
    assert [one.index for one in found.layers] == [1]


def test_progress_counts_layers():
    told = []
    two = trace(layer(), replace(layer(seed=1), index=1))
    analyze(two, plan(count=2), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_a_trace_that_is_too_short_or_has_gaps_or_pads_is_refused():
    short = layer(tokens=MIN_TOKENS - 1)
    with pytest.raises(UnsupportedInput, match=r"255 tokens; allowed: 256 or more"):
        analyze(trace(short), plan())
    assert analyze(trace(layer(tokens=MIN_TOKENS)), plan()).layers
    for changes in ({"positions": tuple(range(1, TOKENS + 1))}, {"real": torch.arange(TOKENS)[None] > 2}):
        with pytest.raises(UnsupportedInput, match="gaps or pads"):
            analyze(trace(layer(), **changes), plan())


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(CacheMismatch, match="Make a plan for the model"):
        analyze(trace(layer()), plan(count=2))
    with pytest.raises(CacheMismatch, match="Make a plan for the model"):
        analyze(trace(layer(), fingerprint="0" * 16), plan())


def test_a_method_that_chooses_for_itself_is_refused():
    with pytest.raises(UnsupportedInput, match="auto"):
        analyze(trace(layer()), plan(base="auto"))


def test_activations_that_are_not_numbers_are_refused():
    model = saved_models.build("packable")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UnsupportedInput, match="K of layer 1 holds NaN"):
        record(model, torch.arange(4, 90)[None], selection=Selection(hidden=True, received=True))


def test_a_model_without_attention_is_refused():
    with pytest.raises(NothingQuantized, match="no layer of this mamba2 can be packed"):
        plan_for(saved_models.build("no attention").config, "occam")
