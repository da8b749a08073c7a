"""Attention through the cache: float64 attention over what is packed, decoded, and the exact rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_mirror import Mirror, left_padded
from occamkv.cache import LayerCache
from occamkv.errors import UnsupportedInput
from occamkv.methods import method
from some_attention import ASKS_AND_FINDS, METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = (
    METHODS
    | ASKS_AND_FINDS
    | {
        "oscar-rolling-with-pins": method("oscar_roll", pins="first:4"),
        "kivi-g64-rolling": method("kivi_g64_roll"),
    }
)
OUTLIERS = 0.04


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_then_decoding_then_a_chunk(name, dtype):
    mirror = Mirror(FORMS[name], batch=2, dtype=dtype, outliers=OUTLIERS)
    for count in (150, 1, 1, 40, 1, 131, 1, 97):
        mirror.step(count)
    waits_for_blocks = FORMS[name].flush == "block" and FORMS[name].finds_pins
    assert min(mirror.cache.packed_tokens()) >= (128 if waits_for_blocks else 192)


@pytest.mark.parametrize("name", ["oscar", "oscar-rolling-with-pins", "occam_quality", "ott", "turboquant"])
def test_token_by_token(name):
    mirror = Mirror(FORMS[name], outliers=OUTLIERS)
    for _ in range(270):
        mirror.step(1)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_other_head_dims(head_dim):
    mirror = Mirror(FORMS["oscar-k4v3-balanced-with-float16-norms"], head_dim=head_dim, heads=3)
    for count in (300, 1, 5):
        mirror.step(count, gqa=3)


@pytest.mark.parametrize(
    "options",
    [{"window": 150}, {"scale": 0.4}, {"softcap": 3.0}, {"sinks": torch.tensor([0.0, 2.0, -1.0, 0.5])}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["oscar-rolling-with-pins", "occam_quality", "ott"])
def test_options_reach_the_backend(name, options):
    mirror = Mirror(FORMS[name], batch=2, outliers=OUTLIERS)
    for count in (200, 1, 7):  # the window's edge lies among packed tokens
        mirror.step(count, **options)


@pytest.mark.parametrize("name", ["oscar", "oscar-rolling-with-pins", "rtn", *ASKS_AND_FINDS])
def test_left_padding_in_the_prompt_and_in_a_later_chunk(name):
    mirror = Mirror(FORMS[name], batch=4, outliers=OUTLIERS)
    mirror.step(180, kept=left_padded(180, 0, 70, 178, 180))  # the last sequence has no token yet
    mirror.step(1)
    mirror.step(60, kept=left_padded(60, 30, 0, 59, 3))
    mirror.step(140, kept=left_padded(140, 0, 139, 7, 0))
    for _ in range(3):
        mirror.step(1)
    mirror.step(200, window=90)
    assert [row.tokens for row in mirror.cache.store.rows] == mirror.real.sum(1).tolist()


def test_a_pad_that_was_not_marked_would_be_noticed():
    """Twin: the same steps with the pads taken for tokens."""
    mirror = Mirror(FORMS["oscar"], batch=2)
    k, v = mirror.fresh(150)
    seen = mirror.put(k, v, left_padded(150, 0, 20))
    with pytest.raises(AssertionError, match="error"):
        mirror.check(150, seen=seen._replace(kept=None))


def test_attending_needs_an_update_first():
    with pytest.raises(UnsupportedInput, match=r"call update\(k, v\)"):
        LayerCache(FORMS["oscar"]).attend(torch.zeros(1, 2, 1, 64))


@pytest.mark.parametrize("name", ["oscar", "kivi", "oscar-rolling-with-pins", *ASKS_AND_FINDS])
def test_dense_gives_what_attention_reads(name):
    mirror = Mirror(FORMS[name], batch=2, outliers=OUTLIERS)
    mirror.step(200, kept=left_padded(200, 0, 33))
    mirror.step(1)
    mirror.put(*mirror.fresh(9))
    dense = mirror.cache.dense()
    k, v, positions = mirror.expected()
    for read, expected in zip(dense, (k, v), strict=True):
        assert read.shape == (2, 2, 210, 32)
        assert (read[1, :, :33] == 0).all(), "pads are zeros"
        torch.testing.assert_close(read[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read[1, :, 33:].double(), expected[1][:, positions[1] >= 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_unpacked_tokens_lose_no_more_than_one_rounding(name, dtype):
    mirror = Mirror(FORMS[name], dtype=dtype)
    k, v = mirror.fresh(100)
    mirror.put(k, v)
    mirror.cache.commit()
    for read, original in zip(mirror.cache.dense(), (k, v), strict=True):
        error = (read.double() - original.double()).norm() / original.double().norm()
        assert error <= max(torch.finfo(dtype).eps, 1e-6), "a rotation in float32 costs a few roundings itself"


chunks = st.sampled_from([1, 1, 1, 2, 20, 31, 33, 127, 128, 129, 290])
actions = st.one_of(
    st.tuples(st.just("step"), chunks),
    st.tuples(st.just("pads"), chunks),
    st.tuples(st.just("remove"), st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0])),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
)


@given(st.sampled_from(list(FORMS)), st.lists(actions, min_size=2, max_size=8), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_course_of_events(name, course, seed):
    """Chunks, single tokens, pads, crops and choices of sequences, in any order; every answer is compared."""
    mirror = Mirror(FORMS[name], batch=2, seed=seed, outliers=OUTLIERS)
    mirror.step(150)
    for action, what in course:
        batch = len(mirror.k)
        if action == "remove":
            mirror.remove(int(what * mirror.cache.length))
        elif action == "select":
            mirror.select([row % batch for row in what])
        elif action == "pads" and what > 1:
            mirror.step(what, kept=left_padded(what, *[(row * 7 + seed) % what for row in range(batch)]))
        else:
            mirror.step(what)
    mirror.step(1)
