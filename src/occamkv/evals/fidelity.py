"""Measured KL: the same tokens read through a packed cache and through a full-precision cache.

The tokens go through both caches in steps that end where the packed cache flushes, which equals token-by-token
decoding: each query sees its own unpacked tokens in full precision and everything older dequantized. (One whole-prompt
call would read nothing packed and report 0.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from occamkv.cache import CacheReport, Plan
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.integrations.transformers import PackedCache, plan_for
from occamkv.integrations.transformers.model import text_config
from occamkv.methods import Method, method

_LOGITS_AT_ONCE = 2**24  # logits turned into probabilities at a time


@dataclass(frozen=True)
class Fidelity:
    """Means over `positions` predictions of the next token, full precision against packed.

    `kl_*` is KL(full || quantized) in nats; `same_top` the share of positions with the same most likely token;
    perplexities are of the text itself.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    same_top: float
    perplexity: float
    perplexity_full: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-ready data."""
        return asdict(self)


@dataclass
class Tally:
    """Collects positions one step at a time; `result` gives the means."""

    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    nll_full: list[Tensor] = field(default_factory=list)

    def add(self, full: Tensor, packed: Tensor, targets: Tensor) -> None:
        """Add predictions.

        Args:
            full: Logits `[n, vocabulary]` of the full-precision run.
            packed: Logits of the packed run.
            targets: The tokens that came next, `[n]`.
        """
        rows = max(1, _LOGITS_AT_ONCE // full.shape[-1])
        for first in range(0, full.shape[0], rows):
            part = slice(first, first + rows)
            p, q = (x[part].float().log_softmax(-1) for x in (full, packed))
            self.kl.append((p.exp() * (p - q)).sum(-1))
            self.same.append(p.argmax(-1) == q.argmax(-1))
            self.nll.append(-q.gather(-1, targets[part, None])[:, 0])
            self.nll_full.append(-p.gather(-1, targets[part, None])[:, 0])

    def result(self) -> Fidelity:
        """Return the means.

        Raises:
            UnsupportedInput: Nothing was added.
        """
        if not self.kl:
            raise UnsupportedInput("no position was scored; give a longer text or score an earlier position.")
        kl = torch.cat(self.kl).double()
        return Fidelity(
            positions=kl.numel(),
            kl_mean=float(kl.mean()),
            kl_median=float(kl.median()),
            kl_p99=float(kl.quantile(0.99)),
            same_top=float(torch.cat(self.same).double().mean()),
            perplexity=float(torch.cat(self.nll).double().mean().exp()),
            perplexity_full=float(torch.cat(self.nll_full).double().mean().exp()),
        )


def chunk_ends(chosen: Method, *, start: int, end: int) -> list[int]:
    """Return where steps must end so that chunked reading equals token-by-token decoding.

    A step ends with the pins, and then wherever the residual reaches 128 tokens and is flushed.
    """
    step = PAGE_TOKENS if chosen.format is None or chosen.flush == "block" else chosen.format.record_tokens
    pins = chosen.pinned_tokens
    ends, at = [], start
    while at < end:
        stream = at - pins
        at = pins if stream < 0 else pins + (stream // step + 1) * step
        ends.append(min(at, end))
    return ends


@torch.no_grad()
def compare(
    model: nn.Module,
    ids: Tensor,
    chosen: Method | str | Plan,
    *,
    score_from: int,
    one_shot: int = 0,
    min_tokens: int = 0,
    tally: Tally | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Fidelity, CacheReport, int]:
    """Read a text through a packed and a full cache and compare the predictions.

    Args:
        model: A causal language model in eval mode.
        ids: Tokens `[1, T]`.
        chosen: A method, its name, or a plan; it also decides where steps end.
        score_from: First position whose prediction counts.
        one_shot: So many tokens go through in one call first, as `generate` sends a prompt; the rest in steps.
        min_tokens: As in `PackedCache`.
        tally: Collect into this, for figures over several texts.
        progress: Called with the number of tokens read so far.

    Returns:
        The figures, the packed cache's report, and the bytes of the full cache.

    Raises:
        UnsupportedInput: The text is too short to score.
    """
    plan = chosen if isinstance(chosen, Plan) else plan_for(model.config, chosen)
    length = ids.shape[1]
    if ids.shape[0] != 1 or length < 2 or not 0 <= score_from < length - 1:
        raise UnsupportedInput(
            f"ids {tuple(ids.shape)} with score_from={score_from}; "
            "allowed: one text [1, T] and 0 <= score_from < T - 1."
        )
    packed = PackedCache(model, plan=plan, min_tokens=min_tokens)
    full = DynamicCache(config=text_config(model.config))
    ends = [one_shot] if 0 < one_shot < length else []
    methods = {entry.method for entry in plan.layers if entry.packs} or {method("full")}
    ends += sorted({end for each in methods for end in chunk_ends(each, start=one_shot, end=length)})
    tally, start = Tally() if tally is None else tally, 0
    for end in ends:
        first = max(start, score_from)
        last = min(end, length - 1)
        keep = max(1, end - first)
        logits = [_step(model, ids[:, start:end], cache, keep) for cache in (full, packed)]
        if last > first:
            count = last - first
            tally.add(logits[0][:count], logits[1][:count], ids[0, first + 1 : last + 1])
        start = end
        if progress is not None:
            progress(end)
    held = sum(
        t.nbytes
        for layer in full.layers
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(t, Tensor)
    )
    return tally.result(), packed.report(), held


def _step(model: nn.Module, ids: Tensor, cache: DynamicCache, keep: int) -> Tensor:
    """Run a step and return the logits of its last `keep` positions, `[keep, vocabulary]`."""
    out: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=min(keep, ids.shape[1])).logits
    return out[0, -min(keep, ids.shape[1]) :]
