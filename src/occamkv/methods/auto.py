"""auto, the budget dial: bits, groups and rotation of every layer, chosen from the first tokens of a text.

The mean bits per value stay at or below a budget, and the error of the attention output (`methods.trial`) is as small
as that allows. Layer-wise precision is KVTuner's idea (arXiv:2502.04420), which searches offline on a calibration set;
here each layer is judged by its own queries, keys and values, once, when its first tokens are due. Until then, and in
all else, the method is occam with error feedback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

from occamkv.errors import UnsupportedFormat
from occamkv.methods.method import Method
from occamkv.methods.occam import METHOD as OCCAM
from occamkv.methods.occam_quality import METHOD as OCCAM_QUALITY

METHOD = dataclasses.replace(OCCAM, name="auto", budget=3.0, source="occamkv, after arXiv:2502.04420")

CODES = ((2, 64), (2, 32), (3, 64), (3, 32), (4, 64))
"""Bits and group of K and of V, each chosen on its own: groups of tokens for K, of channels for V."""

K_WEIGHT = 3.0
"""How much more an error of K counts than one of V: it misleads every later query alike (docs/methods.md)."""

_TYPICAL_ERROR = {"k": 0.012, "v": 0.008}  # of 2 bits and groups of 64; middle of the layers of a small model
_TYPICAL_LAYERS = 3  # so many layers a typical one counts for, lest the first layers be taken to be like all
_TINY = 1e-9

Code = tuple[int, int]


class Option(NamedTuple):
    """A method that a layer could have: its mean bits per value, and the error of the attention output."""

    bits: float
    error: float
    method: Method


class Errors(NamedTuple):
    """Errors of the attention output by code: those that K causes, with the K rotation that is best, and those of V."""

    k: Mapping[Code, tuple[float, str]]
    v: Mapping[Code, float]


@cache
def recipe(chosen: Method, k_code: Code, v_code: Code, *, k_rotation: str, feedback: bool) -> Method:
    """Return a method with a budget as one with these codes, bits and groups of K and V; it is called occam_quality."""
    own = chosen.with_overrides(
        k_bits=k_code[0],
        k_group=k_code[1],
        v_bits=v_code[0],
        v_group=v_code[1],
        k_rotation=k_rotation,
        feedback=feedback,
        budget=None,
    )
    return dataclasses.replace(own, name=OCCAM_QUALITY.name, source=OCCAM_QUALITY.source)


def options(chosen: Method, errors: Errors, *, kv_heads: int, head_dim: int, feedback: bool) -> list[Option]:
    """Return all pairs of a K code and a V code for a layer of this shape; the error of K is weighted."""
    found = []
    for k_code, v_code in product(CODES, CODES):
        k_error, rotation = errors.k[k_code]
        method = recipe(chosen, k_code, v_code, k_rotation=rotation, feedback=feedback)
        bits = _bits(method, kv_heads, head_dim)
        found.append(Option(bits, K_WEIGHT * k_error + errors.v[v_code], method))
    return found


@cache
def _bits(method: Method, kv_heads: int, head_dim: int) -> float:
    return method.bits_per_value(kv_heads=kv_heads, head_dim=head_dim)


def typical_errors(k_rotation: str) -> Errors:
    """Return the errors of a layer of which nothing is known: a fourth for each bit, three fourths for half a group."""
    scale = {code: 4.0 ** (2 - code[0]) * (0.75 if code[1] == 32 else 1.0) for code in CODES}
    k = {code: (_TYPICAL_ERROR["k"] * scale[code], k_rotation) for code in CODES}
    return Errors(k, {code: _TYPICAL_ERROR["v"] * scale[code] for code in CODES})


class _Step(NamedTuple):
    """From one corner of a layer's convex hull to the next: error saved per bit, and bits."""

    gain: float
    bits: float


class Dial:
    """Spends a budget on layers that come one after the other.

    A layer gets the bits whose next one would save less error than a bit saves elsewhere: the Lagrange multiplier at
    which what is spent, this layer, and layers to come, which are taken to be like those seen, meet the budget. Since
    every layer can do with the cheapest option, the sum never exceeds it.

    Args:
        budget: Mean bits per value of all layers.
        layers: How many layers there are.
    """

    def __init__(self, budget: float, layers: int) -> None:
        self.budget, self.layers = budget, layers
        self.chosen: list[Option] = []
        self._hulls: list[list[Option]] = []

    @property
    def mean_bits(self) -> float:
        """Mean bits per value of the layers that have chosen; 0 before the first."""
        return sum(option.bits for option in self.chosen) / max(1, len(self.chosen))

    def choose(self, options: Sequence[Option], *, typical: Sequence[Option] = ()) -> Option:
        """Return the option that the next layer takes.

        Args:
            options: What it could have.
            typical: The same of a typical layer, which counts as three that were seen.

        Raises:
            UnsupportedFormat: Even the cheapest option takes more than the budget.
        """
        cheapest = min(option.bits for option in options)
        if cheapest > self.budget + _TINY:
            raise UnsupportedFormat(
                f"budget is {self.budget} bits per value, but this layer takes {cheapest:.2f} at least (its scales "
                f"and norms weigh more the fewer and smaller its heads are); allowed: {cheapest:.2f} or more."
            )
        left = self.layers - len(self.chosen) - 1
        own = hull(options)
        self._hulls.append(own)
        others = [*self._hulls, *[hull(typical)] * _TYPICAL_LAYERS] if typical else self._hulls
        allowed = self.budget * self.layers - sum(option.bits for option in self.chosen)
        price = _price(own, others, left=left, allowed=allowed)
        index = sum(step.gain >= price for step in _steps(own))
        taken = own[index]
        if left <= 0:
            fit = [option for option in options if option.bits <= allowed + _TINY]
            taken = min(fit, key=lambda option: (option.error, option.bits), default=taken)
        self.chosen.append(taken)
        return taken


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the corners of the lower convex hull of error over bits, from the cheapest to the best."""
    corners: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.error)):
        if corners and option.error >= corners[-1].error:
            continue
        while len(corners) > 1 and _gain(corners[-2], option) >= _gain(corners[-2], corners[-1]):
            corners.pop()
        corners.append(option)
    return corners


def _gain(low: Option, high: Option) -> float:
    return (low.error - high.error) / max(high.bits - low.bits, _TINY)


def _steps(corners: Sequence[Option]) -> list[_Step]:
    return [_Step(_gain(low, high), high.bits - low.bits) for low, high in pairwise(corners)]


def _price(own: Sequence[Option], others: Sequence[Sequence[Option]], *, left: int, allowed: float) -> float:
    """Return the gain per bit above which all steps of this layer and of `left` average others fit into `allowed`."""
    share = left / len(others)
    steps = [*_steps(own), *(_Step(step.gain, step.bits * share) for each in others for step in _steps(each))]
    bits = own[0].bits + share * sum(each[0].bits for each in others)
    price, by_gain = float("inf"), sorted(steps, reverse=True)
    for index, step in enumerate(by_gain):
        bits += step.bits
        last = index + 1 == len(by_gain) or by_gain[index + 1].gain < step.gain
        if bits > allowed + _TINY:
            break
        if last:
            price = step.gain
    return price
