"""Encoding of records in native order: in one launch, or, for what the kernel does not take, through torch."""

import ctypes

import torch
from torch import Tensor

from occamkv import ops
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format, records
from occamkv.formats.records import Records
from occamkv.kernels.checks import check_block
from occamkv.kernels.cuda import building, launching, layout
from occamkv.kernels.cuda.call import DTYPES, is_aligned, readable
from occamkv.kernels.cuda.kernel import Call, Kernel
from occamkv.ops.affine import Grid, clip_share
from occamkv.ops.norms import Norm

_GRIDS = {"minmax": 0, "paper": 1, "unbiased": 2}
_BLOCKS_PER_PROCESSOR = 4
DOES_NOT_FIT, BEYOND_RANGE, NO_ROOM = 1, 2, 4
"""`Flag` of native/arguments.h."""


class View(ctypes.Structure):
    """`View` of native/arguments.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "token")),
        *((name, ctypes.c_int) for name in ("dtype", "aligned")),
    )


class Rules(ctypes.Structure):
    """`Rules` of native/arguments.h."""

    _fields_ = (
        ("balance", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("k_block", "v_block")),
        *((name, ctypes.c_float) for name in ("k_factor", "v_factor")),
        ("grid", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("k_clip", "v_clip")),
    )


class Arguments(ctypes.Structure):
    """`EncodeArguments` of native/arguments.h."""

    _fields_ = (
        *((name, View) for name in ("k", "v")),
        *((name, ctypes.c_void_p) for name in ("records", "norms", "supers", "flags")),
        *((name, ctypes.c_int) for name in ("kv_heads", "heads")),
        ("rules", Rules),
    )


def encode(
    k: Tensor,
    v: Tensor,
    *,
    format: Format,
    grid: Grid = "minmax",
    clip: float | None = 1.0,
    norm: Norm = "l2",
    feedback: Tensor | None = None,
    hadamard_block: int | None = None,
    balance: Tensor | None = None,
    rotate_v: bool = False,
) -> Records:
    """Quantize and pack N groups of tokens; arguments as in `kernels.reference.encode`, its bytes in native order.

    Error feedback, other norms, and records too large for the shared memory of every card go through torch.

    Raises:
        UnsupportedInput: A value does not fit its stored dtype, a scale is too large for the attend kernel
            (`layout.check_range`), or shapes do not fit together.
    """
    _check(k, v, format, balance=balance, hadamard_block=hadamard_block)
    if feedback is not None or (format.token_scale and norm != "l2") or not takes(format, k.shape[3]):
        k = ops.rotate(k, hadamard_block=hadamard_block, balance=balance)
        v = ops.hadamard(v) if rotate_v else v
        made = records.encode(k, v, format=format, grid=grid, clip=clip, norm=norm, feedback=feedback)
        layout.check_range(made.data, made.super_scales, format=format, head_dim=k.shape[-1])
        return made._replace(data=layout.to_native(made.data, format=format, head_dim=k.shape[-1]))
    groups, heads, tokens, head_dim = k.shape
    size, device = format.sections(head_dim).record_bytes, k.device
    made = Records(
        torch.empty(groups, heads, size, dtype=torch.uint8, device=device),
        torch.empty(groups, tokens, dtype=getattr(torch, format.norm_dtype), device=device)
        if format.token_scale
        else None,
        torch.empty(groups, heads, 2, dtype=torch.float16, device=device) if format.metadata_bits == 8 else None,
    )
    if not groups:
        return made
    keep: list[Tensor] = [flags := torch.zeros(1, dtype=torch.int32, device=device)]
    block = ops.hadamard_block(head_dim) if rotate_v else None
    data, norms, supers = (None if t is None else t.data_ptr() for t in made)
    rules = rules_of(format, head_dim, grid=grid, clip=clip, balance=balance, blocks=(hadamard_block, block), keep=keep)
    at_once = heads if groups >= _BLOCKS_PER_PROCESSOR * launching.processors(device) else 1
    views = (view_of(readable(x), keep) for x in (k, v))
    arguments = Arguments(*views, data, norms, supers, flags.data_ptr(), heads, at_once, rules)
    blocks = (groups, -(-heads // at_once), 1)
    launching.launch(Call(Kernel("encode", format, head_dim), arguments, blocks, device, keep))
    if raised := int(flags):
        _refuse(k, v, made, raised, format=format, blocks=(hadamard_block, block), balance=balance)
    return made


def takes(format: Format, head_dim: int) -> bool:
    """Return whether a group of one head fits the shared memory of a block on every card."""
    return building.packing_bytes(format, head_dim) <= building.MAX_SHARED_BYTES


def view_of(x: Tensor, keep: list[Tensor]) -> View:
    """Describe K or V, `[B, H, T, D]`, readable."""
    keep.append(x)
    return View(x.data_ptr(), *x.stride()[:3], DTYPES[x.dtype], is_aligned(x))


def rules_of(
    format: Format,
    head_dim: int,
    *,
    grid: Grid,
    clip: float | None,
    balance: Tensor | None,
    blocks: tuple[int | None, int | None],
    keep: list[Tensor],
) -> Rules:
    """Describe how tokens cross into cache space, K and V in these Hadamard blocks, and how they are encoded."""
    counts = (format.record_tokens, min(format.v_group, head_dim))
    clips = (clip_share(int(b), n) for b, n in zip((format.k_bits, format.v_bits), counts, strict=True))
    if balance is not None:
        keep.append(balance := balance.to(torch.float32).contiguous())
    return Rules(
        None if balance is None else balance.data_ptr(),
        *(block or 0 for block in blocks),
        *(1.0 if block is None else block**-0.5 for block in blocks),
        _GRIDS[grid],
        *(clips if clip is None else (clip, clip)),
    )


def _refuse(
    k: Tensor,
    v: Tensor,
    made: Records,
    raised: int,
    *,
    format: Format,
    blocks: tuple[int | None, int | None],
    balance: Tensor | None,
) -> None:
    """Raise what the reference, or `check_range`, says of groups that the kernel has flagged."""
    head_dim = k.shape[-1]
    if raised & DOES_NOT_FIT:
        k = ops.rotate(k, hadamard_block=blocks[0], balance=balance)
        norms = ops.norms.token_norm(k).to(getattr(torch, format.norm_dtype)) if format.token_scale else None
        v = v if blocks[1] is None else ops.hadamard(v)
        raise records.does_not_fit(k, v, norms, format=format)
    data = layout.to_canonical(made.data, format=format, head_dim=head_dim)
    layout.check_range(data, made.super_scales, format=format, head_dim=head_dim)


def _check(k: Tensor, v: Tensor, format: Format, *, balance: Tensor | None, hadamard_block: int | None) -> None:
    heads, head_dim = k.shape[1], k.shape[3]
    if k.shape != v.shape or k.shape[2] != format.record_tokens or k.device != v.device:
        raise UnsupportedInput(
            f"K has shape {tuple(k.shape)} and V {tuple(v.shape)}, on {k.device} and {v.device}; allowed: both "
            f"[N, H, {format.record_tokens}, D] on one device."
        )
    if balance is not None and (balance.shape != (heads, head_dim) or balance.device != k.device):
        raise UnsupportedInput(
            f"balance has shape {tuple(balance.shape)} on {balance.device}; allowed: {(heads, head_dim)} on {k.device}."
        )
    check_block(hadamard_block, head_dim)
