"""`compare` on a tiny model: the control with nothing packed, what counts, and what is refused."""

import functools

import pytest
import torch
from torch import Tensor

import saved_models
from occamkv import CacheReport
from occamkv.errors import NothingQuantized, OccamError, UnsupportedFormat, UnsupportedInput
from occamkv.evals import Fidelity, Tally, compare
from occamkv.evals.fidelity import read_together
from occamkv.integrations.transformers.plan import plan_for

TOKENS = 300
BYTES = 2 * 2 * 2 * 32 * 4 * TOKENS  # layers, K and V, KV heads, head_dim, float32


@functools.cache
def model():
    return saved_models.build("packable")


def ids(tokens: int = TOKENS, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 4 + saved_models.WORDS, (1, tokens), generator=generator)


@functools.cache
def result(method: str) -> tuple[Fidelity, CacheReport, int]:
    return compare(model(), ids(), method, score_from=0)


def test_a_full_precision_cache_has_kl_exactly_0_and_always_the_same_top_token():
    figures, report, _ = compare(saved_models.build("packable"), ids(), "full", score_from=0)
    assert (figures.kl_mean, figures.kl_p99, figures.same_top) == (0, 0, 1)
    assert figures.perplexity == figures.perplexity_full
    assert not report.quantized


def test_a_full_precision_cache_has_kl_exactly_0_in_a_model_that_was_packed_before():
    result("oscar")
    assert result("full")[0].kl_p99 == 0


@pytest.mark.parametrize("method", ["oscar", "oscar_roll", "kivi", "quarot", "rtn"])
def test_a_packed_cache_has_kl_above_0_and_sometimes_another_top_token(method):
    figures, report, _ = result(method)
    assert figures.kl_mean > 0.01
    assert figures.kl_p99 > figures.kl_mean
    assert figures.same_top < 1
    assert figures.perplexity != figures.perplexity_full
    assert report.quantized


def test_more_bits_cost_less():
    assert result("kivi_k4v4")[0].kl_mean < result("kivi_k3v3")[0].kl_mean < result("kivi")[0].kl_mean


def test_the_full_run_is_the_untouched_model():
    with torch.no_grad():
        logits = saved_models.build("packable")(ids()).logits[0].double()
    nll = -logits.log_softmax(-1)[:-1].gather(-1, ids()[0, 1:, None])
    assert result("oscar")[0].perplexity_full == pytest.approx(float(nll.mean().exp()), rel=1e-5)


@pytest.mark.parametrize("score_from", [0, 5, 127, 128, 200, TOKENS - 2])
def test_the_scored_positions_are_the_last_ones(score_from):
    everything, tail = Tally(), Tally()
    compare(model(), ids(), "oscar", score_from=0, tally=everything)
    figures, _, _ = compare(model(), ids(), "oscar", score_from=score_from, tally=tail)
    assert figures.positions == TOKENS - 1 - score_from
    for of_tail, of_all in ((tail.kl, everything.kl), (tail.nll, everything.nll), (tail.nll_full, everything.nll_full)):
        torch.testing.assert_close(torch.cat(of_tail), torch.cat(of_all)[score_from:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["oscar", "oscar_roll"])
def test_a_prediction_costs_nothing_until_something_is_packed_and_then_does(method):
    tally = Tally()
    compare(model(), ids(), method, score_from=0, tally=tally)
    kl = torch.cat(tally.kl)
    assert float(kl[:128].abs().max()) < 1e-6
    assert float(kl[128:].min()) > 1e-6


def test_what_goes_through_in_one_call_reads_nothing_packed():
    tally = Tally()
    compare(model(), ids(), "oscar", score_from=0, one_shot=200, tally=tally)
    kl = torch.cat(tally.kl)
    assert float(kl[:200].abs().max()) == 0
    assert float(kl[200:].min()) > 1e-6


def test_the_report_and_the_bytes_are_those_of_the_whole_text():
    _, report, full_bytes = result("oscar")
    assert full_bytes == report.full_bytes == BYTES
    assert [(layer.tokens, layer.packed_tokens) for layer in report.layers] == [(TOKENS, 256)] * 2
    assert all(layer.reads_packed and not layer.reads_dense for layer in report.layers)


def test_a_plan_packs_only_the_layers_that_it_says():
    mixed = saved_models.build("half sliding")
    figures, report, _ = compare(mixed, ids(), plan_for(mixed.config, "oscar"), score_from=200)
    assert [layer.packs for layer in report.layers] == [False, True]
    assert figures.kl_mean > 0


def test_a_plan_that_packs_nothing_has_kl_exactly_0():
    figures, _, _ = compare(model(), ids(), plan_for(model().config, "full"), score_from=0)
    assert (figures.kl_p99, figures.same_top) == (0, 1)


def test_progress_counts_up_to_the_last_token():
    seen = []
    compare(model(), ids(), "oscar_roll", score_from=0, one_shot=130, progress=seen.append)
    assert seen == sorted(set(seen))
    assert (seen[0], seen[-1]) == (130, TOKENS)


REFUSED = {
    "one token": (ids(1), 0),
    "no token": (ids(0), 0),
    "two texts": (torch.cat((ids(20), ids(20))), 0),
    "scored from the last token": (ids(20), 19),
    "scored from behind the text": (ids(20), 25),
    "scored from before the text": (ids(20), -1),
}


@pytest.mark.parametrize(("text", "score_from"), REFUSED.values(), ids=REFUSED)
def test_a_text_that_cannot_be_scored_is_refused_with_what_is_allowed(text, score_from):
    with pytest.raises(UnsupportedInput, match=r"allowed: one text \[1, T\] and 0 <= score_from < T - 1"):
        compare(model(), text, "oscar", score_from=score_from)


def test_a_tally_collects_over_several_texts():
    tally, texts = Tally(), [ids(seed=1), ids(200, seed=2)]
    figures = [compare(model(), text, "oscar", score_from=100, tally=tally)[0] for text in texts]
    alone = [compare(model(), text, "oscar", score_from=100)[0] for text in texts]
    assert figures[0] == alone[0]
    assert figures[1].positions == alone[0].positions + alone[1].positions == 199 + 99
    mean = sum(one.kl_mean * one.positions for one in alone) / 298
    assert figures[1].kl_mean == pytest.approx(mean)


def test_methods_that_flush_elsewhere_can_be_read_together_too():
    plans = {name: plan_for(model().config, name) for name in ("oscar", "ott", "occam")}
    for name, reading in read_together(model(), ids(), plans, score_from=0).items():
        figures, report, full_bytes = result(name)
        assert reading.tally.result().kl_mean == pytest.approx(figures.kl_mean, rel=0.02)
        assert reading.cache.report().nbytes == report.nbytes
        assert reading.full_bytes == full_bytes


def test_two_tokens_are_enough():
    assert compare(model(), ids(2), "oscar", score_from=0)[0].positions == 1


def test_a_text_that_goes_through_in_one_call_as_a_whole_is_refused():
    with pytest.raises(UnsupportedInput):
        compare(model(), ids(20), "oscar", score_from=0, one_shot=20)


@pytest.mark.parametrize(
    ("kind", "method", "error"),
    [
        pytest.param("packable", "oscr", UnsupportedFormat, id="unknown method"),
        pytest.param("all sliding", "oscar", NothingQuantized, id="no layer to pack"),
    ],
)
def test_what_cannot_be_packed_is_refused(kind: str, method: str, error: type[OccamError]):
    with pytest.raises(error):
        compare(saved_models.build(kind), ids(), method, score_from=0)
