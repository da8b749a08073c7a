"""The kernel as machine code: compiled by NVRTC when a format first needs it, kept on disk for the next time.

Needs no GPU: NVRTC comes with the extra `cuda`.
"""

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from occamkv.errors import BackendUnavailable
from occamkv.formats import PAGE_TOKENS, Format, padded
from occamkv.kernels.cuda.call import definitions

SOURCES = Path(__file__).parent / "native"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What the kernel is compiled for in tests. Cards between two of them run the code of the lower one."""

_COLUMNS, _WARPS = 8, 4  # as in native/layout.cuh and native/shared.cuh
_SHARED_BYTES = {"sm_80": 164, "sm_90a": 228, "sm_100": 228}  # KiB of a processor; 100 on the others
_SYSTEM_BYTES = 1024  # of each block


def macros_for(format: Format, *, head_dim: int, softcap: bool, architecture: str) -> dict[str, int]:
    """Return all macros, without `OKV_`, that the kernel is compiled with.

    Those beyond `call.definitions` say how many blocks share a processor, and how many pages a block holds.
    """
    capacity = _SHARED_BYTES.get(architecture, 100) * 1024
    stages = 3 if shared_bytes(format, head_dim, stages=3) + _SYSTEM_BYTES <= capacity else 2
    fit = capacity // (shared_bytes(format, head_dim, stages=stages) + _SYSTEM_BYTES)
    by_registers = 4 if padded(head_dim) <= 128 else 2
    blocks = max(1, min(by_registers, fit))
    return definitions(format, head_dim=head_dim, softcap=softcap) | {"MIN_BLOCKS": blocks, "STAGES": stages}


def build(macros: dict[str, int], architecture: str) -> bytes:
    """Return the cubin for these macros, without `OKV_`, from disk if it was compiled before.

    Raises:
        BackendUnavailable: NVRTC is missing, or it refuses the source.
    """
    place = _cache_folder() / f"{_key(macros, architecture)}.cubin"
    if place.is_file():
        return place.read_bytes()
    cubin, _ = compile_source(macros, architecture)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(place)
    except OSError:  # a cache that cannot be written costs the next process half a second
        pass
    return cubin


def compile_source(macros: dict[str, int], architecture: str) -> tuple[bytes, str]:
    """Return the cubin and what the assembler says of it: registers, spills.

    Raises:
        BackendUnavailable: NVRTC is missing, or it refuses the source.
    """
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", f"--include-path={SOURCES}"]
    options += [f"-DOKV_{name}={value}" for name, value in sorted(macros.items())]
    source = (SOURCES / "attend.cu").read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(source, b"attend.cu", 0, [], [])
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if int(result):
            raise BackendUnavailable(f"NVRTC does not compile the CUDA kernel for {architecture}: {log}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def shared_bytes(format: Format, head_dim: int, *, stages: int) -> int:
    """Return the bytes of shared memory of a thread block, `Shared` of native/shared.cuh."""
    row = 4 * (padded(head_dim) + 4)
    page = format.page_records * format.sections(head_dim).record_bytes
    stage = page + max(16, PAGE_TOKENS * format.norm_bytes) + 16
    merge = _WARPS * _COLUMNS * (row + 4 * 2 + 4 * 8)
    ring = -(-max(stages * stage, merge) // 128) * 128
    columns = _COLUMNS * (row + 8 + 4 * 4)
    return -(-(ring + columns + 8 * stages + 4) // 128) * 128


def unavailable() -> str | None:
    """Return why nothing can be compiled here, one sentence, or None."""
    try:
        _nvrtc()
    except BackendUnavailable as reason:
        return str(reason)
    return None


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


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    _, size = size_of(program)
    text = b" " * size
    read(program, text)
    return text


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "occamkv" / "cuda"


def _key(macros: dict[str, int], architecture: str) -> str:
    _, *version = _nvrtc().nvrtcVersion()
    told = [architecture, str(version), str(sorted(macros.items()))]
    told += [path.name + path.read_text() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]
