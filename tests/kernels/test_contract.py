"""The contract of `attend`, for every backend: against float64 attention on what the same bytes stand for."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_cuda import GPU
from occamkv import kernels
from occamkv.errors import UnsupportedInput
from occamkv.methods import Method
from scattered_pages import clone_slabs, fill_behind, page_at
from some_attention import (
    DEFAULT_TARGETS,
    EMULATED,
    METHODS,
    RAGGED,
    TARGETS,
    Case,
    Held,
    attend_backends,
    backend_or_skip,
    backends,
    make_case,
)
from some_records import formats

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)
QUERIES = (1, 5, 130)
GQA = (1, 3, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shapes():
    """Every method with every head_dim and number of queries; GQA ratios and dtypes take turns so that all meet.

    Many queries are no matter of the instruction set: they go through torch.
    """
    for (m, name), (d, head_dim), queries in product(enumerate(METHODS), enumerate(HEAD_DIMS), QUERIES):
        gqa, dtype = GQA[(m + d + QUERIES.index(queries)) % 3], DTYPES[(m + 2 * d) % 3]
        short = str(dtype).removeprefix("torch.")
        told = f"{name}-D{head_dim}-Tq{queries}-gqa{gqa}-{short}"
        compiled = [GPU] if head_dim % 64 == 0 else []  # a format of other head_dims takes a second each
        for target in (*TARGETS, EMULATED, *compiled) if queries < 9 else DEFAULT_TARGETS:
            builds = [pytest.mark.emulator] if target == EMULATED and head_dim != 64 else []
            builds = [pytest.mark.gpu] if target == GPU else builds
            yield pytest.param(target, name, head_dim, queries, gqa, dtype, id=f"{target}-{told}", marks=builds)


@pytest.mark.parametrize(
    ("backend", "name", "head_dim", "queries", "gqa", "dtype"), list(shapes()), indirect=["backend"]
)
def test_attention_over_ragged_left_padded_sequences(backend, name, head_dim, queries, gqa, dtype):
    held = (*RAGGED, Held(0, 1, 40, pads=min(2, queries)))
    case = make_case(METHODS[name], head_dim=head_dim, gqa=gqa, queries=queries, held=held, dtype=dtype)
    truth = case.check(backend_or_skip(backend, METHODS[name]))
    assert (truth[-1, :, : held[-1].pads] == 0).all(), "a pad sees nothing"


def test_twin_the_shapes_meet_every_gqa_ratio_in_every_dtype():
    for target in DEFAULT_TARGETS:
        met = {param.values[2:] for param in shapes() if param.values[0] == target}
        assert {values[2:] for values in met} == set(product(GQA, DTYPES))
        assert {values[1:3] for values in met} == set(product(QUERIES, GQA))


def boolean(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.6


def bias(*shape: int, hidden: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return noise.masked_fill(~boolean(*shape), hidden)


def sizes(case: Case) -> tuple[int, int, int, int]:
    return (*case.q.shape[:3], case.mask_positions)


def one_row_hidden(mask: torch.Tensor) -> torch.Tensor:
    mask[0, :, 1] = False
    return mask


SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, float("-inf"), 1.5])
OPTIONS = {
    "boolean mask shared by heads": lambda b, h, t, n: {"mask": one_row_hidden(boolean(b, 1, t, n))},
    "boolean mask per head": lambda b, h, t, n: {"mask": one_row_hidden(boolean(b, h, t, n))},
    "one boolean mask for the batch": lambda b, h, t, n: {"mask": boolean(1, 1, t, n)},
    "additive mask shared by heads": lambda b, h, t, n: {"mask": bias(b, 1, t, n, hidden=float("-inf"))},
    "additive mask per head with the lowest number": lambda b, h, t, n: {
        "mask": bias(1, h, t, n, hidden=torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    },
    "sliding window": lambda b, h, t, n: {"window": 40},
    "window that shows only the query's own token": lambda b, h, t, n: {"window": 1},
    "window wider than the context": lambda b, h, t, n: {"window": 10_000},
    "window and mask": lambda b, h, t, n: {"window": 60, "mask": boolean(b, 1, t, n)},
    "custom scale": lambda b, h, t, n: {"scale": 0.3},
    "logit soft cap": lambda b, h, t, n: {"softcap": 2.0},
    "learned sinks": lambda b, h, t, n: {"sinks": SINKS},
    "everything at once": lambda b, h, t, n: {
        "mask": one_row_hidden(boolean(b, h, t, n)),
        "window": 150,
        "scale": 0.2,
        "softcap": 3.0,
        "sinks": SINKS,
    },
}


@attend_backends
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["oscar", "quarot", "kivi-k3v4-with-8-bit-metadata"])
def test_options(backend, name, option, dtype):
    case = make_case(METHODS[name], gqa=3, dtype=dtype, held=(*RAGGED, Held(0, 1, 40, pads=2)))
    case.check(backend_or_skip(backend, METHODS[name]), **OPTIONS[option](*sizes(case)))


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "window wider than the context"])
def test_twin_an_option_that_is_ignored_is_noticed(option):
    case = make_case(METHODS["oscar"], gqa=3)

    class Deaf:
        @staticmethod
        def attend(q, **given):
            ignored = dict.fromkeys(("mask", "window", "scale", "softcap", "sinks"))
            return kernels.backend("reference").attend(q, **given | ignored)

    with pytest.raises(AssertionError, match="relative error"):
        case.check(Deaf, **OPTIONS[option](*sizes(case)))


@attend_backends
def test_sinks_of_minus_infinity_are_no_sinks(backend):
    case = make_case(METHODS["oscar"])
    target = backend_or_skip(backend, METHODS["oscar"])
    out = case.attend(target, sinks=torch.full((2,), float("-inf")))
    torch.testing.assert_close(out, case.attend(target), rtol=1e-6, atol=1e-7)


@attend_backends
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, float("-inf")])], ids=["no sinks", "sinks"])
def test_fully_masked_rows_give_zeros(backend, sinks):
    case = make_case(METHODS["oscar"], dtype=torch.bfloat16)
    batch, _, queries, positions = sizes(case)
    mask = torch.zeros(batch, 1, queries, positions, dtype=torch.bool)
    target = backend_or_skip(backend, METHODS["oscar"])
    lowest = [torch.full(mask.shape, torch.finfo(dtype).min, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for hidden in (mask, torch.full(mask.shape, float("-inf")), *lowest):
        out = case.attend(target, mask=hidden, sinks=sinks)
        assert torch.equal(out, torch.zeros_like(out))


@attend_backends
@pytest.mark.parametrize(
    "held",
    [
        pytest.param((Held(0, 0, 0), Held(0, 0, 0)), id="only new tokens"),
        pytest.param((Held(3, 0, 0), Held(0, 0, 7)), id="only pins and residual"),
        pytest.param((Held(0, 4, 0),), id="one full page"),
        pytest.param((Held(0, 0, 9), Held(0, 9, 0), Held(0, 1, 127)), id="nothing packed in the first sequence"),
    ],
)
@pytest.mark.parametrize("name", ["oscar", "rtn"])
def test_parts_that_are_missing(backend, name, held):
    make_case(METHODS[name], held=held, gqa=3).check(backend_or_skip(backend, METHODS[name]))


@attend_backends
@pytest.mark.parametrize("name", METHODS)
def test_packed_tokens_alone(backend, name):
    case = make_case(METHODS[name], held=(Held(0, 6, 0), Held(0, 2, 0)), queries=3)
    packed_slots = case.positions.shape[1] - sum(part.k.shape[2] for part in case.full)
    alone = replace(
        case,
        full=[],
        q_positions=case.packed.lengths[:, None] - 3 + torch.arange(3),
        positions=case.positions.masked_fill(torch.arange(case.positions.shape[1]) >= packed_slots, -1),
    )
    alone.check(backend_or_skip(backend, METHODS[name]))


@attend_backends
@pytest.mark.parametrize("name", METHODS)
def test_bytes_behind_a_sequence_may_be_anything(backend, name):
    case = make_case(METHODS[name])
    assert (case.packed.table == 0).any(), "page 0 belongs to no sequence, yet fills the table"
    slabs = clone_slabs(case.packed)
    for tensor in slabs[0].tensors:
        tensor.view(torch.uint8).fill_(0xFF)
    used = case.packed.lengths // case.packed.format.record_tokens
    for row, index in (
        (row, index) for row, n in enumerate(used) for index in range(-(-n // slabs[0].format.page_records))
    ):
        slab, page = page_at(case.packed, row, index)
        fill_behind(slabs[slab], page, int(used[row]) - index * slabs[0].format.page_records)
    case.with_packed(slabs=slabs).check(backend_or_skip(backend, METHODS[name]))


@attend_backends
@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"q": torch.zeros(3, 3, 5, 64)}, "3 heads", id="query heads no multiple of KV heads"),
        pytest.param({"q_positions": torch.zeros(3, 4).long()}, r"\(3, 4\)", id="too few positions"),
        pytest.param({"mask": torch.ones(3, 1, 4, 500).bool()}, r"\(3, 1, 4, 500\)", id="mask of other queries"),
        pytest.param({"mask": torch.ones(2, 1, 5, 500).bool()}, r"\(2, 1, 5, 500\)", id="mask of another batch"),
        pytest.param({"sinks": torch.zeros(3)}, "3 values", id="too many sinks"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(backend, change, told):
    case = make_case(METHODS["oscar"])
    given = {"q": case.q, "q_positions": case.q_positions, "packed": case.packed, "full": case.full, **case.crossing}
    given |= change
    with pytest.raises(UnsupportedInput, match=told):
        backend_or_skip(backend, METHODS["oscar"]).attend(given.pop("q"), **given)


@st.composite
def cases(draw, *levels: str, head_dim_step: int = 8) -> tuple[Case, dict]:
    """Any format (with `levels` only those) and rotation, small shapes, any mixture of options."""
    k_rotation, v_rotation = draw(st.sampled_from(["none", "hadamard", "balanced"])), draw(st.booleans())
    written = draw(formats(*levels))
    form = Method("oscar", written, k_rotation=k_rotation, v_rotation="hadamard" if v_rotation else "none")
    queries, heads, gqa = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 16]))
    rows = st.builds(Held, st.integers(0, 4), st.integers(0, 5), st.integers(0, 127), st.integers(0, queries))
    case = make_case(
        form,
        head_dim=head_dim_step * draw(st.integers(1, 256 // head_dim_step)),
        heads=heads,
        gqa=gqa,
        queries=queries,
        held=draw(st.lists(rows, min_size=1, max_size=4)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 999)),
    )
    shapes = st.sampled_from([sizes(case), (1, 1, *sizes(case)[2:])])
    chosen = {} if draw(st.booleans()) else {"mask": boolean(*draw(shapes))}
    chosen["window"] = draw(st.none() | st.integers(1, 300))
    chosen["softcap"] = draw(st.none() | st.just(4.0))
    chosen["sinks"] = draw(st.none() | st.just(torch.linspace(-2, 2, heads * gqa)))
    return case, chosen


any_cases = {"reference": cases(), "cpu": cases("uniform", head_dim_step=16)}


@backends
@given(st.data())
@settings(deadline=None, max_examples=60, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_small_case(backend, data):
    backend_or_skip(backend, METHODS["oscar"])
    case, options = data.draw(any_cases[backend])
    case.check(kernels.backend(backend), **options)
