"""Records made and read in C++: byte for byte those of the reference, on every instruction set of this machine."""

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from formats.golden import CASES, GOLDEN_FILE, describe, golden_input
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format, records
from occamkv.formats.pages import Pages
from occamkv.formats.records import Records
from occamkv.kernels import reference
from occamkv.kernels.cpu import encoding, library
from some_records import formats, head_dims, keys_and_values, planted, raw, same, strided

GOLDEN = json.loads(GOLDEN_FILE.read_text())["records"]
OCCAM = Format(token_scale=True, norm_dtype="float16", metadata_bits=8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
fuzzed = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def isas():
    """The instruction sets of this machine; afterwards the one that was in use is in use again."""
    if (reason := library.unavailable()) is not None:
        pytest.skip(reason)
    before = library.isa()
    yield library.isas()
    library.select(before)


class Case(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]


@st.composite
def cases(draw) -> Case:
    format, head_dim, heads = draw(formats("uniform")), draw(head_dims), draw(st.integers(1, 4))
    seed, dtype = draw(st.integers(0, 10**6)), draw(st.sampled_from(DTYPES))
    pair = keys_and_values(format, groups=draw(st.integers(1, 3)), heads=heads, head_dim=head_dim, seed=seed)
    strides = st.sampled_from(["", "heads inside", "in a wider tensor", "channels apart"])
    k, v = (strided(planted(x, seed + i).to(dtype), draw(strides)) for i, x in enumerate(pair))
    noise = torch.Generator().manual_seed(seed)
    blocks = [None] + [2**n for n in range(9) if head_dim % 2**n == 0]
    balance = torch.rand(heads, head_dim, generator=noise) + 0.5
    feedback = (torch.randn(heads, head_dim, head_dim, generator=noise) * 0.05).triu(1)
    options = {
        "format": format,
        "grid": draw(st.sampled_from(["minmax", "paper", "unbiased"])),
        "clip": draw(st.sampled_from([None, 1.0, 0.85, 0.5])),
        "norm": draw(st.sampled_from(["l2", "l2", "sinkhorn"])),
        "hadamard_block": draw(st.sampled_from(blocks)),
        "balance": draw(st.sampled_from([None, balance])),
        "rotate_v": draw(st.booleans()),
        "feedback": feedback if draw(st.integers(0, 3)) == 0 else None,
    }
    return Case(k, v, options)


def outcome(encode, case: Case) -> Records | str:
    try:
        return encode(case.k, case.v, **case.options)
    except UnsupportedInput as error:
        return str(error)


def simple_case(format: Format = OCCAM, *, groups: int = 2, head_dim: int = 64, **options) -> Case:
    """As the method occam encodes, but for what is overridden."""
    k, v = keys_and_values(format, groups=groups, heads=2, head_dim=head_dim)
    balance = torch.rand(2, head_dim, generator=torch.Generator().manual_seed(0)) + 0.5
    usual = {"grid": "unbiased", "clip": None, "hadamard_block": head_dim & -head_dim, "rotate_v": True}
    return Case(k, v, {"format": format, "balance": balance} | usual | options)


@fuzzed
@given(case=cases())
@example(case=simple_case(head_dim=8))
@example(case=simple_case(head_dim=256))
@example(case=simple_case(Format(k_group=128, v_group=128, k_bits=3, token_scale=True), head_dim=80))
def test_bytes_are_those_of_the_reference(isas, case):
    expected = outcome(reference.encode, case)
    for isa in isas:
        library.select(isa)
        got = outcome(encoding.encode, case)
        assert got == expected if isinstance(expected, str) else same(got, expected), isa


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format.levels == "uniform"])
def test_bytes_are_the_golden_ones(isas, name):
    case = CASES[name]
    for isa in isas:
        library.select(isa)
        made = encoding.encode(*golden_input(case), format=case.format, grid=case.grid, clip=case.clip)
        assert describe(made) == GOLDEN[name], isa


@pytest.mark.parametrize("side", ["k", "v"])
def test_twin_a_value_one_step_beyond_a_tie_has_another_code(isas, side):
    """Codes 0, 1, 2, 3 of a group from 0 to 3: a half is rounded to the even code, the next number up."""
    format = Format()
    k, v = (torch.zeros(1, 1, 32, 32) for _ in range(2))
    x = k if side == "k" else v.mT
    x[0, 0, :4, 3] = torch.tensor([0.0, 0.5, 2.5, 3.0])
    for isa in isas:
        library.select(isa)
        tie = encoding.encode(k, v, format=format)
        x[0, 0, 1, 3] = float(np.nextafter(np.float32(0.5), np.float32(1)))
        beyond = encoding.encode(k, v, format=format)
        x[0, 0, 1, 3] = 0.5
        assert (raw(tie.data) != raw(beyond.data)).sum() == 1
        assert not same(tie, beyond)
        read = records.decode(tie, format=format, head_dim=32)[side == "v"]
        assert (read if side == "k" else read.mT)[0, 0, :4, 3].tolist() == [0.0, 0.0, 2.0, 3.0]


def with_tiny_values() -> Case:
    case = simple_case(Format(token_scale=True), grid="paper", balance=None)
    case.k[0, :, :5] *= 1e-39
    case.v[:, :, :9] *= 1e-7
    case.v[:, :, 9:12] *= 1e-40
    return case


def test_a_process_that_flushes_denormal_numbers_gets_the_same_bytes(isas):
    case = with_tiny_values()
    expected = reference.encode(case.k, case.v, **case.options)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormal numbers")
    try:
        made = {}
        for isa in isas:
            library.select(isa)
            made[isa] = encoding.encode(case.k, case.v, **case.options)
        flushed = reference.encode(case.k, case.v, **case.options)
    finally:
        torch.set_flush_denormal(False)
    assert all(same(records, expected) for records in made.values())
    assert not same(flushed, expected), "the twin: in torch these values do change"


BAD_VALUES = [float("nan"), float("inf"), -float("inf"), 1e38, -3e5]
BAD_FORMATS = {
    "float16 norms": OCCAM,
    "float32 norms, 16-bit metadata": Format(token_scale=True),
    "no norm, 3 bits": Format(k_bits=3, v_bits=3),
    "per token": Format(k_axis="token", k_group=64, v_group=64),
}


@pytest.mark.parametrize("norm", ["l2", "sinkhorn"])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "as given"])
@pytest.mark.parametrize("what", BAD_FORMATS)
def test_values_that_cannot_be_stored_are_refused_in_the_words_of_the_reference(isas, what, rotated, norm):
    refused = 0
    for side in (0, 1):
        for value in BAD_VALUES:
            case = simple_case(BAD_FORMATS[what], norm=norm, rotate_v=rotated, hadamard_block=64 if rotated else None)
            case[side][1, 1, 7, 5] = value
            expected = outcome(reference.encode, case)
            refused += isinstance(expected, str)
            for isa in isas:
                library.select(isa)
                got = outcome(encoding.encode, case)
                assert got == expected if isinstance(expected, str) else same(got, expected), (isa, side, value)
    assert refused >= 8


def test_any_strides_and_dtypes_give_the_bytes_of_a_plain_copy(isas):
    case = simple_case()
    expected = encoding.encode(case.k, case.v, **case.options)
    for how in ("heads inside", "in a wider tensor", "channels apart"):
        assert same(encoding.encode(strided(case.k, how), strided(case.v, how), **case.options), expected)
    repeated = case.k[:1, :, :1].expand(case.k.shape)
    assert same(
        encoding.encode(repeated, case.v, **case.options), encoding.encode(repeated.clone(), case.v, **case.options)
    )
    for dtype in DTYPES:
        k, v = case.k.to(dtype), case.v.to(dtype)
        exact = encoding.encode(k.to(torch.float32), v.to(torch.float32), **case.options)
        assert same(encoding.encode(k, v, **case.options), exact), dtype


def test_groups_are_independent_of_each_other_and_of_the_number_of_threads(isas):
    case = simple_case(groups=9)
    together = encoding.encode(case.k, case.v, **case.options)
    for n in range(9):
        one = slice(n, n + 1)
        alone = encoding.encode(case.k[one], case.v[one], **case.options)
        assert same(alone, together.select(torch.tensor([n])))
    torch.set_num_threads(3)
    try:
        assert same(encoding.encode(case.k, case.v, **case.options), together)
    finally:
        torch.set_num_threads(1)


def test_no_groups_give_no_records(isas):
    made = encoding.encode(torch.empty(0, 2, 32, 64), torch.empty(0, 2, 32, 64), format=OCCAM)
    assert [t.shape[0] for t in made] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v": torch.zeros(2, 2, 32, 32)}, r"K has shape \(2, 2, 32, 64\) and V \(2, 2, 32, 32\)"),
        ({"k": torch.zeros(2, 2, 64, 64), "v": torch.zeros(2, 2, 64, 64)}, r"allowed: both \[N, H, 32, D\]"),
        ({"balance": torch.ones(64)}, r"balance has shape \(64,\); allowed: \(2, 64\)"),
        ({"feedback": torch.ones(2, 64)}, r"feedback has shape \(2, 64\); allowed: \(2, 64, 64\)"),
        ({"hadamard_block": 48}, "hadamard_block is 48; allowed: a power of two that divides 64"),
        ({"hadamard_block": 128}, "hadamard_block is 128"),
    ],
    ids=lambda x: " and ".join(x) if isinstance(x, dict) else "",
)
def test_shapes_that_do_not_fit_are_refused(isas, change, told):
    case = simple_case()
    with pytest.raises(UnsupportedInput, match=told):
        encoding.encode(**({"k": case.k, "v": case.v} | case.options | change))


@fuzzed
@given(
    format=formats("uniform"),
    head_dim=head_dims,
    heads=st.integers(1, 3),
    count=st.integers(1, 2),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pages_of_any_bytes_are_read_as_the_reference_reads_them(isas, format, head_dim, heads, count, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    pages = Pages.empty(count, format=format, kv_heads=heads, head_dim=head_dim, device="cpu")
    for tensor in pages.tensors:
        tensor.view(torch.uint8).random_(0, 256, generator=generator)
    expected = [x.to(dtype) for x in records.decode_pages(pages)]
    for isa in isas:
        library.select(isa)
        for got, wanted in zip(encoding.decode_pages(pages, dtype=dtype), expected, strict=True):
            assert got.dtype == dtype
            assert got.shape == wanted.shape
            assert torch.equal(got.isnan(), wanted.isnan()), isa
            assert np.array_equal(raw(got.nan_to_num(7.0)), raw(wanted.nan_to_num(7.0))), isa


def test_records_that_were_never_written_read_as_zeros(isas):
    pages = Pages.empty(2, format=OCCAM, kv_heads=2, head_dim=80, device="cpu")
    for isa in isas:
        library.select(isa)
        assert not any(x.any() for x in encoding.decode_pages(pages))
