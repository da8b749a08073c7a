"""What `attend` refuses, whatever the backend, before it reads anything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.kernels.contract import FullTokens, PackedTokens
from occamkv.ops.rope import KeyBias


def check_attend(
    q: Tensor,
    q_positions: Tensor,
    packed: PackedTokens | None,
    full: Sequence[FullTokens],
    *,
    mask: Tensor | None,
    sinks: Tensor | None,
    balance: Tensor | None,
    hadamard_block: int | None,
    key_bias: KeyBias | None,
) -> int:
    """Check that the arguments of `attend` fit together.

    Returns:
        The number of KV heads.

    Raises:
        UnsupportedInput: They do not.
    """
    if q.dim() != 4 or not q.is_floating_point():
        raise UnsupportedInput(f"q is {q.dtype} {tuple(q.shape)}; allowed: floating point [B, Hq, Tq, D].")
    if packed is None and not full:
        raise UnsupportedInput("there are neither packed nor full-precision tokens; give one of them, even if empty.")
    kv_heads = packed.slabs[0].kv_heads if packed is not None else full[0].k.shape[1]
    batch, q_heads, length, head_dim = q.shape
    if kv_heads == 0 or q_heads % kv_heads:
        raise UnsupportedInput(f"q has {q_heads} heads; allowed: a multiple of the {kv_heads} KV heads.")
    _check_tensor("q_positions", q_positions, q, shape=(batch, length), integer=True)
    _check_tokens(q, kv_heads, packed, full)
    if mask is not None:
        _check_mask(mask, q)
    if sinks is not None:
        check_of_heads("sinks", sinks, q)
    for part in full:
        if part.logit_bias is not None:
            check_of_heads("logit_bias", part.logit_bias, q)
    if balance is not None:
        _check_tensor("balance", balance, q, shape=(kv_heads, head_dim))
    check_block(hadamard_block, head_dim)
    if key_bias is not None:
        check_key_bias(key_bias, q, kv_heads)
    return kv_heads


def check_of_heads(name: str, x: Tensor, q: Tensor) -> None:
    """Raise `UnsupportedInput` unless x holds one float for each head of q, on its device."""
    if x.numel() != q.shape[1]:
        raise UnsupportedInput(f"{name} has {x.numel()} values; allowed: one for each of {q.shape[1]} query heads.")
    _check_tensor(name, x, q, shape=tuple(x.shape))


def check_key_bias(key_bias: KeyBias, x: Tensor, kv_heads: int) -> None:
    """Raise `UnsupportedInput` unless a bias fits tensors `[..., D]` like x and holds finite numbers in its pairs."""
    rotary, vector = key_bias.rotary, key_bias.vector
    _check_tensor("the vector of key_bias", vector, x, shape=(kv_heads, x.shape[-1]))
    pairs = [len(x) for x in (rotary.frequencies, rotary.first, rotary.second)]
    channels = torch.cat((rotary.first, rotary.second)).cpu()
    outside = channels.numel() > 0 and not 0 <= int(channels.min()) <= int(channels.max()) < vector.shape[-1]
    if len(set(pairs)) > 1 or outside or len(channels.unique()) < len(channels):
        raise UnsupportedInput(
            f"key_bias turns channels {channels.tolist()} with {pairs[0]} frequencies; allowed: two channels below "
            f"{vector.shape[-1]} for each frequency, none of them twice."
        )
    if not (bool(rotary.frequencies.isfinite().all()) and bool(vector.isfinite().all())):
        raise UnsupportedInput("key_bias holds a NaN or an infinity; allowed: finite frequencies and values.")
    rest = torch.ones(vector.shape[-1], dtype=torch.bool).index_fill_(0, channels, 0)
    if bool(vector[:, rest].any()):
        raise UnsupportedInput("key_bias has values in channels that no pair turns; allowed: zeros there.")


def check_lengths(lengths: Sequence[int], *, record_tokens: int, pages: int) -> None:
    """Raise `UnsupportedInput` unless every sequence has whole records that lie within its row of the block table."""
    for row, tokens in enumerate(lengths):
        if tokens < 0 or tokens % record_tokens or tokens > pages * PAGE_TOKENS:
            raise UnsupportedInput(
                f"sequence {row} has {tokens} packed tokens; allowed: whole records of {record_tokens} within "
                f"{pages} pages."
            )


def _check_tokens(q: Tensor, kv_heads: int, packed: PackedTokens | None, full: Sequence[FullTokens]) -> None:
    batch, _, _, head_dim = q.shape
    if packed is not None and packed.slabs[0].head_dim != head_dim:
        raise UnsupportedInput(f"q has head_dim {head_dim}, the packed tokens have {packed.slabs[0].head_dim}.")
    for part in full:
        tokens = part.positions.shape[-1]
        _check_tensor("positions", part.positions, q, shape=(batch, tokens), integer=True)
        for name, x in (("k", part.k), ("v", part.v)):
            _check_tensor(name, x, q, shape=(batch, kv_heads, tokens, head_dim))


def _check_tensor(name: str, x: Tensor, q: Tensor, *, shape: tuple[int, ...], integer: bool = False) -> None:
    right_kind = x.dtype in (torch.int64, torch.int32) if integer else x.is_floating_point()
    if tuple(x.shape) != shape or not right_kind or x.device != q.device:
        raise UnsupportedInput(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; allowed: {'int64' if integer else 'floating point'} "
            f"{shape} on {q.device}."
        )


def _check_mask(mask: Tensor, q: Tensor) -> None:
    batch, q_heads, length, _ = q.shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, q_heads)
    if not fits or mask.shape[2] != length or mask.shape[3] == 0:
        raise UnsupportedInput(
            f"mask has shape {tuple(mask.shape)}; allowed: [1 or {batch}, 1 or {q_heads}, {length}, positions]."
        )
    if mask.device != q.device or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise UnsupportedInput(f"mask is {mask.dtype} on {mask.device}; allowed: bool or floating point on {q.device}.")


def check_block(block: int | None, head_dim: int) -> None:
    """Raise `UnsupportedInput` unless channels can be rotated in blocks of this size."""
    if block is not None and (block < 1 or block & (block - 1) or head_dim % block):
        raise UnsupportedInput(f"hadamard_block is {block}; allowed: a power of two that divides head_dim {head_dim}.")
