"""What only a real GPU can show; skipped without one. The contract runs there by the marker `gpu`."""

import ctypes
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

import emulated_cuda
from attention_truth import relative_error
from deferred_stepper import stepping
from gpu_cuda import OnGpu, moved
from integrations.architectures import TINY
from occamkv import PackedCache, kernels
from occamkv.bench.gpu_errors import check_errors
from occamkv.bench.gpu_timing import gpu_rig
from occamkv.cache import LayerCache
from occamkv.cache import layer as cache_layer
from occamkv.formats.records import decode, to_groups
from occamkv.integrations.transformers.replay import CapturedStep
from occamkv.kernels import cuda, reference
from occamkv.kernels.cuda import building, launching
from occamkv.methods import Method, method
from some_attention import make_case, some_statistics

gpu = pytest.mark.gpu

SUBNORMALS = """
extern "C" __global__ void subnormals(float *out) {
    for (int code = 0; code < 4; ++code)
        for (int shift = 0; shift < 5; ++shift) {
            unsigned a = (unsigned)(code << 2 * shift) * 0x00010001u, b = 0x3c003c00u;
            float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                         "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
                         : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a), "r"(b));
            float *mine = out + ((code * 5 + shift) * 32 + threadIdx.x) * 4;
            mine[0] = c0, mine[1] = c1, mine[2] = c2, mine[3] = c3;
        }
}
"""
"""One warp: all codes at all places of a word as float16 subnormals, times ones, 16 to a sum."""


def expected() -> torch.Tensor:
    """`[code, place, lane, register]`: 16 * code * 4^place * 2^-24."""
    codes, places = torch.arange(4.0)[:, None], 4.0 ** torch.arange(5)
    return (16 * codes * places * 2.0**-24)[:, :, None, None].expand(4, 5, 32, 4)


def compiled(source: str, architecture: str) -> bytes:
    """The cubin of a source."""
    nvrtc = building._nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"test.cu", 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
    assert not int(result), building._read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    return building._read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)


@pytest.mark.skipif(building.unavailable() is not None, reason="no NVRTC here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_test_of_subnormals_compiles(architecture):
    assert compiled(SUBNORMALS, architecture)[1:4] == b"ELF"


@gpu
def test_the_tensor_core_reads_float16_subnormals():
    driver = launching._driver()
    out = torch.full((4, 5, 32, 4), float("nan"), device="cuda")
    code = compiled(SUBNORMALS, launching.architecture_of(torch.cuda.get_device_capability()))
    module = launching._check(driver.cuModuleLoadData(code))
    function = launching._check(driver.cuModuleGetFunction(module, b"subnormals"))
    address = ctypes.c_void_p(out.data_ptr())
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    stream = torch.cuda.current_stream().cuda_stream
    launching._check(driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, ctypes.addressof(parameters), 0))
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), expected())


@gpu
@pytest.mark.parametrize("name", ["oscar", "occam", "occam_small"])
def test_errors_of_the_benchmark_are_small(name):
    rows = check_errors([method(name)], gpu_rig("cuda"))
    assert {row["backend"] for row in rows} == {"cuda"}
    assert [row for row in rows if not row["ok"]] == []


@gpu
@pytest.mark.parametrize("name", ["oscar", "occam", "kivi", "occam_quality"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_encoding_keeps_what_the_reference_keeps(name, head_dim):
    form = method(name)
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(1, 2, 256, head_dim, generator=generator) for _ in range(2))
    k, v = (to_groups(x, form.packed_format.record_tokens) for x in given)
    options = {"format": form.packed_format, "grid": form.grid, "clip": form.clip, "norm": form.norm}
    found, wanted = OnGpu().encode(k, v, **options), reference.encode(k, v, **options)
    read = {"format": form.packed_format, "head_dim": head_dim}
    for ours, theirs, x in zip(decode(found, **read), decode(wanted, **read), (k, v), strict=True):
        assert (ours - x).norm() <= 1.01 * (theirs - x).norm()
        assert ((ours - theirs).abs() > 1e-3 * x.abs().max()).float().mean() < 0.01


@gpu
def test_a_captured_call_reads_what_lies_there_when_it_is_replayed():
    """Nothing of a call waits for the GPU or is decided on the CPU by what tensors hold."""
    made = make_case(method("oscar"), head_dim=128, gqa=4, queries=1, dtype=torch.bfloat16)
    case = moved(replace(made, packed=emulated_cuda.native(made.packed)), torch.device("cuda"))

    def call() -> torch.Tensor:
        return case.attend(cuda)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        case.q.copy_(torch.randn_like(case.q))
        graph.replay()
        assert torch.equal(out, call())


def outputs_of_steps(form: Method, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What 140 steps of a layer give after a prompt, on the CPU: the last of them reads what the first ones packed."""
    monkeypatch.setattr(cache_layer, "backend_for", lambda *_: kernels.backend(backend))
    cache = LayerCache(form, statistics=some_statistics(form, 2, 64))
    generator = torch.Generator().manual_seed(0)
    outs = []
    for tokens in (300, *[1] * 140):
        q, k, v = (torch.randn(2, heads, tokens, 64, generator=generator) for heads in (8, 2, 2))
        cache.update(k.bfloat16().to(device), v.bfloat16().to(device))
        outs.append(cache.attend(q.to(device)).cpu())
    assert sum(cache.packed_tokens()) >= 2 * 256
    return outs


STEPPED = [
    *(pytest.param(name, "cuda", marks=gpu) for name in ("oscar", "occam", "occam_small")),
    *(pytest.param("oscar", where, marks=pytest.mark.emulator) for where in ("emulated", "twin")),
]


@pytest.mark.skipif(emulated_cuda.missing() is not None and not torch.cuda.is_available(), reason="no g++ here")
@pytest.mark.parametrize(("name", "where"), STEPPED)
def test_steps_of_a_layer_follow_the_reference(name, where, monkeypatch, tmp_path):
    """Append and attend, step by step, without an emulator beside them: a GPU may be where no g++ is."""
    wanted = outputs_of_steps(method(name), "cpu", "reference", monkeypatch)
    with ExitStack() as stack:
        if where != "cuda":
            stack.enter_context(emulated_cuda.on_cpu())
        if where == "twin":
            changes = ("append.cuh", "positions[number % a.slots] = -1", "positions[number % a.slots] = number")
            stack.enter_context(emulated_cuda.mutated(monkeypatch, tmp_path, *changes))
            stack.enter_context(pytest.raises(AssertionError))
        found = outputs_of_steps(method(name), "cuda" if where == "cuda" else "cpu", "cuda", monkeypatch)
        assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_captured_model_gives_the_logits_of_eager_steps(device, monkeypatch):
    """With whatever transformers does while a graph is captured; on a CPU graphs are those of `deferred_stepper`."""
    model = TINY["llama"].build().to(device)
    ids = torch.randint(90, (2, 170), generator=torch.Generator().manual_seed(0)).to(device)
    with ExitStack() as stack:
        if device == "cpu":
            monkeypatch.setattr(kernels, "BACKENDS", ("reference",))
            stack.enter_context(stepping("reference"))
        caches = [PackedCache(model, "oscar") for _ in range(2)]
        for cache in caches:
            model(ids[:, :150], past_key_values=cache)
        with CapturedStep(model, caches[0], steps=20) as captured:
            found = torch.cat([captured(token) for token in ids[:, 150:].split(1, dim=1)], dim=1)
        steps = [model(token, past_key_values=caches[1]).logits for token in ids[:, 150:].split(1, dim=1)]
    assert relative_error(found, torch.cat(steps, dim=1)) < 1e-3


def test_everything_of_a_case_is_moved():
    made = make_case(method("occam"), head_dim=64, queries=1)
    there = moved((made.packed, made.full, made.crossing), torch.device("meta"))
    found = [x for x in leaves(there) if isinstance(x, torch.Tensor)]
    assert len(found) == sum(isinstance(x, torch.Tensor) for x in leaves((made.packed, made.full, made.crossing))) > 10
    assert {x.device.type for x in found} == {"meta"}


def leaves(x):
    if isinstance(x, (list, tuple)):
        return [leaf for part in x for leaf in leaves(part)]
    if isinstance(x, dict):
        return leaves(list(x.values()))
    return leaves(list(vars(x).values())) if hasattr(x, "__dataclass_fields__") else [x]


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason="no g++ here")
def test_cases_that_are_moved_are_answered_as_before(monkeypatch):
    """The way to a GPU and back, with the kernel in the emulator on the way."""
    emulated, once = emulated_cuda.Emulated(), iter([emulated_cuda.native, lambda packed: packed])
    monkeypatch.setattr(emulated_cuda, "native", lambda packed: next(once)(packed))
    monkeypatch.setattr(cuda, "attend", emulated.attend)
    make_case(method("oscar"), head_dim=64, queries=1).check(OnGpu("cpu"))
    assert next(once, None) is None
