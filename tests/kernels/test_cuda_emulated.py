"""The CUDA kernel on a CPU, beyond the shared contract: any format, split, order of blocks, both ways to copy."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import emulated_cuda
from attention_truth import attention, relative_error
from emulated_cuda import Emulated, mutated
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.kernels import FullTokens, blockwise, cuda
from occamkv.kernels.cuda.attention import splits_for
from occamkv.kernels.cuda.building import ARCHITECTURES
from occamkv.kernels.cuda.call import MAX_PARTS, MAX_QUERIES
from occamkv.kernels.cuda.launching import architecture_of
from occamkv.methods import Method
from scattered_pages import clone_slabs, fill_behind, page_at, scatter
from some_attention import METHODS, RAGGED, Case, Held, make_case, pack, unpacked

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))

OSCAR, BYTES = METHODS["oscar"], METHODS["kivi-k3v4-with-8-bit-metadata"]
SHAPES = (
    (64, 32),
    (128, 32),
    (128, 128),
    (80, 64),
    (256, 32),
    (96, 256),
    (192, 64),
    (112, 32),
    (32, 32),
    (40, 64),
    (8, 32),
)
"""Head_dim and V group."""


def some_method(rng: random.Random, head_dim: int, v_group: int) -> Method:
    written = Format(
        k_bits=rng.choice((2, 3, 4)),
        v_bits=rng.choice((2, 3, 4)),
        k_group=rng.choice((32, 64, 128)),
        v_group=v_group,
        token_scale=rng.random() < 0.6,
        norm_dtype=rng.choice(("float32", "float16")),
        metadata_bits=rng.choice((16, 8)),
    )
    k_rotation, v_rotation = rng.choice(("none", "hadamard", "balanced")), rng.choice(("none", "hadamard"))
    return Method("oscar", written, k_rotation=k_rotation, v_rotation=v_rotation)


def some_case(form: Method, head_dim: int, rng: random.Random) -> tuple[Case, dict[str, Any]]:
    queries, heads, gqa = rng.choice((*range(1, 9), 23)), rng.randint(1, 2), rng.choice((1, 2, 3, 7, 16))
    held = [
        Held(rng.randint(0, 4), rng.randint(0, 5), rng.randint(0, 127), rng.randint(0, queries))
        for _ in range(rng.randint(1, 3))
    ]
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    case = make_case(
        form, head_dim=head_dim, heads=heads, gqa=gqa, queries=queries, held=held, dtype=dtype, seed=rng.randint(0, 999)
    )
    sinks = rng.choice((None, torch.linspace(-2, 2, heads * gqa)))
    window, softcap = rng.choice((None, 1, 40, rng.randint(1, 300))), rng.choice((None, 4.0))
    return case, {"window": window, "softcap": softcap, "sinks": sinks}


def some_backend(rng: random.Random) -> Emulated:
    return Emulated(packed_splits=rng.randint(1, 5), bulk=rng.random() < 0.5, order=rng.randint(0, 99))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.emulator) for n in range(2, 60))])
def test_any_format_in_any_case(seed):
    rng = random.Random(seed)
    head_dim, v_group = SHAPES[seed % len(SHAPES)]
    form = some_method(rng, head_dim, v_group)
    for _ in range(3):
        case, options = some_case(form, head_dim, rng)
        case.check(some_backend(rng), **options)


# -- what must not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_order_of_blocks_changes_no_bit(order):
    case = make_case(OSCAR, gqa=3, held=(Held(2, 20, 20), Held(1, 3, 127)))
    first = case.attend(Emulated(packed_splits=3))
    assert torch.equal(case.attend(Emulated(packed_splits=3, order=order)), first)


def test_copies_in_bulk_change_no_bit():
    case = make_case(OSCAR, held=(Held(0, 40, 0),))
    assert torch.equal(case.attend(Emulated(bulk=True)), case.attend(Emulated()))


@pytest.mark.parametrize(
    ("queries", "gqa", "options"),
    [(9, 1, {}), (17, 3, {"window": 30}), (40, 2, {"softcap": 4.0, "window": 150}), (MAX_QUERIES, 1, {})],
    ids=str,
)
def test_chunks_longer_than_a_tile(queries, gqa, options, monkeypatch):
    """Each query sees the tokens of the chunk up to its own; a row sees none, one is padded."""
    monkeypatch.setattr(blockwise, "attend", None)
    held = (Held(3, 5, 40, queries // 2), Held(0, 2, 100), Held(0, 0, 0, queries))
    case = make_case(OSCAR, gqa=gqa, queries=queries, held=held)
    case.check(Emulated(packed_splits=3), **options)


@pytest.mark.parametrize("splits", [1, 3, 4, 9, 70])
def test_any_number_of_splits(splits):
    case = make_case(OSCAR, gqa=2, held=(Held(0, 20, 5), Held(0, 0, 9)))
    assert relative_error(case.attend(Emulated(packed_splits=splits)), case.attend(Emulated(packed_splits=2))) < 3e-4
    case.check(Emulated(packed_splits=splits))


def test_packed_tokens_in_one_split_need_no_memory_for_partial_results():
    case = make_case(OSCAR, held=(Held(0, 6, 0), Held(0, 2, 0)), queries=3)
    where = case.packed.lengths[:, None] - 3 + torch.arange(3)
    slots = case.positions.shape[1] - sum(part.k.shape[2] for part in case.full)
    hidden = case.positions.masked_fill(torch.arange(case.positions.shape[1]) >= slots, -1)
    alone = replace(case, full=[], q_positions=where, positions=hidden)
    alone.check(Emulated(packed_splits=1))


def test_tokens_in_full_precision_that_lie_otherwise_give_the_same_bits():
    case = make_case(OSCAR, gqa=2, dtype=torch.bfloat16)
    first = case.attend(Emulated())

    def moved(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 77).to(x.dtype)  # rows at no multiple of 16 bytes
        return wide[..., 3:].copy_(x)

    full = [FullTokens(moved(part.k), part.v.mT.contiguous().mT, part.positions) for part in case.full]
    assert torch.equal(replace(case, q=moved(case.q), full=full).attend(Emulated()), first)


def test_weights_are_added_up_as_they_were_rounded():
    """Values that are all one number come out as that number, however many tokens share the weight."""
    case = make_case(METHODS["kivi"], held=(Held(0, 0, 100),), queries=1)
    full = [replace(part, v=torch.where(part.positions[:, None, :, None] >= 0, 3.0, 1e3)) for part in case.full]
    out = replace(case, full=[replace(part, v=part.v.expand_as(part.k)) for part in full]).attend(Emulated())
    torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=1e-6, atol=0)


# -- large and small numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1e2, 2e3])
@pytest.mark.parametrize("name", ["oscar", "kivi", "kivi-k3v4-with-8-bit-metadata"])
def test_keys_and_queries_of_any_size(name, size):
    """K times `size`, q divided by it: the logits stay, and so must the error."""
    form = METHODS[name]
    heads, tokens = 2, 5 * form.packed_format.record_tokens
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(heads, tokens, 64, generator=generator) for _ in range(2))
    held = [Held(0, 5, 0)]
    rows = [pack(k * size, v, form)]
    packed = scatter(rows, form.packed_format, heads=heads, head_dim=64, seed=0)
    k, v, positions = unpacked(rows, held, form, heads, 64)
    q = torch.randn(1, heads, 1, 64, generator=generator) / size
    where = torch.tensor([[tokens]])
    out = Emulated().attend(q, q_positions=where, packed=packed, full=[])
    truth = attention(q.double(), k, v, q_positions=where, positions=positions)
    assert relative_error(out, truth) < 2e-3


# -- what is refused ---------------------------------------------------------------------------------------------


def test_what_the_kernel_is_not_made_for_goes_through_torch_on_native_records(monkeypatch):
    calls = []
    monkeypatch.setattr(emulated_cuda, "run", lambda call, **_: calls.append(call))
    case = make_case(BYTES, held=RAGGED)
    cut = [
        FullTokens(part.k[:, :, start::2], part.v[:, :, start::2], part.positions[:, start::2])
        for part in case.full
        for start in (0, 1)
    ]
    assert len(cut) > MAX_PARTS
    replace(case, full=cut).check(Emulated())
    make_case(BYTES, queries=MAX_QUERIES + 1).check(Emulated())
    assert not calls
    with pytest.raises(AssertionError):
        make_case(BYTES, queries=MAX_QUERIES).check(Emulated())
    assert calls


def test_a_batch_of_none_is_no_launch(monkeypatch):
    monkeypatch.setattr(emulated_cuda, "run", None)
    none = torch.zeros(0, 2, 1, 64)
    full = FullTokens(none, none, torch.zeros(0, 1).long())
    out = Emulated().attend(none, q_positions=torch.zeros(0, 1).long(), packed=None, full=[full])
    assert out.shape == none.shape


@pytest.mark.parametrize(
    ("rows", "pages", "splits"),
    [((1, 8), 1024, 64), ((1, 8), 32, 16), ((64, 8), 1024, 1), ((40, 8), 1024, 13), ((40, 8), 8, 1), ((1, 8), 1, 1)],
    ids=["one long", "one short", "many", "more than half", "more than half and short", "one page"],
)
def test_blocks_fill_the_gpu_and_read_two_pages_each(rows, pages, splits):
    """132 processors with room for 4 blocks each: no round of blocks is much emptier than another."""
    case = make_case(OSCAR, held=(Held(0, 1, 0),), heads=rows[1])
    packed = replace(case.packed, table=torch.zeros(rows[0], pages, dtype=torch.int64))
    assert splits_for(torch.zeros(rows[0], 4 * rows[1], 1, 64), packed, 132) == splits


def test_the_backend_says_why_it_cannot_run_here():
    cpu, format = torch.device("cpu"), OSCAR.packed_format
    assert "not on cpu" in cuda.refuses(format, cpu)
    assert "one for each token" in cuda.refuses(METHODS["rtn"].packed_format, torch.device("cuda"))
    assert "multiples of 8, not 20" in cuda.refuses(format, torch.device("cuda"), 20)
    lloyd = METHODS["lloyd-max-levels-of-2.5-and-3-bits"].packed_format
    assert "lloyd levels" in cuda.refuses(lloyd, torch.device("cuda"), 20)
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in cuda.refuses(format, torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_87"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_what_a_card_runs(capability, architecture):
    assert architecture_of(capability) == architecture
    assert architecture is None or architecture in ARCHITECTURES


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: {"table": p.table.int()}, "the block table: torch.int32"),
        (lambda p: {"lengths": p.lengths[:2]}, r"lengths and first positions: torch.int64 \(2,\)"),
        (lambda p: {"lengths": p.lengths + 128 * p.table.shape[1]}, "within . pages"),
        (lambda p: {"table": p.table + 1000}, "in no slab"),
        (lambda p: {"slabs": [replace(s, norms=s.norms.T.contiguous().T) for s in p.slabs]}, "dense"),
    ],
    ids=["a table of int32", "too few lengths", "a length beyond the table", "a page that is none", "norms not dense"],
)
def test_packed_tokens_that_do_not_fit_are_refused(change, told):
    case = make_case(OSCAR)
    with pytest.raises((UnsupportedInput, ValueError), match=told):
        case.with_packed(**change(case.packed)).attend(Emulated())


# -- twins: the checks above can fail ----------------------------------------------------------------------------

MUTATIONS = {
    "rows of K exchanged": (
        "codes.cuh",
        "{{x & LOW, y & LOW}, {x & HIGH, y & HIGH}}",
        "{{y & LOW, x & LOW}, {x & HIGH, y & HIGH}}",
    ),
    "third bits of the other tile": ("codes.cuh", "tile ? third << 1 : third >> 7", "tile ? third >> 7 : third << 1"),
    "channels of scales exchanged": (
        "packed.cuh",
        "multiply(q[k], scale.of[k])",
        "multiply(q[k], scale.of[k ^ 1])",
    ),
    "the norm of the next token": ("packed.cuh", "8 * i + at.row)", "8 * i + (at.row ^ 1))"),
    "a length one too long": ("shared.cuh", "count > length ? length : count", "count > length ? length : count + 1"),
    "a window one too long": (
        "shared.cuh",
        "tokens_up_to(a, at.batch, position - a.window)",
        "tokens_up_to(a, at.batch, position - a.window - 1)",
    ),
    "no minimum of V": ("combine.cuh", "tile & 1, upper)) + minimum)", "tile & 1, upper)))"),
    "sums not shrunk": ("softmax.cuh", "sums[i][c + 2] *= shrink", "sums[i][c + 2] *= 1.0f"),
    "copies not waited for": ("ring.cuh", "copies_wait<STAGES - 2>();", ""),
    "a page copied too early": ("ring.cuh", "copy(i + STAGES - 1,", "copy(i + STAGES,"),
    "a split left out": ("combine.cuh", "== (u32)a.splits - 1", "== (u32)a.splits - 2"),
}
IN_BYTES = {
    "minimums of K exchanged": ("codes.cuh", "k_minimum[2] = ", "k_minimum[1] = "),
    "no factor of V": ("codes.cuh", "both((page.supers[record] >> 16)", "both(0 * (page.supers[record] >> 16)"),
    "a page of the next split": ("packed.cuh", "seen.end < end * PAGE_TOKENS ? seen.end :", "true ? seen.end :"),
    "the second page not found": ("ring.cuh", "source(i * STEP_PAGES + j)", "source(i * STEP_PAGES)"),
}
"""With 8-bit metadata, and two pages at a time."""


@pytest.mark.emulator
@pytest.mark.parametrize("what", [*MUTATIONS, *IN_BYTES])
def test_twin_a_wrong_kernel_is_noticed(what, monkeypatch, tmp_path):
    changed = {"k_bits": 3} if what in MUTATIONS else {"metadata_bits": 8}
    case = make_case(
        Method("oscar", Format(token_scale=True, **changed)), held=(Held(2, 25, 20), Held(1, 3, 127)), gqa=2
    )
    backend = Emulated(packed_splits=1 if what in MUTATIONS else 3)
    case.check(backend, window=90)
    case.check(backend)
    with mutated(monkeypatch, tmp_path, *(MUTATIONS | IN_BYTES)[what]), pytest.raises(AssertionError):
        case.check(backend, window=90)
        case.check(backend)


@pytest.mark.emulator
def test_twin_a_record_that_is_none_is_noticed(monkeypatch, tmp_path):
    case = make_case(Method("oscar", Format()), held=(Held(0, 3, 0),))
    slabs = clone_slabs(case.packed)
    slab, page = page_at(case.packed, 0, 0)
    fill_behind(slabs[slab], page, 3)
    spoiled = case.with_packed(slabs=slabs)
    spoiled.check(Emulated())
    wrong = ("packed.cuh", "part == 0 || token + 32 * part < seen.end", "true")
    with mutated(monkeypatch, tmp_path, *wrong), pytest.raises(AssertionError):
        spoiled.check(Emulated())


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_number_on_a_gpu_is_none_in_the_result(dtype, monkeypatch, tmp_path):
    """There each operation that gives a NaN gives the one whose bits are all ones, which no rounding may make -0."""
    case = make_case(Method("oscar", Format()), held=(Held(0, 3, 0),), queries=1, dtype=dtype)
    changes = ("a.q_dtype, shared.q[column][d]);", "a.q_dtype, bits_to_float(0x7fffffffu));")
    with mutated(monkeypatch, tmp_path, "combine.cuh", *changes):
        assert case.attend(Emulated()).isnan().all()


def test_twin_another_order_of_bits_is_noticed(monkeypatch):
    case = make_case(OSCAR, held=RAGGED)
    case.check(Emulated())
    original = emulated_cuda.layout.to_native

    def wrong(records, **given):
        data = original(records, **given)
        data[..., :2] = data[..., :2].flip(-1)  # one lane's first bytes
        data[..., 64:66] = data[..., 64:66].flip(-1)
        return data

    monkeypatch.setattr(emulated_cuda.layout, "to_native", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        case.check(Emulated())
