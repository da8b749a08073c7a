"""What generate() offers, on a packed cache: the same tokens while nothing is packed, then the right attention."""

import copy
import functools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

import occamkv
from integrations.architectures import TINY
from integrations.comparison import Call, comparing
from integrations.steps import difference, prompt, run, words
from occamkv import PackedCache, kernels
from occamkv.integrations.transformers import attention
from some_attention import AVAILABLE

PROMPT, SHORTER, NEW = 370, 300, 40  # the new tokens fill the residual, so packing goes on while generating
ABOVE_ALL = 10**6
ROUNDING = {"reference": 1e-5, "cpu": 2e-3}  # of float32; of 16-bit fixed point
LLAMA = TINY["llama"]

FEATURES = {
    "greedy": {},
    "beam search": {"num_beams": 4},
    "beam search with three sequences returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "sampling of three sequences": {"do_sample": True, "num_return_sequences": 3},
    "a prompt in chunks": {"prefill_chunk_size": 64},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "assisted decoding": {"assistant": True},
}
every_feature = pytest.mark.parametrize("feature", FEATURES)


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


@functools.cache
def assistant() -> nn.Module:
    """Return a model that guesses some of the model's tokens and misses others."""
    other = LLAMA.build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.03 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.dim() > 1 else 0
    return other


def generate(model: nn.Module, feature: str, **more) -> Tensor:
    options = dict(FEATURES[feature])
    speculative = "assistant" in options or "prompt_lookup_num_tokens" in options
    if options.pop("assistant", False):
        options["assistant_model"] = assistant()
    inputs = prompt(LLAMA, {0: PROMPT} if speculative else {0: PROMPT, 1: SHORTER})
    if "prompt_lookup_num_tokens" in options:
        inputs["input_ids"][:, -60:] = inputs["input_ids"][:, 20:80]  # something to look up
    torch.manual_seed(0)
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **inputs, **options, **more})


@pytest.fixture
def calls(monkeypatch):
    """Compare every attention call on a packed layer with plain attention; the list fills while a test runs."""
    found: list[Call] = []
    monkeypatch.setattr(attention, "attention_forward", comparing(found))
    yield found
    monkeypatch.undo()
    attention.register()


def assert_packed_tokens_were_read_rightly(calls: list[Call], cache: PackedCache) -> None:
    layers = cache.report().layers
    assert max(call.error for call in calls) < ROUNDING[layers[0].backend]
    assert any(call.packed for call in calls)
    assert all(layer.reads_packed and layer.packed_tokens and not layer.reads_dense for layer in layers)


@every_feature
def test_while_nothing_is_packed_the_tokens_are_those_of_transformers_own_cache(feature, model):
    expected = generate(model, feature, past_key_values=DynamicCache(config=model.config))
    cache = PackedCache(model, min_tokens=ABOVE_ALL)
    assert torch.equal(generate(model, feature, past_key_values=cache), expected)
    assert cache.get_seq_length() > PROMPT
    assert not cache.report().quantized


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("method", "packed"), [("occam", 256 + 32), ("oscar", 256 + 128)])
@every_feature
def test_every_attention_call_on_packed_tokens_is_plain_attention_on_the_dequantized_ones(
    feature, method, packed, backend, model, calls, monkeypatch
):
    monkeypatch.setattr(kernels, "BACKENDS", (backend,))
    cache = PackedCache(model, method)
    tokens = generate(model, feature, past_key_values=cache)
    assert tokens.shape[1] == PROMPT + NEW
    assert_packed_tokens_were_read_rightly(calls, cache)
    assert max(cache.layers[0].cache.packed_tokens()) == packed  # 256 of the prompt, the others while generating


def test_twin_attention_that_is_off_by_a_percent_is_noticed(model, monkeypatch):
    def off(module, query, *rest, **options):
        return function(module, query * 1.01, *rest, **options)

    found, function = [], attention.attention_forward
    monkeypatch.setattr(attention, "attention_forward", comparing(found, off))
    generate(model, "greedy", past_key_values=PackedCache(model))
    monkeypatch.undo()
    attention.register()
    assert max(call.error for call in found) > 2 * max(ROUNDING.values())


def test_speculation_packs_nothing_that_may_be_taken_back(model):
    cache = PackedCache(model)
    tokens = generate(model, "assisted decoding", past_key_values=cache)
    assert not any(layer.lossy_crops for layer in cache.report().layers)
    assert PROMPT + NEW - 1 <= cache.get_seq_length() <= tokens.shape[1]


def test_a_second_turn_on_the_same_cache_reads_what_the_first_one_packed(model, calls):
    cache = PackedCache(model)
    first = generate(model, "greedy", past_key_values=cache)
    ids = torch.cat((first, words(200, row=3).repeat(2, 1)), dim=1)
    mask = (ids != 0).long()
    calls.clear()
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert calls[0].queries == 201
    assert calls[0].packed > 0
    assert_packed_tokens_were_read_rightly(calls, cache)


def test_a_cache_copied_after_a_common_beginning_continues_as_if_it_were_alone(model):
    beginning, tokens = words(300)[None], words(20, seed=5)[None]
    prefilled = PackedCache(model)
    with torch.no_grad():
        model(beginning, past_key_values=prefilled)
    for row in (1, 2):
        ids = torch.cat((beginning, words(150, row=row)[None]), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone = PackedCache(model)
        with torch.no_grad():
            model(beginning, past_key_values=alone)
        expected = run(model, inputs, tokens, past_key_values=alone)
        copied = run(model, inputs, tokens, past_key_values=copy.deepcopy(prefilled))
        assert torch.equal(copied.logits, expected.logits)
        assert copied.cache.get_seq_length() == 469
    assert prefilled.get_seq_length() == 300
    assert {layer.packed_tokens for layer in prefilled.report().layers} == {192}


def test_a_cache_that_was_reset_is_as_good_as_new_even_for_another_batch(model):
    used, tokens = PackedCache(model), torch.stack([words(20, row=row, seed=5) for row in (0, 1)])
    run(model, prompt(LLAMA, {0: PROMPT}), tokens[:1], past_key_values=used)
    used.reset()
    assert used.get_seq_length() == 0
    inputs = prompt(LLAMA, {0: PROMPT, 1: SHORTER})
    again = run(model, inputs, tokens, past_key_values=used).logits
    assert torch.equal(again, run(model, inputs, tokens, past_key_values=PackedCache(model)).logits)


def _step(model: nn.Module, cache: PackedCache, rows: list[int]) -> Tensor:
    ids = torch.stack([words(1, row=row, seed=6) for row in rows])
    mask = torch.ones(len(rows), cache.get_seq_length() + 1, dtype=torch.int64)
    for place, row in enumerate(rows):
        mask[place, : (PROMPT - SHORTER) * row] = 0
    positions = mask.sum(dim=1, keepdim=True) - 1
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
    ids=["rows exchanged", "one row selected", "each row twice"],
)
def test_rows_move_with_all_that_is_packed(change, rows, model):
    tokens = torch.stack([words(3, row=row, seed=5) for row in (0, 1)])
    cache = run(model, prompt(LLAMA, {0: PROMPT, 1: SHORTER}), tokens, past_key_values=PackedCache(model)).cache
    expected = _step(model, copy.deepcopy(cache), [0, 1])
    change(cache)
    assert difference(_step(model, cache, rows), expected[rows]) < ROUNDING[AVAILABLE[0]]
    assert difference(expected[:1], expected[1:]) > 0.1  # another row would not do


@pytest.mark.parametrize("removed", [20, 200], ids=["within the residual", "below the residual"])
def test_after_a_crop_attention_reads_what_is_left(removed, model, calls):
    cache = PackedCache(model)
    with torch.no_grad():
        model(words(370)[None], past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 370 - removed
        for token in words(5, row=2):
            model(token[None, None], past_key_values=cache)
    assert_packed_tokens_were_read_rightly(calls, cache)
    below = removed > 110  # 4 tokens are pinned, 256 packed
    assert [bool(layer.lossy_crops) for layer in cache.report().layers] == [below] * 2
    assert ("lossy crop" in str(cache.report())) == below


def test_generate_returns_the_packed_cache_with_the_rest(model):
    given = PackedCache(model)
    out = generate(model, "greedy", past_key_values=given, return_dict_in_generate=True, output_logits=True)
    assert out.past_key_values is given
    with occamkv.attach(model) as handle:
        out = generate(model, "greedy", return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache
    assert out.past_key_values.get_seq_length() == PROMPT + NEW - 1
    assert handle.report().quantized


def test_a_pipeline_runs_packed_once_it_is_attached(model):
    vocabulary = {f"w{number}": number for number in range(99)}
    words_to_ids = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_to_ids, pad_token="w0", padding_side="left")
    texts = [" ".join(f"w{token}" for token in words(count, row=row)) for row, count in ((0, PROMPT), (1, SHORTER))]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    options = {"max_new_tokens": 10, "do_sample": False, "return_tensors": True}
    untouched = generator(texts, **options)
    with occamkv.attach(generator, min_tokens=ABOVE_ALL):
        assert generator(texts, **options) == untouched
    with occamkv.attach(generator) as handle:
        generator(texts, **options)
    assert {layer.packed_tokens for layer in handle.report().layers} == {256 + 192}
    assert all(layer.reads_packed and not layer.reads_dense for layer in handle.report().layers)
