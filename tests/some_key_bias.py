"""Made-up key biases, and what K holds of them, in float64."""

from dataclasses import replace

import torch
from torch import Tensor

from occamkv.ops.rope import KeyBias, Rotary
from some_attention import Case


def some_bias(
    heads: int, head_dim: int, pairs: int, *, size: float, seed: int = 0, interleaved: bool = False
) -> KeyBias:
    """A bias of about `size` in that many pairs, spread from the fastest to the slowest, the rest of the vector 0."""
    chosen = torch.linspace(0, head_dim // 2 - 1, pairs).round().long()
    return bias_in(chosen, heads, head_dim, size=size, seed=seed, interleaved=interleaved)


def bias_in(
    chosen: Tensor, heads: int, head_dim: int, *, size: float, seed: int = 0, interleaved: bool = False
) -> KeyBias:
    """A bias of half to one and a half `size` in the pairs with these numbers, 0 being the fastest."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (2 * chosen, 2 * chosen + 1) if interleaved else (chosen, chosen + head_dim // 2)
    vector = torch.zeros(heads, head_dim)
    for channels in (first, second):
        signs = torch.randint(0, 2, (heads, len(chosen)), generator=generator) * 2 - 1
        vector[:, channels] = size * signs * (0.5 + torch.rand(heads, len(chosen), generator=generator))
    return KeyBias(Rotary(1e6 ** (-2 * chosen.double() / head_dim), first, second), vector)


def turned(key_bias: KeyBias, positions: Tensor) -> Tensor:
    """What K holds of the bias, float64 `[B, H, N, D]`: each pair as a complex number, times e^(i t f)."""
    rotary, vector = key_bias.rotary, key_bias.vector.double()
    spin = torch.polar(torch.ones(()).double(), positions[:, None, :, None] * rotary.frequencies)
    pairs = torch.complex(vector[:, rotary.first], vector[:, rotary.second])[None, :, None] * spin
    out = torch.zeros(*pairs.shape[:3], vector.shape[1], dtype=torch.float64)
    out[..., rotary.first], out[..., rotary.second] = pairs.real, pairs.imag
    return out


def biased(case: Case, key_bias: KeyBias) -> Case:
    """The same stored tokens, from whose K this bias was taken out."""
    crossing = case.crossing | {"key_bias": key_bias}
    return replace(case, k=case.k + turned(key_bias, case.positions), crossing=crossing)
