"""Kernels as machine code: compiled by NVRTC when a format first needs them, kept on disk for the next time.

Needs no GPU: NVRTC comes with the extra `cuda`.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from occamkv.errors import BackendUnavailable
from occamkv.formats import PAGE_TOKENS, Format, padded
from occamkv.formats.format import channel_groups
from occamkv.kernels.cuda.kernel import THREADS, Kernel

SOURCES = Path(__file__).parent / "native"
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What the kernel is compiled for in tests. Cards between two of them run the code of the lower one."""

_COLUMNS, _WARPS, _SOURCES = 8, 4, 32  # as in native/layout.cuh and native/shared.cuh
_SHARED_BYTES = {"sm_80": 164, "sm_87": 164, "sm_90a": 228, "sm_100": 228}  # KiB of a processor; 100 on the others
_SYSTEM_BYTES = 1024  # of each block

MAX_SHARED_BYTES = 99 * 1024
"""That a block may have on every card."""


class Build(NamedTuple):
    """What is compiled: `native/<name>.cu` with these macros, without `OKV_`, and the shared memory of its blocks."""

    name: str
    macros: dict[str, int]
    architecture: str
    shared_bytes: int


def plan(kernel: Kernel, architecture: str) -> Build:
    """Decide how a kernel is compiled for a card: how many blocks share a processor, how many pages a block holds."""
    format, head_dim = kernel.format, kernel.head_dim
    capacity = _SHARED_BYTES.get(architecture, 100) * 1024
    if kernel.name != "attend":
        shared = packing_bytes(format, head_dim)
        fit = capacity // (shared + _SYSTEM_BYTES)
        return Build(kernel.name, kernel.macros() | {"MIN_BLOCKS": max(1, min(5, fit))}, architecture, shared)
    stages = 3 if attend_bytes(format, head_dim, stages=3) + _SYSTEM_BYTES <= capacity else 2
    shared = attend_bytes(format, head_dim, stages=stages)
    fit = capacity // (shared + _SYSTEM_BYTES)
    by_registers = 4 if padded(head_dim) <= 128 else 2
    more = {"MIN_BLOCKS": max(1, min(by_registers, fit)), "STAGES": stages}
    return Build(kernel.name, kernel.macros() | more, architecture, shared)


def build(wanted: Build) -> bytes:
    """Return the cubin, from disk if it was compiled before.

    Raises:
        BackendUnavailable: NVRTC is missing, or it refuses the source.
    """
    place = _cache_folder() / f"{_key(wanted)}.cubin"
    with suppress(OSError):  # not there, or not for us to read
        return place.read_bytes()
    cubin, _ = compile_source(wanted)
    with suppress(OSError):  # a cache that cannot be written costs the next process half a second
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(place)
    return cubin


def compile_source(wanted: Build) -> tuple[bytes, str]:
    """Return the cubin and what the assembler says of it: registers, spills.

    Raises:
        BackendUnavailable: NVRTC is missing, or it refuses the source.
    """
    nvrtc, name = _nvrtc(), f"{wanted.name}.cu"
    options = [f"--gpu-architecture={wanted.architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [
        f"--include-path={SOURCES}",
        *(f"-DOKV_{name}={value}" for name, value in sorted(wanted.macros.items())),
    ]
    if wanted.name != "attend":
        options.append("--fmad=false")  # records are byte for byte those of formats.records
    program = _done(nvrtc.nvrtcCreateProgram((SOURCES / name).read_bytes(), name.encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if int(result):
            error = next((line for line in log.splitlines() if "error" in line), result.name)
            raise BackendUnavailable(f"NVRTC does not compile {name} for {wanted.architecture}: {error}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def attend_bytes(format: Format, head_dim: int, *, stages: int) -> int:
    """Return the bytes of shared memory of a block of the attend kernel, `Shared` of native/shared.cuh."""
    width = padded(head_dim)
    row = 4 * (width + 4)
    pages = 2 if width <= 64 and format.k_bits + format.v_bits == 4 else 1  # of a step
    page = format.page_records * format.sections(head_dim).record_bytes + max(16, PAGE_TOKENS * format.norm_bytes) + 16
    merge = _WARPS * _COLUMNS * (row + 4 * 2 + 4 * 8)
    ring = -(-max(stages * pages * page, merge) // 128) * 128
    groups = channel_groups(head_dim, format.v_group)
    wide = 4 * (width + 32 * groups) * _WARPS * pages if format.metadata_bits == 8 else 16
    columns = _COLUMNS * (row + 8 + 6 * 4)
    return -(-(ring + wide + columns + _SOURCES * 24 + 8 * stages + 4) // 128) * 128


def packing_bytes(format: Format, head_dim: int) -> int:
    """Return the bytes of shared memory of a block of the kernels that write records, `Packing` of native/pack.cuh."""
    tokens, width, v_group = format.record_tokens, padded(head_dim), min(format.v_group, head_dim)
    groups = max(width, tokens * channel_groups(head_dim, v_group))
    floats = tokens * (width + 8) + 3 * groups + max(tokens, v_group) // 4 * THREADS + tokens + _WARPS
    return -(-(4 * floats + 4) // 128) * 128


def unavailable() -> str | None:
    """Return why nothing can be compiled here, one sentence, or None."""
    try:
        _nvrtc()
    except BackendUnavailable as reason:
        return str(reason)
    return None


def nvrtc_version() -> tuple[int, int]:
    """Return the CUDA that NVRTC belongs to.

    Raises:
        BackendUnavailable: NVRTC is missing.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    return int(major), int(minor)


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as missing:
        raise BackendUnavailable(
            f"the CUDA kernel is compiled by NVRTC, which is missing ({missing}); pip install 'occamkv[cuda]'."
        ) from missing
    return nvrtc


def _done(results: tuple[Any, ...]) -> Any:
    """Return what a call of NVRTC gave, or raise with its own name of what went wrong."""
    result, *values = results
    if int(result):
        raise BackendUnavailable(f"NVRTC refuses: {result.name}.")
    return values[0] if values else None


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    text = b" " * _done(size_of(program))
    _done(read(program, text))
    return text


def _cache_folder() -> Path:
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers: nothing can be kept
        folder = os.devnull
    return Path(folder) / "occamkv" / "cuda"


def _key(wanted: Build) -> str:
    told = [wanted.name, wanted.architecture, str(nvrtc_version()), str(sorted(wanted.macros.items()))]
    told += [path.name + path.read_text() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]
