"""From an engine's attention mask, over all slots with their pads, to positions of real tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput


class Seen(NamedTuple):
    """A mask that was read once and serves all layers of a step.

    Args:
        kept: bool `[B, T]`: which of the new tokens are real; None when all are.
        mask: `[B or 1, 1 or Hq, Tq, positions]` for a backend, or None for plain causal attention.
    """

    kept: Tensor | None
    mask: Tensor | None


def visible(mask: Tensor) -> Tensor:
    """Return True where a boolean or additive mask lets a query see a token."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def read_pads(mask: Tensor, *, before: Tensor | None, new: int, batch: int) -> Tensor | None:
    """Tell pads from real tokens among the newest `new` columns of a mask: a pad is seen by no query of this step.

    Args:
        mask: `[B or 1, 1 or Hq, Tq, S]`, boolean or additive.
        before: As in `read_mask`.
        new: Number of new tokens T.
        batch: B.

    Returns:
        bool `[B, T]`, or None when all tokens are real.

    Raises:
        UnsupportedInput: The batch is padded on the right.
    """
    seen = visible(mask[:, :, :, mask.shape[-1] - new :]).any(dim=2).any(dim=1).expand(batch, -1)
    kept = None if bool(seen.all()) else seen
    refuse_right_padding(kept, before, mask.shape[-1] - new)
    return kept


def read_mask(mask: Tensor, *, before: Tensor | None, new: int, batch: int) -> Seen:
    """Translate a mask over slots into one over positions.

    Args:
        mask: `[B or 1, 1 or Hq, Tq, S]`: boolean (True is seen) or additive, S = held + new slots.
        before: bool `[B, held]`: which held slots are real tokens; None when all are.
        new: New tokens of this step, the last columns.
        batch: B.

    Raises:
        UnsupportedInput: The batch is padded on the right, or a pad has become visible.
    """
    held = mask.shape[-1] - new
    kept = read_pads(mask, before=before, new=new, batch=batch)
    if kept is None and before is None:
        return Seen(None, None if _is_causal(mask, mask.shape[3] - mask.shape[2]) else mask)
    device = mask.device
    old = torch.ones(batch, held, dtype=torch.bool, device=device) if before is None else before.to(device)
    fresh = torch.ones(batch, new, dtype=torch.bool, device=device) if kept is None else kept
    real = torch.cat((old, fresh), dim=1)
    if bool((visible(mask).any(dim=2).any(dim=1) & ~real).any()):
        raise UnsupportedInput(
            "the mask shows a token that was hidden from every query when it came, so it was dropped as padding. "
            "Keep a token's attention_mask the same from call to call."
        )
    slots = torch.argsort(~real, dim=1, stable=True)  # slot of each position; pads behind
    positions = int(real.sum(1).max())
    index = slots[:, None, None, :positions].expand(-1, mask.shape[1], mask.shape[2], -1)
    by_position = mask.expand(batch, -1, -1, -1).gather(-1, index)
    return Seen(kept, None if _is_causal_for(by_position, real, mask.shape[2]) else by_position)


def refuse_right_padding(kept: Tensor | None, before: Tensor | None, held: int) -> None:
    """Raise `UnsupportedInput` if a sequence with real tokens ends in a pad; arguments as in `read_mask`."""
    if kept is None:
        return
    has_tokens = kept.any(dim=1)
    if held:
        has_tokens = has_tokens | (torch.ones_like(has_tokens) if before is None else before.any(dim=1).to(kept.device))
    wrong = has_tokens & ~kept[:, -1]
    if bool(wrong.any()):
        raise UnsupportedInput(
            f"sequence {int(wrong.nonzero()[0])} of the batch ends in padding; allowed: padding on the left. "
            "Set tokenizer.padding_side = 'left'. Nothing was stored."
        )


def _is_causal(mask: Tensor, held: int) -> bool:
    if mask.dtype != torch.bool:
        return False
    plain = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(held)
    return bool((mask == plain).all())


def _is_causal_for(mask: Tensor, real: Tensor, new: int) -> bool:
    if mask.dtype != torch.bool:
        return False
    at = query_positions(real, new)
    positions = torch.arange(mask.shape[-1], device=mask.device)
    plain = (positions <= at[:, :, None])[:, None]
    queries = (at >= 0)[:, None, :, None]
    return bool(((mask == plain) | ~queries).all())


def query_positions(real: Tensor, new: int) -> Tensor:
    """Return the position of the last `new` slots, int64 `[B, new]`, -1 for pads. `real`: bool `[B, S]`."""
    positions = real.cumsum(dim=1) - 1
    return positions.masked_fill(~real, -1)[:, real.shape[1] - new :]
