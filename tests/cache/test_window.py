"""A window: what is kept, what it takes, where the pins stand, and what attention reads, by float64 of its own."""

import copy

import pytest
import torch
from torch import Tensor

from attention_truth import attention
from cache_mirror import Mirror, held_bytes
from occamkv.cache import LayerCache
from occamkv.cache.masks import read_mask
from occamkv.cache.pins import standing
from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.kernels import cpu
from occamkv.methods import method
from occamkv.methods.crossing import Statistics
from occamkv.ops.rope import Rotary
from some_attention import some_statistics

HEADS, DIM = 2, 32
ROTARY = Rotary.of(10_000.0 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))
FORMS = {
    "rolling": method("occam", window=300),
    "block": method("oscar", window=256, pins="first:4"),
    "groups of 64, per position": method("occam_small", window=400, pins="at:0,5,60"),
    "no pins": method("kivi", window=256),
    "found pins": method("occam_quality", window=300, feedback=False),
    "4 bits": method("occam_k4v4", window=384),
}


def a_cache(form, **options) -> LayerCache:
    known = some_statistics(form, HEADS, DIM) or Statistics()
    return LayerCache(form, statistics=Statistics(known.balance, known.moment, None, ROTARY), **options)


class Stream:
    """Tokens `[1, H, T, D]` whose K has its position turned in, and a cache that has seen the first of them."""

    def __init__(self, form, tokens: int = 2000, *, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(1)
        self.plain, self.v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
        self.k = ROTARY.turn(self.plain, torch.arange(tokens)).to(dtype)
        self.v, self.dtype, self.at, self.form = self.v.to(dtype), dtype, 0, form
        self.cache = a_cache(form, **options)

    def put(self, count: int) -> None:
        part = slice(self.at, self.at + count)
        self.cache.update(self.k[:, :, part], self.v[:, :, part])
        self.at += count

    def attend(self, count: int, q: Tensor) -> Tensor:
        self.put(count)
        return self.cache.attend(q)

    def kept(self) -> tuple[list[int], int]:
        """Positions of the pins, and of the first other token that is held."""
        row = self.cache.store.rows[0]
        stream = [t for t in range(self.at) if t not in row.pins]
        return row.pins, stream[row.dropped]

    def truth(self, q: Tensor, *, without: tuple[int, ...] = ()) -> Tensor:
        """Attention in float64 over pins at their new places and everything behind the dropped tokens."""
        pins, first = self.kept()
        passed = [p for p in pins if p < first]
        places = {p: first - len(passed) + i for i, p in enumerate(passed)}
        where = [t for t in (*passed, *range(first, self.at)) if t not in without]
        at = torch.tensor([places.get(t, t) for t in where])
        k = ROTARY.turn(self.plain[:, :, where], at).double()
        now = torch.arange(self.at - q.shape[2], self.at)[None]
        return attention(q.double(), k, self.v[:, :, where].double(), q_positions=now, positions=at[None])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("step", [7, 128, 300])
def test_at_least_the_window_and_at_most_a_page_and_a_residual_more_is_kept(name, step):
    stream, form = Stream(FORMS[name]), FORMS[name]
    for _ in range(1300 // step):
        stream.put(step)
        stream.cache.commit()
        row = stream.cache.store.rows[0]
        held = row.held + row.residual
        assert held >= min(form.window, stream.at - row.pinned)
        assert held < form.window + 128 + form.residual_tokens
        assert row.dropped % 128 == 0 and (row.dropped > 0) == (row.packed > row.held)
    assert stream.cache.store.rows[0].dropped >= 512


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.finds_pins])
def test_bytes_stay_and_are_those_of_the_formula(name):
    form, seen = FORMS[name], set()
    stream = Stream(form)
    for tokens in range(100, 2000, 100):
        stream.put(100)
        stream.cache.commit()
        size = form.nbytes(tokens, kv_heads=HEADS, head_dim=DIM, dtype_bytes=4)
        assert sum(stream.cache.nbytes().values()) == size
        if tokens > 1000:
            seen.add(size)
    assert max(seen) <= min(seen) + form.format.page_bytes(kv_heads=HEADS, head_dim=DIM)
    stream.put(1)
    stream.cache.attend(torch.randn(1, 2 * HEADS, 1, DIM))
    assert held_bytes(stream.cache) <= max(seen) + 4096, "pins are moved for a step and not held twice"
    without = method(str(form).rstrip("+")).nbytes(1900, kv_heads=HEADS, head_dim=DIM, dtype_bytes=4)
    assert min(seen) < 0.6 * without, "twin: without a window it would be much more"


@pytest.mark.parametrize(("chunk", "whole"), [(1, True), (40, False)], ids=["whole steps", "the long way"])
def test_attention_reads_the_window_and_the_pins_just_before_it(chunk, whole, monkeypatch):
    """With 4 bits the packed tokens are close to what they were; what is read is told from what else could be read."""
    if not whole:
        monkeypatch.setattr(cpu, "stepper", lambda layer: None)
    stream = Stream(FORMS["4 bits"])
    generator = torch.Generator().manual_seed(2)
    stream.put(300)
    stream.cache.commit()
    errors = []
    while stream.at + chunk < 1500:
        q = 0.5 * torch.randn(1, 2 * HEADS, chunk, DIM, generator=generator)
        stream.put(chunk)
        pins, first = stream.kept()
        truth = stream.truth(q)
        out = stream.cache.attend(q)
        errors.append(float((out - truth).norm() / truth.norm()))
        assert pins == [0, 1, 2, 3]
    assert first > 900
    assert max(errors) < 0.2 and sum(errors) < 0.1 * len(errors)


def test_twins_pins_left_where_they_were_and_no_pins_are_told_apart():
    stream = Stream(FORMS["4 bits"])
    stream.put(1400)
    stream.cache.commit()
    stream.put(1)
    # the query looks at a pin: at the place where it should stand
    _, first = stream.kept()
    q = 3 * ROTARY.turn(stream.plain[:, :, :1], torch.tensor([first - 4])).repeat_interleave(2, 1)
    truth, out = stream.truth(q), copy.deepcopy(stream.cache).attend(q)
    assert (out - truth).norm() / truth.norm() < 0.12
    left = copy.deepcopy(stream.cache)
    left.store.move = None
    assert (left.attend(q) - truth).norm() / truth.norm() > 0.3
    gone = copy.deepcopy(stream.cache)
    gone.store.rows[0].pins = []
    gone.store.rows[0].packed += 4  # keeps positions as they are
    gone.store.rows[0].dropped += 4
    assert (gone.attend(q) - truth).norm() / truth.norm() > 0.3


def test_where_pins_stand():
    assert standing([0, 1, 2, 3], 4) == [0, 1, 2, 3]
    assert standing([0, 1, 2, 3], 132) == [128, 129, 130, 131]
    assert standing([0, 50, 400], 300) == [298, 299, 400]
    assert standing([], 300) == []


@pytest.mark.parametrize("hidden", [0, 2, 700, 1250], ids=["a pin", "another", "a dropped token", "a held token"])
def test_a_mask_hides_the_token_that_it_names_wherever_pins_stand(hidden):
    stream = Stream(FORMS["4 bits"])
    stream.put(1300)
    stream.cache.commit()
    stream.put(1)
    pins, first = stream.kept()
    assert pins == [0, 1, 2, 3] and 700 < first <= 1250
    mask = torch.ones(1, 1, 1, 1301).bool()
    mask[..., hidden] = False
    seen = read_mask(mask, before=None, new=1, batch=1)
    q = ROTARY.turn(stream.plain[:, :, :1], torch.tensor([first - 4])).repeat_interleave(2, 1)  # looks at the first pin
    gone, stay = stream.truth(q, without=(hidden,)), stream.truth(q)
    out = stream.cache.attend(q, seen=seen)
    assert (out - gone).norm() / gone.norm() < 0.12
    assert ((gone - stay).norm() / stay.norm() > 0.3) == (hidden == 0)


def test_moving_again_and_again_rounds_once():
    stream = Stream(FORMS["rolling"], dtype=torch.bfloat16)
    for _ in range(30):
        stream.put(64)
        stream.cache.commit()
        stream.cache.store.pinned()
    _, first = stream.kept()
    shown = stream.cache.store.pinned()
    inside = stream.cache._crossing
    k, _ = inside.leave(shown.k.float(), shown.v.float())
    exact = ROTARY.turn(stream.plain[:, :, :4], torch.arange(first - 4, first))
    assert shown.positions.tolist() == [list(range(first - 4, first))]
    assert (k - exact).norm() / exact.norm() < 0.02


def test_a_pin_that_was_cropped_and_came_again_is_the_new_one():
    """It stands in the window, at the same place as before, beside one that was moved."""
    outs = []
    for crops in (False, True):
        stream = Stream(method("oscar", window=256, pins="at:0,700"))
        stream.put(690)
        stream.cache.commit()
        if crops:
            other = 3 * torch.randn(1, HEADS, 21, DIM, generator=torch.Generator().manual_seed(7))
            stream.cache.update(other[:, :, :20], other[:, :, :20])
            stream.cache.update(other[:, :, 20:], other[:, :, 20:])
            stream.cache.attend(torch.randn(1, 2 * HEADS, 1, DIM))
            stream.cache.remove(21)
        stream.put(20)
        q = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(8))
        outs.append(stream.attend(1, q))
        assert stream.cache.store.rows[0].dropped and stream.cache.store.rows[0].pins == [0, 700]
    assert torch.equal(*outs)


def test_sequences_of_different_lengths_slide_on_their_own():
    form = FORMS["rolling"]
    mirror = Mirror(form, batch=2)
    mirror.cache.statistics = Statistics(mirror.cache.statistics.balance, None, None, ROTARY)
    kept = torch.arange(900) >= torch.tensor([[0], [350]])
    mirror.cache.note(mirror.put(*mirror.fresh(900), kept))
    mirror.cache.commit()
    mirror.cache.note(mirror.put(*mirror.fresh(1)))
    first, second = mirror.cache.store.rows
    assert first.dropped > second.dropped > 0
    assert [row.tokens for row in (first, second)] == [900, 550]
    q = torch.randn(2, 4, 1, DIM)
    both = mirror.cache.attend(q, seen=None)
    assert bool(both.isfinite().all())


def test_one_append_of_any_length_drops_whole_pages_of_what_was_packed_before():
    stream = Stream(FORMS["rolling"])
    stream.put(164)
    stream.cache.commit()
    store = stream.cache.store
    assert store.rows[0].packed == 64
    for _ in range(2):
        store.append(stream.k[:, :, :1500], stream.v[:, :, :1500])
        row = store.rows[0]
        assert row.held + row.residual >= 300 and row.dropped % 128 == 0 and len(row.pages) == -(-row.held // 128)
    assert row.dropped >= 1024


def test_crop_within_the_window_works_and_beyond_it_is_refused_unchanged():
    stream = Stream(FORMS["rolling"])
    stream.put(1500)
    stream.cache.commit()
    row = copy.deepcopy(stream.cache.store.rows[0])
    with pytest.raises(UnsupportedInput, match=f"cannot remove 900 tokens; allowed: up to {row.held + row.residual}"):
        stream.cache.remove(900)
    assert stream.cache.store.rows[0] == row and stream.cache.length == 1500
    stream.cache.remove(150)
    assert stream.cache.store.rows[0].tokens == 1350
    stream.at = 1350
    stream.put(200)
    stream.cache.commit()
    assert stream.cache.store.rows[0].tokens == 1550


def test_what_cannot_be_is_refused():
    stream = Stream(FORMS["rolling"])
    stream.put(1000)
    stream.cache.commit()
    with pytest.raises(UnsupportedInput, match="have left the window of 300"):
        stream.cache.dense()
    with pytest.raises(UnsupportedInput, match="how this model embeds positions is not known"):
        bare = LayerCache(FORMS["block"])
        bare.update(torch.randn(1, 2, 8, 32), torch.randn(1, 2, 8, 32))
    with pytest.raises(UnsupportedInput, match="min_tokens is 500; allowed: at most the window of 300"):
        LayerCache(FORMS["rolling"], min_tokens=500)
    for bad in (255, 0, -5, 300.0, True, "300"):
        with pytest.raises(UnsupportedFormat, match=r"window is .*at least 256"):
            method("occam", window=bad)
