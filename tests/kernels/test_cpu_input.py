"""Bad input is refused in one sentence before anything is read; input that is merely odd works."""

from dataclasses import replace

import pytest
import torch

from occamkv import kernels
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.formats.pages import Pages
from occamkv.kernels import FullTokens
from scattered_pages import clone_slabs
from some_attention import METHODS, Case, Held, backend_or_skip, cpu_backends, default_backends, make_case

WIDE = "oscar-k4v3-balanced-with-float16-norms"
BYTES = "kivi-k3v4-with-8-bit-metadata"
HELD = (Held(2, 5, 20), Held(1, 3, 127))


def slabs_with(case: Case, **changes) -> Case:
    """Tensors of the second slab, which holds the first used page, replaced by what a function makes of them."""
    slabs = clone_slabs(case.packed)
    slabs[1] = replace(slabs[1], **{name: change(getattr(slabs[1], name)) for name, change in changes.items()})
    return case.with_packed(slabs=slabs)


def full_with(case: Case, **changes) -> Case:
    part = case.full[1]
    return replace(case, full=[case.full[0], replace(part, **{n: f(getattr(part, n)) for n, f in changes.items()})])


def packed_with(case: Case, name: str, change) -> Case:
    return case.with_packed(**{name: change(getattr(case.packed, name))})


def entry(value: int):
    """The first entry of the block table becomes this."""

    def change(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[0, 0] = value
        return table

    return change


def first_gap(case: Case) -> int:
    """A page number between two slabs."""
    ends = [start + slab.count for start, slab in zip(case.packed.starts, case.packed.slabs, strict=True)]
    return next(end for end, start in zip(ends, case.packed.starts[1:], strict=False) if end < start)


def with_gap() -> Case:
    for seed in range(20):
        case = make_case(METHODS[WIDE], held=HELD, seed=seed)
        starts, slabs = case.packed.starts, case.packed.slabs
        if any(a + s.count < b for a, s, b in zip(starts, slabs, starts[1:], strict=False)):
            return case
    raise AssertionError("no slab was given back")


def meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), dim=-1)[..., 0]


PAGES = {
    "records not dense": (WIDE, {"records": strided}, r"records of pages are torch.uint8 .* dense"),
    "records of another dtype": (WIDE, {"records": lambda x: x.int()}, "torch.int32"),
    "records of another length": (WIDE, {"records": lambda x: x[..., :-2].contiguous()}, "another version"),
    "records on another device": (WIDE, {"records": meta}, "on meta"),
    "norms missing": (WIDE, {"norms": lambda x: None}, "norms of pages are missing"),
    "norms of another dtype": (WIDE, {"norms": lambda x: x.float()}, "norms of pages are torch.float32"),
    "norms too few": (WIDE, {"norms": lambda x: x[:, :64].contiguous()}, r"\(\d+, 64\)"),
    "norms not dense": (WIDE, {"norms": strided}, "norms of pages .* dense"),
    "norms that the format has not": (BYTES, {"norms": lambda x: torch.ones(9, 128)}, "allowed: none"),
    "super-scales missing": (BYTES, {"super_scales": lambda x: None}, "super_scales of pages are missing"),
    "super-scales not dense": (BYTES, {"super_scales": strided}, "super_scales of pages .* dense"),
    "pages of another format": (WIDE, {"format": lambda f: replace(f, k_bits=2, v_bits=4)}, "pages of one layer hold"),
    "pages of another head_dim": (WIDE, {"head_dim": lambda d: 48}, "heads of different shapes"),
}


@cpu_backends
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("what", PAGES)
def test_pages_of_another_make_are_refused(backend, what, queries):
    name, changes, told = PAGES[what]
    case = slabs_with(make_case(METHODS[name], held=HELD, queries=queries), **changes)
    with pytest.raises(UnsupportedInput, match=told):
        case.attend(backend_or_skip(backend, METHODS[name]))


@cpu_backends
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("number", [-1, -(2**62), 10**6, 2**62])
def test_pages_outside_the_pool_are_refused(backend, number, queries):
    case = packed_with(make_case(METHODS[WIDE], held=HELD, queries=queries), "table", entry(number))
    with pytest.raises(UnsupportedInput, match=f"block table names page {number}.* in no slab"):
        case.attend(backend_or_skip(backend, METHODS[WIDE]))


@default_backends
def test_a_page_between_two_slabs_is_refused(backend):
    case = with_gap()
    target, number = backend_or_skip(backend, METHODS[WIDE]), first_gap(case)
    with pytest.raises(UnsupportedInput, match=f"names page {number}"):
        packed_with(case, "table", entry(number)).attend(target)
    case.check(target)


LENGTHS = {
    "negative": (lambda n: n - 1000, "-6.. packed tokens"),
    "no whole records": (lambda n: n + 1, "321 packed tokens; allowed: whole records of 64"),
    "beyond the table": (lambda n: n + 128, "448 packed tokens; .* within 3 pages"),
    "largest": (lambda n: n * 0 + 2**63 - 64, "9223372036854775744 packed tokens"),
}


@default_backends
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("what", LENGTHS)
def test_lengths_that_cannot_be_are_refused(backend, what, queries):
    change, told = LENGTHS[what]
    case = packed_with(make_case(METHODS[WIDE], held=HELD, queries=queries), "lengths", change)
    with pytest.raises(UnsupportedInput, match=told):
        case.attend(backend_or_skip(backend, METHODS[WIDE]))


OF_PACKED = {
    "table of int32": ("table", lambda x: x.int(), "the block table is torch.int32"),
    "table of one sequence": ("table", lambda x: x[:1], r"the block table is torch.int64 \(1, 3\)"),
    "table elsewhere": ("table", meta, "the block table .* on meta"),
    "lengths of int32": ("lengths", lambda x: x.int(), "lengths is torch.int32"),
    "too few lengths": ("lengths", lambda x: x[:1], r"lengths is torch.int64 \(1,\)"),
    "lengths elsewhere": ("lengths", meta, "lengths .* on meta"),
    "first positions of int32": ("first_position", lambda x: x.int(), "first_position is torch.int32"),
    "first positions elsewhere": ("first_position", meta, "first_position .* on meta"),
    "skips of int32": ("skips", lambda _: torch.zeros(2, 1).int(), "skips is torch.int32"),
    "skips of one sequence": ("skips", lambda _: torch.zeros(1, 1).long(), r"skips is torch.int64 \(1, 1\)"),
}


@cpu_backends
@pytest.mark.parametrize("what", OF_PACKED)
def test_descriptions_of_packed_tokens_that_do_not_fit_are_refused(backend, what):
    name, change, told = OF_PACKED[what]
    case = packed_with(make_case(METHODS[WIDE], held=HELD), name, change)
    with pytest.raises(UnsupportedInput, match=told):
        case.attend(backend_or_skip(backend, METHODS[WIDE]))


GIVEN = {
    "q of whole numbers": (lambda c: replace(c, q=c.q.int()), {}, r"q is torch.int32 \(2, 2, 5, 64\)"),
    "q without a batch": (lambda c: replace(c, q=c.q[0]), {}, r"q is torch.float32 \(2, 5, 64\)"),
    "q of another head_dim": (
        lambda c: replace(c, q=c.q[..., :48]),
        {},
        "q has head_dim 48, the packed tokens have 64",
    ),
    "no heads of q": (lambda c: replace(c, q=c.q[:, :1]), {}, "1 heads; allowed: a multiple of the 2"),
    "positions of floats": (
        lambda c: replace(c, q_positions=c.q_positions.float()),
        {},
        "q_positions is torch.float32",
    ),
    "positions elsewhere": (lambda c: replace(c, q_positions=meta(c.q_positions)), {}, "q_positions .* on meta"),
    "no tokens": (lambda c: replace(c, packed=None, full=[]), {}, "neither packed nor full-precision"),
    "k elsewhere": (lambda c: full_with(c, k=meta), {}, r"k is .* on meta; allowed"),
    "k of whole numbers": (lambda c: full_with(c, k=lambda x: x.int()), {}, "k is torch.int32"),
    "k of other heads": (lambda c: full_with(c, k=lambda x: x[:, :1]), {}, r"k is torch.float32 \(2, 1, 128, 64\)"),
    "v of another head_dim": (lambda c: full_with(c, v=lambda x: x[..., :32]), {}, r"v is .*\(2, 2, 128, 32\)"),
    "v of fewer tokens": (lambda c: full_with(c, v=lambda x: x[:, :, :9]), {}, r"v is .*\(2, 2, 9, 64\)"),
    "token positions of floats": (
        lambda c: full_with(c, positions=lambda x: x.float()),
        {},
        "positions is torch.float32",
    ),
    "token positions elsewhere": (lambda c: full_with(c, positions=meta), {}, "positions .* on meta"),
    "mask of whole numbers": (lambda c: c, {"mask": torch.ones(1, 1, 5, 500).int()}, "mask is torch.int32"),
    "mask elsewhere": (lambda c: c, {"mask": torch.ones(1, 1, 5, 500, device="meta")}, "mask is .* on meta"),
    "mask of no positions": (lambda c: c, {"mask": torch.ones(1, 1, 5, 0)}, r"\(1, 1, 5, 0\)"),
    "mask without heads": (lambda c: c, {"mask": torch.ones(1, 5, 500)}, r"\(1, 5, 500\)"),
    "sinks elsewhere": (lambda c: c, {"sinks": torch.ones(2, device="meta")}, "sinks .* on meta"),
    "sinks of whole numbers": (lambda c: c, {"sinks": torch.ones(2).int()}, "sinks is torch.int32"),
    "balance of other heads": (lambda c: crossed(c, balance=torch.ones(1, 64)), {}, r"balance is .*\(1, 64\)"),
    "balance elsewhere": (lambda c: crossed(c, balance=torch.ones(2, 64, device="meta")), {}, "balance .* on meta"),
    "rotation in blocks of 24": (lambda c: crossed(c, hadamard_block=24), {}, "hadamard_block is 24; .* head_dim 64"),
    "rotation in blocks of 128": (lambda c: crossed(c, hadamard_block=128), {}, "hadamard_block is 128"),
    "rotation in blocks of 0": (lambda c: crossed(c, hadamard_block=0), {}, "hadamard_block is 0"),
}


def crossed(case: Case, **changes) -> Case:
    return replace(case, crossing=case.crossing | changes)


@default_backends
@pytest.mark.parametrize("what", GIVEN)
def test_arguments_that_do_not_fit_are_refused_by_every_backend(backend, what):
    change, options, told = GIVEN[what]
    case = make_case(METHODS[WIDE], held=HELD)
    with pytest.raises(UnsupportedInput, match=told):
        change(case).attend(backend_or_skip(backend, METHODS[WIDE]), **options)


@cpu_backends
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("head_dim", [8, 24, 72, 272, 320])
def test_heads_that_do_not_fill_vectors_or_exceed_the_buffers_are_refused(backend, head_dim, queries):
    part = FullTokens(*(torch.zeros(1, 1, 3, head_dim) for _ in range(2)), torch.arange(3)[None])
    at = torch.full((1, queries), 2)
    given = {"q_positions": at, "packed": None, "full": [part]}
    target = backend_or_skip(backend, METHODS["oscar"])
    with pytest.raises(UnsupportedInput, match=f"head_dim {head_dim}; allowed: the CPU, multiples of 16 up to 256"):
        target.attend(torch.zeros(1, 1, queries, head_dim), **given)


def test_q_on_another_device_is_refused():
    case = make_case(METHODS["oscar"], held=HELD)
    target = backend_or_skip("cpu", METHODS["oscar"])
    part = FullTokens(meta(case.full[1].k), meta(case.full[1].v), meta(case.full[1].positions))
    given = {"q_positions": meta(case.q_positions), "packed": None, "full": [part]}
    with pytest.raises(UnsupportedInput, match="q lies on meta"):
        target.attend(meta(case.q), **given)


@cpu_backends
@pytest.mark.parametrize("queries", [1, 9])
def test_levels_that_the_kernel_cannot_read_are_refused_even_when_nobody_asked_first(backend, queries):
    name = "lloyd-max-levels-of-2.5-and-3-bits"
    case = make_case(METHODS[name], held=HELD, queries=queries)
    with pytest.raises(UnsupportedInput, match="lloyd levels"):
        case.attend(kernels.backend(backend))


@cpu_backends
def test_short_positions_of_tokens_are_refused(backend):
    case = full_with(make_case(METHODS["oscar"], held=HELD), positions=lambda x: x.int())
    with pytest.raises(UnsupportedInput, match=r"positions is torch.int32 \(2, 128\)"):
        case.attend(backend_or_skip(backend, METHODS["oscar"]))


# -- which backend is taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 24, 40, 72, 120, 248])
def test_head_dims_that_do_not_fill_vectors_go_to_the_reference_with_a_reason(head_dim):
    form = METHODS["oscar"].packed_format
    backend_or_skip("cpu", METHODS["oscar"])
    reasons = kernels.refusals(form, "cpu", head_dim)
    assert "not on cpu" in reasons.pop("cuda")
    assert reasons == {"cpu": f"it takes head_dims that are multiples of 16, not {head_dim}", "reference": None}
    assert kernels.backend_for(form, "cpu", head_dim).name == "reference"
    assert kernels.backend_for(form, "cpu", head_dim + 8).name == "cpu"
    assert kernels.backend_for(form, "cpu").name == "cpu"


def test_other_devices_and_levels_go_to_the_reference_with_a_reason():
    backend_or_skip("cpu", METHODS["oscar"])
    assert "not on meta" in kernels.refusals(METHODS["oscar"].packed_format, "meta", 64)["cpu"]
    assert "lloyd" in kernels.refusals(Format(levels="lloyd"), "cpu", 64)["cpu"]
    assert kernels.backend_for(Format(levels="lloyd"), "cpu", 64).name == "reference"


# -- odd, but right ----------------------------------------------------------------------------------------------


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element behind a 64-byte boundary."""
    room = torch.zeros(x.numel() + 128, dtype=x.dtype)
    first = -(room.data_ptr() // x.element_size()) % 64 + 1
    moved = room[first : first + x.numel()].view(x.shape)
    assert moved.data_ptr() % 64 == x.element_size()
    return moved.copy_(x)


@cpu_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["oscar", "rtn", WIDE, BYTES])
def test_misaligned_tensors_and_pages_give_the_same_bits(backend, name, dtype):
    case, target = make_case(METHODS[name], gqa=2, head_dim=96, dtype=dtype), backend_or_skip(backend, METHODS[name])
    mask = torch.zeros(1, 1, 5, case.mask_positions, dtype=dtype)
    slabs = [
        Pages(
            s.format, s.head_dim, *(None if t is None else misaligned(t) for t in (s.records, s.norms, s.super_scales))
        )
        for s in case.packed.slabs
    ]
    numbers = {x: misaligned(getattr(case.packed, x)) for x in ("table", "lengths", "first_position")}
    full = [FullTokens(*map(misaligned, (part.k, part.v, part.positions))) for part in case.full]
    crossing = {n: misaligned(x) if isinstance(x, torch.Tensor) else x for n, x in case.crossing.items()}
    moved = replace(case, q=misaligned(case.q), q_positions=misaligned(case.q_positions), full=full, crossing=crossing)
    moved = moved.with_packed(slabs=slabs, **numbers)
    assert torch.equal(moved.attend(target, mask=misaligned(mask)), case.attend(target, mask=mask))


@cpu_backends
def test_entries_behind_the_last_page_do_not_count(backend):
    """The kernel does not even look them up."""
    case, target = (
        make_case(METHODS[WIDE], held=(Held(0, 5, 3), Held(0, 1, 3))),
        backend_or_skip(backend, METHODS[WIDE]),
    )
    table = case.packed.table.clone()
    assert table.shape[1] == 3
    table[1, 1:] = -5
    assert torch.equal(case.with_packed(table=table).attend(target), case.attend(target))
