"""Attention sinks: tokens that many queries look at though they say little, and by which rule one knows.

Rules of the literature, as collected in the survey arXiv:2604.10098. A sink is decided by attention where it was
recorded, else by norms; the other rules that fire for the same token are named too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from occamkv.analysis.norms import layer_norms, over_median
from occamkv.analysis.trace import LayerTrace

ATTENTION = 0.3
"""A head has a sink where the mean attention of the queries that see a token is above this (Gu et al., epsilon)."""

LAST_POSITIONS = 32
"""Tokens at the end of the text that are never sinks: too few queries see them."""

COLUMN_FACTOR = 1000.0
"""Equation 5 of the survey (tau): a column of the attention matrix adds up to more than so many mean columns."""

SHORT_VALUE, MASSIVE = 0.5, 4.0
"""Rules by norms, in units of the median: the norm of V is below, the largest entry of the hidden state above."""


@dataclass(frozen=True)
class Sink:
    """One token that a layer uses as a sink.

    Args:
        position: Of the token in the text.
        token: Its text.
        received: Largest mean attention of a head, None where attention was not recorded.
        k_norm: Norm of K over all heads, relative to the median of the layer.
        v_norm: The same of V.
        massive: Largest entry of the hidden state, relative to the median over tokens; None if not recorded.
        rules: Which rules fired: "attention", "equation 5", "short value", "massive activation".
    """

    position: int
    token: str
    received: float | None
    k_norm: float
    v_norm: float
    massive: float | None
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Sinks:
    """What one layer shows.

    Args:
        rate: Share of query heads with attention above .3 on the token that most heads agree on; None if unknown.
        found: The sinks, in order.
        latent: Positions where both norm rules fire though attention goes elsewhere (yet).
        column_positions: Where equation 5 holds in some head.
    """

    rate: float | None
    found: tuple[Sink, ...]
    latent: tuple[int, ...]
    column_positions: tuple[int, ...]


def find_sinks(layer: LayerTrace, texts: Sequence[str]) -> Sinks:
    """Return the sinks of the first sequence of a layer. `texts`: of each token."""
    k_norm, v_norm = layer_norms(layer.k[0]), layer_norms(layer.v[0])
    massive = None if layer.hidden is None else massive_activation(layer.hidden[0])
    by_rule = {"short value": v_norm < SHORT_VALUE}
    if massive is not None:
        by_rule["massive activation"] = massive > MASSIVE
    by_norms = torch.stack(list(by_rule.values())).all(0)
    decided, rate, received = by_norms, None, None
    if layer.received is not None:
        received = layer.received[0].amax(0)
        heads = heads_with_sink(layer.received[0])
        decided, rate = heads.any(0), float(heads.float().mean(0).amax())
        by_rule = {
            "attention": decided,
            "equation 5": large_columns(layer.received[0], window=layer.window).any(0),
            **by_rule,
        }

    def sink(at: int) -> Sink:
        return Sink(
            at,
            texts[at],
            None if received is None else float(received[at]),
            float(k_norm[at]),
            float(v_norm[at]),
            None if massive is None else float(massive[at]),
            tuple(name for name, fired in by_rule.items() if fired[at]),
        )

    columns = _positions(by_rule["equation 5"]) if received is not None else ()
    latent = _positions(by_norms & ~decided)
    return Sinks(rate, tuple(sink(at) for at in _positions(decided)), latent, columns)


def heads_with_sink(received: Tensor) -> Tensor:
    """Tell in which heads a token is a sink: mean attention above .3, the last 32 tokens left out.

    Args:
        received: Mean attention of the queries that see each token, `[Hq, T]`.

    Returns:
        bool `[Hq, T]`.
    """
    fired = received > ATTENTION
    fired[:, -LAST_POSITIONS:] = False
    return fired


def large_columns(received: Tensor, *, window: int | None = None) -> Tensor:
    """Tell where equation 5 of the survey holds: a column sum of attention above 1000 mean ones.

    A column adds up to the number of queries at most and 1 on average, so it cannot hold in texts of 1000 tokens.

    Args:
        received: Mean attention of the queries that see each token, `[Hq, T]`.
        window: Sliding window in tokens: no more queries see a token.

    Returns:
        bool `[Hq, T]`.
    """
    count = torch.arange(received.shape[-1], 0, -1, device=received.device)
    columns = received * (count if window is None else count.clamp(max=window))
    return columns > COLUMN_FACTOR * columns.mean(-1, keepdim=True)


def massive_activation(hidden: Tensor) -> Tensor:
    """Return the largest entry of each token's hidden state, relative to the median token. `hidden`: `[T, C]`."""
    return over_median(hidden.to(torch.float32).abs().amax(-1))


def _positions(fired: Tensor) -> tuple[int, ...]:
    return tuple(fired.nonzero()[:, 0].tolist())
