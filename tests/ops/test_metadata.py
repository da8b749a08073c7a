"""What is stored for a group: float16 pairs, or float8 e4m3 scale and int8 minimum under a float16 super-scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv.ops import dequantize, quantize, round_metadata

every_width = pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")


def e4m3(byte: int) -> float:
    """One float8 e4m3fn by its definition: sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


LEVELS = np.array([e4m3(b) for b in range(127)])  # 0 and the positive ones


def a_record(seed: int, magnitude: float, offset: float, groups: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranges of the groups of one record, float32 [1, groups]."""
    generator = np.random.default_rng(seed)
    middle = generator.standard_normal(groups) * magnitude + offset * magnitude
    half = np.exp(generator.standard_normal(groups)) * magnitude
    low, high = ((middle + sign * half).astype("f4")[None] for sign in (-1, 1))
    return torch.from_numpy(low), torch.from_numpy(high)


records = st.builds(
    a_record,
    seed=st.integers(0, 10_000),
    magnitude=st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 30.0, 2000.0]),
    offset=st.sampled_from([0.0, 2.0, -2.0, 8.0, -8.0]),
)


@given(records, st.sampled_from([2, 3, 4]))
@settings(deadline=None, max_examples=60)
def test_16_bit_metadata_is_the_float16_of_minimum_and_then_of_scale(record, bits):
    low, high = record
    meta = round_metadata(low, high, bits=bits, metadata_bits=16)
    minimum = low.numpy().astype(np.float16)
    scale = ((high.numpy() - minimum.astype("f4")) / np.float32(2**bits - 1)).clip(0).astype(np.float16)
    assert np.array_equal(meta.stored_minimum.numpy(), minimum)
    assert np.array_equal(meta.stored_scale.numpy(), scale)
    assert np.array_equal(meta.minimum.numpy(), minimum.astype("f4"))
    assert np.array_equal(meta.scale.numpy(), scale.astype("f4"))
    assert meta.super_scale is None


def assert_is_8_bit_metadata(meta, low: torch.Tensor, high: torch.Tensor, bits: int) -> None:
    """Everything that the 8-bit format promises about one record."""
    unit = float(meta.super_scale)
    assert meta.super_scale.dtype == torch.float16
    assert meta.super_scale.shape == (1, 1)
    assert np.log2(unit) % 1 == 0, "the super-scale is a power of two"
    raw = meta.stored_scale.view(torch.uint8).numpy()
    scale = np.array([[e4m3(int(b)) for b in raw[0]]]) * unit
    assert np.array_equal(meta.scale.double().numpy(), scale), "scale is what its byte says"
    assert np.array_equal(meta.minimum.double().numpy(), meta.stored_minimum.double().numpy() * (scale / 16))
    assert meta.stored_minimum.dtype == torch.int8
    wanted = np.maximum((high - low).double().numpy() / (2**bits - 1), low.abs().double().numpy() * 16 / 127)
    nearest = np.abs(LEVELS[:, None] * unit - wanted).min(0)
    assert (np.abs(scale - wanted) <= nearest + 1e-6 * wanted).all(), "scale is the nearest that float8 can say"
    if unit > 2**-14:
        assert raw.max() >= 0x76, "the largest scale uses the top octave of float8"
    off = np.abs(meta.minimum.double().numpy() - low.double().numpy())
    inside = np.abs(low.double().numpy() * 16) <= 127.4 * scale
    assert (off[inside] <= scale[inside] / 32 * 1.0001).all(), "minimum is within half of scale / 16"
    normal = scale >= 2.0**-6 * unit
    assert (off <= 0.55 * scale)[normal].all(), "a minimum out of reach is missed by little more than half a step"


@given(records, st.sampled_from([2, 3, 4]))
@settings(deadline=None, max_examples=80)
def test_8_bit_metadata_keeps_its_promises(record, bits):
    assert_is_8_bit_metadata(round_metadata(*record, bits=bits, metadata_bits=8), *record, bits)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m._replace(scale=m.scale * 1.001), id="scale is not what its byte says"),
        pytest.param(lambda m: m._replace(minimum=m.minimum + 0.01), id="minimum is not what its byte says"),
        pytest.param(lambda m: m._replace(super_scale=m.super_scale * 1.5), id="super-scale is no power of two"),
        pytest.param(
            lambda m: m._replace(super_scale=m.super_scale * 4, scale=m.scale * 4, minimum=m.minimum * 4),
            id="scales four times too large",
        ),
        pytest.param(
            lambda m: m._replace(stored_minimum=m.stored_minimum + 1, minimum=m.minimum + m.scale / 16),
            id="minimum off by one",
        ),
    ],
)
def test_twin_the_check_sees_wrong_8_bit_metadata(change):
    record = a_record(3, 1.0, 0.0)
    meta = round_metadata(*record, bits=2, metadata_bits=8)
    assert_is_8_bit_metadata(meta, *record, 2)
    with pytest.raises(AssertionError):
        assert_is_8_bit_metadata(change(meta), *record, 2)


def reconstruct(x: torch.Tensor, bits: int, metadata_bits: int) -> torch.Tensor:
    """x: [values, groups], one group per column, all of one record."""
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    meta = round_metadata(low, high, bits=bits, metadata_bits=metadata_bits)
    assert meta.scale.isfinite().all()
    assert meta.minimum.isfinite().all()
    codes = quantize(x, scale=meta.scale, minimum=meta.minimum, bits=bits)
    return dequantize(codes, scale=meta.scale, minimum=meta.minimum)


@every_width
def test_a_constant_group_stays_near_its_value(bits):
    x = torch.tensor([0.5, -0.5, 3.0, -3.0, 17.3, -17.3]).expand(32, 6)
    assert ((reconstruct(x, bits, 16) - x).abs() <= x.abs() * 2**-11).all()
    assert ((reconstruct(x, bits, 8) - x).abs() <= x.abs() * 0.5 * (16 / 127) * 1.07).all()


@every_width
def test_a_group_far_from_zero_stays_near_its_values(bits):
    generator = np.random.default_rng(5)
    offset = torch.tensor([100.0, -100.0, 1000.0, -1000.0, 30000.0, -30000.0])
    x = torch.from_numpy(generator.uniform(-1, 1, (32, 6)).astype("f4")) + offset
    assert ((reconstruct(x, bits, 16) - x).abs() <= 1.0 / (2**bits - 1) + offset.abs() * 2**-11).all()
    assert ((reconstruct(x, bits, 8) - x).abs() <= offset.abs() * 0.5 * (16 / 127) * 1.07 + 1).all()


@every_width
@pytest.mark.parametrize("metadata_bits", [16, 8], ids=lambda m: f"{m}-bit metadata")
def test_zero_groups_are_exactly_zero_alone_and_beside_others(bits, metadata_bits):
    assert (reconstruct(torch.zeros(32, 5), bits, metadata_bits) == 0).all()
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((32, 5)).astype("f4"))
    x[:, 2] = 0
    assert (reconstruct(x, bits, metadata_bits)[:, 2] == 0).all()


@every_width
@pytest.mark.parametrize("magnitude", [1e-6, 1e-5, 1e-3], ids=lambda m: f"values near {m:g}")
def test_a_record_of_tiny_values_is_not_lost(bits, magnitude):
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((32, 8)).astype("f4")) * magnitude
    exact = reconstruct(x, bits, 32)
    for metadata_bits in (16, 8):
        error = (reconstruct(x, bits, metadata_bits) - x).norm() / (exact - x).norm()
        assert error < 1.3


@every_width
def test_a_tiny_group_beside_a_large_one_costs_less_than_the_large_one_resolves(bits):
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((32, 3)).astype("f4"))
    x *= torch.tensor([1000.0, 1e-4, 1.0])
    error = (reconstruct(x, bits, 8) - x).abs().amax(0)
    assert error[1] <= x[:, 1].abs().max() + 1000 * 2.0**-17
    assert error[2] <= 1.2 * (x[:, 2].max() - x[:, 2].min()) / (2**bits - 1)


@every_width
def test_8_bit_metadata_costs_less_than_one_step(bits):
    """Float8 rounds a scale by up to 1/16: the top of a group may lie (2^bits - 1) / 16 steps beyond the last code."""
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((32, 500)).astype("f4"))
    steps = (reconstruct(x, bits, 8) - x).abs() / ((x.amax(0) - x.amin(0)) / (2**bits - 1))
    bound = 0.5 * 17 / 16 + 1 / 32 if bits == 2 else (2**bits - 1) / 16 + 0.5 / 16 + 0.5
    assert steps.max() < bound + 0.05


def test_metadata_of_a_record_does_not_depend_on_other_records():
    low, high = a_record(1, 1.0, 0.0)
    other_low, other_high = a_record(2, 900.0, 3.0)
    both = round_metadata(torch.stack((low, other_low)), torch.stack((high, other_high)), bits=2, metadata_bits=8)
    alone = round_metadata(low, high, bits=2, metadata_bits=8)
    assert torch.equal(both.scale[0], alone.scale)
    assert torch.equal(both.minimum[0], alone.minimum)
    assert not torch.equal(both.super_scale[1], both.super_scale[0])
