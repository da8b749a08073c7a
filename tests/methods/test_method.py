"""Methods are frozen, overrides are checked, and encode refuses bad input with the right error and a useful message."""

import dataclasses

import pytest
import torch

from occamkv import Format, Method, method
from occamkv.errors import OccamError, UnsupportedFormat, UnsupportedInput
from paper_formulas import relative_error, some_kv

METHODS = ("oscar", "kivi", "quarot", "rtn", "ott", "rotatekv", "turboquant", "kvarn")
every_method = pytest.mark.parametrize("name", METHODS)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_a_method_is_frozen_hashable_and_compared_by_value():
    oscar = method("oscar")
    for field in dataclasses.fields(Method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(oscar, field.name, None)
    assert oscar == method("oscar")
    assert len({oscar, method("oscar"), method("kivi")}) == 2


def test_overrides_make_a_copy_and_reach_into_the_format():
    oscar = method("oscar")
    changed = oscar.with_overrides(k_bits=3, clip=0.9, norm_dtype="float16", pins="first:4")
    assert (changed.format.k_bits, changed.clip, changed.format.norm_dtype) == (3, 0.9, "float16")
    assert changed.pinned_tokens == 4
    assert oscar == method("oscar")
    assert oscar.pinned_tokens == 0
    assert oscar.with_overrides() == oscar


BAD_OVERRIDES = [
    ({"k_bits": 1}, "k_bits is 1; allowed: 2, 3, 4"),
    ({"k_group": 256}, "k_group is 256; allowed: 32, 64, 128"),
    ({"metadata_bits": 32}, "metadata_bits is 32; allowed: 16, 8"),
    ({"k_rotation": "sylvester"}, "k_rotation is 'sylvester'; allowed: 'none', 'hadamard', 'balanced', 'random'"),
    ({"v_rotation": "balanced"}, "v_rotation is 'balanced'; allowed: 'none', 'hadamard', 'random'\\."),
    ({"grid": "lloyd"}, "grid is 'lloyd'; allowed: 'minmax', 'paper', 'unbiased'"),
    ({"norm": "l1"}, "norm is 'l1'; allowed: 'l2', 'sinkhorn'"),
    ({"feedback": "yes"}, "feedback is 'yes'; allowed: False, True"),
    ({"feedback": True, "levels": "lloyd"}, "feedback is True; error feedback needs levels='uniform'"),
    ({"k_bits": 2.5}, r"2\.5 bits need levels='lloyd'"),
    ({"flush": "roll"}, "flush is 'roll'; allowed: 'block', 'rolling'"),
    ({"clip": 0.0}, r"clip is 0\.0; allowed: above 0, at most 1"),
    ({"clip": 1.5}, r"clip is 1\.5; allowed: above 0, at most 1"),
    ({"clip": float("nan")}, "clip is nan; allowed: above 0, at most 1"),
    ({"clip": "half"}, "clip is 'half'; allowed: above 0, at most 1"),
    ({"pins": "first"}, "pins is 'first'; allowed: 'none', 'first:4'"),
    ({"pins": "first:-1"}, "pins is 'first:-1'; allowed: 'none', 'first:4'"),
    ({"pins": "first:\u00b2"}, "pins is 'first:\u00b2'; allowed: 'none', 'first:4'"),
    ({"pins": "first:4+lost"}, "pins is .*; allowed: 'none', 'first:4', .*'lowest:5'"),
    ({"pins": "lowest"}, "pins is 'lowest'; allowed: 'none', 'first:4'"),
    ({"pins": "lowest:5+found"}, "pins is .*; allowed: 'none', 'first:4'"),
    ({"pins": "first:12345"}, "pins is 'first:12345'; allowed: 'none', 'first:4'"),
    ({"pins": 4}, "pins is 4; allowed: 'none', 'first:4'"),
    ({"k_bit": 3}, "no field 'k_bit'; did you mean 'k_bits'.*Fields: budget, clip, feedback, flush"),
    ({"rotation": "none"}, "no field 'rotation'; did you mean 'k_rotation'|'v_rotation'"),
    ({"format": Format()}, "no field 'format'"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[ascii(o) for o, _ in BAD_OVERRIDES])
def test_an_override_that_is_not_allowed_is_refused_by_name(override, message):
    with pytest.raises(UnsupportedFormat, match=message):
        method("oscar", **override)


def test_full_has_no_format_to_override_or_fill():
    for refused in (
        lambda: method("full", k_bits=3),
        lambda: method("full").packed_format,
        lambda: method("full").encode(zeros(1, 1, 128, 64), zeros(1, 1, 128, 64)),
    ):
        with pytest.raises(UnsupportedFormat, match="'full' keeps K and V as they are"):
            refused()


def test_a_method_of_your_own_name_can_be_named_and_used():
    mine = dataclasses.replace(method("oscar"), name="mine")
    k, v = some_kv(2, 64)
    assert str(mine).startswith("mine")
    assert mine.encode(k, v).nbytes == method("oscar").encode(k, v).nbytes
    with pytest.raises(UnsupportedInput, match="balance was given, but mine"):
        mine.encode(k, v, balance=torch.ones(2, 64))


K, V = (1, 2, 128, 64), (1, 2, 128, 64)
BAD_INPUTS = {
    "three dimensions": ((zeros(2, 128, 64), zeros(2, 128, 64)), UnsupportedInput, r"K \(2, 128, 64\).*\[B, H, T, D\]"),
    "V of another shape": ((zeros(*K), zeros(1, 2, 128, 32)), UnsupportedInput, r"V \(1, 2, 128, 32\).*one shape"),
    "V of another dtype": (
        (zeros(*K), zeros(*V, dtype=torch.half)),
        UnsupportedInput,
        r"V .*torch\.float16.*one dtype",
    ),
    "integers": (
        (zeros(*K, dtype=torch.int32), zeros(*V, dtype=torch.int32)),
        UnsupportedInput,
        r"torch\.int32.*allowed: a floating-point dtype",
    ),
    "100 tokens": ((zeros(1, 2, 100, 64),) * 2, UnsupportedInput, r"\(1, 2, 100, 64\).*T a multiple of 128"),
    "no tokens": ((zeros(1, 2, 0, 64),) * 2, UnsupportedInput, r"\(1, 2, 0, 64\)"),
    "empty batch": ((zeros(0, 2, 128, 64),) * 2, UnsupportedInput, r"\(0, 2, 128, 64\).*at least one sequence"),
    "no heads": (
        (zeros(1, 0, 128, 64),) * 2,
        UnsupportedInput,
        r"\(1, 0, 128, 64\).*at least one sequence and one head",
    ),
    "head_dim 7": ((zeros(1, 2, 128, 7),) * 2, UnsupportedFormat, "head_dim is 7;.*multiples of 8 up to 256"),
    "head_dim 12": ((zeros(1, 2, 128, 12),) * 2, UnsupportedFormat, "head_dim is 12;.*multiples of 8 up to 256"),
    "head_dim 264": ((zeros(1, 2, 128, 264),) * 2, UnsupportedFormat, "head_dim is 264;.*multiples of 8 up to 256"),
    "head_dim 0": ((zeros(1, 2, 128, 0),) * 2, UnsupportedFormat, "head_dim is 0;"),
}


@every_method
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_encode_refuses(name, case):
    (k, v), error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message) as refusal:
        method(name).encode(k, v)
    assert isinstance(refusal.value, OccamError)
    assert isinstance(refusal.value, ValueError)


def test_twin_the_good_input_next_to_the_bad_ones_is_accepted():
    for name in METHODS:
        assert method(name).encode(zeros(*K), zeros(*V)).pages.count == 1


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["in K", "in V"])
def test_encode_refuses_a_value_that_is_not_finite_and_says_where(name, side, bad):
    pair = some_kv(2, 64)
    pair[side][0, 1, 77, 5] = bad
    with pytest.raises(UnsupportedInput, match=rf"{'KV'[side]} holds 1 NaN or infinite.*\[0, 1, 77, 5\]"):
        method(name).encode(*pair)


TOO_LARGE = [(name, side) for name in METHODS for side in (0, 1) if side or name not in ("oscar", "kvarn")]


@pytest.mark.parametrize(("name", "side"), TOO_LARGE, ids=lambda x: x if isinstance(x, str) else "KV"[x])
def test_values_beyond_float16_are_refused_and_their_size_is_named(name, side):
    pair = some_kv(2, 64)
    pair[side][0, 1, 77] = 1e6
    with pytest.raises(
        UnsupportedInput, match=rf"largest \|{'KV'[side]}\| [1-8](\.\d+)?e\+06.*at most 65504.*full precision"
    ):
        method(name).encode(*pair)


def test_a_token_norm_beyond_its_dtype_is_refused_and_keys_are_named_as_given():
    k, v = some_kv(2, 64)
    with pytest.raises(UnsupportedInput, match="token norm inf"):
        method("oscar", norm_dtype="float16").encode(k * 1e5, v)
    with pytest.raises(UnsupportedInput, match=r"largest \|K\| \d.*e\+2\d"):
        method("oscar").encode(k * 1e20, v)


def test_a_balance_that_would_not_be_used_is_refused():
    for name in METHODS:
        with pytest.raises(UnsupportedInput, match=f"balance was given, but {name} has k_rotation="):
            method(name).encode(*some_kv(2, 64), balance=torch.ones(2, 64))


BAD_BALANCES = {
    "negative": torch.ones(2, 64).index_fill(1, torch.tensor([3]), -1.0),
    "zero": torch.ones(2, 64).index_fill(1, torch.tensor([3]), 0.0),
    "NaN": torch.ones(2, 64).index_fill(1, torch.tensor([3]), float("nan")),
    "infinite": torch.ones(2, 64).index_fill(1, torch.tensor([3]), float("inf")),
    "one head short": torch.ones(1, 64),
    "one row for all heads": torch.ones(64),
    "another head_dim": torch.ones(2, 32),
}


@pytest.mark.parametrize("what", BAD_BALANCES)
def test_a_bad_balance_is_refused(what):
    balance = BAD_BALANCES[what]
    with pytest.raises(UnsupportedInput, match=r"balance has shape.*finite values above 0, shape") as refusal:
        method("oscar", k_rotation="balanced").encode(*some_kv(2, 64), balance=balance)
    assert str(tuple(balance.shape)) in str(refusal.value)
    assert "(2, 64)" in str(refusal.value)


def test_balanced_without_a_balance_warns_at_the_caller_and_is_a_plain_rotation():
    k, v = some_kv(2, 64)
    balanced = method("oscar", k_rotation="balanced")
    with pytest.warns(UserWarning, match=r"given no balance vector; d = 1") as warned:
        packed = balanced.encode(k, v)
    assert warned[0].filename == __file__
    assert torch.equal(packed.pages.records, method("oscar").encode(k, v).pages.records)


def test_a_balance_is_multiplied_in_before_the_rotation_and_divided_out_again():
    k, v = some_kv(2, 64)
    balance = torch.exp(torch.linspace(-1, 1, 128)).reshape(2, 64)
    balanced = method("oscar", k_rotation="balanced")
    packed = balanced.encode(k, v, balance=balance)
    by_hand = method("oscar").encode(k * balance[:, None], v)
    assert torch.equal(packed.pages.records, by_hand.pages.records)
    stored = balanced.decode(packed)[0]
    assert (stored - method("oscar").decode(by_hand)[0] / balance[:, None]).abs().max() < 1e-5
    assert relative_error(stored, k) < 0.6
