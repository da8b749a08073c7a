"""What a page draws of a layer: norms and attention by position, and keys token by channel before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from occamkv.analysis.norms import head_norms, layer_norms, scaled_norms
from occamkv.analysis.sinks import massive_activation
from occamkv.analysis.trace import LayerTrace
from occamkv.ops import hadamard, token_norm

POSITIONS, FIRST_EXACT = 512, 64
"""At most so many positions of a profile; the first ones are all kept, and all that a caller names."""

_PANEL_VALUES, _PANEL_TOKENS = 2**14, 128


@dataclass(frozen=True)
class Profile:
    """One layer by position; norms and the massive activation are relative to their medians over all tokens.

    Args:
        positions: Which tokens these are.
        k_norm: Norm of K over all KV heads; a rotation does not change it.
        k_norm_scaled: After the token norm was divided out, see `norms.scaled_norms`.
        v_norm: Norm of V over all KV heads.
        massive: Largest entry of the hidden state, None if it was not recorded.
        received: Mean attention of the queries that see a token, mean over heads; None if it was not recorded.
    """

    positions: list[int]
    k_norm: list[float]
    k_norm_scaled: list[float]
    v_norm: list[float]
    massive: list[float] | None
    received: list[float] | None


@dataclass(frozen=True)
class Panel:
    """The size of one head's keys, `[tokens][channels]`: as they are, rotated, and rotated and scaled.

    `scaled` is divided by the token norm over all KV heads, times the median norm, so that all three compare.
    """

    layer: int
    head: int
    why: str
    tokens: int
    raw: list[list[float]]
    rotated: list[list[float]]
    scaled: list[list[float]]


def profile(layer: LayerTrace, keep: Iterable[int] = ()) -> Profile:
    """Return the profile of the first sequence of a layer; `keep`: positions that must be in it."""
    k, v = layer.k[0], layer.v[0]
    positions = _positions(k.shape[1], keep)

    def at(x: Tensor) -> list[float]:
        values: list[float] = x[positions].tolist()
        return values

    return Profile(
        positions,
        at(layer_norms(k)),
        at(scaled_norms(k)),
        at(layer_norms(v)),
        None if layer.hidden is None else at(massive_activation(layer.hidden[0])),
        None if layer.received is None else at(layer.received[0].mean(0)),
    )


def panel(layer: LayerTrace, why: str) -> Panel:
    """Return the first tokens of the KV head whose norms are most unequal."""
    k = layer.k[0]
    head = int(head_norms(k).amin(1).argmin())
    tokens = min(_PANEL_TOKENS, k.shape[1], _PANEL_VALUES // k.shape[2])
    raw = k[head, :tokens].float()
    rotated = hadamard(raw)
    norm = token_norm(k[None])[0]
    scaled = rotated / (norm / norm.median()).clamp_min(1e-30)[:tokens, None]
    return Panel(layer.index, head, why, tokens, *(x.abs().tolist() for x in (raw, rotated, scaled)))


def _positions(count: int, keep: Iterable[int]) -> list[int]:
    """Return at most 512 positions: the first 64, those to keep, and others evenly between."""
    sure = sorted({*range(min(FIRST_EXACT, count)), *sorted(at for at in keep if at < count)[: POSITIONS // 2]})
    rest = sorted(set(range(count)).difference(sure))
    room = POSITIONS - len(sure)
    even = rest if len(rest) <= room else [rest[index * len(rest) // room] for index in range(room)]
    return sorted([*sure, *even])
