"""Whole decode steps of the CUDA backend on a CPU: the bytes and, nearly, the outputs of the reference's cache."""

import copy
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated_cuda
from attention_truth import relative_error
from cache_mirror import Mirror, assert_same_contents, contents
from occamkv import kernels
from occamkv.cache import LayerCache
from occamkv.cache import layer as cache_layer
from occamkv.cache.stepping import Stepping
from occamkv.errors import UnsupportedInput
from occamkv.kernels import StepLayer, cuda
from occamkv.kernels.cuda import launching, layout, stepping
from occamkv.kernels.cuda.kernel import Call
from occamkv.methods import Method, method
from occamkv.ops.rope import KeyBias, Rotary
from some_records import some_format

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))

FORMS = {
    "block": method("oscar"),
    "rolling with pins and 8-bit metadata": method("occam"),
    "groups of 64": method("occam_small"),
    "pins in between": method("occam", pins=[0, 7, 130]),
    "no rotation": method("kivi"),
    "3 and 4 bits, float16 norms": method("oscar_k4v3_g64_roll", norm_dtype="float16"),
}


ON_GPU = launching.launch
OPTIONS = ({}, {"window": 100}, {"softcap": 4.0, "scale": 0.2}, {"sinks": torch.linspace(-1, 1, 6)}, {}, {})


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """What the emulator was given to run, as on a GPU of one processor."""
    calls: list[Call] = []
    monkeypatch.setattr(
        launching, "launch", lambda call: calls.append(call) or emulated_cuda.run(call, order=len(calls))
    )
    monkeypatch.setattr(launching, "processors", lambda device: 1)
    return calls


def prompt(form: Method, name: str, monkeypatch: Any, *, tokens: int = 300, pads: int = 70, **options: Any) -> Mirror:
    """A cache of a backend with a prompt of two sequences, the second with `pads` on its left."""
    monkeypatch.setattr(cache_layer, "backend_for", lambda *_: kernels.backend(name))
    mirror = Mirror(form, batch=2, **options)
    kept = torch.ones(2, tokens, dtype=torch.bool)
    kept[-1, :pads] = False
    seen = mirror.put(*mirror.fresh(tokens), kept)
    mirror.cache.attend(torch.randn(2, 2 * mirror.shape[0], tokens, mirror.shape[1]).to(mirror.dtype), seen=seen)
    return mirror


def queries(mirror: Mirror, steps: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Queries of single steps, `[2, Hq, 1, D]`, and what else attention is told."""
    generator = torch.Generator().manual_seed(3)
    for number in range(steps):
        q = torch.randn(2, 2 * mirror.shape[0], 1, mirror.shape[1], generator=generator)
        told = dict(OPTIONS[number // 5 % len(OPTIONS)])
        if "sinks" in told:
            told["sinks"] = told["sinks"][: q.shape[1]]
        yield q.to(mirror.dtype), told


def decoded(form: Method, name: str, monkeypatch: Any, *, steps: int, **options: Any) -> tuple[list[Tensor], Mirror]:
    """A prompt, then single tokens; outputs and what is held."""
    mirror, outs = prompt(form, name, monkeypatch, **options), []
    for q, told in queries(mirror, steps):
        outs.append(mirror.cache.attend(q, seen=mirror.put(*mirror.fresh(1)), **told))
    return outs, mirror


def in_native_order(cache: LayerCache) -> None:
    """Move the records of a cache of the reference to where the CUDA kernels have them."""
    for slab in cache.store.pool.slabs:
        slab.records.copy_(layout.to_native(slab.records, format=slab.format, head_dim=slab.head_dim))


def check(form: Method, monkeypatch: Any, *, steps: int, **options: Any) -> None:
    """Compare whole steps with the reference's cache: the same bytes, nearly the same outputs."""
    fast, whole = decoded(form, "cuda", monkeypatch, steps=steps, **options)
    slow, long = decoded(form, "reference", monkeypatch, steps=steps, **options)
    assert whole.cache.packed_tokens() == long.cache.packed_tokens()
    in_native_order(long.cache)
    for row in range(2):
        assert_same_contents(contents(whole.cache, row), contents(long.cache, row))
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == b.dtype == whole.dtype
        assert relative_error(a, b.double()) < (4e-3 if a.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim"),
    [
        pytest.param("block", torch.float32, 32, marks=pytest.mark.emulator),
        pytest.param("block", torch.float16, 64, marks=pytest.mark.emulator),
        ("rolling with pins and 8-bit metadata", torch.bfloat16, 32),
        pytest.param("rolling with pins and 8-bit metadata", torch.float32, 80, marks=pytest.mark.emulator),
        pytest.param("groups of 64", torch.bfloat16, 32, marks=pytest.mark.emulator),
        pytest.param("pins in between", torch.float16, 32, marks=pytest.mark.emulator),
        pytest.param("no rotation", torch.bfloat16, 40, marks=pytest.mark.emulator),
        pytest.param("3 and 4 bits, float16 norms", torch.float32, 128, marks=pytest.mark.emulator),
    ],
    ids=str,
)
def test_whole_steps_leave_the_bytes_of_the_reference(name, dtype, head_dim, monkeypatch, launches):
    steps = 70 if name.startswith("rolling") else 170
    check(FORMS[name], monkeypatch, steps=steps, dtype=dtype, head_dim=head_dim)
    appends = [call for call in launches if call.kernel.name == "append"]
    packs = sum(call.arguments.tokens == 0 for call in appends)
    assert len(appends) == steps + packs and packs >= 2


# -- graphs ------------------------------------------------------------------------------------------------------


def with_room(mirror: Mirror, pages: int) -> StepLayer:
    """What a backend is told of a layer whose sequences own more pages than they have filled."""
    store = mirror.cache.store
    for row in store.rows:
        row.pages = row.pages + store.pool.allocate(pages)
    return Stepping(store, mirror.cache._crossing).describe(query_heads=2 * mirror.shape[0])


def held(step: stepping.LayerStep, layer: StepLayer) -> list[Tensor]:
    """Everything that steps have left in memory, but for what lies in empty slots of the ring."""
    empty = (step._positions < 0)[:, None, :, None]
    ring = [x.masked_fill(empty, 0) for x in layer.ring]
    return [*ring, step._state, step._positions, *(t for slab in layer.slabs for t in slab.tensors)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("rolling with pins and 8-bit metadata", 45),
        pytest.param("block", 140, marks=pytest.mark.emulator),
        pytest.param("pins in between", 90, marks=pytest.mark.emulator),
        pytest.param("groups of 64", 90, marks=pytest.mark.emulator),
    ],
)
def test_a_replayed_graph_does_what_single_steps_do_in_any_order_of_blocks(name, steps, monkeypatch):
    """A graph is the launches of one step, with their arguments as they were; q, k and v are written where they lay."""
    mirror = prompt(FORMS[name], "cuda", monkeypatch, tokens=250, dtype=torch.bfloat16)
    layer = with_room(mirror, 3)
    copied = copy.deepcopy(layer)
    eager, captured = cuda.stepper(copied), cuda.stepper(layer)
    q, k, v = (torch.zeros(2, heads, 1, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
    options = {"scale": None, "window": None, "softcap": None, "sinks": None}
    graph: list[Call] = []
    with monkeypatch.context() as patch:
        patch.setattr(launching, "capturing", lambda device: True)
        as_they_are = lambda x: type(x).from_buffer_copy(x)  # noqa: E731
        patch.setattr(
            launching, "launch", lambda call: graph.append(call._replace(arguments=as_they_are(call.arguments)))
        )
        out = captured(q, k, v, due=[0, 0], **options)
    assert [call.kernel.name for call in graph] == ["append", "attend"]
    assert list(captured.residual) == layer.residual
    packed, residual, packs = list(layer.packed), list(layer.residual), 0
    for number, (now, _) in enumerate(queries(mirror, steps)):
        fresh = [now, *mirror.fresh(1)]
        due = [layer.flush_tokens * (n + 1 == 128) for n in residual]
        wanted = eager(*fresh, due=due, **options)
        packed, residual = (
            [p + d for p, d in zip(packed, due, strict=True)],
            [n + 1 - d for n, d in zip(residual, due, strict=True)],
        )
        packs += any(due)
        for static, x in zip((q, k, v), fresh, strict=True):
            static.copy_(x)
        for call in graph:
            emulated_cuda.run(call, order=number)
        assert torch.equal(out, wanted), f"step {number}"
    captured.settle()
    assert packs >= 2 and list(captured.residual) == list(eager.residual) == residual
    assert captured._state[0].tolist() == packed
    for a, b in zip(held(captured, layer), held(eager, copied), strict=True):
        assert torch.equal(a, b)


def on(device: str, thing: Any) -> Any:
    """The same, every tensor in it on a device."""
    if isinstance(thing, Tensor):
        return thing.clone().to(device)
    if isinstance(thing, list | tuple):
        return type(thing)(on(device, x) for x in thing)
    if is_dataclass(thing):
        return replace(thing, **{field.name: on(device, getattr(thing, field.name)) for field in fields(thing)})
    return thing


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_a_graph_on_a_gpu_does_what_the_emulator_does(name, monkeypatch):
    mirror = prompt(FORMS[name], "cuda", monkeypatch, tokens=250, dtype=torch.bfloat16)
    layer = with_room(mirror, 3)
    moved = on("cuda", layer)
    emulated, real = cuda.stepper(layer), cuda.stepper(moved)
    steps = [[q, *mirror.fresh(1)] for q, _ in queries(mirror, 100)]
    options = {"scale": None, "window": None, "softcap": None, "sinks": None}
    wanted = []
    for one in steps:
        due = [layer.flush_tokens * (n + 1 == 128) for n in emulated.residual]
        wanted.append(emulated(*one, due=due, **options))
    monkeypatch.setattr(launching, "launch", ON_GPU)
    static = on("cuda", steps[0])
    outs = [real(*static, due=[0, 0], **options).cpu()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = real(*static, due=[0, 0], **options)
    for one in steps[1:]:
        for place, x in zip(static, one, strict=True):
            place.copy_(x)
        graph.replay()
        outs.append(out.cpu())
    real.settle()
    assert list(real.residual) == list(emulated.residual)
    for a, b in zip(held(real, moved), held(emulated, layer), strict=True):
        assert torch.equal(a.cpu(), b)
    for a, b in zip(outs, wanted, strict=True):
        assert relative_error(a, b.double()) < 1e-2


def test_a_step_allocates_its_result_and_waits_for_nothing(monkeypatch):
    mirror = prompt(FORMS["block"], "cuda", monkeypatch, tokens=250)
    step = cuda.stepper(with_room(mirror, 2))
    options = {"scale": None, "window": None, "softcap": None, "sinks": None}
    steps = [(q, *mirror.fresh(1)) for q, _ in queries(mirror, 20)]
    step(*steps[0], due=[0, 0], **options)
    made: list[str] = []

    def told(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: made.append(name) or original(*a, **k))

    for name in ("empty", "zeros", "tensor", "arange", "full", "cat"):
        told(torch, name)
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "contiguous", "clone", "__int__", "__bool__"):
        told(torch.Tensor, name)
    for number, one in enumerate(steps[1:], 2):
        due = [128 if number == 6 else 0, 0]
        step(*one, due=due, **options)
    assert made == ["empty"] * 19
    assert list(step.residual) == [122 + 20 - 128, 52 + 20]


# -- what is refused ---------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_take_goes_the_long_way(monkeypatch):
    layer = with_room(prompt(FORMS["block"], "cuda", monkeypatch), 0)
    assert cuda.stepper(layer) is not None
    bias = KeyBias(Rotary(*(torch.arange(n, n + 4) for n in (1, 0, 16))), torch.ones(2, 32))
    wide, odd = (torch.zeros(2, 2, 128, 32, dtype=dtype) for dtype in (torch.float64, torch.float32))
    apart = torch.zeros(2, 2, 128, 33)[..., :32]
    for change in (
        {"key_bias": bias},
        {"feedback": torch.zeros(2, 32, 32)},
        {"ring": (wide, wide)},
        {"ring": (odd, apart)},
        {"format": replace(layer.format, k_group=128), "ring": (torch.zeros(2, 2, 128, 256),) * 2},
        {"ring": (odd[:, :, :100], odd[:, :, :100])},
    ):
        assert cuda.stepper(replace(layer, **change)) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"packed": [100, 128]}, "whole records"),
        ({"packed": [-128, 128]}, "whole records"),
        ({"packed": [1280, 128]}, "whole records"),
        ({"residual": [129, 0]}, "do not fit together"),
        ({"tables": [[0, 1, 2], [0, 999]]}, "names page 999"),
        ("canonical", "order 'canonical'"),
    ],
    ids=str,
)
def test_counts_and_pages_that_do_not_fit_are_refused(change, told, monkeypatch):
    layer = with_room(prompt(FORMS["block"], "cuda", monkeypatch), 0)
    if change == "canonical":
        change = {"slabs": [replace(slab, order=change) for slab in layer.slabs]}
    with pytest.raises(UnsupportedInput, match=told):
        cuda.stepper(replace(layer, **change))


@pytest.mark.parametrize("wrong", [(2, 4, 2, 32), (2, 3, 1, 32), (1, 4, 1, 32), (2, 4, 1, 64)], ids=str)
def test_queries_that_do_not_fit_are_refused_before_anything_is_written(wrong, monkeypatch, launches):
    mirror = prompt(FORMS["block"], "cuda", monkeypatch)
    step = cuda.stepper(with_room(mirror, 0))
    launches.clear()
    with pytest.raises(UnsupportedInput):
        step(torch.zeros(wrong), *mirror.fresh(1), due=[0, 0], scale=None, window=None, softcap=None, sinks=None)
    assert not launches


def steps_of(mirror: Mirror, layer: StepLayer, count: int, size: float = 1.0) -> stepping.LayerStep:
    """Take steps as a cache does."""
    step = cuda.stepper(layer)
    for q, _ in queries(mirror, count):
        k, v = mirror.fresh(1)
        due = [layer.flush_tokens * (n + 1 == 128) for n in step.residual]
        step(q, k * size, v, due=due, scale=None, window=None, softcap=None, sinks=None)
    return step


def test_a_scale_beyond_the_range_is_told_by_a_later_step(monkeypatch):
    mirror = prompt(FORMS["no rotation"], "cuda", monkeypatch, tokens=250)
    layer = with_room(mirror, 2)
    steps_of(mirror, copy.deepcopy(layer), 8)
    with pytest.raises(UnsupportedInput, match="earlier decode step could not be stored: a scale of K or V"):
        steps_of(mirror, layer, 8, size=3e3)
    with pytest.raises(UnsupportedInput, match="does not fit its stored numbers; a scale"):
        steps_of(mirror, layer, 8, size=1e6)


def test_a_sequence_without_room_writes_nothing(monkeypatch):
    """A graph that is replayed for too long."""
    mirror = prompt(FORMS["block"], "cuda", monkeypatch, tokens=250)
    layer = with_room(mirror, 0)
    before = [t.clone() for slab in layer.slabs for t in slab.tensors]
    step = cuda.stepper(layer)
    for q, _ in queries(mirror, 12):
        step(q, *mirror.fresh(1), due=[0, 0], scale=None, window=None, softcap=None, sinks=None)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (t for slab in layer.slabs for t in slab.tensors), strict=True)
    )
    with pytest.raises(UnsupportedInput, match="more tokens than its pages have room for"):
        step.settle()
    assert list(step.residual) == [128, 64]


# -- twins: the checks above can fail ----------------------------------------------------------------------------

MUTATIONS = {
    "the wrong slot": (
        "const i64 slot = number % a.slots;\n  const float",
        "const i64 slot = (number + 1) % a.slots;\n  const float",
    ),
    "packed tokens that are seen twice": ("positions[number % a.slots] = -1;", ";"),
    "the norm of one head": ("other < a.kv_heads", "other < 1"),
    "squares that a new token overwrites": (
        "number % a.square_slots) * a.kv_heads + head",
        "number % a.slots) * a.kv_heads + head",
    ),
    "rotated twice": ("rules.k_block = rules.v_block = 0;", ""),
    "the norm of what was not rounded": ("shared.x[c] = x;", ""),
    "counts that change too early": ("== (u32)a.kv_heads - 1", "== 0u"),
    "one record of several": ("end = packed + a.flush_tokens;", "end = packed + GROUP;"),
    "records on top of each other": ("+ token / GROUP", ""),
    "super-scales of another head": (
        "(u16 *)place.slab.supers + 2 * record",
        "(u16 *)place.slab.supers + 2 * place.of_head(a.kv_heads, 0)",
    ),
    "no barrier before V": ("  barrier();\n}\n\nOKV_DEVICE void take_token", "}\n\nOKV_DEVICE void take_token"),
    "no balance": ("{balance, r.k_block", "{nullptr, r.k_block"),
    "V not rotated": ("{nullptr, r.v_block, r.v_factor", "{nullptr, 0, 1.0f"),
}


@pytest.mark.emulator
@pytest.mark.parametrize("seed", range(8))
def test_any_format(seed, monkeypatch):
    rng = random.Random(seed)
    form = Method(
        "oscar",
        some_format(rng),
        k_rotation=rng.choice(("none", "hadamard", "balanced")),
        v_rotation=rng.choice(("none", "hadamard")),
        flush=rng.choice(("block", "rolling")),
        pins=rng.choice(("none", "first:4")),
    )
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    head_dim, heads = rng.choice((32, 40, 64, 80)), rng.randint(1, 3)
    check(form, monkeypatch, steps=70, tokens=rng.randint(200, 330), head_dim=head_dim, heads=heads, dtype=dtype)


@pytest.mark.emulator
@pytest.mark.parametrize("what", MUTATIONS)
def test_twin_a_wrong_kernel_is_noticed(what, monkeypatch, tmp_path):
    forms = (FORMS["block"], FORMS["rolling with pins and 8-bit metadata"])
    noticed = pytest.raises((AssertionError, UnsupportedInput))
    with emulated_cuda.mutated(monkeypatch, tmp_path, "append.cuh", *MUTATIONS[what]), noticed:
        for form in forms:
            check(form, monkeypatch, steps=40, tokens=250, dtype=torch.bfloat16)
