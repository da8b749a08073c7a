"""How a model embeds positions, told from its keys: the pairs and frequencies, and what of a key bias is in K."""

import pytest
import torch
from torch import nn

from integrations.architectures import TINY
from integrations.steps import words
from integrations.tiny import Tiny
from occamkv import PackedCache
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers.rotary import key_biases, model_rotaries
from occamkv.integrations.transformers.statistics import model_statistics
from occamkv.methods import method

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def plant(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("k_proj.bias"):
            weight.data[::13] = 300.0


BIASED = {
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", change=plant),
    "qwen2 with yarn": Tiny("Qwen2Config", "Qwen2ForCausalLM", {"rope_parameters": YARN}, change=plant),
    "gpt_oss, which has yarn": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
        change=plant,
    ),
}


def forget_positions(model: nn.Module) -> None:
    """Every token is embedded at its place in the call, whatever position the model is told."""
    embed = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: embed(x, torch.arange(x.shape[1])[None])


SLOW = Tiny(
    "PhiConfig",
    "PhiForCausalLM",
    {"hidden_size": 128, "partial_rotary_factor": 0.5},
    drop=("head_dim",),
)
UNKNOWN = {
    "frequencies that change with the length": Tiny("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": DYNAMIC}),
    "positions of several axes": Tiny(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
    ),
    "positions that the model does not heed": Tiny("LlamaConfig", "LlamaForCausalLM", change=forget_positions),
    "no rotary embedding": TINY["bart, an encoder and a decoder"],
}
LAYOUTS = {
    "halves": (TINY["llama"], {0: (16, 0, 16), 1: (16, 0, 16)}),
    "neighbours": (
        Tiny("CohereConfig", "CohereForCausalLM", drop=("head_dim",), layers=2),
        {0: (8, 0, 1), 1: (8, 0, 1)},
    ),
    "a quarter of the channels": (TINY["qwen3_next with linear layers"], {0: (4, 0, 4)}),
    "one layer without": (
        Tiny("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, drop=("head_dim",)),
        {0: (8, 0, 8), 1: (0, None, None)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_are_those_that_the_model_turns(name):
    tiny, expected = LAYOUTS[name]
    found = {
        index: (len(one.frequencies), *((int(one.first[0]), int(one.second[0])) if len(one.first) else (None, None)))
        for index, one in model_rotaries(tiny.build()).items()
    }
    assert found == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_not_guessed(name):
    model = UNKNOWN[name].build()
    assert model_rotaries(model) == {}
    with pytest.raises(UnsupportedInput, match="how this model embeds positions is not known"):
        PackedCache(model, method("oscar", window=256, pins="first:4"))
    PackedCache(model, method("oscar", window=256, pins="none"))


def keys_of(model: nn.Module) -> list[torch.Tensor]:
    """K of each layer as transformers' own cache keeps it."""
    with torch.no_grad():
        return [layer.keys[0] for layer in model(words(260)[None], use_cache=True).past_key_values.layers]


@pytest.mark.parametrize("name", BIASED)
def test_a_key_bias_is_found_as_k_holds_it(name):
    """Without it K is what the same model without a bias makes."""
    made, bare = BIASED[name].build(), BIASED[name].build()
    for key, weight in bare.named_parameters():
        if key.endswith("k_proj.bias"):
            weight.data.zero_()
    found = key_biases(made)
    assert sorted(found) == [0, 1] and not key_biases(bare)
    biased, plain = keys_of(made)[0], keys_of(bare)[0]  # of layer 0: no attention comes before it
    left = biased - found[0].rows(torch.arange(260)[None])[0]
    assert (left - plain).norm() < 1e-3 * plain.norm()
    assert (biased - plain).norm() > 10 * plain.norm()
    assert all(one.key_bias is not None for one in model_statistics(made).values())


def test_a_bias_that_a_norm_has_changed_stays():
    tiny = Tiny("Qwen3Config", "Qwen3ForCausalLM", {"attention_bias": True}, change=plant)
    model = tiny.build()
    assert sorted(key_biases(model)) == [0, 1]
    assert [one.key_bias for one in model_statistics(model).values()] == [None, None]


def divergence(model: nn.Module) -> float:
    """KL of a text that is read through `occam`."""
    ids, cache = words(500)[None], PackedCache(model)
    with torch.no_grad():
        full = model(ids).logits.log_softmax(-1)
        parts = [model(ids[:, at : at + 50], past_key_values=cache).logits for at in range(0, 500, 50)]
    packed = torch.cat(parts, dim=1).log_softmax(-1)
    return float((full.exp() * (full - packed)).sum(-1)[:, 200:].mean())


def test_a_bias_in_channels_that_do_not_turn_costs_nothing():
    """8-bit minimums do not reach it, so a method with such would need wider steps."""
    found = []
    for size in (0.0, 300.0):
        model = SLOW.build()
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data = torch.zeros(2, 32).index_fill_(1, torch.tensor([17, 30]), size).flatten()
        found.append(divergence(model))
    assert 0 < found[0] < 0.1 and found[1] < 1.2 * found[0]


@pytest.mark.parametrize(("name", "balance"), [("kivi", None), ("occam", None), ("occam", {0: torch.ones(2, 32)})])
def test_methods_that_remove_a_bias_find_it_whatever_else_they_need(name, balance):
    model = BIASED["qwen2"].build()
    cache = PackedCache(model, method(name, key_bias="remove"), balance=balance)
    with torch.no_grad():
        model(words(200)[None], past_key_values=cache)
    assert all(layer.key_bias_pairs for layer in cache.report().layers)


def test_a_bias_that_lies_elsewhere_until_it_is_used_stays():
    model = BIASED["qwen2"].build()
    model_rotaries(model)  # as if hooks brought the weights while it runs
    projection = model.model.layers[0].self_attn.k_proj
    projection.bias = nn.Parameter(projection.bias.to("meta"))
    assert sorted(key_biases(model)) == [1]
