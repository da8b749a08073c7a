"""A bias on the logits of pins: transformers' own eager code with the same number added by its mask, and refusals."""

import pytest
import torch
from torch import Tensor, nn

import occamkv
from integrations.architectures import TINY
from integrations.steps import difference, prompt, run, words
from occamkv import PackedCache
from occamkv.errors import UnsupportedInput
from occamkv.methods import method

LLAMA, LENGTHS, STEPS = TINY["llama"], {0: 200, 1: 150}, 6
ABOVE_ALL, ROUNDING = 10**6, 2e-5
BY_HEAD = {0: torch.tensor([1.0, -2.0, 0.5, 0.0]), 1: torch.tensor([0.0, 3.0, -1.0, 2.0])}


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def forced(rows: int) -> Tensor:
    return torch.stack([words(STEPS, row=row, seed=3) for row in range(rows)])


def eager(model: nn.Module, bias: dict[int, Tensor], pins: list[int]) -> Tensor:
    """Logits before each forced token, in one pass without a cache, the bias in a mask of each layer."""
    inputs, tokens = prompt(LLAMA, LENGTHS), forced(len(LENGTHS))
    ids = torch.cat((inputs["input_ids"], tokens), dim=1)
    real = torch.cat((inputs["attention_mask"], torch.ones_like(tokens)), dim=1).bool()
    at = real.cumsum(1) - 1
    seen = torch.ones(ids.shape[1], ids.shape[1]).bool().tril() & real[:, None, None]
    seen = seen | torch.eye(ids.shape[1]).bool()  # a pad sees itself: no NaN
    pinned = torch.isin(at, torch.tensor(pins)) & real
    hooks = []
    for index, layer in enumerate(model.model.layers):
        mask = torch.zeros(1).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask = mask + bias[index].reshape(1, -1, 1, 1) * pinned[:, None, None]

        def with_mask(_module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(ids, position_ids=at.clamp_min(0), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits[:, -STEPS - 1 : -1]


def ours(model: nn.Module, pins: str, pin_bias: object, *, min_tokens: int = ABOVE_ALL) -> Tensor:
    chosen = method("occam", pins=pins)
    with occamkv.attach(model, chosen, pin_bias=pin_bias, min_tokens=min_tokens):
        return run(model, prompt(LLAMA, LENGTHS), forced(len(LENGTHS))).logits


@pytest.mark.parametrize("pins", ["first:4", "at:0,7,140"])
@pytest.mark.parametrize("pin_bias", [2.0, BY_HEAD], ids=["one number", "by layer and head"])
def test_prompt_and_steps_are_those_of_eager_code_with_the_bias_in_its_mask(pin_bias, pins, model):
    places = list(range(4)) if pins == "first:4" else [0, 7, 140]
    by_layer = pin_bias if isinstance(pin_bias, dict) else dict.fromkeys((0, 1), torch.full((4,), pin_bias))
    expected = eager(model, by_layer, places)
    assert difference(ours(model, pins, pin_bias), expected) < ROUNDING
    without = eager(model, dict.fromkeys((0, 1), torch.zeros(4)), places)
    assert difference(expected, without) > 1000 * ROUNDING, "the bias does something"
    assert difference(ours(model, pins, None), without) < ROUNDING


def test_a_bias_of_nothing_changes_nothing_on_packed_tokens(model):
    plain, zero = (ours(model, "first:4", bias, min_tokens=0) for bias in (None, 0.0))
    assert difference(zero, plain) < 1e-3
    assert difference(ours(model, "first:4", 2.0, min_tokens=0), plain) > 0.1


def test_a_model_that_reads_k_and_v_elsewhere_would_leave_it_out_and_is_refused(model):
    given = (model, prompt(LLAMA, LENGTHS), forced(2))
    cache = PackedCache(model.config, method("oscar", pins="first:4"), pin_bias=5.0)
    with pytest.raises(UnsupportedInput, match=r"layer 0 has a pin_bias.*outside occamkv's attention"):
        run(*given, past_key_values=cache)
    cache = PackedCache(model, method("oscar", pins="first:4"), pin_bias=5.0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedInput, match="layer 0 has a pin_bias"):
        run(*given, past_key_values=cache)


@pytest.mark.parametrize(
    ("pins", "pin_bias"),
    [
        ("first:4", float("nan")),
        ("first:4", {0: torch.zeros(3)}),
        ("first:4", {5: torch.zeros(4)}),
        ("first:4", {0: 1.0}),
        ("first:4", {}),
        ("none", 1.0),
    ],
)
def test_what_cannot_be_added_is_refused(pins, pin_bias, model):
    with pytest.raises(UnsupportedInput, match="pin_bias"):
        PackedCache(model, method("occam", pins=pins), pin_bias=pin_bias)


def test_a_prompt_whose_first_tokens_see_each_other_keeps_its_mask(model):
    ids = words(90)[None]
    seen = torch.ones(90, 90).bool().tril()
    seen[:30, :30] = True
    cache = PackedCache(model, method("occam"), pin_bias=2.0)
    with torch.no_grad():
        out = model(ids, attention_mask=seen[None, None], past_key_values=cache).logits
        model.set_attn_implementation("eager")
        mask = torch.zeros(1).masked_fill(~seen, torch.finfo(torch.float32).min) + 2.0 * (torch.arange(90) < 4)
        expected = model(ids, attention_mask=mask[None, None], use_cache=False).logits
        causal = mask.masked_fill(~seen.tril(), torch.finfo(torch.float32).min)
        other = model(ids, attention_mask=causal[None, None], use_cache=False).logits
    assert difference(out, expected) < ROUNDING
    assert difference(other, expected) > 1000 * ROUNDING
