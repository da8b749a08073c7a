"""Texts to score: read from a file or from Python's own help, and cut into windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput

HELP_TOPICS = "Python help topics"
_MARKS = "-.,"


@dataclass(frozen=True)
class Text:
    """A text with its name and hash."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the text as it is read, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | None = None) -> Text:
    """Return a UTF-8 text file, or the help texts that come with Python (their version is part of the hash).

    The marks of word-level corpora such as WikiText (` @-@ `, ` @.@ `, ` @,@ `) are undone.

    Raises:
        UnsupportedInput: The file cannot be read, is no text or is empty.
    """
    if path is None:
        return Text(HELP_TOPICS, "\n\n".join(text for _, text in sorted(topics.items())))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnsupportedInput(f"cannot read the text {str(path)!r}: {error.strerror}.") from error
    except UnicodeError as error:
        raise UnsupportedInput(f"the text {str(path)!r} is no text; allowed: UTF-8.") from error
    for mark in _MARKS:
        text = text.replace(f" @{mark}@ ", mark)
    if not text.strip():
        raise UnsupportedInput(f"the text {str(path)!r} is empty; allowed: UTF-8 with words in it.")
    return Text(path.name, text)


def windows(text: str, tokenizer: Any, *, count: int, length: int, first_token: int = 0) -> list[Tensor]:
    """Cut `count` windows of `length` tokens, `[1, length]` each, one behind the other from `first_token` on.

    Each begins with the tokenizer's special first tokens, where it has any: without them some models lose their
    attention sink and with it the effect that is to be measured.

    Raises:
        UnsupportedInput: The text is too short.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    head = tokenizer("", add_special_tokens=True).input_ids
    needed = first_token + (count - 1) * length + length - len(head)
    if count < 1 or length <= len(head) or first_token < 0 or needed > len(ids):
        raise UnsupportedInput(
            f"{count} windows of {length} tokens from token {first_token} on need {needed} tokens, the text has "
            f"{len(ids)}. Give fewer, shorter or earlier windows, or a longer text."
        )
    starts = (first_token + index * length for index in range(count))
    return [torch.tensor([head + ids[at : at + length - len(head)]], dtype=torch.int64) for at in starts]
