"""The CUDA kernel as machine code, without a GPU: every architecture compiles, no registers spill, and the main loop
has the instructions that the memory leaves time for."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import emulated_cuda
from occamkv.errors import BackendUnavailable
from occamkv.formats import Format
from occamkv.kernels.cuda import building
from occamkv.kernels.cuda.kernel import Kernel
from some_attention import METHODS, Held, make_case

REGISTERS = {5: 102, 4: 128, 3: 168, 2: 255, 1: 255}
"""At most, by thread blocks of a processor."""

INT2 = Format(token_scale=True)


needs_nvrtc = pytest.mark.skipif(building.unavailable() is not None, reason=str(building.unavailable()))


def build_of(
    format: Format,
    head_dim: int = 128,
    *,
    name: str = "attend",
    softcap: bool = False,
    architecture: str = "sm_90a",
    **changed: int,
) -> building.Build:
    planned = building.plan(Kernel(name, format, head_dim, softcap), architecture)
    return planned._replace(macros=planned.macros | changed)


def told(log: str, what: str) -> int:
    """A number of the assembler's report."""
    return int(re.search(what.replace("N", r"(\d+)"), log)[1])


def check_registers(build: building.Build) -> None:
    _, log = building.compile_source(build)
    assert told(log, "N bytes spill stores") == told(log, "N bytes stack frame") == 0, f"registers spill: {log}"
    assert told(log, "Used N registers") <= REGISTERS[build.macros["MIN_BLOCKS"]]


@needs_nvrtc
@pytest.mark.parametrize("architecture", building.ARCHITECTURES)
def test_no_registers_spill(architecture):
    check_registers(build_of(INT2, architecture=architecture))


OTHERS = [
    (
        Format(k_bits=k, v_bits=v, k_group=group, metadata_bits=metadata, token_scale=metadata == 8),
        head_dim,
        architecture,
    )
    for k, v, group, metadata in ((2, 2, 64, 8), (3, 2, 32, 16), (3, 3, 32, 16), (4, 4, 128, 16), (2, 4, 32, 8))
    for head_dim in (32, 64, 80, 96, 112, 128, 192, 256)
    for architecture in building.ARCHITECTURES
]


@needs_nvrtc
@pytest.mark.parametrize(
    ("format", "head_dim", "architecture"),
    [
        pytest.param(*one, marks=pytest.mark.slow if number % 11 else pytest.mark.emulator)
        for number, one in enumerate(OTHERS)
    ],
    ids=str,
)
def test_no_registers_spill_in_other_formats(format, head_dim, architecture):
    check_registers(build_of(format, head_dim, softcap=head_dim % 64 == 0, architecture=architecture))


PACKING = [
    (name, format, head_dim, architecture)
    for name in ("encode", "append")
    for format, head_dim in [
        (INT2, 128),
        (Format(k_bits=3, v_bits=4, k_group=64, v_group=128, metadata_bits=8), 128),
        (Format(k_bits=4, v_bits=3, k_group=128, metadata_bits=8, token_scale=True, norm_dtype="float16"), 80),
        (Format(k_bits=4, v_bits=2), 256),
        (Format(k_bits=3, v_bits=3, token_scale=True), 64),
    ]
    for architecture in building.ARCHITECTURES
]


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "format", "head_dim", "architecture"),
    [pytest.param(*one, marks=[pytest.mark.emulator] if one[1:] != (INT2, 128, "sm_90a") else []) for one in PACKING],
    ids=str,
)
def test_no_registers_spill_in_kernels_that_write_records(name, format, head_dim, architecture):
    build = build_of(format, head_dim, name=name, architecture=architecture)
    check_registers(build)
    assert build.shared_bytes <= building.MAX_SHARED_BYTES


@needs_nvrtc
def test_twin_spilled_registers_are_noticed():
    with pytest.raises(AssertionError, match="registers spill"):
        check_registers(build_of(INT2, MIN_BLOCKS=8))


# -- instructions ------------------------------------------------------------------------------------------------


def disassembler() -> Path | None:
    """nvdisasm of the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else ()
    return next((path for place in places or () for path in Path(place).rglob("nvdisasm")), None)


class Loop(NamedTuple):
    """Of instructions. `skipped`: those behind branches forward, over no tile product."""

    instructions: list[str]
    skipped: set[int]

    @property
    def products(self) -> int:
        """Tile products."""
        return sum("HMMA" in one for one in self.instructions)


def loops(cubin: Path) -> Iterator[Loop]:
    """Yield each loop: from the target of a branch backwards to that branch."""
    command = [str(disassembler()), "-c", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    branches = [
        (start, labels[target[1]])
        for start, instruction in enumerate(instructions)
        if (target := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)) and target[1] in labels
    ]
    for end, start in branches:
        if start <= end:
            forward = [range(a + 1, b) for a, b in branches if start <= a < b <= end]
            rare = (body for body in forward if not any("HMMA" in instructions[n] for n in body))
            yield Loop(instructions[start : end + 1], {n - start for body in rare for n in body})


def instructions_per_1000_codes(build: building.Build, tmp_path: Path) -> tuple[float, float]:
    """Of a warp in the main loop, the smallest one with tile products on codes: all, and those of most steps.

    Most steps copy nothing (three of four warps never do), are seen whole by all queries, and find no larger logit.
    """
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(building.compile_source(build)[0])
    width = build.macros["HEAD_DIM"]
    products = 2 * 2 * width // 16 + width // 16 + 2  # of 32 tokens: codes, the minimums of K and of V
    main = min((loop for loop in loops(cubin) if loop.products >= products), key=lambda loop: len(loop.instructions))
    codes = main.products // products * 2 * 32 * width
    return 1000 * len(main.instructions) / codes, 1000 * (len(main.instructions) - len(main.skipped)) / codes


SMALL = Format(token_scale=True, metadata_bits=8, norm_dtype="float16")
LOOPS = {
    "2 bits": (INT2, 128, 61, 48),
    "2 bits with 8-bit metadata": (SMALL, 128, 68, 54),
    "2 bits in groups of 64": (replace(SMALL, k_group=64), 128, 69, 55),
    "2 bits, head_dim 64": (INT2, 64, 71, 56),
    "2 bits with 8-bit metadata, head_dim 64": (SMALL, 64, 80, 64),
    "2 bits with 8-bit metadata, head_dim 256": (SMALL, 256, 52, 44),
    "4 bits": (replace(INT2, k_bits=4, v_bits=4), 128, 67, 55),
}
"""Format, head_dim, and the instructions of a warp for 1000 codes at most: in the loop, and in most of its steps. While
memory streams an H200 has time for 91 at 3.0 bits per value, 76 at 2.5, 152 at 5."""


needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)"
)


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize("what", [n if n == "2 bits" else pytest.param(n, marks=pytest.mark.emulator) for n in LOOPS])
def test_the_main_loop_has_time_while_memory_streams(what, tmp_path):
    format, head_dim, most, most_often = LOOPS[what]
    whole, often = instructions_per_1000_codes(build_of(format, head_dim), tmp_path)
    assert 25 < often <= most_often and often + 5 < whole <= most


@needs_nvrtc
@needs_disassembler
@pytest.mark.emulator
def test_the_documented_counts_are_those_of_the_machine_code(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    rows = re.findall(r"^\| (\d bits.*?) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(LOOPS)
    for what, *told in rows:
        counted = instructions_per_1000_codes(build_of(*LOOPS[what][:2]), tmp_path)
        assert counted == pytest.approx([float(number) for number in told], abs=2), what  # compilers differ a little


def fused_sums(build: building.Build, tmp_path: Path) -> int:
    """Products that are added without being rounded before."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(building.compile_source(build)[0])
    return subprocess.run([str(disassembler()), "-c", str(cubin)], capture_output=True, text=True).stdout.count("FFMA")


@needs_nvrtc
@needs_disassembler
def test_kernels_that_write_records_round_as_the_reference_does(tmp_path, monkeypatch):
    """What is fused there is fused on purpose; without the option, the compiler fuses more."""
    build = build_of(INT2, name="encode")
    on_purpose = fused_sums(build, tmp_path)
    nvrtc = building._nvrtc()

    class Fusing:
        def __getattr__(self, name: str) -> object:
            return getattr(nvrtc, name)

        def nvrtcCompileProgram(self, program: object, count: int, options: list[bytes]) -> object:
            kept = [option for option in options if option != b"--fmad=false"]
            assert len(kept) == count - 1
            return nvrtc.nvrtcCompileProgram(program, count - 1, kept)

    monkeypatch.setattr(building, "_nvrtc", Fusing)
    assert fused_sums(build, tmp_path) > on_purpose


@needs_nvrtc
@needs_disassembler
def test_twin_more_instructions_are_noticed(tmp_path):
    whole, often = instructions_per_1000_codes(build_of(replace(INT2, k_bits=3, v_bits=3)), tmp_path)
    assert whole > LOOPS["2 bits"][2] and often > LOOPS["2 bits"][3]


# -- building ----------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = building.build(build_of(INT2))
    monkeypatch.setattr(building, "compile_source", None)
    assert building.build(build_of(INT2)) == first
    with pytest.raises(TypeError):
        building.build(build_of(INT2, architecture="sm_80"))


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "occamkv").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert building.build(build_of(INT2, 64))


@needs_nvrtc
@pytest.mark.parametrize("call", ["nvrtcCreateProgram", "nvrtcGetProgramLog", "nvrtcGetCUBINSize"])
def test_no_refusal_of_the_compiler_is_overlooked(call, monkeypatch):
    nvrtc = building._nvrtc()

    class Refusing:
        def __getattr__(self, name: str) -> object:
            real = getattr(nvrtc, name)
            return real if name != call else lambda *_: (nvrtc.nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY, None)

    monkeypatch.setattr(building, "_nvrtc", Refusing)
    with pytest.raises(BackendUnavailable, match="NVRTC_ERROR_OUT_OF_MEMORY"):
        building.compile_source(build_of(INT2, 64))


@needs_nvrtc
def test_what_the_compiler_says_is_passed_on():
    with pytest.raises(BackendUnavailable, match=r"does not compile .* for sm_90a"):
        building.compile_source(build_of(INT2, K_BITS=5))


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize(("fields", "head_dim"), [({}, 64), ({"token_scale": True}, 128), ({"metadata_bits": 8}, 32)])
def test_the_shared_memory_that_is_asked_for_is_what_the_kernel_uses(fields, head_dim):
    format = Format(**fields)
    library = emulated_cuda.build("attend", **Kernel("attend", format, head_dim, True).macros(), BULK=0)
    size = format.sections(head_dim).record_bytes
    assert library.occamkv_record_bytes() == size
    assert library.occamkv_memory_bytes() == building.attend_bytes(format, head_dim, stages=3)


@pytest.mark.parametrize("architecture", building.ARCHITECTURES)
def test_a_block_fits_the_shared_memory_of_every_card(architecture):
    """By NVIDIA's tables: 163 KiB on 8.0 and 8.7, 99 on 8.6, 8.9 and 12.0, 227 on the others."""
    most = {"sm_80": 163, "sm_87": 163, "sm_90a": 227, "sm_100": 227}.get(architecture, 99) * 1024
    held = set()
    for format, head_dim, _ in OTHERS:
        stages = build_of(format, head_dim, architecture=architecture).macros["STAGES"]
        assert building.attend_bytes(format, head_dim, stages=stages) <= most
        held.add(stages)
    assert (2 in held) == (most == 99 * 1024)


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize("bulk", [False, True], ids=["copies", "bulk copies"])
def test_two_pages_in_shared_memory_give_the_same_bits_as_three(bulk, monkeypatch):
    case = make_case(METHODS["oscar"], held=(Held(2, 30, 20),))
    first = case.attend(emulated_cuda.Emulated(packed_splits=1, bulk=bulk))
    build = emulated_cuda.build
    monkeypatch.setattr(emulated_cuda, "build", lambda name, **macros: build(name, **macros, STAGES=2))
    assert torch.equal(case.attend(emulated_cuda.Emulated(packed_splits=1, bulk=bulk)), first)
