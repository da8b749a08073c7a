"""The crossing: leaving undoes entering, logits and outputs are kept, signs never change, bad statistics fail."""

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv import method
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.methods.crossing import Crossing, Statistics, random_signs
from occamkv.ops import rotate
from occamkv.ops.rope import KeyBias, Rotary

ROTATIONS = {
    "none": {"k_rotation": "none", "v_rotation": "none"},
    "hadamard": {"k_rotation": "hadamard", "v_rotation": "hadamard"},
    "balanced": {"k_rotation": "balanced", "v_rotation": "hadamard"},
    "random": {"k_rotation": "random", "v_rotation": "random"},
    "K alone": {"k_rotation": "random", "v_rotation": "none"},
    "V alone": {"k_rotation": "none", "v_rotation": "random"},
}
every_rotation = pytest.mark.parametrize("rotation", ROTATIONS)
every_head_dim = pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256], ids=lambda d: f"head_dim {d}")


def some_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


def a_crossing(rotation: str, head_dim: int, heads: int = 2) -> Crossing:
    d = torch.exp(0.5 * some_values(heads, head_dim, seed=9)) if rotation == "balanced" else None
    statistics = None if d is None else Statistics(d)
    return method("kivi", **ROTATIONS[rotation]).crossing(torch.zeros(1, heads, 1, head_dim), statistics)


@every_rotation
@every_head_dim
def test_leaving_undoes_entering(rotation, head_dim):
    crossing = a_crossing(rotation, head_dim)
    k, v = some_values(2, 2, 5, head_dim), some_values(2, 2, 5, head_dim, seed=1)
    inside = crossing.enter(k, v)
    for back, given in zip(crossing.leave(*inside), (k, v), strict=True):
        assert back.dtype == torch.float32
        assert (back - given).abs().max() < 5e-6
    moved = [not torch.allclose(x, given, atol=1e-3) for x, given in zip(inside, (k, v), strict=True)]
    fields = ROTATIONS[rotation]
    assert moved == [fields["k_rotation"] != "none", fields["v_rotation"] != "none"]


@every_rotation
@every_head_dim
def test_logits_and_outputs_are_kept(rotation, head_dim):
    """The query side divides by the vector and rotates; the output is rotated back and given its signs."""
    crossing = a_crossing(rotation, head_dim)
    q, k, v = (some_values(2, 2, 5, head_dim, seed=seed) for seed in range(3))
    inside_k, inside_v = crossing.enter(k, v)
    inverse = None if crossing.k_vector is None else 1 / crossing.k_vector
    inside_q = rotate(q, hadamard_block=crossing.k_block, balance=inverse)
    exact = q.double() @ k.double().mT
    logits = inside_q.double() @ inside_k.double().mT
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()
    weights = exact.softmax(-1)
    out = rotate((weights @ inside_v.double()).float(), hadamard_block=crossing.v_block)
    truth = weights @ v.double()
    assert (crossing.leave_output(out) - truth).abs().max() < 1e-5 * truth.abs().max()
    if crossing.v_signs is not None:
        assert (out - truth).abs().max() > 1e-2, "the twin: without its signs the output is wrong"


def test_twin_logits_change_when_the_query_does_not_cross():
    crossing = a_crossing("random", 64)
    q, k = some_values(1, 2, 3, 64), some_values(1, 2, 3, 64, seed=1)
    exact = q.double() @ k.double().mT
    assert (q.double() @ crossing.enter(k, k)[0].double().mT - exact).abs().max() > 1


@every_rotation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_dtype_enters_as_float32_and_outputs_keep_theirs(rotation, dtype):
    crossing = a_crossing(rotation, 64)
    x = some_values(1, 2, 3, 64).to(dtype)
    assert [t.dtype for t in (*crossing.enter(x, x), *crossing.leave(x, x))] == [torch.float32] * 4
    assert crossing.leave_output(x).dtype == dtype


@every_rotation
@pytest.mark.parametrize("seed", range(4), ids=lambda s: f"seed {s}")
def test_no_value_and_no_token_norm_is_above_the_bound(rotation, seed):
    crossing = a_crossing(rotation, 80)
    k, v = (some_values(1, 2, 9, 80, seed=seed) ** 5, some_values(1, 2, 9, 80, seed=seed + 9) ** 5)
    if seed == 3:
        k, v = torch.ones(1, 2, 9, 80), -random_signs(80).expand(1, 2, 9, 80)
    inside_k, inside_v = crossing.enter(k, v)
    largest = max(float(inside_v.abs().max()), float(inside_k.double().square().sum((1, 3)).sqrt().max()))
    assert largest <= crossing.bound(k, v) * (1 + 1e-6)
    assert crossing.bound(k, v) < 1000 * largest


# Fixed for ever: stored bytes depend on them.
SIGNS_OF_8 = [-1, 1, -1, -1, 1, -1, -1, -1]


def splitmix64(count: int) -> list[float]:
    """Signs from the published generator (Steele, Lea and Flood 2014), in numpy's wrapping arithmetic."""
    seed = int.from_bytes(b"occamkv", "big")
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where((z ^ (z >> np.uint64(31))) & np.uint64(1), 1.0, -1.0).tolist()


def test_random_signs_are_the_ones_they_have_always_been():
    assert random_signs(8).tolist() == SIGNS_OF_8
    assert random_signs(8).dtype == torch.float32


@every_head_dim
def test_random_signs_are_those_of_splitmix64_and_about_half_are_negative(head_dim):
    signs = random_signs(head_dim)
    assert signs.tolist() == splitmix64(head_dim)
    assert abs(float(signs.sum())) < 4 * head_dim**0.5
    assert random_signs(256)[:head_dim].tolist() == signs.tolist()


def test_signs_are_shared_by_k_and_v_and_by_all_heads():
    crossing = a_crossing("random", 64, heads=3)
    assert torch.equal(crossing.k_vector, random_signs(64).expand(3, -1))
    assert torch.equal(crossing.v_signs, random_signs(64))


def moment(heads: int = 2, head_dim: int = 64) -> Tensor:
    return torch.eye(head_dim).expand(heads, -1, -1)


BAD_STATISTICS = {
    "balance of one head less": (Statistics(torch.ones(1, 64), moment()), r"balance has shape \(1, 64\).*\(2, 64\)"),
    "balance with a zero": (Statistics(torch.ones(2, 64) - torch.eye(2, 64), moment()), "finite values above 0"),
    "balance with NaN": (Statistics(torch.full((2, 64), float("nan")), moment()), "finite values above 0"),
    "moment of one head less": (
        Statistics(torch.ones(2, 64), moment(heads=1)),
        r"statistics of a layer with \[H, D\] = \(1, 64\), K has \(2, 64\)",
    ),
    "moment of another head_dim": (
        Statistics(torch.ones(2, 64), moment(head_dim=32)),
        r"statistics of a layer with \[H, D\] = \(2, 32\), K has \(2, 64\)",
    ),
    "moment with NaN": (Statistics(torch.ones(2, 64), moment() * float("nan")), "second moment.*finite"),
    "infinite moment": (Statistics(torch.ones(2, 64), moment() + float("inf")), "second moment.*finite"),
    "no moment": (Statistics(torch.ones(2, 64)), "error feedback and needs the second moment.*Pass the model"),
    "nothing": (None, "error feedback and needs the second moment.*Pass the model"),
}


@pytest.mark.parametrize("what", BAD_STATISTICS)
def test_statistics_that_do_not_fit_are_refused(what):
    statistics, message = BAD_STATISTICS[what]
    error = CacheMismatch if "statistics of a layer" in message else UnsupportedInput
    with pytest.raises(error, match=message):
        method("occam_quality").crossing(torch.zeros(1, 2, 1, 64), statistics)


def test_twin_statistics_that_fit_are_taken():
    good = Statistics(torch.full((2, 64), 2.0), moment())
    crossing = method("occam_quality").crossing(torch.zeros(1, 2, 1, 64), good)
    assert torch.equal(crossing.k_vector, good.balance)
    assert crossing.feedback.shape == (2, 64, 64)


@pytest.mark.parametrize("name", ["oscar", "kivi", "turboquant", "kvarn"])
def test_statistics_that_would_not_be_used_are_refused(name):
    with pytest.raises(UnsupportedInput, match=f"balance was given, but {name} has k_rotation="):
        method(name).crossing(torch.zeros(1, 2, 1, 64), Statistics(torch.ones(2, 64)))


def a_key_bias(heads: int = 2, head_dim: int = 32) -> KeyBias:
    pair = Rotary(torch.ones(1).double(), torch.tensor([0]), torch.tensor([head_dim // 2]))
    return KeyBias(pair, torch.zeros(heads, head_dim).index_fill_(1, torch.tensor([0, head_dim // 2]), 3.0))


def test_everything_a_crossing_holds_lies_where_k_does():
    form = method("occam_quality")
    known = Statistics(torch.ones(2, 32), torch.eye(32).expand(2, -1, -1), a_key_bias())
    crossing = form.crossing(torch.zeros(1, 2, 1, 32, device="meta"), known)
    assert {x.device.type for x in (crossing.k_vector, crossing.feedback, crossing.key_bias.vector)} == {"meta"}


@pytest.mark.parametrize("shape", [(1, 32), (2, 16), (4, 32)])
def test_a_key_bias_of_another_layer_is_refused(shape):
    with pytest.raises(CacheMismatch, match=r"key_bias is of a layer with \[H, D\]"):
        method("occam").crossing(torch.zeros(1, 2, 1, 32), Statistics(torch.ones(2, 32), None, a_key_bias(*shape)))
