"""What rotation and token scale do to the output of one layer's attention, by packing K and reading it.

The arithmetic is that of `methods.trial`: real softmax weights, the same tokens, causal, the newest 128 tokens in full
precision as the residual, V never packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from occamkv.analysis.trace import LayerTrace
from occamkv.formats import PAGE_TOKENS
from occamkv.methods import Method, method
from occamkv.methods.crossing import Statistics
from occamkv.methods.trial import Sample, Trial, spread
from occamkv.ops.balance import balance_vector, query_moment, variance_in_groups
from occamkv.ops.rope import KeyBias, removable

QUERIES = 128
"""Queries that read the packed keys, evenly spread over the text."""

_FIRST_TOKENS = 4  # sinks tell nothing about the others
_PAPER = method("oscar")
VARIANTS: Mapping[str, Method] = {
    "none": _PAPER.with_overrides(k_rotation="none", token_scale=False),
    "rotation": _PAPER.with_overrides(token_scale=False),
    "token_scale": _PAPER.with_overrides(k_rotation="none"),
    "rotation+token_scale": _PAPER,
    "balanced+token_scale": _PAPER.with_overrides(k_rotation="balanced"),
}
"""The paper's two switches at its own format (INT2 in groups of 32), and the balanced rotation."""


class LayerErrors:
    """Tries methods on the first sequence of a layer.

    Args:
        layer: At least 256 tokens, K and V of one shape.
    """

    def __init__(self, layer: LayerTrace) -> None:
        self.layer = layer
        self._trials: dict[int, Trial] = {}

    def statistics(self, method: Method) -> Statistics:
        """What these queries and keys tell a method; random ids of the model give as good a balance vector."""
        bias, k = self._bias if method.key_bias == "remove" else None, self.layer.k[:1].float()
        if bias is not None:
            k = k - bias.rows(torch.arange(k.shape[2])[None])
        variance = variance_in_groups(k[:, :, _FIRST_TOKENS:])
        return Statistics(balance_vector(self._energy, variance), self._moment, bias).used_by(method)

    @cached_property
    def overlap(self) -> float:
        """How much the queries look at the channels in which K varies: `D sum(u v) / (sum(u) sum(v))`, mean over heads.

        u is the energy of the queries' channels, v the variance of K's within groups. A rotation makes both even; so
        below 1 it brings K's error to where queries look, above 1 it takes it away (`ops.balance`).
        """
        variance = variance_in_groups(self.layer.k[:1, :, _FIRST_TOKENS:])
        u, v = (x / x.sum(-1, keepdim=True) for x in (self._energy, variance))
        return float((u * v).sum(-1).mean() * u.shape[-1])

    @cached_property
    def _moment(self) -> Tensor:
        return query_moment(self.layer.q[:1, :, _FIRST_TOKENS:], kv_heads=self.layer.k.shape[1])

    @property
    def _energy(self) -> Tensor:
        return self._moment.diagonal(dim1=1, dim2=2)

    @cached_property
    def _bias(self) -> KeyBias | None:
        bias, k = self.layer.key_bias, self.layer.k[:1, :, _FIRST_TOKENS:].float()
        return None if bias is None else removable(bias, k, first=_FIRST_TOKENS)

    def error(self, method: Method, *, pins: int = 0) -> float:
        """Return `||o' - o|| / ||o||` over all heads and queries, when K is packed by a method.

        Error feedback is left out. `pins`: So many first tokens stay in full precision.
        """
        plain = method.with_overrides(feedback=False)
        trial = self._trial(pins)
        crossing = plain.crossing(self.layer.k[:1], self.statistics(plain))
        return float(trial.errors(plain, trial.space(crossing))[0] ** 0.5)

    def _trial(self, pins: int) -> Trial:
        if pins not in self._trials:
            layer = self.layer
            end = pins + (layer.k.shape[2] - pins) // PAGE_TOKENS * PAGE_TOKENS
            first = max(end // 4, PAGE_TOKENS)
            at = torch.tensor([first + i for i in spread(end - first, QUERIES)])
            sample = Sample(layer.q[0][:, at], at, layer.k[0, :, :end], layer.v[0, :, :end], layer.reading)
            self._trials[pins] = Trial(sample, pins=pins, recent=PAGE_TOKENS, window=layer.window)
        return self._trials[pins]


def paper_errors(errors: LayerErrors) -> dict[str, float]:
    """Return the error of each of `VARIANTS`, nothing pinned."""
    return {name: errors.error(variant) for name, variant in VARIANTS.items()}
