"""Two real models on a long English text: packed reads are right reads, and the cache is as small as it should be."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from integrations.comparison import Call, comparing
from integrations.real_models import Real, gemma_file, load, smollm2_file
from integrations.steps import difference, run
from occamkv import PackedCache
from occamkv.integrations.transformers import attention

pytestmark = pytest.mark.model

PROMPT, STEPS, PADS = 704, 4, 60
ABOVE_ALL = 10**6
ROUNDING = 1e-3  # of the CPU backend's fixed point


@pytest.fixture(scope="session")
def smollm2() -> Real:
    return load(smollm2_file())


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> Real:
    return load(gemma_file(tmp_path_factory.mktemp("gemma")))


def prefilled(real: Real, cache: Cache) -> Cache:
    """Let the model read the prompt up to its last token."""
    with torch.no_grad():
        real.model(real.text[None, : PROMPT - 1], past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.fixture(scope="session")
def smollm2_packed(smollm2) -> PackedCache:
    return prefilled(smollm2, PackedCache(smollm2.model))


def text_of(real: Real, *, pads: int = 0) -> dict[str, Tensor]:
    """Return the prompt as one row, behind `pads` pads."""
    ids = torch.cat((torch.zeros(pads, dtype=torch.int64), real.text[:PROMPT]))[None]
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= pads).long()[None]}


def forced(real: Real, cache: Cache, **options) -> Tensor:
    """Return the logits before each of the tokens that really follow the prompt, `[1, n, V]`."""
    tokens = real.text[None, PROMPT : PROMPT + STEPS]
    return run(real.model, text_of(real), tokens, past_key_values=cache, **options).logits


def generate(real: Real, cache: Cache, **options) -> Tensor:
    return real.model.generate(
        **{**text_of(real), "max_new_tokens": 12, "do_sample": False, "past_key_values": cache, **options}
    )


@contextlib.contextmanager
def transformers_attention(model: nn.Module) -> Iterator[None]:
    """Let the model attend by transformers' own function for a while."""
    model.set_attn_implementation("sdpa")
    yield
    model.set_attn_implementation(attention.NAME)


def assert_reads_are_the_same_packed_and_dequantized(real: Real, packed: PackedCache) -> None:
    """Compare the same cache read packed and read by transformers' own attention, and both with full precision."""
    same, full = copy.deepcopy(packed), prefilled(real, DynamicCache(config=real.model.config))
    by_ours = forced(real, packed)
    with transformers_attention(real.model):
        dequantized, untouched = forced(real, same), forced(real, full)
    assert difference(by_ours, dequantized) < ROUNDING
    assert difference(by_ours, untouched) > 10 * ROUNDING
    assert all(layer.reads_packed and not layer.reads_dense for layer in packed.report().packed_layers)


def test_smollm2_reads_packed_what_it_would_read_dequantized(smollm2, smollm2_packed):
    assert_reads_are_the_same_packed_and_dequantized(smollm2, copy.deepcopy(smollm2_packed))


def test_gemma_reads_packed_what_it_would_read_dequantized_and_keeps_its_sliding_layers(gemma):
    cache = prefilled(gemma, PackedCache(gemma.model))
    assert_reads_are_the_same_packed_and_dequantized(gemma, cache)
    report = cache.report()
    assert [layer.index for layer in report.packed_layers] == [5, 11, 17]
    assert {layer.packed_tokens for layer in report.packed_layers} == {576}
    others = [layer for layer in report.layers if not layer.packs]
    assert len(others) == 15
    assert {layer.reason for layer in others} == {
        "sliding window: its cache never grows beyond the window of 512 tokens"
    }


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_while_nothing_is_packed_the_tokens_are_those_of_transformers_own_cache(name, request):
    real = request.getfixturevalue(name)
    cache = PackedCache(real.model, min_tokens=ABOVE_ALL)
    tokens = generate(real, cache)
    with transformers_attention(real.model):
        assert torch.equal(tokens, generate(real, DynamicCache(config=real.model.config)))
    assert not cache.report().quantized
    assert tokens.shape[1] == PROMPT + 12


@pytest.fixture
def calls(monkeypatch):
    """Compare every attention call on a packed layer with plain attention; the list fills while a test runs."""
    found: list[Call] = []
    monkeypatch.setattr(attention, "attention_forward", comparing(found))
    attention.register()
    yield found
    monkeypatch.undo()
    attention.register()


def assert_packed_tokens_were_read_rightly(calls: list[Call], layers: int) -> None:
    assert max(call.error for call in calls) < ROUNDING
    assert sum(call.packed > 0 for call in calls) >= layers


def test_beam_search_reads_packed_tokens_rightly(smollm2, smollm2_packed, calls):
    cache = copy.deepcopy(smollm2_packed)
    cache.batch_repeat_interleave(3)
    tokens = generate(smollm2, cache, num_beams=3)
    assert tokens.shape == (1, PROMPT + 12)
    assert_packed_tokens_were_read_rightly(calls, layers=30)


def test_assisted_decoding_reads_packed_tokens_rightly(smollm2, calls):
    cache = PackedCache(smollm2.model)
    tokens = generate(smollm2, cache, assistant_model=smollm2.model)
    assert tokens.shape == (1, PROMPT + 12)
    assert cache.get_seq_length() < PROMPT + 12
    assert_packed_tokens_were_read_rightly(calls, layers=30)
    assert any(call.queries > 1 and call.packed for call in calls)  # several guesses were checked at once


def test_a_prompt_in_chunks_reads_packed_tokens_rightly(smollm2, calls):
    cache = PackedCache(smollm2.model)
    generate(smollm2, cache, prefill_chunk_size=256, max_new_tokens=2)
    assert {call.queries for call in calls} >= {256, 1}
    assert_packed_tokens_were_read_rightly(calls, layers=60)


def test_a_left_padded_row_is_packed_and_read_like_the_row_alone(smollm2, calls):
    tokens = smollm2.text[None, PROMPT : PROMPT + STEPS]
    row, longer = text_of(smollm2, pads=PADS), smollm2.text[None, 1 : PROMPT + PADS + 1]
    both = {
        "input_ids": torch.cat((longer, row["input_ids"])),
        "attention_mask": torch.cat((torch.ones_like(longer), row["attention_mask"])),
    }
    full = run(smollm2.model, text_of(smollm2), tokens).logits[:, 1:]
    alone = run(smollm2.model, text_of(smollm2), tokens, past_key_values=PackedCache(smollm2.model)).logits[:, 1:]
    calls.clear()
    cache = PackedCache(smollm2.model)
    padded = run(smollm2.model, both, tokens.repeat(2, 1), past_key_values=cache).logits[1:, 1:]
    assert_packed_tokens_were_read_rightly(calls, layers=30)
    assert cache.layers[0].cache.packed_tokens() == [640, 576]
    assert difference(padded, alone) < 0.1 * difference(alone, full)  # a batch rounds differently, so some codes flip


def test_one_flipped_bit_moves_the_logits_and_an_untouched_copy_does_not(smollm2, smollm2_packed):
    flipped, intact = copy.deepcopy(smollm2_packed), copy.deepcopy(smollm2_packed)
    flipped.layers[0].cache.store.pool.slabs[0].records[0, 0, 0, 0] ^= 0b10
    expected = forced(smollm2, copy.deepcopy(smollm2_packed))
    assert torch.equal(forced(smollm2, intact), expected)
    assert not torch.equal(forced(smollm2, flipped), expected)


def bytes_of_all_tensors(thing: object, seen: set[int]) -> int:
    """Return the bytes of every tensor that can be reached from an object."""
    if id(thing) in seen or isinstance(thing, type | nn.Module):
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.nbytes
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    return sum(bytes_of_all_tensors(part, seen) for part in (*parts, *getattr(thing, "__dict__", {}).values()))


def test_at_4096_tokens_the_cache_of_smollm2_in_bfloat16_is_4_3_times_smaller(smollm2):
    config = smollm2.model.config
    shape = (1, config.num_key_value_heads, 4095, config.hidden_size // config.num_attention_heads)
    packed, full = PackedCache(config, "oscar"), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, *shape, generator=generator).bfloat16()
    for cache in (packed, full):
        for layer in range(config.num_hidden_layers):
            cache.update(k, v, layer)
            cache.update(k[:, :, :1], v[:, :, :1], layer)  # the prompt is packed when the next token comes
    assert packed.get_seq_length() == full.get_seq_length() == 4096
    held, whole = (bytes_of_all_tensors(cache.layers, set()) for cache in (packed, full))
    assert whole == 30 * 2 * 3 * 4096 * 64 * 2
    assert whole / held >= 4.3
    handles = sum(layer.handle.nbytes for layer in packed.layers)
    assert packed.nbytes() == held - handles
    assert packed.report().full_bytes == whole
