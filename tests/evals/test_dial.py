"""The smallest budget: found by bisection, measured through the cache, refused where it cannot be had."""

import pytest
import torch

import saved_models
from occamkv import method
from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.evals import dial
from occamkv.evals.dial import BUDGETS, Setting, smallest_budget, wanted_share
from occamkv.evals.fidelity import read_together
from occamkv.integrations.transformers import plan_for


@pytest.mark.parametrize(("text", "share"), [("same-top>=95%", 0.95), (" same-top >= 99.5 % ", 0.995)])
def test_a_wish_is_read(text, share):
    assert wanted_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "95%", "same-top>95%", "same-top>=95", "same-top>=0%", "same-top>=101%", "kl<=1"])
def test_another_wish_is_refused(text):
    with pytest.raises(UnsupportedInput, match="allowed: 'same-top>=95%'"):
        wanted_share(text)


@pytest.mark.parametrize("first", range(len(BUDGETS)))
def test_the_bisection_finds_the_first_budget_that_suffices(first, monkeypatch):
    seen = []

    def measure(_model, _ids, chosen, _score_from):
        seen.append(chosen.budget)
        return Setting(chosen.budget, 0.9 if chosen.budget >= BUDGETS[first] else 0.8, None)

    monkeypatch.setattr(dial, "_measure", measure)
    assert smallest_budget(None, None, method("auto"), 0.9, score_from=0).budget == BUDGETS[first]
    assert len(seen) == len(set(seen)) <= len(BUDGETS).bit_length() + 1


def test_a_share_that_no_budget_reaches_is_refused(monkeypatch):
    monkeypatch.setattr(dial, "_measure", lambda *_: Setting(BUDGETS[-1], 0.7, None))
    with pytest.raises(UnsupportedInput, match=r"70\.0 % .* stay the same; allowed: at most that, 90\.0 %"):
        smallest_budget(None, None, method("auto"), 0.9, score_from=0)


def test_a_method_without_a_budget_is_refused():
    with pytest.raises(UnsupportedInput, match="oscar has no budget"):
        smallest_budget(None, None, method("oscar"), 0.9, score_from=0)


def test_what_is_returned_was_measured_and_its_plan_reads_the_same():
    model = saved_models.build("packable")
    ids = torch.randint(0, 90, (1, 300), generator=torch.Generator().manual_seed(3))
    found = smallest_budget(model, ids, method("auto"), 0.01, score_from=150)  # any cache keeps one token in a hundred
    below = BUDGETS[BUDGETS.index(found.budget) - 1]
    if found.budget > BUDGETS[0]:  # less than codes of two bits take with heads as small as these
        with pytest.raises(UnsupportedFormat, match=r"this layer takes .* at least"):
            smallest = method("auto", budget=below)
            read_together(model, ids, {"": plan_for(model.config, smallest)}, score_from=150)
    again = read_together(model, ids, {"": found.plan}, score_from=150)[""]
    assert float(torch.cat(again.tally.same).float().mean()) == pytest.approx(found.same_top, abs=0.02)
    bits = [layer.bits_per_value for layer in again.cache.report().packed_layers]
    assert sum(bits) / len(bits) <= found.budget + 1e-6
