"""A layer cache changes its method while nothing is packed: what it holds stays, within one rounding."""

import pytest
import torch

from cache_mirror import contents
from occamkv import method
from occamkv.cache import LayerCache
from occamkv.cache.chooser import first_tokens
from occamkv.cache.masks import Seen
from occamkv.errors import UnsupportedInput
from occamkv.formats.records import LARGEST_TOKEN
from occamkv.methods.crossing import Statistics
from occamkv.ops.rope import KeyBias, Rotary
from some_attention import some_balance, some_tokens

HEADS, DIM = 2, 32
GENERATOR = torch.Generator().manual_seed(0)
MOMENT = torch.eye(DIM).expand(HEADS, DIM, DIM)
STATISTICS = Statistics(some_balance(HEADS, DIM), MOMENT)
STRETCH = float(STATISTICS.balance.max() / STATISTICS.balance.min())  # K is rounded after it is multiplied by d
OCCAM = method("occam")
OTHERS = {
    "other bits, the same space": method("occam", k_bits=3, v_bits=4, k_group=64),
    "no rotation of K": method("occam", k_rotation="none", k_group=64),
    "pins that are found, in a larger ring": method("occam_quality", v_bits=3),
    "no pins": method("occam", pins="none"),
}


def fresh(batch: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(some_tokens(batch, HEADS, tokens, DIM, generator=GENERATOR).to(dtype) for _ in range(2))


def filled(k: torch.Tensor, v: torch.Tensor, ends: tuple[int, ...], kept: torch.Tensor | None = None) -> LayerCache:
    """A cache that was given tokens in steps; the last step still waits."""
    cache, start = LayerCache(OCCAM, statistics=STATISTICS), 0
    for end in ends:
        cache.update(k[:, :, start:end], v[:, :, start:end])
        if kept is not None:
            cache.note(Seen(kept[:, start:end], None))
        start = end
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_held_is_the_same_after_a_change(name, dtype):
    k, v = fresh(2, 110, dtype)
    kept = torch.arange(110) >= torch.tensor([[0], [37]])
    cache = filled(k, v, (50, 51, 100, 110), kept)
    before = cache.dense()
    cache.adopt(OTHERS[name])
    assert cache.method == OTHERS[name]
    assert cache.length == 110
    for old, new in zip(before, cache.dense(), strict=True):
        assert new.dtype == dtype
        rounding = 2 * STRETCH * torch.finfo(dtype).eps * old.float().norm(dim=-1, keepdim=True)
        assert ((new.float() - old.float()).abs() <= rounding).all()


@pytest.mark.parametrize("name", OTHERS)
def test_the_bytes_afterwards_are_those_of_a_cache_that_had_the_method_from_the_start(name):
    k, v = fresh(1, 400, torch.float32)
    other = OTHERS[name]
    cache = filled(k, v, (120,))
    cache.adopt(other)
    straight = LayerCache(other, statistics=STATISTICS if other.needs_model else None)
    straight.update(k[:, :, :120], v[:, :, :120])
    for one in (cache, straight):
        one.update(k[:, :, 120:], v[:, :, 120:])
        one.commit()
        assert one.packed_tokens()[0] > 0
    for a, b in zip(contents(cache, 0), contents(straight, 0), strict=True):
        assert torch.equal(a, b)  # the step still waited in model space


def test_a_cache_that_was_given_nothing_yet_just_changes():
    cache = LayerCache(OCCAM, statistics=STATISTICS)
    cache.adopt(OTHERS["no rotation of K"])
    k, v = fresh(1, 200, torch.float32)
    cache.update(k, v)
    cache.commit()
    assert cache.store.format.k_group == 64


def test_no_change_once_tokens_are_packed():
    k, v = fresh(1, 200, torch.float32)
    cache = filled(k, v, (200,))
    cache.commit()
    held = contents(cache, 0)
    with pytest.raises(UnsupportedInput, match="96 tokens are packed with occam"):
        cache.adopt(method("occam", k_bits=3))
    assert cache.method == OCCAM
    assert all(torch.equal(a, b) for a, b in zip(held, contents(cache, 0), strict=True))


def test_first_tokens_are_those_of_store_and_step_without_pads():
    k, v = fresh(2, 110, torch.float32)
    kept = torch.arange(110) >= torch.tensor([[0], [37]])
    cache = filled(k, v, (50, 110), kept)
    for row, pads in ((0, 0), (1, 37)):
        for count in (5, 40, 500):
            got = first_tokens(cache, row, count)
            for new, old in zip(got, (k, v), strict=True):
                torch.testing.assert_close(new, old[row : row + 1, :, pads:][:, :, :count], rtol=1e-5, atol=1e-5)


def test_a_key_bias_leaves_and_enters_at_the_positions_of_its_tokens():
    pairs = torch.tensor([0, 5])
    vector = torch.zeros(HEADS, DIM).index_fill_(1, torch.cat((pairs, pairs + DIM // 2)), 30.0)
    bias = KeyBias(Rotary(torch.tensor([1.0, 0.3]).double(), pairs, pairs + DIM // 2), vector)
    cache = LayerCache(method("kivi"), statistics=Statistics(key_bias=bias))
    k, v = fresh(1, 100, torch.float32)
    cache.update(k[:, :, :99], v[:, :, :99])
    cache.update(k[:, :, 99:], v[:, :, 99:])
    for name, pairs_out in (("kivi", 2), ("kivi", 2), ("oscar", 0)):
        cache.adopt(method(name, key_bias="remove" if pairs_out else "keep"))
        assert cache.key_bias_pairs == pairs_out
        assert (cache.dense()[0] - k).abs().max() < 1e-4
    assert cache.store.residual_k.norm() > 0


def test_a_key_bias_that_takes_k_beyond_what_a_record_can_hold_is_refused():
    """K alone and the bias alone could be stored; K without the bias cannot."""
    form, pair = method("kivi", key_bias="remove"), torch.tensor([0])
    k = torch.full((1, HEADS, 8, DIM), 0.1 * LARGEST_TOKEN)
    bias = KeyBias(
        Rotary(torch.zeros(1).double(), pair, pair + 1),
        torch.zeros(HEADS, DIM).index_fill_(1, torch.tensor([0, 1]), -0.95 * LARGEST_TOKEN),
    )
    LayerCache(form, statistics=Statistics()).update(k, k)
    cache = LayerCache(form, statistics=Statistics(key_bias=bias))
    with pytest.raises(UnsupportedInput, match="does not fit its stored numbers"):
        cache.update(k, k)
    assert cache.length == 0
