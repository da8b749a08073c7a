"""A key bias as the native library reads it: its pairs, its vector, and tables of the turns that positions make."""

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.kernels.cpu import library
from occamkv.ops.rope import KeyBias

MAX_POSITIONS = 2**24
"""The tables take 8 bytes per pair for each 128 positions: 16 MB for 16 pairs at this many."""

_LANES = 16


def turns_of(key_bias: KeyBias | None) -> "Turns | None":
    """Return what describes a key bias; None where nothing is to be added to a logit."""
    return None if key_bias is None or not len(key_bias.rotary.frequencies) else Turns(key_bias)


class Turns:
    """Describes a key bias, with tables that reach as far as positions do.

    Cosine and sine of position t are those of its page, `t // 128`, times those of its place in it, as complex numbers.
    All angles are computed in float64.
    """

    def __init__(self, key_bias: KeyBias) -> None:
        rotary, pairs = key_bias.rotary, len(key_bias.rotary.frequencies)
        lanes = -(-pairs // _LANES) * _LANES
        self._frequencies = torch.zeros(lanes, dtype=torch.float64)
        self._frequencies[:pairs] = rotary.frequencies
        self._channels = [x.to(torch.int64).contiguous() for x in (rotary.first, rotary.second)]
        self._vector = torch.zeros(len(key_bias.vector), 2, lanes)
        self._vector[:, :, :pairs] = torch.stack([key_bias.vector[:, x] for x in self._channels], dim=1)
        self._fine = self._table(PAGE_TOKENS, 1)
        self._columns = self._fine[:, :, :pairs].permute(1, 2, 0).contiguous()
        self._coarse = self._fine[:0]
        self._struct = library.KeyBias(
            pairs=pairs,
            lanes=lanes,
            frequencies=self._frequencies.data_ptr(),
            first=self._channels[0].data_ptr(),
            second=self._channels[1].data_ptr(),
            vector=self._vector.data_ptr(),
            fine=self._fine.data_ptr(),
            fine_columns=self._columns.data_ptr(),
        )

    def up_to(self, positions: int) -> library.KeyBias:
        """Return the description, with tables for this many positions from 0 on; it lives as long as this object.

        Raises:
            UnsupportedInput: These are more than `MAX_POSITIONS`.
        """
        if positions > MAX_POSITIONS:
            raise UnsupportedInput(
                f"a token stands at position {positions - 1}; with a key bias the C++ kernels take positions below "
                f"{MAX_POSITIONS}."
            )
        if positions > self._struct.reach:
            pages = -(-max(positions, min(2 * self._struct.reach, MAX_POSITIONS)) // PAGE_TOKENS)
            self._coarse = self._table(pages, PAGE_TOKENS)
            self._struct.coarse, self._struct.reach = self._coarse.data_ptr(), pages * PAGE_TOKENS
        return self._struct

    def _table(self, count: int, step: int) -> Tensor:
        """Return cosines and sines of multiples of `step`, float32 `[count, 2, lanes]`."""
        angles = torch.arange(0, count * step, step, dtype=torch.float64)[:, None] * self._frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=1).float()
