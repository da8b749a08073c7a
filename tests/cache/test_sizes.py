"""Bytes: what the cache says, what its tensors hold, and what the method foretells are one number."""

import pytest
import torch

from cache_mirror import Mirror, held_bytes, left_padded
from occamkv.cache import LayerCache
from occamkv.methods import method
from some_attention import ASKS_AND_FINDS, METHODS

FORMS = (
    METHODS
    | ASKS_AND_FINDS
    | {
        "oscar-rolling-with-pins": method("oscar_roll", pins="first:4"),
        "kivi-m8-g64": method("kivi_g64_m8"),
    }
)
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 131, 132, 160, 255, 256, 260, 300, 1000, 4096)


def calm(*shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens of about one length, so that no pin is found."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


def one_shot(form, tokens: int, *, batch=2, heads=3, head_dim=64, dtype=torch.bfloat16) -> LayerCache:
    mirror = Mirror(form, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype)
    mirror.put(*calm(batch, heads, tokens, head_dim, dtype=dtype))
    mirror.cache.commit()
    return mirror.cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_takes_the_bytes_that_its_method_foretells(name, dtype):
    for tokens in LENGTHS[:-1]:
        cache = one_shot(FORMS[name], tokens, dtype=dtype)
        told = FORMS[name].nbytes(tokens, kv_heads=3, head_dim=64, dtype_bytes=dtype.itemsize)
        assert sum(cache.nbytes().values()) == held_bytes(cache) == 2 * told, f"{tokens} tokens"
        assert cache.packed_tokens() == [FORMS[name].packed_tokens(tokens)] * 2


@pytest.mark.parametrize("name", FORMS)
def test_a_growing_cache_takes_the_bytes_of_a_prompt(name):
    mirror = Mirror(FORMS[name], heads=3, head_dim=80)
    tokens = 0
    for count in (100, *[1] * 60, 200, *[1] * 40):
        mirror.put(*calm(1, 3, count, 80))
        mirror.cache.commit()
        tokens += count
        told = FORMS[name].nbytes(tokens, kv_heads=3, head_dim=80, dtype_bytes=4)
        assert sum(mirror.cache.nbytes().values()) == held_bytes(mirror.cache) == told


def test_tokens_that_wait_are_counted_with_what_their_rotation_made():
    mirror = Mirror(FORMS["oscar"], batch=2)
    mirror.step(200)
    before = sum(mirror.cache.nbytes().values())
    k, v = mirror.fresh(9)
    mirror.put(k, v)
    assert sum(mirror.cache.nbytes().values()) == held_bytes(mirror.cache) == before + k.nbytes + v.nbytes
    mirror.cache.attend(k)
    assert sum(mirror.cache.nbytes().values()) == held_bytes(mirror.cache) == before + 2 * (k.nbytes + v.nbytes)


def test_a_padded_batch_counts_what_it_remembers_about_pads():
    mirror = Mirror(FORMS["oscar"], batch=2)
    mirror.step(600, kept=left_padded(600, 0, 100))
    assert sum(mirror.cache.nbytes().values()) == held_bytes(mirror.cache)


def test_an_empty_cache_takes_nothing():
    cache = LayerCache(FORMS["oscar"])
    assert sum(cache.nbytes().values()) == held_bytes(cache) == 0


def test_a_small_model_at_4096_tokens_is_at_least_4_3_times_smaller():
    """One layer of 3 KV heads of 64 channels; the residual is counted."""
    full = 2 * 4096 * 3 * 64 * 2
    assert full / held_bytes(one_shot(method("oscar"), 4096, batch=1)) >= 4.3
    assert full / held_bytes(one_shot(method("oscar_g64_m8"), 4096, batch=1)) >= 5.4


def test_twin_a_tensor_that_is_not_counted_would_show():
    cache = one_shot(FORMS["oscar"], 300)
    cache.store.forgotten = torch.zeros(10)
    assert held_bytes(cache) == sum(cache.nbytes().values()) + 40


def steps_of(cache: LayerCache, mirror: Mirror, counts) -> list[int]:
    packed = []
    for count in counts:
        mirror.step(count)
        packed.append(cache.packed_tokens()[0])
    return packed


@pytest.mark.parametrize("name", ["oscar", "oscar-rolling-with-pins"])
def test_nothing_is_packed_below_min_tokens(name):
    mirror = Mirror(FORMS[name], min_tokens=500)
    packed = steps_of(mirror.cache, mirror, (300, 1, 160, 1, 37, *[1] * 3))
    assert packed[:4] == [0] * 4, "462 tokens"
    assert packed[-1] == FORMS[name].packed_tokens(502)
    told = FORMS[name].nbytes(502, kv_heads=2, head_dim=32, dtype_bytes=4)
    assert sum(mirror.cache.nbytes().values()) == held_bytes(mirror.cache) == told
    mirror.step(1)


def test_a_batch_with_min_tokens_packs_each_sequence_when_it_is_long_enough():
    mirror = Mirror(FORMS["oscar"], batch=2, min_tokens=300)
    mirror.step(290, kept=left_padded(290, 0, 200))
    assert mirror.cache.packed_tokens() == [0, 0]
    for _ in range(12):
        mirror.step(1)
    assert mirror.cache.packed_tokens() == [256, 0]
    mirror.step(200)
    mirror.step(1)
    assert mirror.cache.packed_tokens()[1] == 256
    mirror.remove(300)
    mirror.step(1)


@pytest.mark.parametrize("pause", [{"records_past": True}, {"pack_after_attend": False}], ids=lambda p: next(iter(p)))
def test_packing_can_wait_for_the_next_step(pause):
    """While speculative tokens may be taken back, or while several layers read one K and V."""
    mirror = Mirror(FORMS["oscar"])
    for name, value in pause.items():
        setattr(mirror.cache, name, value)
    mirror.step(200)
    assert mirror.cache.packed_tokens() == [0]
    mirror.check(200)  # a second reader of the same step sees the same
    mirror.step(1)
    assert mirror.cache.packed_tokens() == [128]
