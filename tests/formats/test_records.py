"""Records against the slow reader: what the bytes say, which codes were chosen, what padding does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_decoder
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format, padded
from occamkv.formats.records import Records, decode, encode
from some_records import formats, head_dims, keys_and_values

grids = st.sampled_from([("minmax", 1.0), ("paper", 1.0), ("minmax", 0.85), ("paper", 0.9)])
small = {"deadline": None, "max_examples": 60}


def assert_reads_as_documented(records: Records, format: Format, head_dim: int, reader=decode) -> None:
    expected = slow_decoder.decode(records, format, head_dim)
    for read, slow in zip(reader(records, format=format, head_dim=head_dim), expected, strict=True):
        assert read.dtype == torch.float32
        assert np.array_equal(read.numpy(), slow)


@given(formats(), head_dims, st.integers(1, 3), st.integers(1, 3), grids, st.integers(0, 99))
@settings(**small)
def test_decoded_records_are_what_a_slow_reader_makes_of_the_bytes(format, head_dim, heads, groups, grid, seed):
    k, v = keys_and_values(format, groups=groups, heads=heads, head_dim=head_dim, seed=seed)
    records = encode(k, v, format=format, grid=grid[0], clip=grid[1])
    assert records.data.shape == (groups, heads, format.sections(head_dim).record_bytes)
    assert (records.norms is None) == (not format.token_scale)
    assert (records.super_scales is None) == (format.metadata_bits == 16)
    assert_reads_as_documented(records, format, head_dim)


@given(formats(), head_dims, st.integers(0, 99))
@settings(**small)
def test_any_bytes_read_alike(format, head_dim, seed):
    """Codes and float16 metadata of any value, so that no bit of the layout goes untested."""
    format = Format(**{**vars_of(format), "metadata_bits": 16, "token_scale": False})
    size = format.sections(head_dim).record_bytes
    raw = np.random.default_rng(seed).integers(0, 256, (2, 2, size), dtype=np.uint8)
    k, v = slow_decoder.sides(format, head_dim)
    for start, side in ((0, k), (sum(k.sizes), v)):
        meta = raw[..., start + side.sizes[0] : start + sum(side.sizes)]
        meta[..., 1::2] &= 0xBB  # exponents below 16: finite numbers
    assert_reads_as_documented(Records(torch.from_numpy(raw), None, None), format, head_dim)


def vars_of(format: Format) -> dict:
    return {name: getattr(format, name) for name in Format.__dataclass_fields__}


@pytest.mark.parametrize(
    "read_as",
    [
        pytest.param(Format(v_bits=4, k_bits=3), id="bits of K and V swapped"),
        pytest.param(Format(k_bits=4, v_bits=3, k_axis="token"), id="K read per token"),
        pytest.param(Format(k_bits=4, v_bits=3, v_group=64), id="V groups twice as wide"),
        pytest.param(Format(k_bits=4, v_bits=3, levels="lloyd"), id="codes read as Lloyd-Max levels"),
    ],
)
def test_twin_a_reader_with_the_wrong_layout_fails_the_same_check(read_as):
    format = Format(k_bits=4, v_bits=3)
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=64)
    records = encode(k, v, format=format)
    assert_reads_as_documented(records, format, 64)

    def wrong_reader(records, *, format, head_dim):
        size = read_as.sections(head_dim).record_bytes
        data = torch.nn.functional.pad(records.data, (0, max(0, size - records.data.shape[-1])))[..., :size]
        return decode(records._replace(data=data), format=read_as, head_dim=head_dim)

    with pytest.raises(AssertionError):
        assert_reads_as_documented(records, format, 64, reader=wrong_reader)


def scaled_inputs(records: Records, k: torch.Tensor, v: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """K divided by the stored norms, and V: what the codes stand for."""
    if records.norms is None:
        return k.numpy(), v.numpy()
    return k.numpy() / records.norms.numpy().astype(np.float32)[:, None, :, None], v.numpy()


@given(formats(), head_dims, grids, st.integers(0, 99))
@settings(**small)
def test_every_code_is_the_nearest_that_the_stored_metadata_allows(format, head_dim, grid, seed):
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=head_dim, seed=seed)
    records = encode(k, v, format=format, grid=grid[0], clip=grid[1])
    for h in range(2):
        supers = None if records.super_scales is None else records.super_scales[0, h].numpy()
        read = slow_decoder.read_record(records.data[0, h].numpy(), format, head_dim, supers)
        for side, said, x in zip(slow_decoder.sides(format, head_dim), read, scaled_inputs(records, k, v), strict=True):
            scale, minimum = (m[side.group_of()] for m in (said.scale, said.minimum))
            all_codes = (np.full_like(said.codes, code) for code in range(16))
            levels = np.stack([side.meaning(codes, said.scale, said.minimum) for codes in all_codes], -1)
            best = np.nanmin(np.abs(levels - x[0, h][..., None]), -1)
            chosen = np.abs(said.values - x[0, h].astype(np.float64))
            assert (chosen <= best + 1e-5 * scale + 1e-6 * np.abs(minimum)).all()


@given(formats("uniform"), head_dims, st.integers(0, 99))
@settings(**small)
def test_16_bit_metadata_holds_the_minimum_and_range_of_each_group(format, head_dim, seed):
    format = Format(**{**vars_of(format), "metadata_bits": 16})
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=head_dim, seed=seed)
    records = encode(k, v, format=format)
    read = slow_decoder.read_record(records.data[0, 0].numpy(), format, head_dim, None)
    for side, said, x in zip(slow_decoder.sides(format, head_dim), read, scaled_inputs(records, k, v), strict=True):
        group = side.group_of()
        for g in np.unique(group):
            values = x[0, 0][group == g]
            minimum = values.min().astype(np.float16)
            step = (values.max() - minimum.astype(np.float32)) / np.float32(2**side.bits - 1)
            assert said.minimum[g] == minimum
            assert said.scale[g] == max(step, np.float32(0)).astype(np.float16)


@given(formats("lloyd"), head_dims, st.integers(0, 99))
@settings(**small)
def test_the_metadata_of_lloyd_max_levels_is_the_root_mean_square_of_each_group(format, head_dim, seed):
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=head_dim, seed=seed)
    records = encode(k, v, format=format)
    read = slow_decoder.read_record(records.data[0, 0].numpy(), format, head_dim, None)
    for side, said, x in zip(slow_decoder.sides(format, head_dim), read, scaled_inputs(records, k, v), strict=True):
        group = side.group_of()
        for g in np.unique(group):
            rms = np.sqrt(np.square(x[0, 0][group == g].astype(np.float64)).mean())
            assert said.scale[g] == pytest.approx(rms, rel=2**-11 + 1e-6)
        assert not side.per_channel or not said.scale[head_dim:].any(), "padding has no scale"
        assert not said.codes[:, head_dim:].any()


LLOYD_HEAD_DIMS = (8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256)


@pytest.mark.parametrize("head_dim", LLOYD_HEAD_DIMS, ids=lambda d: f"head_dim {d}")
@pytest.mark.parametrize("k_axis", ["channel", "token"], ids=["K per channel", "K per token"])
def test_two_and_a_half_bits_are_three_in_the_first_half_of_the_padded_channels(k_axis, head_dim):
    format = Format(k_bits=2.5, v_bits=2.5, k_axis=k_axis, v_group=256, levels="lloyd")
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=head_dim, offset=0.0)
    records = encode(k, v, format=format)
    assert_reads_as_documented(records, format, head_dim)
    half = padded(head_dim) // 2
    for said in slow_decoder.read_record(records.data[0, 0].numpy(), format, head_dim, None):
        assert said.codes[:, : min(half, head_dim)].max() > 3, "eight levels"
        assert said.codes[:, half:].max(initial=0) <= 3, "four levels"


def test_a_group_of_zeros_comes_back_as_zeros_with_lloyd_max_levels():
    format = Format(k_bits=2.5, v_bits=3, k_axis="token", levels="lloyd")
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=64)
    k[..., 3, :], v[..., 4, :32] = 0, 0
    read_k, read_v = decode(encode(k, v, format=format), format=format, head_dim=64)
    assert not read_k[..., 3, :].any()
    assert not read_v[..., 4, :32].any()
    assert read_v[..., 4, 32:].any()


@pytest.mark.parametrize("k_axis", ["channel", "token"], ids=["K per channel", "K per token"])
@pytest.mark.parametrize("metadata_bits", [16, 8], ids=lambda m: f"{m}-bit metadata")
@pytest.mark.parametrize("head_dim", [8, 40, 80, 112], ids=lambda d: f"head_dim {d}")
def test_padding_moves_no_range_and_is_stored_as_zeros(k_axis, metadata_bits, head_dim):
    format = Format(k_axis=k_axis, metadata_bits=metadata_bits, k_bits=3)
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=head_dim, offset=0.0)
    k, v = k.tanh() * 0.5 + 5, v.tanh() * 0.5 + 5
    records = encode(k, v, format=format)
    supers = None if metadata_bits == 16 else records.super_scales[0, 0].numpy()
    read = slow_decoder.read_record(records.data[0, 0].numpy(), format, head_dim, supers)
    for side, said in zip(slow_decoder.sides(format, head_dim), read, strict=True):
        used = np.unique(side.group_of())
        assert (said.minimum[used] > 3).all()
        assert (said.codes[:, head_dim:] == 0).all()
        assert not said.scale[head_dim:].any() or not side.per_channel
        assert np.abs(said.values - 5).max() < 1


def test_twin_channels_of_zeros_that_count_do_move_the_range():
    format = Format()
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=40, offset=0.0)
    v = torch.nn.functional.pad(v.tanh() * 0.5 + 5, (0, 24))
    records = encode(torch.nn.functional.pad(k, (0, 24)), v, format=format)
    said = slow_decoder.read_record(records.data[0, 0].numpy(), format, 64, None)[1]
    assert (said.minimum == 0).any()


@pytest.mark.parametrize("grid", ["minmax", "paper"])
def test_the_largest_float16_values_are_stored_or_refused_but_never_as_nan(grid):
    format = Format()
    k, v = keys_and_values(format, groups=1, heads=1, head_dim=64)
    v[..., 0], v[..., 1] = 60000.0, -60000.0
    try:
        records = encode(k, v, format=format, grid=grid)
    except UnsupportedInput:
        return
    read = decode(records, format=format, head_dim=64)[1]
    assert read.isfinite().all()
    assert (read[..., :2] - v[..., :2]).abs().max() <= 0.51 * 120000 / 3


@pytest.mark.parametrize("bad", [-65600.0, 4e5, -1e30, float("inf"), float("nan")], ids=lambda x: f"{x:g}")
@pytest.mark.parametrize("side", [0, 1], ids=["in K", "in V"])
def test_values_that_float16_metadata_cannot_say_are_refused(side, bad):
    format = Format()
    pair = keys_and_values(format, groups=2, heads=1, head_dim=64)
    pair[side][1, 0, 3, 7] = bad
    with pytest.raises(UnsupportedInput, match=r"largest \|K\|.*largest \|V\|.*Nothing was packed"):
        encode(*pair, format=format)


def test_a_norm_that_float16_cannot_say_is_refused_but_float32_stores_it():
    k, v = keys_and_values(Format(), groups=1, heads=2, head_dim=64)
    with pytest.raises(UnsupportedInput, match="token norm inf"):
        encode(k * 1e6, v, format=Format(token_scale=True, norm_dtype="float16"))
    format = Format(token_scale=True)
    large, plain = (decode(encode(x, v, format=format), format=format, head_dim=64)[0] for x in (k * 2.0**20, k))
    assert torch.equal(large, plain * 2.0**20)


def test_a_token_of_zeros_comes_back_as_zeros_under_token_scale():
    format = Format(token_scale=True)
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=64)
    k[:, :, 5] = 0
    records = encode(k, v, format=format)
    assert records.norms[0, 5] == 0
    assert (decode(records, format=format, head_dim=64)[0][:, :, 5] == 0).all()


def test_padded_is_the_next_multiple_of_32():
    assert [padded(d) for d in (8, 32, 40, 64, 80, 96, 112, 128, 256)] == [32, 32, 64, 64, 96, 96, 128, 128, 256]
