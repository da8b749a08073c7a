"""`fold_balance`: the balance vector in the weights changes no logit, makes K come out balanced, or is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from integrations.architectures import TINY
from integrations.steps import difference, words
from occamkv import fold_balance
from occamkv.cache.folding import scale_heads
from occamkv.errors import UnsupportedModel
from occamkv.integrations.transformers import folding
from occamkv.integrations.transformers.statistics import model_statistics

LLAMA = TINY["llama"]
FOLDABLE = {
    "llama": LLAMA,
    "llama with a KV head for each query head": dataclasses.replace(LLAMA, fields={"num_key_value_heads": 4}),
    "llama with one KV head": dataclasses.replace(LLAMA, fields={"num_key_value_heads": 1}),
    "qwen2 with biases": TINY["qwen2"],
}
IDS = words(200)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("name", FOLDABLE)
def test_logits_stay_and_keys_come_out_balanced(name):
    model = FOLDABLE[name].build()
    before, old = logits(model), model_statistics(model)
    assert any(float((old[i].balance - 1).abs().max()) > 0.05 for i in old)  # there is something to fold
    report = fold_balance(model)
    assert list(report.folded) == FOLDABLE[name].packed
    assert not report.refused
    assert difference(logits(model), before) < 1e-5
    for index, statistics in model_statistics(model).items():
        torch.testing.assert_close(statistics.balance, torch.ones_like(old[index].balance), rtol=2e-3, atol=0)


def test_twin_keys_scaled_by_another_vector_than_queries_would_show(monkeypatch):
    model = LLAMA.build()
    before = logits(model)
    monkeypatch.setattr(folding, "_change", lambda _decoder, _output, new: _set(new))
    monkeypatch.setattr(
        folding, "scale_heads", lambda weight, vector, heads: scale_heads(weight, 1.5 * vector, heads=heads)
    )
    fold_balance(model)
    assert difference(logits(model), before) > 1e-2


@torch.no_grad()
def _set(new: dict[Tensor, Tensor]) -> None:
    for parameter, value in new.items():
        parameter.copy_(value)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_norm_behind_the_projections_is_refused_and_nothing_is_changed(name):
    model = TINY[name].build()
    saved, before = weights(model), logits(model)
    with pytest.raises(UnsupportedModel, match=r"the balance cannot be folded into this model: .*Nothing was changed"):
        fold_balance(model)
    assert all(torch.equal(weight, saved[key]) for key, weight in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_each_row_of_the_vector_serves_its_heads_in_a_row():
    vector = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ones = torch.ones(8, 3)
    assert scale_heads(ones, vector, heads=4)[:, 0].tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert scale_heads(ones[:, 0], vector, heads=4).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
