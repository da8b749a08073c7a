"""What a long run has done so far, on disk, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from occamkv.errors import UnsupportedInput


class Journal:
    """Results of finished units of work, one JSON line each, behind a first line that says what the run is.

    Args:
        path: The file, or None to remember nothing.
        key: What the results depend on; a file with another key is refused.

    Raises:
        UnsupportedInput: The file belongs to another run or cannot be written.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self._done = path, dict[str, Any]()
        if path is None:
            return
        first = json.dumps({"key": key}, sort_keys=True)
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise self._unusable(error) from error
        lines = text.splitlines() or [first]
        if lines[0] != first:
            raise UnsupportedInput(
                f"{str(path)!r} is the journal of a run with other settings. Delete it, or run with the same ones."
            )
        if not text.endswith("\n"):
            self._append("" if text else first)  # a line that was cut off ends here
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self._done[entry["unit"]] = entry["data"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the run was stopped while it wrote this line

    def get(self, unit: str, work: Callable[[], Any]) -> Any:
        """Return the result of a unit, JSON-ready: the one on file, or what `work` gives, which is then filed."""
        if unit not in self._done:
            self._done[unit] = json.loads(json.dumps(work()))
            self._append(json.dumps({"unit": unit, "data": self._done[unit]}))
        return self._done[unit]

    def close(self) -> None:
        """Delete the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError | UnicodeDecodeError) -> UnsupportedInput:
        told = error.strerror if isinstance(error, OSError) else "it is no text"
        return UnsupportedInput(f"cannot use the journal {str(self.path)!r}: {told}. Delete it, or write elsewhere.")
