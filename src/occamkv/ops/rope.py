"""Rotary position embedding as a turn of channel pairs (Su et al. 2021, arXiv:2104.09864, eq. 34), for what we add.

The model applies its own embedding; this one serves the key bias, which is taken out of K and put back into the
logit with the same angles, and pinned tokens that move with a window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from occamkv.ops.balance import VARIANCE_TOKENS, variance_in_groups

# How much of a key bias may be left, in units of what K varies without it within groups, all channels together:
_SPREAD = 0.1  # variance within groups that it adds
_OFFSET = 16.0  # its square; from 64 on 8-bit minimums cannot reach so far without wider steps


@dataclass(frozen=True)
class Rotary:
    """Which channels form a pair, and how fast it turns.

    Args:
        frequencies: float64 `[P]`, radians per position.
        first: int64 `[P]`, first channel of each pair.
        second: int64 `[P]`, second channel; channels in no pair are not turned.
        scale: What keys are multiplied by besides (YaRN, arXiv:2309.00071); `turn` leaves it out, for K has it already.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor
    scale: float = 1.0

    @staticmethod
    def of(frequencies: Tensor, *, interleaved: bool = False, scale: float = 1.0) -> "Rotary":
        """Return the usual layouts of P pairs: channels (i, i + P), or (2 i, 2 i + 1) when `interleaved`."""
        pairs = torch.arange(len(frequencies))
        first, second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + len(frequencies))
        return Rotary(frequencies.double().cpu(), first, second, scale)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn vectors forward by their positions (backward by negative ones).

        Args:
            x: `[..., T, D]`.
            positions: int64, broadcastable to `[..., T]`.

        Returns:
            float32, the shape of x.
        """
        angles = positions[..., None].double() * self.frequencies.to(x.device)
        cos, sin = angles.cos().float(), angles.sin().float()
        out = x.float().clone()
        a, b = out[..., self.first], out[..., self.second]
        out[..., self.first], out[..., self.second] = a * cos - b * sin, b * cos + a * sin
        return out


@dataclass(frozen=True)
class KeyBias:
    """A vector that a model adds to all keys of a head before it embeds their positions.

    K of position t holds `turn(vector, t)`. Caches store K without it, and logits get `scale * q . turn(vector, t)`
    back, so the result does not depend on whether the angles are those of the model.

    Args:
        rotary: Pairs and frequencies; only pairs that are to be taken out.
        vector: float32 `[H, D]`, zero outside these pairs.
    """

    rotary: Rotary
    vector: Tensor

    def rows(self, positions: Tensor) -> Tensor:
        """Return what keys at positions int64 `[B, T]` hold of the bias, float32 `[B, H, T, D]`."""
        vector = self.vector.to(positions.device)[None, :, None, :].expand(len(positions), -1, positions.shape[1], -1)
        return self.rotary.turn(vector, positions[:, None])


def worth_removing(bias: KeyBias, variance: Tensor, *, tokens: int) -> KeyBias | None:
    """Return what of a key bias would widen the groups of a record, or None if nothing of it matters.

    What a pair adds to the variance within a group is `|b|^2 (1 - |mean of exp(i f t)|^2)`. A slow pair adds little and
    is taken up by the group's minimum, as far as 8-bit metadata can hold it. Pairs go, the worst first, until the rest
    adds at most a tenth of what the keys vary without their bias, and its square is at most 16 times that.

    Args:
        bias: All of it.
        variance: Of K without its bias within groups, `[H, D]`.
        tokens: Tokens of a group.
    """
    rotary = bias.rotary
    steps = torch.arange(tokens, dtype=torch.float64)
    mean = torch.polar(torch.ones(1, 1, dtype=torch.float64), rotary.frequencies[:, None] * steps).mean(1)
    square = bias.vector[:, rotary.first].double().square() + bias.vector[:, rotary.second].double().square()
    own = variance.double().sum(-1).to(square.device)[:, None].clamp_min(1e-30)
    harm = torch.cat((square * (1 - mean.abs().square()) / (_SPREAD * own), square / (_OFFSET * own)))  # [2 H, P]
    order = harm.amax(0).argsort(descending=True)
    rest = harm.sum(1, keepdim=True) - harm[:, order].cumsum(1)  # what is left when so many pairs and one more are out
    if bool((harm.sum(1) <= 1).all()):
        return None
    count = int((rest > 1).any(0).sum()) + 1
    taken = order[:count].sort().values
    part = Rotary(rotary.frequencies[taken], rotary.first[taken], rotary.second[taken])
    vector = torch.zeros_like(bias.vector)
    for channels in (part.first, part.second):
        vector[:, channels] = bias.vector[:, channels]
    return KeyBias(part, vector)


def removable(bias: KeyBias, k: Tensor, *, first: int) -> KeyBias | None:
    """Return what of a key bias should be taken out of keys, as `worth_removing` says.

    None also if K does not hold it, because a norm came after it.

    Args:
        bias: All of it.
        k: Keys as a cache gets them, float32 `[B, H, T, D]`.
        first: Position of the first one.
    """
    clean = k - bias.rows(torch.arange(first, first + k.shape[2], device=k.device)[None])
    held = bool(clean.square().sum() < k.square().sum())
    return worth_removing(bias, variance_in_groups(clean).cpu(), tokens=VARIANCE_TOKENS) if held else None
