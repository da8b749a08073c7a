"""The native library: its structs as ctypes see them, why it may be missing, and which instruction set it uses."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import occamkv.kernels.cpu
from occamkv.errors import BackendUnavailable, UnsupportedInput
from occamkv.kernels.cpu import library

NATIVE = Path(library.__file__).parent / "native"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
STRUCTS = {
    "okv_layout": library.Layout,
    "okv_slab": library.Slab,
    "okv_packed": library.Packed,
    "okv_tensor": library.View,
    "okv_full": library.Full,
    "okv_key_bias": library.KeyBias,
    "okv_mask": library.Mask,
    "okv_attend": library.Attend,
    "okv_encode": library.Encode,
    "okv_decode": library.Decode,
    "okv_step": library.Step,
}
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def built(monkeypatch):
    """The library's file, with the best instruction set; skips where it was not built."""
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    library._load.cache_clear()
    if (reason := library.unavailable()) is not None:
        pytest.skip(reason)
    before = library.isa()
    yield Path(library.library()._name)
    library._load.cache_clear()
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    library.select(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Let the package look for its library in an empty folder only."""
    monkeypatch.setattr(occamkv.kernels.cpu, "__path__", [str(tmp_path)])
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    library._load.cache_clear()
    yield tmp_path
    library._load.cache_clear()


def compiled(source: str, target: Path) -> None:
    command = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-o", target]
    subprocess.run(command, input=source, text=True, check=True)


# -- structs -----------------------------------------------------------------------------------------------------


def differences(structs: dict[str, type[ctypes.Structure]]) -> str:
    """Return what the compiler says against the claim that these structs lie in memory as those of api.h."""
    claims = [f"static_assert(OKV_ABI == {library.ABI});"]
    for name, struct in structs.items():
        claims.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        as_many = ", ".join(f"field{i}" for i in range(len(struct._fields_)))
        claims.append(f"void count_{name}({name} &it) {{ auto &[{as_many}] = it; }}")
        for field, kind in struct._fields_:
            claims += [
                f"static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset});",
                f"static_assert(sizeof({name}::{field}) == {ctypes.sizeof(kind)});",
                f"static_assert(std::is_floating_point<decltype({name}::{field})>() == {int(kind is ctypes.c_float)});",
                f"static_assert(std::is_pointer<decltype({name}::{field})>() == {int(points(kind))});",
            ]
    source = "\n".join(['#include "api.h"', "#include <stddef.h>", "#include <type_traits>", *claims])
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{NATIVE}", "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False).stderr


def points(kind: type) -> bool:
    return kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer)


@needs_compiler
def test_every_struct_of_the_header_is_mirrored_field_by_field():
    header = (NATIVE / "api.h").read_text()
    declared = {line.split()[1] for line in header.splitlines() if line.startswith("struct okv_")}
    assert declared == set(STRUCTS)
    assert differences(STRUCTS) == ""


def missing_last(fields):
    return fields[:-1]


def swapped(fields):
    return (fields[1], fields[0], *fields[2:])


def integer_for_float(fields):
    return tuple((name, ctypes.c_int32 if kind is ctypes.c_float else kind) for name, kind in fields)


@needs_compiler
@pytest.mark.parametrize("change", [missing_last, swapped, integer_for_float])
def test_a_mirror_that_differs_is_seen(change):
    struct = type("Wrong", (ctypes.Structure,), {"_fields_": change(library.Encode._fields_)})
    assert "error:" in differences({"okv_encode": struct})


def test_the_numbers_of_dtypes_and_grids_are_those_of_the_header():
    header = " ".join((NATIVE / "api.h").read_text().split())
    for name in ("F32", "BF16", "F16", "BOOL", "MINMAX", "PAPER", "UNBIASED"):
        assert f"OKV_{name} = {getattr(library, name)}" in header


# -- no library --------------------------------------------------------------------------------------------------


def test_without_a_library_the_reason_says_what_to_do(folder):
    reason = library.unavailable()
    assert "was not built" in reason
    assert "install a C++17 compiler" in reason
    for call in (library.library, library.isa, library.isas, lambda: library.run(library.Decode())):
        with pytest.raises(BackendUnavailable, match="was not built"):
            call()


def test_the_reason_that_the_build_left_is_told(folder):
    (folder / "not_built.txt").write_text("The moon was full: wait.\n")
    assert library.unavailable() == "The moon was full: wait."


@needs_compiler
@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param('extern "C" int okv_abi() { return 999; }', f"ABI 999, not {library.ABI}", id="another ABI"),
        pytest.param('extern "C" int something() { return 1; }', "okv_abi", id="another library"),
    ],
)
def test_a_library_of_another_version_is_refused(folder, source, words):
    compiled(source, folder / "libokv.so")
    assert words in library.unavailable()
    assert "install occamkv again" in library.unavailable()


def test_a_file_that_is_no_library_is_refused(folder):
    (folder / "libokv.so").write_text("not ELF")
    assert "cannot be used" in library.unavailable()


def test_asking_for_an_instruction_set_without_a_library_is_an_error_and_no_reason_to_fall_back(folder, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "avx2")
    with pytest.raises(BackendUnavailable, match=r"OCCAMKV_CPU_ISA asks for 'avx2'.*was not built"):
        library.unavailable()


# -- instruction sets --------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_taken_at_load(built):
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).okv_isa; f.restype = ctypes.c_char_p; print(f().decode())"
    taken = subprocess.run([sys.executable, "-c", code, built], capture_output=True, text=True, check=True).stdout
    assert taken.strip() == library.isas()[0]
    assert library.isas()[-1] == "portable"


def test_another_instruction_set_can_be_selected(built):
    for name in library.isas():
        library.select(name)
        assert library.isa() == name
    with pytest.raises(UnsupportedInput, match=r"'sse2' is not to be had; allowed here: .*portable"):
        library.select("sse2")
    assert library.isa() == "portable"


def test_the_environment_chooses_the_instruction_set(built, monkeypatch):
    for name in library.isas():
        monkeypatch.setenv(library.ISA_VARIABLE, name)
        library._load.cache_clear()
        assert library.isa() == name


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx512,avx2", "best"])
def test_an_instruction_set_that_is_not_to_be_had_is_an_error(built, monkeypatch, name):
    monkeypatch.setenv(library.ISA_VARIABLE, name)
    library._load.cache_clear()
    for call in (library.unavailable, library.library, library.isa):
        with pytest.raises(BackendUnavailable, match=rf"asks for '{name}'.*portable.*unset OCCAMKV_CPU_ISA"):
            call()


# -- the file ----------------------------------------------------------------------------------------------------


def of_tool(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None or sys.platform != "linux":
        pytest.skip(f"no {command[0]} for Linux here")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def foreign(symbols: str) -> list[str]:
    """Return the names in the output of `nm -D --defined-only` that are not ours to export."""
    return [line.split()[-1] for line in symbols.splitlines() if not line.split()[-1].startswith("okv_")]


def unwanted(needed: str) -> list[str]:
    """Return the lines of `readelf -d` that name a library of threads or of C++ which another package may bring too."""
    bad = ("gomp", "iomp", "libomp", "stdc++", "libc++", "torch", "python")
    return [line for line in needed.splitlines() if "NEEDED" in line and any(word in line for word in bad)]


def test_the_library_exports_only_its_own_functions_and_needs_no_openmp(built):
    symbols = of_tool("nm", "-D", "--defined-only", built)
    assert "okv_attend_run" in symbols
    assert foreign(symbols) == []
    assert unwanted(of_tool("readelf", "-d", built)) == []


@needs_compiler
def test_the_checks_of_the_file_see_a_foreign_symbol_and_a_foreign_library(tmp_path):
    compiled("#include <string>\nstd::string okv_no(char c) { return std::string(99, c) + c; }", tmp_path / "bad.so")
    assert foreign(of_tool("nm", "-D", "--defined-only", tmp_path / "bad.so")) != []
    assert unwanted(of_tool("readelf", "-d", tmp_path / "bad.so")) != []


# -- calls -------------------------------------------------------------------------------------------------------


def test_a_call_without_work_succeeds_with_any_number_of_threads(built):
    for threads in (0, 1, 3):
        library.run(library.Decode(groups=0, threads=threads))
