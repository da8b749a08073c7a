"""A layer through steps, crops, choices of sequences and copies in any order: float64 attention over its memory.

Pages are decoded by the format's own reader; which token each of them is and where it stands is worked out here, one
by one, from the words of the design.
"""

import copy
import random

import pytest
import torch
from torch import Tensor

from occamkv.cache import LayerCache
from occamkv.cache.masks import Seen, read_mask
from occamkv.errors import UnsupportedInput
from occamkv.formats.records import decode_pages, from_groups, pages_of
from occamkv.kernels import cpu
from occamkv.methods import method
from occamkv.methods.crossing import Statistics
from occamkv.ops.rope import KeyBias, Rotary

HEADS, DIM, GQA = 2, 32, 2
ROTARY = Rotary.of(10_000.0 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))
PAIRS = torch.tensor([0, 2, 5])
FORMS = {
    "window": method("occam", window=256),
    "window, pins in between": method("occam_small", window=300, pins="at:0,5,140,300"),
    "window, found pins": method("occam_quality", window=300, feedback=False),
    "window, first keys": method("oscar", window=256, pins="first:4", key_bias="remove"),
    "window, no pins": method("quarot", window=256),
    "pins in between": method("occam", pins="at:0,5,140,300"),
    "lowest": method("kivi", pins="lowest:3", key_bias="remove"),
    "found pins": method("oscar_roll", pins="first:4+found", key_bias="remove"),
}
CALLS, ERROR = 10, 5e-3  # the C++ backend attends in 16-bit fixed point


class Life:
    """A cache, which of its slots are real, and chance that decides what comes."""

    def __init__(self, form, *, batch: int, leaning: bool, seed: str) -> None:
        self.chance, self.draws = random.Random(seed), torch.Generator().manual_seed(len(seed))
        vector = torch.zeros(HEADS, DIM).index_fill_(1, torch.cat((PAIRS, PAIRS + DIM // 2)), 12.0)
        bias = KeyBias(Rotary(ROTARY.frequencies[PAIRS], PAIRS, PAIRS + DIM // 2), vector)
        balance = torch.exp(0.2 * self.some(HEADS, DIM)) if form.needs_model else None
        self.form, self.pin_bias = form, self.some(HEADS * GQA) if leaning and form.pins != "none" else torch.zeros(())
        given = self.pin_bias if self.pin_bias.dim() else None
        self.cache = LayerCache(form, statistics=Statistics(balance, None, bias, ROTARY), pin_bias=given)
        self.real = torch.zeros(batch, 0).bool()

    def some(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draws)

    def held(self, row: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """K and V `[H, n, D]` in model space, where each token stands, and how many of them, the first, are pins."""
        store, counts, inside = self.cache.store, self.cache.store.rows[row], self.cache._crossing
        assert len(counts.pages) == pages_of(counts.packed - counts.dropped)
        stream = [t for t in range(counts.tokens) if t not in counts.pins]
        slots = [n % store.residual_k.shape[2] for n in range(counts.packed, counts.packed + counts.residual)]
        parts = [[x[row][:, : counts.pinned] for x in (store.pin_k, store.pin_v)]]
        if counts.held:
            pages = decode_pages(store.packed_tokens().gather(counts.pages))
            parts.append([from_groups(x, 1)[0][:, : counts.held] for x in pages])
        parts.append([x[row][:, slots] for x in (store.residual_k, store.residual_v)])
        at = torch.tensor([*counts.pins, *stream[counts.dropped :]], dtype=torch.int64)
        k, v = inside.leave(*(torch.cat(side, dim=1).float()[None] for side in zip(*parts, strict=True)), at[None])
        places = at.clone()
        if counts.dropped:
            first = stream[counts.dropped]
            behind = sum(pin < first for pin in counts.pins)
            places[:behind] = torch.arange(first - behind, first)
        return ROTARY.turn(k[0], places - at), v[0], places, counts.pinned

    def truth(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over what is held and the new tokens; queries of pads give zeros."""
        out, new = torch.zeros(q.shape).double(), q.shape[2]
        for row, real in enumerate(self.real):
            kept, at = real[-new:], (real.cumsum(0) - 1)[-new:][real[-new:]]
            pinned = torch.isin(at, torch.tensor(self.form.pinning.positions, dtype=torch.int64))
            held_k, held_v, places = k[row][:, kept], v[row][:, kept], at
            if self.cache.store is not None:
                *old, stand, pins = self.held(row)
                held_k, held_v = (torch.cat(pair, dim=1) for pair in zip(old, (held_k, held_v), strict=True))
                pinned, places = torch.cat((torch.arange(len(stand)) < pins, pinned)), torch.cat((stand, places))
            held_k, held_v = (x.double().repeat_interleave(GQA, dim=0) for x in (held_k, held_v))
            logits = q[row][:, kept].double() @ held_k.mT * DIM**-0.5
            logits = logits + self.pin_bias.double().expand(HEADS * GQA)[:, None, None] * pinned
            out[row][:, kept] = logits.masked_fill(places > at[:, None], float("-inf")).softmax(-1) @ held_v
        return out

    def step(self, count: int) -> None:
        batch, held = self.real.shape
        kept = torch.ones(batch, count).bool()
        if not held and batch > 1:
            kept = torch.arange(count) >= torch.tensor([[0], [count // 3]])
        k, v, q = (self.some(batch, heads, count, DIM) for heads in (HEADS, HEADS, HEADS * GQA))
        k[:, :, ::50] *= 0.05
        self.real = torch.cat((self.real, kept), dim=1)
        self.cache.commit()
        truth = self.truth(q, k, v)
        self.cache.update(k, v)
        out = self.cache.attend(q, seen=self.seen(count))
        assert (out * kept[:, None, :, None] - truth).abs().max() < ERROR * truth.abs().max()

    def seen(self, new: int) -> Seen | None:
        if bool(self.real.all()):
            return None
        slots = self.real.shape[1]
        mask = torch.ones(new, slots).bool().tril(slots - new) & self.real[:, None, None]
        return read_mask(mask, before=self.cache.slots_before(new), new=new, batch=len(self.real))

    def something(self) -> None:
        """Whatever comes."""
        what = self.chance.choice(["steps", "steps", "chunk", "chunk", "crop", "select", "copy"])
        if what == "crop":
            count = self.chance.choice([1, 7, 40, 130])
            try:
                self.cache.remove(count)
            except UnsupportedInput:
                return
            self.real = self.real[:, :-count]
        elif what == "select":
            rows = [self.chance.randrange(len(self.real)) for _ in self.real]
            self.cache.select(rows)
            self.real = self.real[rows]
        elif what == "copy":
            self.cache = copy.deepcopy(self.cache)
        for _ in range(40 if what == "steps" else 1):
            self.step(self.chance.choice([33, 128, 260]) if what == "chunk" else 1)


@pytest.mark.parametrize(("batch", "whole"), [(1, True), (2, True), (2, False)], ids=["one", "two", "the long way"])
@pytest.mark.parametrize("name", FORMS)
def test_attention_is_that_over_what_is_held_whatever_came_before(name, batch, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(cpu, "stepper", lambda layer: None)
    life = Life(FORMS[name], batch=batch, leaning=batch == 2, seed=f"{name} {batch}")
    life.step(500)
    for _ in range(CALLS):
        life.something()
    if FORMS[name].window:
        while not all(row.dropped for row in life.cache.store.rows):
            life.step(100)
        life.step(1)
