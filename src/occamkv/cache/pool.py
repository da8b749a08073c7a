"""The page pool: slabs of pages with reference counts. It grows by whole slabs; nothing is copied or re-laid.

A slab holds exactly the pages that were asked for, so slack is only the part of a page that is not yet filled.
"""

from bisect import bisect_right
from collections.abc import Sequence

import torch

from occamkv.formats import Format
from occamkv.formats.pages import CANONICAL, Pages
from occamkv.formats.records import Records, write


class PagePool:
    """Pages of one layer, numbered through all slabs. A page shared by several sequences is counted, not copied.

    Their bytes lie in the `order` of the backend that writes and reads them.
    """

    def __init__(
        self, *, format: Format, kv_heads: int, head_dim: int, device: torch.device, order: str = CANONICAL
    ) -> None:
        self.format = format
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.device = device
        self.order = order
        self.slabs: list[Pages] = []
        self.starts: list[int] = []
        self._owners: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, free pages included."""
        return sum(slab.nbytes for slab in self.slabs)

    def allocate(self, count: int) -> list[int]:
        """Return the numbers of `count` pages with one owner each: freed ones first, then a new slab."""
        self.reserve(count)
        numbers = [self._free.pop() for _ in range(count)]
        for number in numbers:
            self._owners[number] = 1
        return numbers

    def reserve(self, count: int) -> None:
        """Make sure that `count` pages are free: what is missing becomes one new slab."""
        missing = count - len(self._free)
        if missing <= 0:
            return
        slab = Pages.empty(
            missing,
            format=self.format,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            device=self.device,
            order=self.order,
        )
        start = self.starts[-1] + self.slabs[-1].count if self.slabs else 0
        self.slabs.append(slab)
        self.starts.append(start)
        self._free = [*reversed(range(start, start + missing)), *self._free]

    def share(self, numbers: Sequence[int]) -> None:
        """Add an owner to each page."""
        for number in numbers:
            self._owners[number] += 1

    def release(self, numbers: Sequence[int]) -> None:
        """Take an owner from each page; pages without owners are reused, slabs without used pages are given back."""
        for number in numbers:
            self._owners[number] -= 1
            if not self._owners[number]:
                del self._owners[number]
                self._free.append(number)
        self.drop_free_slabs()

    def shared(self, number: int) -> bool:
        """Tell whether a page has more than one owner, so that writing to it would change another sequence."""
        return self._owners[number] > 1

    def duplicate(self, number: int) -> int:
        """Copy a page and return the number of the copy; the original loses one owner."""
        copy = self.allocate(1)[0]
        source, target = self._locate(number), self._locate(copy)
        for old, new in zip(source[0].tensors, target[0].tensors, strict=True):
            new[target[1]] = old[source[1]]
        self.release([number])
        return copy

    def write(self, records: Records, *, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Put N records at their pages and slots."""
        places: dict[int, list[int]] = {}
        for index, number in enumerate(pages):
            places.setdefault(bisect_right(self.starts, number) - 1, []).append(index)
        for slab, indices in places.items():
            chosen = torch.tensor(indices, device=self.device)
            whole = len(indices) == len(pages)
            part = records if whole else records.select(chosen)
            write(
                self.slabs[slab],
                part,
                page=torch.tensor([pages[i] - self.starts[slab] for i in indices], device=self.device),
                slot=torch.tensor([slots[i] for i in indices], device=self.device),
            )

    def _locate(self, number: int) -> tuple[Pages, int]:
        slab = bisect_right(self.starts, number) - 1
        return self.slabs[slab], number - self.starts[slab]

    def drop_free_slabs(self) -> None:
        """Give back slabs without used pages."""
        free = set(self._free)
        for index in reversed(range(len(self.slabs))):
            numbers = range(self.starts[index], self.starts[index] + self.slabs[index].count)
            if all(number in free for number in numbers):
                free.difference_update(numbers)
                del self.slabs[index], self.starts[index]
        self._free = sorted(free, reverse=True)
