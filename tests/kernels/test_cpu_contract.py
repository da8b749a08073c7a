"""What the CPU kernel is given beyond the shared contract: shapes at its own limits, every format, odd tensors."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from attention_truth import attention, relative_error
from occamkv import kernels
from occamkv.formats import Format
from occamkv.kernels import FullTokens, blockwise
from occamkv.kernels.cpu.attention import MAX_QUERIES
from occamkv.methods import Method
from some_attention import METHODS, RAGGED, Case, Held, backend_or_skip, cpu_backends, make_case

WIDE = METHODS["oscar-k4v3-balanced-with-float16-norms"]
BYTES = METHODS["kivi-k3v4-with-8-bit-metadata"]


def written_as(**fields) -> Method:
    return Method("oscar", Format(**fields), k_rotation="hadamard", v_rotation="hadamard")


# -- shapes ------------------------------------------------------------------------------------------------------


@cpu_backends
@pytest.mark.parametrize("queries", range(1, MAX_QUERIES + 2))
def test_any_number_of_queries(backend, queries):
    make_case(BYTES, queries=queries, gqa=2, held=RAGGED[:2]).check(backend_or_skip(backend, BYTES))


@cpu_backends
@pytest.mark.parametrize(("queries", "through_torch"), [(MAX_QUERIES, False), (MAX_QUERIES + 1, True)])
def test_the_last_step_that_runs_on_packed_bytes_and_the_first_that_does_not(
    monkeypatch, backend, queries, through_torch
):
    calls = []
    original = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *a, **k: calls.append(1) or original(*a, **k))
    make_case(WIDE, queries=queries, held=RAGGED[:1]).attend(backend_or_skip(backend, WIDE))
    assert bool(calls) == through_torch


@cpu_backends
@pytest.mark.parametrize(("gqa", "queries"), [(16, 1), (16, 2), (11, 3), (16, 3), (5, 7), (9, 8), (16, 8)])
def test_query_rows_of_a_head_beyond_one_pass(backend, gqa, queries):
    held = (Held(1, 6, 9), Held(0, 2, 70, pads=queries - 1))
    make_case(WIDE, gqa=gqa, queries=queries, held=held).check(backend_or_skip(backend, WIDE))


@cpu_backends
@pytest.mark.parametrize("name", ["quarot", "kivi-k3v4-with-8-bit-metadata"])
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_dim(backend, head_dim, name):
    case = make_case(METHODS[name], head_dim=head_dim, queries=2, held=(Held(1, 5, 9),))
    case.check(backend_or_skip(backend, METHODS[name], head_dim))


# -- formats -----------------------------------------------------------------------------------------------------


@cpu_backends
@pytest.mark.parametrize("metadata", [16, 8])
@pytest.mark.parametrize(("k_axis", "k_bits", "v_bits"), list(product(["channel", "token"], (2, 3, 4), (2, 3, 4))))
def test_every_pair_of_bits(backend, k_axis, k_bits, v_bits, metadata):
    form = written_as(k_bits=k_bits, v_bits=v_bits, k_axis=k_axis, metadata_bits=metadata, token_scale=k_bits != 3)
    make_case(form, head_dim=96, queries=3, held=RAGGED[:2]).check(backend_or_skip(backend, form))


@cpu_backends
@pytest.mark.parametrize("head_dim", [48, 144, 256])
@pytest.mark.parametrize("v_group", [32, 64, 128, 256])
@pytest.mark.parametrize(("k_axis", "k_group"), [("channel", 64), ("channel", 128), *product(["token"], (32, 64, 256))])
def test_every_group(backend, k_axis, k_group, v_group, head_dim):
    wide = 16 if (k_group + v_group + head_dim) % 96 else 8
    form = written_as(k_bits=3, v_bits=2, k_axis=k_axis, k_group=k_group, v_group=v_group, metadata_bits=wide)
    make_case(form, head_dim=head_dim, queries=1, gqa=2, held=(Held(0, 5, 0),)).check(backend_or_skip(backend, form))


@cpu_backends
@pytest.mark.parametrize(("k_axis", "bits"), list(product(["channel", "token"], (2, 3, 4))))
def test_the_largest_codes_beside_the_largest_weights_do_not_overflow(backend, k_axis, bits):
    """Every product has the same sign and the largest size that its bytes can have."""
    form = written_as(k_bits=bits, v_bits=bits, k_axis=k_axis)
    case = make_case(form, head_dim=256, queries=1, held=(Held(0, 8, 0),))
    slabs = [replace(s, records=s.records.clone()) for s in case.packed.slabs]
    sections = form.packed_format.sections(256)
    one, none = (torch.tensor([x], dtype=torch.float16).view(torch.uint8) for x in (1.0, 0.0))
    for slab in slabs:
        parts = slab.records.split(sections.sizes, dim=-1)
        for part, value in zip(parts, (None, one, none, None, one, none), strict=True):
            part.copy_(torch.tensor(255) if value is None else value.repeat(part.shape[-1] // 2))
    everywhere = torch.full_like(case.k, 2.0**bits - 1)
    crossing = {"hadamard_block": None, "balance": None, "rotate_output": False}
    for sign in (1, -1):
        same = replace(case, q=torch.full_like(case.q, 1e-3 * sign), k=everywhere, v=everywhere, crossing=crossing)
        tokens = slice(0, int(case.packed.lengths[0]))
        same = replace(
            same, k=same.k[:, :, tokens], v=same.v[:, :, tokens], positions=case.positions[:, tokens], full=[]
        )
        same.with_packed(slabs=slabs).check(backend_or_skip(backend, form))


# -- tensors that do not lie densely -----------------------------------------------------------------------------


def token_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_larger(x: torch.Tensor) -> torch.Tensor:
    larger = torch.full([n + 3 for n in x.shape], 77).to(x.dtype)
    inside = larger[tuple(slice(1, n + 1) for n in x.shape)]
    return inside.copy_(x)


def every_second(x: torch.Tensor) -> torch.Tensor:
    larger = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77).to(x.dtype)
    return larger[..., ::2].copy_(x)


def channel_major(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


LIES = [token_major, part_of_a_larger, every_second, channel_major]


@cpu_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lie", LIES)
def test_tensors_that_lie_otherwise_give_the_same_bits(backend, lie, dtype):
    case, target = make_case(BYTES, gqa=2, dtype=dtype), backend_or_skip(backend, BYTES)
    mask = torch.randn(3, 4, 5, case.mask_positions, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = part_of_a_larger if lie in (token_major, channel_major) else lie
    full = [FullTokens(lie(part.k), lie(part.v), flat(part.positions)) for part in case.full]
    packed = replace(case.packed, **{x: flat(getattr(case.packed, x)) for x in ("table", "lengths", "first_position")})
    other = replace(case, q=lie(case.q), q_positions=flat(case.q_positions), full=full, packed=packed)
    assert not other.q.is_contiguous()
    assert torch.equal(other.attend(target, mask=lie(mask)), case.attend(target, mask=mask))
    assert not torch.equal(case.attend(target, mask=mask), case.attend(target)), "a twin: the mask matters"


@cpu_backends
def test_tensors_with_a_stride_of_zero_give_the_same_bits(backend):
    case, target = make_case(BYTES, gqa=2, held=(RAGGED[0],)), backend_or_skip(backend, BYTES)
    mask = torch.rand(1, 1, 1, case.mask_positions, generator=torch.Generator().manual_seed(0)) < 0.7
    out = case.repeated(3).attend(target, mask=mask.expand(3, 4, 5, -1))
    assert torch.equal(out, case.attend(target, mask=mask.expand(1, 1, 5, -1)).expand(3, -1, -1, -1))


# -- options at their ends ---------------------------------------------------------------------------------------

MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@cpu_backends
@pytest.mark.parametrize("lowest", [False, True], ids=["-inf", "lowest"])
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_masks_of_any_dtype(backend, dtype, lowest):
    case, generator = make_case(WIDE, gqa=2), torch.Generator().manual_seed(0)
    shape = (3, 1, 5, case.mask_positions)
    shown = torch.rand(shape, generator=generator) < 0.5
    if dtype != torch.bool:
        hidden = torch.finfo(dtype).min if lowest else float("-inf")
        shown = torch.randn(shape, generator=generator).to(dtype).masked_fill(~shown, hidden)
    case.check(backend_or_skip(backend, WIDE), mask=shown)


@cpu_backends
@pytest.mark.parametrize("window", [1, 2, 33, 129, 2**62, 2**70])
def test_windows(backend, window):
    case, target = make_case(BYTES, gqa=2), backend_or_skip(backend, BYTES)
    case.check(target, window=min(window, 2**40)) if window < 2**62 else None
    wide = window >= 2**62
    assert torch.equal(case.attend(target, window=window), case.attend(target)) == wide


@cpu_backends
def test_a_window_of_nothing_gives_zeros(backend):
    case, target = make_case(BYTES), backend_or_skip(backend, BYTES)
    assert (case.attend(target, window=0) == 0).all()


@cpu_backends
@pytest.mark.parametrize("sink", [60.0, 200.0, -1e4, float("-inf")])
def test_sinks_far_from_the_logits(backend, sink):
    case, target = make_case(BYTES, gqa=2), backend_or_skip(backend, BYTES)
    sinks = torch.tensor([0.5, sink, 1.0, sink])
    out = case.attend(target, sinks=sinks)
    truth = attention(
        case.q.double(), case.k, case.v, q_positions=case.q_positions, positions=case.positions, sinks=sinks
    )
    assert relative_error(out[:, ::2], truth[:, ::2]) < 1e-3
    if sink > 100:  # below the smallest float
        assert out[:, 1::2].abs().max() < 1e-30
    else:
        assert relative_error(out[:, 1::2], truth[:, 1::2]) < 1e-3


@cpu_backends
@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0, 1e4])
def test_scales(backend, scale):
    case, target = make_case(BYTES, queries=2, held=(Held(0, 9, 3),)), backend_or_skip(backend, BYTES)
    out = case.attend(target, scale=scale)
    assert out.isfinite().all()
    if scale < 100:
        case.check(target, scale=scale)
    else:  # one token has it all, but which of two nearly equal ones is a matter of rounding
        assert (out.abs().amax(-1) > 0).all()


@cpu_backends
def test_double_precision_queries_give_double_precision_back(backend):
    case, target = make_case(BYTES, gqa=2), backend_or_skip(backend, BYTES)
    double = replace(case, q=case.q.double()).attend(target)
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), case.attend(target))


@cpu_backends
def test_positions_of_queries_may_be_short_integers(backend):
    case, target = make_case(BYTES), backend_or_skip(backend, BYTES)
    short = replace(case, q_positions=case.q_positions.int())
    assert torch.equal(short.attend(target, window=50), case.attend(target, window=50))


@cpu_backends
def test_no_full_precision_tokens_and_parts_without_a_token(backend):
    case, target = make_case(BYTES, held=(Held(0, 9, 0), Held(0, 5, 0))), backend_or_skip(backend, BYTES)
    length = int(case.packed.lengths.max())
    alone = replace(
        case, full=[], k=case.k[:, :, :length], v=case.v[:, :, :length], positions=case.positions[:, :length]
    )
    alone.check(target)
    empty = FullTokens(torch.zeros(2, 2, 0, 64), torch.zeros(2, 2, 0, 64), torch.zeros(2, 0).long())
    assert torch.equal(replace(alone, full=[empty, empty]).attend(target), alone.attend(target))
    nothing = replace(case, packed=None, full=[empty])
    assert (nothing.attend(target) == 0).all()


@cpu_backends
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "queries"), [(0, 1), (3, 0), (0, 0)])
def test_no_query_gives_no_output(backend, threads, batch, queries, monkeypatch):
    case, target = make_case(BYTES, held=(Held(0, 40, 5),) * 3), backend_or_skip(backend, BYTES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    packed = replace(
        case.packed, **{x: getattr(case.packed, x)[:batch] for x in ("table", "lengths", "first_position")}
    )
    full = [FullTokens(*(x[:batch] for x in (part.k, part.v, part.positions))) for part in case.full]
    few = replace(
        case, q=case.q[:batch, :, :queries], q_positions=case.q_positions[:batch, :queries], packed=packed, full=full
    )
    assert few.attend(target).shape == (batch, 2, queries, 64)


# -- numbers that are none ---------------------------------------------------------------------------------------


def poison(case: Case, where: str, value: float) -> Case:
    """Put a number into one channel of a visible token of the residual of the first sequence, or of a query."""
    if where == "q":
        q = case.q.clone()
        q[0, 1, 2, 7] = value
        return replace(case, q=q)
    full = list(case.full)
    ring = full[1]
    slot = int((ring.positions[0] >= 0).nonzero()[3, 0])
    changed = getattr(ring, where).clone()
    changed[0, 1, slot, 7] = value
    full[1] = replace(ring, **{where: changed})
    return replace(case, full=full)


NON_FINITE_OPTIONS = {
    "causal": {},
    "soft cap": {"softcap": 5.0},
    "sinks": {"sinks": torch.tensor([0.5, 1.0, -1.0, float("-inf")])},
    "window before it": {"window": 2},
}


@cpu_backends
@pytest.mark.parametrize("option", NON_FINITE_OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["rtn", "kivi-k3v4-with-8-bit-metadata"])
def test_what_is_not_finite_shows_where_the_reference_shows_it(backend, name, where, value, option):
    case = poison(make_case(METHODS[name], gqa=2), where, value)
    given = NON_FINITE_OPTIONS[option]
    shown = ~case.attend(backend_or_skip(backend, METHODS[name]), **given).isfinite().all(-1)
    expected = ~case.attend(kernels.backend("reference"), **given).isfinite().all(-1)
    if option == "causal" and value != float("-inf"):
        assert expected.any(), "a twin: the reference shows it"
    may_show = torch.zeros_like(shown)
    may_show[(0, 1, 2) if where == "q" else (0, slice(2, 4))] = True  # that query, or the queries of that KV head
    assert not (expected & ~shown).any(), "hidden"
    assert not (shown & ~may_show).any(), "spread"


@cpu_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["mask", "sinks", "balance"])
def test_an_argument_that_is_not_finite_shows_too(backend, what, value):
    case, target = make_case(WIDE), backend_or_skip(backend, WIDE)
    options = {}
    if what == "mask":
        options["mask"] = torch.zeros(3, 1, 5, case.mask_positions)
        options["mask"][0, 0, 2, 30] = value
    elif what == "sinks":
        options["sinks"] = torch.tensor([0.5, value])
    else:
        balance = case.crossing["balance"].clone()
        balance[1, 5] = value
        case = replace(case, crossing=case.crossing | {"balance": balance})
    out, expected = case.attend(target, **options), case.attend(kernels.backend("reference"), **options)
    assert torch.equal(out.isfinite().all(-1), expected.isfinite().all(-1))
