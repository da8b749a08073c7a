"""The CUDA kernel as a backend that runs on a CPU: its source, built by g++ with the emulator, once for each format."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from occamkv.errors import UnsupportedFormat
from occamkv.kernels import PackedTokens
from occamkv.kernels.cuda import attend, call, launching, layout, refuses_format
from occamkv.kernels.cuda.kernel import Call

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda"
NATIVE = ROOT / "src" / "occamkv" / "kernels" / "cuda" / "native"
BUILDS = ROOT / "build" / "emulator"
FLAGS = ("-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
FLAGS += ("-ffp-contract=off",)  # as `building` has NVRTC round for the kernels that write records


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "the emulator of the CUDA kernel is built with g++, which is not here"
    return None


@cache
def build(name: str, **macros: int) -> ctypes.CDLL:
    """Compile a kernel for one format, unless the same source was compiled before."""
    sources = [*sorted(NATIVE.iterdir()), HERE / "emulator.h", HERE / "emulator.cpp"]
    options = [*FLAGS, "-DOKV_EMULATOR", f'-DOKV_KERNEL="{name}.cuh"']
    options += [f"-DOKV_{name}={value}" for name, value in sorted(macros.items())]
    digest = hashlib.sha256("\0".join([*options, *(p.read_text() for p in sources)]).encode()).hexdigest()[:16]
    library = BUILDS / f"{digest}.so"
    if not library.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *options, f"-I{HERE}", f"-I{NATIVE}", str(HERE / "emulator.cpp"), "-o", str(own)]
        subprocess.run(command, check=True)
        own.rename(library)
    loaded = ctypes.CDLL(str(library))
    loaded.occamkv_run.restype = ctypes.c_char_p
    return loaded


def run(wanted: Call, *, bulk: bool = False, order: int = 0) -> None:
    """Do what `launching.launch` does, in the emulator. `bulk`: copies as on sm_90; `order`: of blocks."""
    macros = wanted.kernel.macros() | {"SOFTCAP": 1, "BULK": int(bulk)}
    library = build(wanted.kernel.name, **macros)
    assert library.occamkv_given_bytes() == ctypes.sizeof(wanted.arguments)
    failure = library.occamkv_run(ctypes.byref(wanted.arguments), *wanted.grid, order)
    assert failure is None, failure.decode()


def native(packed: PackedTokens) -> PackedTokens:
    """The same tokens with their records in native order."""
    return replace(
        packed,
        slabs=[
            replace(s, records=layout.to_native(s.records, format=s.format, head_dim=s.head_dim), order=layout.ORDER)
            for s in packed.slabs
        ],
    )


@contextmanager
def mutated(monkeypatch: Any, folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Build kernels from a source in which something is wrong."""
    for path in NATIVE.iterdir():
        text = path.read_text()
        assert path.name != file or old in text
        (folder / path.name).write_text(text.replace(old, new) if path.name == file else text)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "NATIVE", folder)
        patch.setattr(call, "_counters", call._counters.__wrapped__)  # it may not leave them as it should
        build.cache_clear()
        try:
            yield
        finally:
            build.cache_clear()


class Emulated:
    """A backend for tests. `order`: of blocks; `bulk`: copies as on sm_90."""

    name = "cuda"

    def __init__(self, *, packed_splits: int = 2, bulk: bool = False, order: int = 0) -> None:
        self.packed_splits, self.bulk, self.order = packed_splits, bulk, order

    def attend(self, q: Tensor, *, packed: PackedTokens | None, **given: Any) -> Tensor:
        """See `occamkv.kernels.blockwise.attend`. Records are canonical here."""
        if packed is not None:
            if reason := refuses_format(packed.format):
                raise UnsupportedFormat(reason)
            packed = native(packed)

        def launch(wanted: Call) -> None:
            run(wanted, bulk=self.bulk, order=self.order)

        with mock.patch.object(launching, "launch", launch):
            return attend(q, packed=packed, packed_splits=self.packed_splits, **given)


@contextmanager
def on_cpu(*, processors: int = 1) -> Iterator[None]:
    """Let the product's own CUDA backend take tensors on the CPU, as if they were on a GPU of so many processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "launch", run)
        patch.setattr(launching, "unavailable", lambda device: None)
        patch.setattr(launching, "processors", lambda device: processors)
        yield
