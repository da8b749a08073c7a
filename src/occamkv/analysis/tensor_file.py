"""A safetensors file that is written tensor by tensor, so that no more than one of them must be in memory.

The header of such a file comes first and names the place of every tensor, so the bytes go to a nameless file beside it
until all of them are known.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from typing_extensions import Self

_DTYPES = {
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class TensorWriter:
    """Writes one file; used in a `with` block. What was at `path` is replaced by `finish`, or not at all.

    Args:
        path: The file.

    Raises:
        UnsupportedInput: It cannot be written there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._entries = path, dict[str, dict[str, Any]]()
        try:
            self._data = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UnsupportedInput(f"cannot write {str(path)!r}: {error.strerror}.") from error

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the bytes that were collected."""
        self._data.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of any shape; its dtype is one of bool, int64 and the float dtypes."""
        start = self._data.tell()
        self._data.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        offsets = [start, self._data.tell()]
        self._entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def finish(self, metadata: dict[str, str]) -> None:
        """Put header and tensors into the file."""
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data.seek(0)
        partial = self._path.with_name(self._path.name + ".part")
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            shutil.copyfileobj(self._data, file, 2**20)
        partial.replace(self._path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata of a safetensors file and its tensors, which are memory-mapped: nothing is read yet.

    Raises:
        UnsupportedInput: There is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnsupportedInput(
            f"cannot read {str(path)!r} ({error}); allowed: a whole file in safetensors format."
        ) from error
