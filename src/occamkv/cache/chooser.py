"""The chooser of one layer: it looks at queries until the first tokens are due, and then names the layer's method."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occamkv.methods import Method
from occamkv.methods.auto import Dial, Errors, Option, options, typical_errors
from occamkv.methods.trial import Reading, Sample, errors, has_feedback, spread, whole

if TYPE_CHECKING:
    from occamkv.cache.layer import LayerCache

SAMPLE_TOKENS = 196  # 4 pins and three groups of 64; twice as many take twice as long
SAMPLE_QUERIES = 32
_RECENT = 4  # a query sees one of so many tokens, the newest, in full precision
_log = logging.getLogger("occamkv.auto")


class Chooser:
    """Collects queries of the first 196 tokens of the longest sequence, and chooses by what they see.

    Args:
        dial: Spends the budget, with the choosers of the other layers of the cache.
        index: Number of the layer, for the log.
    """

    def __init__(self, dial: Dial, index: int) -> None:
        self.dial, self.index = dial, index
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._reading = Reading()

    def see(self, q: Tensor, cache: LayerCache, reading: Reading) -> None:
        """Look at the queries of the newest slots, `[B, Hq, T, D]` in model space, before anything of them is packed.

        Only those of the second half of the tokens so far are kept, at most 32 of a call.
        """
        if cache.chooser is not self:
            return
        if cache.new == cache.length:
            self._seen = []
        row, at = _positions(cache, q.shape[2])
        end = min(whole(SAMPLE_TOKENS, cache.method.pinning.leading), int(at.amax()) + 1)
        good = ((at >= end // 2) & (at < end)).nonzero()[:, 0]
        few = good[spread(len(good), SAMPLE_QUERIES)]
        if len(few):
            self._seen.append((q[row, :, few], at[few]))
        self._reading = reading

    def choose(self, cache: LayerCache) -> Method:
        """Return the method of this layer, within what the budget leaves.

        Raises:
            UnsupportedFormat: Even the cheapest candidate takes more than the budget.
        """
        sample = self._sample(cache)
        heads, head_dim = (int(first_tokens(cache, 0, 1)[0].shape[axis]) for axis in (1, 3))
        feedback, chosen, dial = has_feedback(cache.statistics), cache.method, self.dial

        def possible(found: Errors) -> list[Option]:
            return options(chosen, found, kv_heads=heads, head_dim=head_dim, feedback=feedback)

        typical = possible(typical_errors("none" if cache.statistics is None else "balanced"))
        if sample is None:
            found, how = typical, "no queries were seen, errors of a typical layer"
        else:
            recent = sample.k.shape[1] // _RECENT
            found = possible(errors(sample, chosen, cache.statistics, recent=recent))
            how = f"{sample.q.shape[1]} queries on {sample.k.shape[1]} tokens"
        taken = dial.choose(found, typical=typical)
        self._seen = []
        _log.info(
            "layer %d: %s with K rotation %s, %.2f bits, output error %.2g (%s)",
            *(self.index, taken.method, taken.method.k_rotation, taken.bits, taken.error, how),
        )
        if len(dial.chosen) == dial.layers:
            total = sum(option.error for option in dial.chosen)
            _log.info(
                "%d layers: %.3f bits per value on average, budget %.2f, sum of output errors %.2g",
                *(dial.layers, dial.mean_bits, dial.budget, total),
            )
        return taken.method

    def _sample(self, cache: LayerCache) -> Sample | None:
        """Return the tokens and at most 32 queries of their second half; None if no query was seen."""
        if not self._seen:
            return None
        row, _ = _positions(cache, 1)
        k, v = (x[0] for x in first_tokens(cache, row, SAMPLE_TOKENS))
        end = whole(k.shape[1], cache.method.pinning.leading)
        q, at = torch.cat([q for q, _ in self._seen], dim=1), torch.cat([at for _, at in self._seen])
        good = ((at >= end // 2) & (at < end)).nonzero()[:, 0]
        few = good[spread(len(good), SAMPLE_QUERIES)]
        return Sample(q[:, few], at[few].to(k.device), k[:, :end], v[:, :end], self._reading) if len(few) else None


def _positions(cache: LayerCache, new: int) -> tuple[int, Tensor]:
    """Return the number of the longest sequence, and the positions of its newest `new` slots, -1 for pads."""
    real = cache.real_slots()
    if real is None:
        return 0, torch.arange(cache.length - new, cache.length)
    row = int(real.sum(1).argmax())
    return row, (real[row].cumsum(0) - 1).masked_fill(~real[row], -1)[-new:].cpu()


def first_tokens(cache: LayerCache, row: int, count: int) -> tuple[Tensor, Tensor]:
    """Return K and V of the first real tokens of a sequence, at most `count`: float32 `[1, H, n, D]`, model space.

    Those of the current step are among them.
    """
    (k, v), step = cache.read(row), cache.step
    if step is not None:
        step_k, step_v = step.first_real(row, max(0, count - k.shape[2]))
        k, v = torch.cat((k, step_k), dim=2), torch.cat((v, step_v), dim=2)
    return k[:, :, :count], v[:, :, :count]
