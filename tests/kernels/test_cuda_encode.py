"""The encode kernel on a CPU: byte for byte what the reference encodes, in native order."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated_cuda
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.formats.records import Records
from occamkv.kernels import reference
from occamkv.kernels.cuda import building, encode, launching, layout
from occamkv.kernels.cuda.encoding import takes
from occamkv.kernels.cuda.kernel import Call, Kernel
from some_records import keys_and_values, planted, same, some_format, strided

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))

OCCAM = Format(token_scale=True, norm_dtype="float16", metadata_bits=8)
ON_GPU = launching.launch, launching.processors
HEAD_DIMS = (64, 128, 80, 40, 256, 96, 8, 112, 192, 248, 32)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The calls that the emulator has run, on a GPU of one processor; fresh memory is full of rubbish."""
    calls: list[Call] = []
    empty = torch.empty
    monkeypatch.setattr(
        launching, "launch", lambda call: calls.append(call) or emulated_cuda.run(call, order=len(calls))
    )
    monkeypatch.setattr(launching, "processors", lambda device: 1)

    def rubbish(*shape: int, **given: Any) -> Tensor:
        made = empty(*shape, **given)
        made.view(torch.uint8).fill_(0xA5)
        return made

    monkeypatch.setattr(torch, "empty", rubbish)
    return calls


def expected(k: Tensor, v: Tensor, *, format: Format, **options: Any) -> Records:
    made = reference.encode(k, v, format=format, **options)
    return made._replace(data=layout.to_native(made.data, format=format, head_dim=k.shape[-1]))


def outcome(encoder: Any, k: Tensor, v: Tensor, **given: Any) -> Records | str:
    try:
        return encoder(k, v, **given)
    except UnsupportedInput as error:
        return str(error)


def some_options(rng: random.Random, heads: int, head_dim: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(rng.randint(0, 999))
    return {
        "grid": rng.choice(("minmax", "paper", "unbiased")),
        "clip": rng.choice((None, 1.0, 0.85)),
        "hadamard_block": rng.choice([None] + [2**n for n in range(9) if head_dim % 2**n == 0]),
        "balance": rng.choice((None, torch.rand(heads, head_dim, generator=noise) + 0.5)),
        "rotate_v": rng.random() < 0.5,
    }


def some_pair(rng: random.Random, format: Format, head_dim: int) -> tuple[Tensor, Tensor]:
    seed = rng.randint(0, 999)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    pair = keys_and_values(format, groups=rng.randint(1, 3), heads=rng.randint(1, 4), head_dim=head_dim, seed=seed)
    how = ("", "heads inside", "in a wider tensor", "channels apart")
    k, v = (strided(planted(x, seed + i).to(dtype), rng.choice(how)) for i, x in enumerate(pair))
    return k, v


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.emulator) for n in range(4, 66))])
def test_any_format_has_the_bytes_of_the_reference(seed, launches):
    rng = random.Random(seed)
    head_dim, format = HEAD_DIMS[seed % len(HEAD_DIMS)], some_format(rng)
    for _ in range(3):
        k, v = some_pair(rng, format, head_dim)
        options = {"format": format, **some_options(rng, k.shape[1], head_dim)}
        wanted, made = (outcome(encoder, k, v, **options) for encoder in (expected, encode))
        if isinstance(wanted, str):
            assert made == wanted
        elif isinstance(made, str):
            assert "allowed on GPUs" in made
        else:
            assert same(made, wanted)
    assert len(launches) == (3 if takes(format, head_dim) else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_a_gpu_writes_the_same_bytes(seed, monkeypatch):
    monkeypatch.setattr(launching, "launch", ON_GPU[0])
    monkeypatch.setattr(launching, "processors", ON_GPU[1])
    rng = random.Random(seed)
    head_dim, format = HEAD_DIMS[seed % len(HEAD_DIMS)], some_format(rng)
    k, v = some_pair(rng, format, head_dim)
    options = {"format": format, **some_options(rng, k.shape[1], head_dim)}
    wanted = outcome(expected, k, v, **options)
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    made = outcome(encode, k.cuda(), v.cuda(), **moved)
    if isinstance(wanted, str) or isinstance(made, str):
        assert made == wanted or "allowed on GPUs" in str(made)
    else:
        assert same(Records(*(None if t is None else t.cpu() for t in made)), wanted)


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_values_at_the_edges_of_codes(metadata_bits):
    """Halfway between two codes, and one float above and below: the nearest code is that of a division."""
    format = Format(k_bits=4, v_bits=4, k_group=128, metadata_bits=metadata_bits)
    k, v = keys_and_values(format, groups=2, heads=2, head_dim=128)
    for x, axis in ((k, 2), (v.unflatten(3, (-1, 32)), 4)):
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        step = ((high - low.half().float()) / 15).half().float()
        edge = low.half().float() + ((x - low) / step).floor().clamp(0, 14).add(0.5) * step
        for shift, value in ((0, edge), (1, edge.nextafter(high)), (2, edge.nextafter(low))):
            at = torch.zeros_like(x, dtype=torch.bool)
            at.flatten()[shift::4] = True
            x.copy_(torch.where(at & (x != low) & (x != high), value, x))
    assert same(encode(k, v, format=format), expected(k, v, format=format))


def test_heads_of_a_group_in_one_block_or_in_many(launches, monkeypatch):
    k, v = keys_and_values(OCCAM, groups=5, heads=3, head_dim=64)
    together = encode(k, v, format=OCCAM)
    monkeypatch.setattr(launching, "processors", lambda device: 132)
    apart = encode(k, v, format=OCCAM)
    assert [call.grid for call in launches] == [(5, 1, 1), (5, 3, 1)]
    assert same(together, apart)
    monkeypatch.setattr(launching, "launch", lambda call: emulated_cuda.run(call, order=7))
    assert same(encode(k, v, format=OCCAM), together)


def test_no_groups_give_no_records(launches):
    made = encode(torch.zeros(0, 2, 32, 64), torch.zeros(0, 2, 32, 64), format=OCCAM)
    assert [t.shape[0] for t in made] == [0, 0, 0] and not launches


@pytest.mark.parametrize(
    ("format", "head_dim", "options"),
    [
        (OCCAM, 64, {"feedback": torch.ones(2, 64, 64).triu(1) * 0.1}),
        (OCCAM, 64, {"norm": "sinkhorn"}),
        (Format(k_group=128), 256, {}),
    ],
    ids=["error feedback", "another norm", "too large for shared memory"],
)
def test_what_the_kernel_does_not_take_goes_through_torch(format, head_dim, options, launches):
    k, v = keys_and_values(format, groups=1, heads=2, head_dim=head_dim)
    options = options | {"hadamard_block": 8, "rotate_v": True}
    assert same(encode(k, v, format=format, **options), expected(k, v, format=format, **options))
    assert not launches


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [OCCAM, Format(token_scale=True), Format(k_bits=3, v_bits=3)], ids=str)
@pytest.mark.parametrize("block", [None, 64])
def test_values_that_cannot_be_stored_are_refused_in_the_words_of_the_reference(format, block):
    refused = 0
    for side in (0, 1):
        for value in (float("nan"), float("inf"), -float("inf"), 1e38, -3e5):
            pair = keys_and_values(format, groups=2, heads=2, head_dim=64)
            pair[side][1, 1, 7, 5] = value
            options = {"format": format, "hadamard_block": block, "rotate_v": block is not None}
            wanted = outcome(expected, *pair, **options)
            refused += isinstance(wanted, str)
            made = outcome(encode, *pair, **options)
            if isinstance(made, str) and "allowed on GPUs" in made:
                continue
            assert made == wanted if isinstance(wanted, str) else same(made, wanted)
    assert refused >= 8


@pytest.mark.parametrize(
    ("fields", "side", "size", "told"),
    [
        ({}, 0, 3e3, "largest scale of K"),
        ({}, 1, 1e3, "largest scale of V"),
        ({"metadata_bits": 8}, 1, 1e3, "largest scale of V"),
    ],
)
def test_scales_that_the_attend_kernel_cannot_hold_are_refused(fields, side, size, told):
    format = Format(**fields)
    pair = list(keys_and_values(format, groups=2, heads=2, head_dim=64))
    encode(*pair, format=format)
    pair[side] = pair[side].clamp(-5, 5) * size
    reference.encode(*pair, format=format)
    with pytest.raises(UnsupportedInput, match=told) as made:
        encode(*pair, format=format)
    canonical = reference.encode(*pair, format=format)
    with pytest.raises(UnsupportedInput) as wanted:
        layout.check_range(canonical.data, canonical.super_scales, format=format, head_dim=64)
    assert str(made.value) == str(wanted.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"v": torch.zeros(2, 2, 32, 32)}, r"K has shape \(2, 2, 32, 64\) and V \(2, 2, 32, 32\)"),
        ({"balance": torch.ones(64)}, r"balance has shape \(64,\) on cpu; allowed: \(2, 64\)"),
        ({"hadamard_block": 48}, "hadamard_block is 48; allowed: a power of two that divides head_dim 64"),
    ],
    ids=lambda x: " and ".join(x) if isinstance(x, dict) else "",
)
def test_shapes_that_do_not_fit_are_refused(change, told):
    k, v = keys_and_values(OCCAM, groups=2, heads=2, head_dim=64)
    with pytest.raises(UnsupportedInput, match=told):
        encode(**({"k": k, "v": v, "format": OCCAM} | change))


# -- twins: the checks above can fail ----------------------------------------------------------------------------

MUTATIONS = {
    "bits of a word exchanged": (
        "pack.cuh",
        "16 * low + 8 * upper + 4 * step + 2 * high",
        "16 * low + 8 * upper + 2 * step + 4 * high",
    ),
    "third bits of the other rows": ("pack.cuh", "2 * high + 1 - upper", "2 * high + upper"),
    "loads of four words throughout": ("pack.cuh", "word < words / 2 * 2 ? 2 : 1", "4"),
    "metadata in canonical order": ("pack.cuh", "32 * unit + metadata_place(", "32 * unit + ("),
    "the norm of one head": ("encode.cuh", "shared.norms[token] + sum", "shared.norms[token]"),
    "a norm that is not rounded": ("rows.cuh", "return half_to_float(half);", "return norm;"),
    "the super-scale of half the warps": ("groups.cuh", "- 126", "- 125"),
    "the largest of one warp": ("pack.cuh", "x = fmaxf(x, shared.largest[w])", "x = shared.largest[0]"),
    "sums in another order": (
        "rows.cuh",
        "(leaf(0) + leaf(4 * step)) + (leaf(2 * step) + leaf(6 * step))",
        "(leaf(0) + leaf(2 * step)) + (leaf(4 * step) + leaf(6 * step))",
    ),
    "a quotient that is not quite rounded": ("pack.cuh", "fused(fused(-near, divisor, above), inverse, near)", "near"),
    "padding with codes": ("pack.cuh", "channel >= HEAD_DIM) code = 0", "channel >= HEAD_DIM) code = 1"),
    "no barrier before codes": (
        "pack.cuh",
        "  barrier();\n  return flags;\n}\n\n// The nearest",
        "  return flags;\n}\n\n// The nearest",
    ),
    "no barrier behind codes": (
        "pack.cuh",
        "  barrier();\n  return flags;\n}\n\n// Write a record",
        "  return flags;\n}\n\n// Write a record",
    ),
    "no barrier between sums": ("rows.cuh", "  barrier();\n  for (int row = thread()", "  for (int row = thread()"),
    "no barrier between stages": ("rows.cuh", "at[i * half] = y[i];\n  }\n  barrier();", "at[i * half] = y[i];\n  }"),
    "no flags": ("encode.cuh", "if (flags) raise", "if (false) raise"),
}


def check(metadata_bits: int) -> None:
    """What the tests above check, for two formats."""
    norm_dtype = "float16" if metadata_bits == 8 else "float32"
    format = Format(3, 2, k_group=128, token_scale=True, norm_dtype=norm_dtype, metadata_bits=metadata_bits)
    k, v = keys_and_values(format, groups=1, heads=3, head_dim=80)
    for options in ({}, {"grid": "unbiased", "clip": 0.85, "hadamard_block": 16}):
        assert same(encode(k, v, format=format, **options), expected(k, v, format=format, **options))
    v[0, 1, 5, 7] = 1e30
    with pytest.raises(UnsupportedInput):
        encode(k, v, format=format)
        raise AssertionError("not refused")


@pytest.mark.emulator
@pytest.mark.parametrize("what", MUTATIONS)
def test_twin_a_wrong_kernel_is_noticed(what, monkeypatch, tmp_path):
    def checked() -> None:
        for metadata_bits in (16, 8, 8):  # the last one with the threads the other way round
            check(metadata_bits)
        test_values_at_the_edges_of_codes(16)

    checked()
    with (
        emulated_cuda.mutated(monkeypatch, tmp_path, *MUTATIONS[what]),
        pytest.raises((AssertionError, UnsupportedInput)),
    ):
        checked()


@pytest.mark.parametrize(
    ("format", "head_dim"), [(Format(), 64), (OCCAM, 80), (Format(k_group=128, v_group=128), 128)], ids=str
)
def test_the_shared_memory_that_is_asked_for_is_what_the_kernels_use(format, head_dim):
    for name in ("encode", "append"):
        library = emulated_cuda.build(name, **Kernel(name, format, head_dim).macros(), BULK=0)
        assert library.occamkv_memory_bytes() == building.packing_bytes(format, head_dim)
