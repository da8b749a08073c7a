"""Pins at named positions: which tokens they are, that everything else is packed, and what attention reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_mirror import Mirror, assert_same_contents, contents, left_padded
from occamkv.errors import UnsupportedFormat
from occamkv.evals.fidelity import chunk_ends
from occamkv.methods import method
from occamkv.methods.names import unnamed_overrides
from occamkv.methods.pinning import pinning

FORMS = {
    "oscar": method("oscar", pins=[0, 3, 200, 201, 390]),
    "rolling": method("occam", pins="at:7,130,131,132,500"),
    "groups of 64": method("occam_small", pins="at:40"),
    "per token": method("quarot", pins="at:0,1,2,129"),
    "first tokens by number": method("kivi", pins=[0, 1, 2, 3]),
}


def count_one_by_one(form, tokens: int) -> tuple[list[int], int]:
    """Pins and packed tokens of a sequence, one token at a time by the words of the design."""
    named = {int(p) for p in form.pins.removeprefix("at:").split(",")}
    pins, waiting, packed = [], 0, 0
    step = 128 if form.flush == "block" else form.format.k_group
    for token in range(tokens):
        if token in named:
            pins.append(token)
            continue
        waiting += 1
        while waiting >= 128:
            waiting, packed = waiting - step, packed + step
    return pins, packed


@given(
    st.sampled_from(list(FORMS)),
    st.lists(st.sampled_from([1, 2, 31, 33, 127, 128, 129, 260]), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=30)
def test_pins_and_counts_are_those_of_tokens_taken_one_by_one(name, chunks):
    mirror, form, tokens = Mirror(FORMS[name], batch=2), FORMS[name], 0
    for count in chunks:
        mirror.put(*mirror.fresh(count))
        mirror.cache.commit()
        tokens += count
        pins, packed = count_one_by_one(form, tokens)
        assert [(row.pins, row.packed) for row in mirror.cache.store.rows] == [(pins, packed)] * 2
        assert form.packed_tokens(tokens) == packed
        sizes = {"kv_heads": 2, "head_dim": 32, "dtype_bytes": 4}
        assert 2 * form.nbytes(tokens, **sizes) == sum(mirror.cache.nbytes().values())


@pytest.mark.parametrize("name", FORMS)
def test_attention_reads_pins_in_full_precision_wherever_they_lie(name):
    mirror = Mirror(FORMS[name], batch=2)
    mirror.step(300, kept=left_padded(300, 0, 41))
    for count in (1, 1, 3, 90, 1, 200, 1):
        mirror.step(count)


def test_pads_do_not_shift_the_positions():
    alone, padded = Mirror(FORMS["oscar"]), Mirror(FORMS["oscar"])
    k, v = alone.fresh(450)
    alone.put(k, v)
    pads = torch.full((1, 2, 50, 32), 99.0)
    padded.cache.note(padded.put(torch.cat((pads, k), 2), torch.cat((pads, v), 2), left_padded(500, 50)))
    alone.cache.commit()
    padded.cache.commit()
    assert_same_contents(contents(alone.cache, 0), contents(padded.cache, 0))


def test_the_first_tokens_by_number_are_the_first_tokens():
    named, first = (Mirror(method("kivi", pins=pins)) for pins in ([0, 1, 2, 3], "first:4"))
    k, v = named.fresh(400)
    for mirror in (named, first):
        mirror.put(k, v)
        mirror.cache.commit()
    assert_same_contents(contents(named.cache, 0), contents(first.cache, 0))
    assert not FORMS["first tokens by number"].pinning.scatters


def test_twin_a_pin_one_further_is_another_cache():
    one, other = (Mirror(method("oscar", pins=pins)) for pins in ([0, 200], [0, 201]))
    k, v = one.fresh(400)
    for mirror in (one, other):
        mirror.put(k, v)
        mirror.cache.commit()
    with pytest.raises(AssertionError):
        assert_same_contents(contents(one.cache, 0), contents(other.cache, 0))


def test_crop_beam_and_reset():
    mirror = Mirror(FORMS["oscar"], batch=2)
    mirror.step(420)
    mirror.cache.commit()
    mirror.select([1, 1, 0])
    mirror.step(1)
    mirror.remove(100)  # takes the pin at 390 with it
    assert mirror.cache.store.rows[0].pins == [0, 3, 200, 201]
    for _ in range(80):
        mirror.step(1)
    assert mirror.cache.store.rows[0].pins == [0, 3, 200, 201, 390]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("start", [0, 1, 150])
def test_steps_of_an_evaluation_end_where_a_cache_packs(name, start):
    form, ends = FORMS[name], set(chunk_ends(FORMS[name], start=start, end=700))
    for tokens in range(start + 1, 700):
        if form.packed_tokens(tokens) != form.packed_tokens(tokens - 1):
            assert tokens in ends or count_one_by_one(form, tokens)[0][-1:] == [tokens - 1]


def test_how_pins_are_written():
    assert method("oscar", pins=[7, 0, 7]).pins == "at:0,7"
    assert method("oscar", pins=[]).pins == "none"
    assert unnamed_overrides(method("oscar", pins=[5])) == {"pins": "at:5"}
    assert (pinning("at:3,9").place_of(0), pinning("at:3,9").place_of(3), pinning("at:3,9").place_of(7)) == (0, 4, 8)
    assert pinning("at:3,9").place_of(8) == 10
    assert list(pinning("at:3,9,20").among(4, 20)) == [9]
    assert method("oscar", pins="detected").finds_pins and method("oscar", pins="detected").pinned_tokens == 0
    for bad in ([1.5], [-1], ["3"], [True], "at:", "at:1,", "at:-1", {3}, "at:" + ",".join(map(str, range(2000)))):
        with pytest.raises(UnsupportedFormat, match="pins"):
            method("oscar", pins=bad)
