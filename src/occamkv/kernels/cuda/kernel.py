"""A kernel compiled for a format, and a call of it that is ready to run."""

import ctypes
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from occamkv.formats import Format

THREADS = 128
"""Of a block."""


@dataclass(frozen=True)
class Kernel:
    """One of the kernels of `native/`, as it is compiled for records of a format.

    Args:
        name: `native/<name>.cu` has the function `occamkv_<name>`.
        format: Of the records that it reads or writes.
        head_dim: D.
        softcap: Whether logits are soft-capped.
    """

    name: Literal["attend", "encode", "append"]
    format: Format
    head_dim: int
    softcap: bool = False

    def macros(self) -> dict[str, int]:
        """Return what the source is compiled with, whatever the card; names without `OKV_`."""
        return {
            "K_BITS": int(self.format.k_bits),
            "V_BITS": int(self.format.v_bits),
            "GROUP": self.format.record_tokens,
            "V_GROUP": min(self.format.v_group, self.head_dim),
            "HEAD_DIM": self.head_dim,
            "METADATA": self.format.metadata_bits,
            "NORM_BYTES": self.format.norm_bytes,
            "SOFTCAP": int(self.softcap),
        }


class Call(NamedTuple):
    """A call that is ready to run.

    `grid`: blocks in x, y, z. `keep`: what the arguments point at.
    """

    kernel: Kernel
    arguments: ctypes.Structure
    grid: tuple[int, int, int]
    device: torch.device
    keep: list[Tensor]
