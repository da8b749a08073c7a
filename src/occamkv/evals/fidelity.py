"""Measured KL: the same tokens read through a packed cache and through a full-precision cache.

The tokens go through both caches in steps that end where the packed cache flushes, which equals token-by-token
decoding: each query sees its own unpacked tokens in full precision and everything older dequantized. (One whole-prompt
call would read nothing packed and report 0.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from occamkv.cache import CacheReport, Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals.layers import LayerWatch
from occamkv.formats import PAGE_TOKENS
from occamkv.integrations.transformers import PackedCache, plan_for
from occamkv.integrations.transformers.layer import PackedLayer
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

    def extend(self, other: Tally) -> None:
        """Add the positions of another tally."""
        for own, new in ((self.kl, other.kl), (self.same, other.same), (self.nll, other.nll)):
            own.extend(new)
        self.nll_full.extend(other.nll_full)

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
    step = PAGE_TOKENS if chosen.format is None else chosen.flush_tokens
    pinning, ends, at = chosen.pinning, list[int](), start
    while at < end:
        number = stream = at - pinning.before(at)
        if pinning.lowest and stream >= PAGE_TOKENS:
            stream -= pinning.lowest  # they have left the stream by then
        at = pinning.leading if at < pinning.leading else pinning.place_of(number + step - stream % step)
        ends.append(min(at, end))
    return ends


@dataclass
class Reading:
    """What one method made of one text.

    `tally` holds the scored positions, `cache` the packed cache behind the last token, `full_bytes` the bytes of the
    full cache, `layer_errors` the relative error of each packed layer's attention output (after its projection) over
    the scored positions, if it was asked for.
    """

    tally: Tally
    cache: PackedCache
    full_bytes: int = 0
    layer_errors: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def read_together(
    model: nn.Module,
    ids: Tensor,
    plans: Mapping[str, Plan],
    *,
    score_from: int,
    one_shot: int = 0,
    min_tokens: int = 0,
    watch_layers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Reading]:
    """Read a text through packed caches and a full one, step by step side by side, and compare the predictions.

    Args:
        model: A causal language model in eval mode.
        ids: Tokens `[1, T]`.
        plans: A plan per method. Steps end where any of them flushes, so they should flush alike (`step_ends`).
            Plans that pack nothing go along with the others.
        score_from: First position whose prediction counts.
        one_shot: So many tokens go through in one call first, as `generate` sends a prompt; the rest in steps.
        min_tokens: As in `PackedCache`.
        watch_layers: Also compare the output of each attention layer.
        progress: Called with the number of tokens read so far.

    Raises:
        UnsupportedInput: The text is too short to score.
    """
    length = ids.shape[1]
    if ids.shape[0] != 1 or length < 2 or not 0 <= score_from < length - 1:
        raise UnsupportedInput(
            f"ids {tuple(ids.shape)} with score_from={score_from}; "
            "allowed: one text [1, T] and 0 <= score_from < T - 1."
        )
    ids = ids.to(next(model.parameters()).device)
    readings = {
        name: Reading(Tally(), PackedCache(model, plan=plan, min_tokens=min_tokens)) for name, plan in plans.items()
    }
    full = DynamicCache(config=text_config(model.config))
    ends = [one_shot] if 0 < one_shot < length else []
    first_flush = {min_tokens} if one_shot < min_tokens < length else set()
    flushing = [plan for plan in plans.values() if plan.packed_layers] or list(plans.values())
    ends += sorted(first_flush.union(*(step_ends(plan, start=one_shot, end=length) for plan in flushing)))
    with LayerWatch(model) if watch_layers else nullcontext() as watch:
        start = 0
        for end in ends:
            first, last = max(start, score_from), min(end, length - 1)
            keep, count = max(1, end - first), last - first
            scored = max(0, end - first)
            expected = _step(model, ids[:, start:end], full, keep, watch, None, scored)
            for name, reading in readings.items():
                logits = _step(model, ids[:, start:end], reading.cache, keep, watch, name, scored)
                if count > 0:
                    reading.tally.add(expected[:count], logits[:count], ids[0, first + 1 : last + 1])
            start = end
            if progress is not None:
                progress(end)
    for name, reading in readings.items():
        reading.full_bytes = _held(full)
        for layer in reading.cache.layers:
            if isinstance(layer, PackedLayer) and layer.cache is not None:
                layer.cache.commit()  # a short last step would wait for the next one
        if watch is not None:
            packed = {layer.index for layer in reading.cache.report().packed_layers}
            reading.layer_errors = {i: e for i, e in watch.errors(name).items() if i in packed}
    return readings


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
    """Read a text through one packed and a full cache, as `read_together` does.

    Args:
        model: A causal language model in eval mode.
        ids: Tokens `[1, T]`.
        chosen: A method, its name, or a plan; it also decides where steps end.
        score_from: First position whose prediction counts.
        one_shot: As in `read_together`.
        min_tokens: As in `PackedCache`.
        tally: Collect into this, for figures over several texts.
        progress: Called with the number of tokens read so far.

    Returns:
        The figures, the packed cache's report, and the bytes of the full cache.
    """
    plan = chosen if isinstance(chosen, Plan) else plan_for(model.config, chosen)
    reading = read_together(
        model, ids, {"": plan}, score_from=score_from, one_shot=one_shot, min_tokens=min_tokens, progress=progress
    )[""]
    total = Tally() if tally is None else tally
    total.extend(reading.tally)
    return total.result(), reading.cache.report(), reading.full_bytes


def step_ends(plan: Plan, *, start: int, end: int) -> list[int]:
    """Return where steps must end for a plan, see `chunk_ends`."""
    methods = {entry.method for entry in plan.layers if entry.packs} or {method("full")}
    return sorted({at for each in methods for at in chunk_ends(each, start=start, end=end)})


def _held(cache: DynamicCache) -> int:
    parts = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(t.nbytes for t in parts if isinstance(t, Tensor))


def _step(
    model: nn.Module,
    ids: Tensor,
    cache: DynamicCache,
    keep: int,
    watch: LayerWatch | None,
    name: str | None,
    scored: int,
) -> Tensor:
    """Run a step and return the logits of its last `keep` positions, `[keep, vocabulary]`."""
    if watch is not None:
        watch.begin(name, scored)
    keep = min(keep, ids.shape[1])
    out: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return out[0, -keep:]
