"""Pages as tensors: the bytes of many records side by side, with their token norms and super-scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats.format import PAGE_TOKENS, Format

CANONICAL = "canonical"
"""The order of bytes that docs/format.md describes; a backend may write and read another one."""


@dataclass(frozen=True)
class Pages:
    """P pages of one layer.

    Records, norms and super-scales are three arrays, so each stays aligned and nothing is padded.

    Args:
        format: What the bytes mean.
        head_dim: D, without padding.
        records: uint8 `[P, H, R, record_bytes]`, R = `format.page_records`.
        norms: `[P, 128]` in `format.norm_dtype`, or None without token scale.
        super_scales: float16 `[P, H, R, 2]` (K, V), or None with 16-bit metadata.
        order: Order of the bytes within a record.
    """

    format: Format
    head_dim: int
    records: Tensor
    norms: Tensor | None
    super_scales: Tensor | None
    order: str = CANONICAL

    @staticmethod
    def empty(
        pages: int,
        *,
        format: Format,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        order: str = CANONICAL,
    ) -> "Pages":
        """Allocate zeroed pages, so that the bytes of records not yet written are defined."""
        per_head = (pages, kv_heads, format.page_records)
        size = format.sections(head_dim).record_bytes
        norms = super_scales = None
        if format.token_scale:
            norms = torch.zeros((pages, PAGE_TOKENS), dtype=getattr(torch, format.norm_dtype), device=device)
        if format.metadata_bits == 8:
            super_scales = torch.zeros((*per_head, 2), dtype=torch.float16, device=device)
        records = torch.zeros((*per_head, size), dtype=torch.uint8, device=device)
        return Pages(format, head_dim, records, norms, super_scales, order)

    @property
    def count(self) -> int:
        """Number of pages P."""
        return self.records.shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of KV heads H."""
        return self.records.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the bytes."""
        return tuple(t for t in (self.records, self.norms, self.super_scales) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held, norms and super-scales included."""
        return sum(t.nbytes for t in self.tensors)

    def check_order(self, order: str) -> None:
        """Raise `UnsupportedInput` unless the bytes lie in this order."""
        if self.order != order:
            raise UnsupportedInput(
                f"the records of pages lie in order {self.order!r}; allowed here: {order!r}. Read them with the "
                "backend that wrote them: its `decode` gives K and V."
            )

    def select(self, index: Tensor) -> "Pages":
        """Copy out the pages with these numbers, int64 `[N]`."""
        return Pages(
            format=self.format,
            head_dim=self.head_dim,
            records=self.records.index_select(0, index),
            norms=None if self.norms is None else self.norms.index_select(0, index),
            super_scales=None if self.super_scales is None else self.super_scales.index_select(0, index),
            order=self.order,
        )

    @staticmethod
    def concatenate(parts: "list[Pages]") -> "Pages":
        """Join pages of the same format and order into one object (copies).

        Raises:
            UnsupportedInput: They lie in different orders.
        """
        first = parts[0]
        for part in parts:
            part.check_order(first.order)
        if len(parts) == 1:
            return first
        norms = [p.norms for p in parts if p.norms is not None]
        supers = [p.super_scales for p in parts if p.super_scales is not None]
        return Pages(
            format=first.format,
            head_dim=first.head_dim,
            records=torch.cat([p.records for p in parts]),
            norms=torch.cat(norms) if norms else None,
            super_scales=torch.cat(supers) if supers else None,
            order=first.order,
        )
