"""Pins that are found, seen from the engine: what the report counts, and that rows, copies and crops carry them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from integrations.architectures import TINY
from integrations.steps import difference, prompt, run, words
from occamkv import PackedCache, method
from occamkv.integrations.transformers.layer import PackedLayer
from some_attention import some_statistics

LLAMA = TINY["llama"]
ROUNDING = 2e-3  # of 16-bit fixed point
QUALITY = method("occam_quality")


def kv(batch: int, tokens: int, sinks: list[int]) -> tuple[Tensor, Tensor]:
    """K and V of 2 heads of 64 channels in bfloat16, about alike but for the sinks."""
    k, v = torch.randn(2, batch, 2, tokens, 64, generator=torch.Generator().manual_seed(0)).unbind()
    k[:, :, sinks] *= 0.2
    v[:, :, sinks] *= 0.05
    return k.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sinks", [[], [77], [40, 41, 130]], ids=["no sink", "one sink", "three sinks"])
def test_the_report_counts_found_pins_in_tokens_bits_and_bytes(sinks, batch):
    layer = PackedLayer(0, QUALITY, statistics=some_statistics(QUALITY, 2, 64))
    layer.update(*kv(batch, 500, sinks))
    layer.cache.commit()
    report, values = layer.report(), 2 * 2 * 64  # K and V of a token
    packed = batch * ((384 - len(sinks)) // 32 * 32)  # 496 tokens behind the first pins, of them 384 judged
    assert (report.found_pins, report.packed_tokens) == (batch * len(sinks), packed)
    record = (
        2 * (32 * 64 * 2 // 8) + 2 * 64 + 2 * 32 * 2
    )  # codes of K and V; scale and minimum of K, then of V: a byte each
    group_bytes = 2 * (record + 4) + 32 * 2  # both heads with two super-scales each, and the token norms
    bits = 8 * group_bytes * packed // 32 + 16 * values * batch * len(sinks)
    assert report.bits_per_value == pytest.approx(bits / (values * (packed + batch * len(sinks))))
    assert report.pin_bytes == batch * 2 * values * (12 if sinks else 4), "room for found pins comes in eights"
    assert report.tokens == 500 and report.full_bytes == batch * 500 * values * 2
    assert report.nbytes == report.packed_bytes + report.pin_bytes + report.residual_bytes


def test_a_method_that_finds_none_reports_none():
    layer = PackedLayer(0, method("occam"), statistics=some_statistics(method("occam"), 2, 64))
    layer.update(*kv(1, 500, [77]))
    layer.cache.commit()
    assert layer.report().found_pins == 0
    assert layer.report().bits_per_value == method("occam").bits_per_value(kv_heads=2, head_dim=64)


@pytest.fixture
def model() -> nn.Module:
    """A tiny llama in which two words are sinks: what their keys and values are made of is small."""
    model = LLAMA.build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
            layer.input_layernorm.variance_epsilon = 1.0  # short embeddings stay short
        model.model.embed_tokens.weight.mul_(3.0)
        model.model.embed_tokens.weight[[5, 6]] *= 0.01
    return model


def cache_of(model: nn.Module, rows: dict[int, int], name: str = "occam_quality") -> PackedCache:
    inputs, tokens = prompt(LLAMA, rows), torch.stack([words(3, row=row, seed=5) for row in rows])
    return run(model, inputs, tokens, past_key_values=PackedCache(model, name)).cache


def pins_of(cache: PackedCache) -> list[list[list[int]]]:
    return [[row.pins for row in layer.cache.store.rows] for layer in cache.layers]


@pytest.mark.parametrize("name", ["occam_quality", "ott", "rotatekv"])
def test_rows_copies_and_selections_carry_their_own_pins(name, model):
    cache = cache_of(model, {0: 370, 1: 300}, name)
    first, second = pins_of(cache)[0]
    assert first != second and cache.report().layers[0].found_pins
    assert pins_of(copy.deepcopy(cache)) == pins_of(cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    assert pins_of(cache)[0] == [second, first, second]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert pins_of(cache)[0] == [first, first, second]


def step(model: nn.Module, cache: PackedCache, row: int) -> Tensor:
    with torch.no_grad():
        return model(words(1, row=row, seed=6)[None], past_key_values=cache).logits


@pytest.mark.parametrize("removed", [3, 60, 150, 300])
@pytest.mark.parametrize("name", ["occam_quality", "ott", "rotatekv"])
def test_after_a_crop_what_is_read_packed_is_what_is_read_dequantized(name, removed, model):
    cache = cache_of(model, {0: 370}, name)
    before = pins_of(cache)
    cache.crop(-removed)
    left = 370 + 2 - removed
    assert cache.get_seq_length() == left
    assert pins_of(cache) == [[[at for at in row if at < left] for row in layer] for layer in before]
    dense = copy.deepcopy(cache)
    for row in range(12):
        packed = step(model, cache, row)
        model.set_attn_implementation("sdpa")
        plain = step(model, dense, row)
        model.set_attn_implementation("occamkv")
        assert difference(packed, plain) < ROUNDING
