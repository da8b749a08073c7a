"""The trial: what packing K and V of some tokens would do to the output of attention, with real softmax weights.

The error of K alone says little: a key that no query looks at may be wrong. So each candidate encodes and decodes the
tokens of a sample, and the queries of the same text read both. K and V are tried apart, `softmax(q k^) v` and
`softmax(q k) v^` against `softmax(q k) v`: the squared error of the output, relative to its square, over all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from occamkv.formats import records
from occamkv.methods.auto import CODES, Code, Errors, recipe
from occamkv.methods.crossing import Crossing, Statistics
from occamkv.methods.method import Method
from occamkv.ops import rotate

_ROTATIONS = ("balanced", "none")
_JUDGE = (3, 64)  # the code by which the rotation of K is chosen
_MARGIN = 0.5  # no rotation must be so much better than the balanced one; a sample's errors are noisy
_GROUP = max(group for _, group in CODES)


class Reading(NamedTuple):
    """How a layer reads its tokens: softmax scale (None: `D ** -0.5`), soft cap, learned sink logits `[Hq]`."""

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Sample(NamedTuple):
    """Tokens of one sequence in model space, and queries at some of their positions.

    `q`: `[Hq, n, D]`; `at`: int64 `[n]`, positions of the queries; `k`, `v`: `[H, T, D]`, from position 0 on.
    """

    q: Tensor
    at: Tensor
    k: Tensor
    v: Tensor
    reading: Reading


def errors(sample: Sample, chosen: Method, statistics: Statistics | None, *, recent: int) -> Errors:
    """Return what each code of K and V does to the attention output of a sample.

    Args:
        sample: At least 64 tokens behind the pinned ones; a last incomplete group is left out.
        chosen: The method with a budget; its V rotation and pins are kept.
        statistics: Of the layer's queries and keys; without them K is not rotated. Error feedback, which helps all
            codes of K alike, is left out: it would take most of the time.
        recent: A query sees so many newest tokens in full precision, as it would see the residual.
    """
    trial = Trial(sample, pins=chosen.pinning.leading, recent=recent)

    @cache
    def space(rotation: str) -> Space:
        method = recipe(chosen, _JUDGE, _JUDGE, k_rotation=rotation, feedback=False)
        return trial.space(method.crossing(sample.k[None], None if statistics is None else statistics.used_by(method)))

    def tried(code: Code, rotation: str) -> tuple[float, float]:
        return trial.errors(recipe(chosen, code, code, k_rotation=rotation, feedback=False), space(rotation))

    judged = {rotation: tried(_JUDGE, rotation) for rotation in (("none",) if statistics is None else _ROTATIONS)}
    plain = statistics is None or judged["none"][0] < _MARGIN * judged["balanced"][0]
    best = "none" if plain else "balanced"
    found = {code: judged[best] if code == _JUDGE else tried(code, best) for code in CODES}
    return Errors({code: (k, best) for code, (k, _) in found.items()}, {code: v for code, (_, v) in found.items()})


def has_feedback(statistics: Statistics | None) -> bool:
    """Tell whether statistics suffice for error feedback."""
    return statistics is not None and statistics.moment is not None


class Space(NamedTuple):
    """Queries `[H, g, n, D]`, K and V `[H, T, D]` in cache space; `common`: a key bias's logits or 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    common: Tensor | float


class Trial:
    """The queries' logits and output in full precision, float32, and what changes when tokens are packed.

    Args:
        sample: Queries and tokens; a last incomplete group behind the pins is left out.
        pins: So many first tokens stay in full precision.
        recent: A query sees so many newest tokens in full precision.
        window: Sliding window in tokens, None for full attention.
    """

    def __init__(self, sample: Sample, *, pins: int, recent: int, window: int | None = None) -> None:
        end = whole(sample.k.shape[1], pins)
        self.pins = pins
        self.k, self.v = (x[:, :end].to(torch.float32) for x in (sample.k, sample.v))
        heads, head_dim = self.k.shape[0], self.k.shape[2]
        scale = head_dim**-0.5 if sample.reading.scale is None else sample.reading.scale
        self.q = sample.q.to(torch.float32).unflatten(0, (heads, -1)) * scale  # [H, g, n, D]
        self.reading = sample.reading
        behind = sample.at[:, None] - torch.arange(end, device=sample.k.device)  # [n, T]
        self.hidden, self.packed = behind < 0, behind >= recent
        if window is not None:
            self.hidden = self.hidden | (behind >= window)
        self.packed[:, :pins] = False
        self.logits = self._logits(self.q, self.k)
        self.weights = self._softmax(self.logits)
        self.energy = float((self.weights @ self.v[:, None]).square().sum())

    def space(self, crossing: Crossing) -> Space:
        """Return queries, K and V in cache space; errors are measured there, since nothing has to be rotated back."""
        at = torch.arange(self.k.shape[1], device=self.k.device)[None]
        k, v = (x[0] for x in crossing.enter(self.k[None], self.v[None], at))
        bias = crossing.key_bias
        common = 0.0 if bias is None else self.q @ bias.rows(at)[0, :, None].transpose(-1, -2)
        inverse = None if crossing.k_vector is None else 1 / crossing.k_vector
        q = rotate(self.q.flatten(1, 2)[None], hadamard_block=crossing.k_block, balance=inverse)
        return Space(q[0].unflatten(1, self.q.shape[1:3]), k, v, common)

    def errors(self, method: Method, space: Space) -> tuple[float, float]:
        """Return the relative squared error of the output that K causes when it is packed, and that V causes.

        Args:
            method: How the tokens are packed.
            space: Where, see `space`; it must be the method's own crossing.
        """
        form, pins = method.packed_format, self.pins
        groups = (records.to_groups(x[None, :, pins:], form.record_tokens) for x in (space.k, space.v))
        packed = records.encode(*groups, format=form, grid=method.grid, clip=method.clip)
        k, v = (records.from_groups(x, 1)[0] for x in records.decode(packed, format=form, head_dim=space.k.shape[2]))
        read = self._logits(space.q, torch.cat((space.k[:, :pins], k), dim=1), space.common)
        logits = torch.where(self.packed, read, self.logits)
        by_k = (self._softmax(logits) - self.weights) @ self.v[:, None]
        by_v = (self.weights * self.packed)[..., pins:] @ (v - space.v[:, pins:])[:, None]
        k_error, v_error = (float(x.square().sum()) / max(self.energy, 1e-30) for x in (by_k, by_v))
        return k_error, v_error

    def _logits(self, q: Tensor, k: Tensor, common: Tensor | float = 0.0) -> Tensor:
        """Return the logits of all queries, `[H, g, n, T]`, those of later tokens at minus infinity."""
        logits, softcap = q @ k[:, None].transpose(-1, -2) + common, self.reading.softcap
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits.masked_fill(self.hidden, -math.inf)

    def _softmax(self, logits: Tensor) -> Tensor:
        sinks = self.reading.sinks
        if sinks is None:
            return logits.softmax(-1)
        column = sinks.to(logits).reshape(*logits.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1]


def whole(tokens: int, pins: int) -> int:
    """Return how many of `tokens` tokens a trial takes: the pins, and whole groups behind them."""
    return pins + max(0, tokens - pins) // _GROUP * _GROUP


def spread(count: int, most: int) -> Sequence[int]:
    """Return at most `most` numbers below `count`, evenly spread, the last one among them."""
    wanted = min(count, most)
    return [(index + 1) * count // wanted - 1 for index in range(wanted)]
