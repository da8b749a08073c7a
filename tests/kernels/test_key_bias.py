"""A key bias that was taken out of K comes back into the logits: against float64 attention on K with its bias."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from occamkv import kernels
from occamkv.errors import UnsupportedInput
from occamkv.ops.rope import KeyBias, Rotary
from some_attention import METHODS, RAGGED, Case, Held, backend_or_skip, backends, make_case

HELD = (*RAGGED, Held(0, 1, 40, pads=1))


def some_bias(heads: int, head_dim: int, pairs: int, *, size: float, seed: int = 0, base: float = 1e6) -> KeyBias:
    """A bias of about `size` in that many pairs, spread from the fastest to the slowest, the rest of the vector 0."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.linspace(0, head_dim // 2 - 1, pairs).round().long()
    rotary = Rotary(base ** (-2 * chosen.double() / head_dim), chosen, chosen + head_dim // 2)
    vector = torch.zeros(heads, head_dim)
    for channels in (rotary.first, rotary.second):
        signs = torch.randint(0, 2, (heads, pairs), generator=generator) * 2 - 1
        vector[:, channels] = size * signs * (0.5 + torch.rand(heads, pairs, generator=generator))
    return KeyBias(rotary, vector)


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


@backends
@pytest.mark.parametrize("queries", [1, 3, 8, 9, 40])
@pytest.mark.parametrize(("name", "gqa"), [("oscar", 1), ("quarot", 3), ("oscar-k4v3-balanced-with-float16-norms", 7)])
def test_the_bias_comes_back(backend, name, gqa, queries):
    case = make_case(METHODS[name], gqa=gqa, queries=queries, held=HELD)
    case = biased(case, some_bias(2, 64, 5, size=3.0))
    case.check(backend_or_skip(backend, METHODS[name]))


@backends
@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"vector": torch.zeros(3, 64)}, r"vector of key_bias .*\(3, 64\)", id="other heads"),
        pytest.param({"vector": torch.zeros(2, 32)}, r"vector of key_bias .*\(2, 32\)", id="another head_dim"),
        pytest.param({"vector": torch.zeros(2, 64, device="meta")}, "on meta", id="another device"),
        pytest.param({"vector": torch.full((2, 64), float("nan"))}, "NaN", id="a value that is none"),
        pytest.param({"vector": torch.ones(2, 64)}, "no pair turns", id="values outside the pairs"),
        pytest.param({"first": [0, 64]}, r"channels \[0, 64, .*below 64", id="a channel beyond head_dim"),
        pytest.param({"first": [-1, 1]}, r"channels \[-1, ", id="a channel below zero"),
        pytest.param({"first": [0, 0]}, "twice", id="a channel twice"),
        pytest.param({"first": [0]}, "for each frequency", id="too few channels"),
        pytest.param({"frequencies": [1.0, float("nan")]}, "NaN", id="a frequency that is none"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(backend, change, told):
    case, right = make_case(METHODS["oscar"]), some_bias(2, 64, 2, size=1.0)
    rotary = {name: torch.as_tensor(x) for name, x in change.items() if name != "vector"}
    wrong = KeyBias(replace(right.rotary, **rotary), change.get("vector", right.vector))
    target = backend_or_skip(backend, METHODS["oscar"])
    with pytest.raises(UnsupportedInput, match=told):
        replace(case, crossing=case.crossing | {"key_bias": wrong}).attend(target)


WRONG = {
    "sign": lambda b, p: (replace(b, vector=-b.vector), p),
    "turned backward": lambda b, p: (replace(b, rotary=replace(b.rotary, frequencies=-b.rotary.frequencies)), p),
    "no bias": lambda b, p: (None, p),
    "one position late": lambda b, p: (b, p + 1),
    "heads exchanged": lambda b, p: (replace(b, vector=b.vector.flip(0)), p),
}


@pytest.mark.parametrize("what", WRONG)
def test_twin_a_wrong_bias_breaks_the_check(what):
    case = make_case(METHODS["oscar"], held=HELD)
    right = biased(case, some_bias(2, 64, 5, size=3.0))
    wrong, first = WRONG[what](right.crossing["key_bias"], case.packed.first_position)
    with pytest.raises(AssertionError, match="error"):
        tampered = replace(right.with_packed(first_position=first), crossing=case.crossing | {"key_bias": wrong})
        tampered.check(kernels.backend("reference"))
