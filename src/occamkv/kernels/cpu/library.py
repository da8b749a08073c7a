"""The native library: where it is, its structs as ctypes, its errors as exceptions. Loaded at the first use.

A pointer to numbers is an address, such as `Tensor.data_ptr()`: the caller keeps its owner alive during the call.
"""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import occamkv.kernels.cpu
from occamkv.errors import BackendUnavailable, UnsupportedInput

ABI = 2
"""The number in `native/api.h`; it changes with every struct or function."""

F32: int = 0
BF16: int = 1
F16: int = 2
BOOL: int = 3
"""Dtypes of tensors and masks."""

MINMAX: int = 0
PAPER: int = 1
UNBIASED: int = 2
"""Grids of the encoder."""

ISA_VARIABLE = "OCCAMKV_CPU_ISA"
"""Environment variable that names the instruction set to be used, instead of the best one."""

_FILES = ("libokv.so", "libokv.dylib")
_REASON = "not_built.txt"  # written by CMakeLists.txt in place of the library


class Layout(ctypes.Structure):
    """`okv_layout`: a format at one head_dim."""

    _fields_ = (
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("width", c_int32),
        ("k_bits", c_int32),
        ("v_bits", c_int32),
        ("k_per_token", c_int32),
        ("k_group", c_int32),
        ("v_group", c_int32),
        ("record_tokens", c_int32),
        ("metadata_bits", c_int32),
        ("norm_bits", c_int32),
        ("k_scale", c_int32),
        ("k_minimum", c_int32),
        ("v_codes", c_int32),
        ("v_scale", c_int32),
        ("v_minimum", c_int32),
        ("record_bytes", c_int32),
    )


class Slab(ctypes.Structure):
    """`okv_slab`: some pages."""

    _fields_ = (
        ("records", c_void_p),
        ("norms", c_void_p),
        ("super_scales", c_void_p),
        ("start", c_int64),
        ("count", c_int64),
    )


class Packed(ctypes.Structure):
    """`okv_packed`: the packed tokens of B sequences."""

    _fields_ = (
        ("layout", Layout),
        ("slab_count", c_int64),
        ("slabs", POINTER(Slab)),
        ("table", c_void_p),
        ("table_width", c_int64),
        ("table_stride", c_int64),
        ("lengths", c_void_p),
        ("first_position", c_void_p),
        ("skips", c_void_p),
        ("skip_count", c_int64),
    )


class View(ctypes.Structure):
    """`okv_tensor`: a tensor `[B, H, T, D]` with strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("dtype", c_int32),
        ("reserved", c_int32),
    )


class Full(ctypes.Structure):
    """`okv_full`: tokens in full precision."""

    _fields_ = (("k", View), ("v", View), ("tokens", c_int64), ("positions", c_void_p), ("logit_bias", c_void_p))


class KeyBias(ctypes.Structure):
    """`okv_key_bias`: what K lies without and logits get back."""

    _fields_ = (
        ("pairs", c_int64),
        ("lanes", c_int64),
        ("reach", c_int64),
        ("frequencies", c_void_p),
        ("first", c_void_p),
        ("second", c_void_p),
        ("vector", c_void_p),
        ("coarse", c_void_p),
        ("fine", c_void_p),
        ("fine_columns", c_void_p),
    )


class Mask(ctypes.Structure):
    """`okv_mask`: a mask `[B, H, Tq, positions]` with strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("query_stride", c_int64),
        ("position_stride", c_int64),
        ("positions", c_int64),
        ("dtype", c_int32),
        ("reserved", c_int32),
    )


class Attend(ctypes.Structure):
    """`okv_attend`: what `attend` is given."""

    _fields_ = (
        ("q", View),
        ("out", View),
        ("batch", c_int64),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("queries", c_int64),
        ("head_dim", c_int64),
        ("q_positions", c_void_p),
        ("packed", POINTER(Packed)),
        ("full", POINTER(Full)),
        ("full_count", c_int64),
        ("mask", POINTER(Mask)),
        ("sinks", c_void_p),
        ("balance", c_void_p),
        ("key_bias", POINTER(KeyBias)),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("hadamard_block", c_int32),
        ("output_hadamard_block", c_int32),
        ("threads", c_int32),
        ("reserved", c_int32),
    )


class Encode(ctypes.Structure):
    """`okv_encode`: groups of tokens and where their records go."""

    _fields_ = (
        ("layout", Layout),
        ("k", View),
        ("v", View),
        ("groups", c_int64),
        ("grid", c_int32),
        ("k_clip", c_float),
        ("v_clip", c_float),
        ("k_hadamard_block", c_int32),
        ("v_hadamard_block", c_int32),
        ("balance", c_void_p),
        ("feedback", c_void_p),
        ("given_norms", c_void_p),
        ("records", c_void_p),
        ("norms", c_void_p),
        ("super_scales", c_void_p),
        ("threads", c_int32),
        ("reserved", c_int32),
    )


class Decode(ctypes.Structure):
    """`okv_decode`: records and where their K and V go."""

    _fields_ = (
        ("layout", Layout),
        ("records", c_void_p),
        ("group_stride", c_int64),
        ("head_stride", c_int64),
        ("norms", c_void_p),
        ("super_scales", c_void_p),
        ("super_group_stride", c_int64),
        ("super_head_stride", c_int64),
        ("groups", c_int64),
        ("k", View),
        ("v", View),
        ("threads", c_int32),
        ("reserved", c_int32),
    )


class Step(ctypes.Structure):
    """`okv_step`: one token of every sequence of a layer."""

    _fields_ = (
        ("attend", Attend),
        ("packed", Packed),
        ("k", View),
        ("v", View),
        ("ring_k", View),
        ("ring_v", View),
        ("pin_k", View),
        ("pin_v", View),
        ("ring_slots", c_int64),
        ("pin_slots", c_int64),
        ("pin_positions", c_void_p),
        ("pin_logit_bias", c_void_p),
        ("packed_tokens", c_void_p),
        ("residual", c_void_p),
        ("due", c_void_p),
        ("encode", Encode),
    )


def unavailable() -> str | None:
    """Return why there are no native kernels, one sentence with the way out, or None if there are.

    Raises:
        BackendUnavailable: `OCCAMKV_CPU_ISA` asks for an instruction set that is not to be had. That is no reason to
            take another backend: it would not be what was asked for.
    """
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        BackendUnavailable: There is none; the message says why, as `unavailable` does.
    """
    found = _load()
    if isinstance(found, str):
        raise BackendUnavailable(found)
    return found


def isa() -> str:
    """Return the name of the instruction set in use."""
    return library().okv_isa().decode()


def isas() -> tuple[str, ...]:
    """Return the names of all instruction sets that the library has and this machine runs, best first."""
    return tuple(library().okv_isas().decode().split(","))


def select(name: str) -> None:
    """Use another instruction set, in all threads.

    Raises:
        UnsupportedInput: It is none of `isas()`.
    """
    if library().okv_select(name.encode()) != 0:
        raise UnsupportedInput(f"instruction set {name!r} is not to be had; allowed here: {', '.join(isas())}.")


def run(call: Attend | Encode | Decode | Step) -> None:
    """Run a call of the library: `okv_attend_run`, `okv_encode_run`, `okv_decode_run` or `okv_step_run`.

    Raises:
        UnsupportedInput: It failed; the message is the library's.
    """
    native = library()
    if getattr(native, _RUNS[type(call)])(call) != 0:
        raise UnsupportedInput(f"{native.okv_error().decode()}.")


_RUNS = {Attend: "okv_attend_run", Encode: "okv_encode_run", Decode: "okv_decode_run", Step: "okv_step_run"}


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, with the instruction set that the environment asks for, or why there is none."""
    found = _open([Path(folder) for folder in occamkv.kernels.cpu.__path__])
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return found
    if isinstance(found, str):
        raise BackendUnavailable(f"{ISA_VARIABLE} asks for {wanted!r}, but there are no native kernels: {found}")
    if found.okv_select(wanted.encode()) != 0:
        here, built = (names.decode().replace(",", ", ") for names in (found.okv_isas(), found.okv_built()))
        raise BackendUnavailable(
            f"{ISA_VARIABLE} asks for {wanted!r}; this machine and library have {here} (built: {built}). "
            f"Choose one of these, or unset {ISA_VARIABLE} for the best one."
        )
    return found


def _open(folders: list[Path]) -> ctypes.CDLL | str:
    """Return the library found in one of these folders, ready to be called, or why there is none.

    An editable install has two: the sources, and the folder in site-packages that holds only what was built.
    """
    file = next((folder / name for folder in folders for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        for folder in folders:
            if (folder / _REASON).is_file():
                return (folder / _REASON).read_text().strip()
        return "occamkv's C++ library was not built: install a C++17 compiler, then install occamkv again with pip."
    try:
        native = ctypes.CDLL(str(file))
        abi = native.okv_abi()
    except (OSError, AttributeError) as error:
        return f"{file} cannot be used ({error}): install occamkv again with pip."
    if abi != ABI:
        return f"{file} belongs to another version of occamkv (ABI {abi}, not {ABI}): install occamkv again with pip."
    for name in ("okv_isa", "okv_isas", "okv_built", "okv_error"):
        getattr(native, name).restype = c_char_p
    native.okv_select.argtypes = [c_char_p]
    for struct, name in _RUNS.items():
        getattr(native, name).argtypes = [POINTER(struct)]
    return native
