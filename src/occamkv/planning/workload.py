"""What is asked of a model: how long a text, how many at a time, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """A prompt of `context` tokens in each of `batch` sequences.

    Args:
        context: Tokens of each sequence, prompt and answer together.
        batch: Sequences in one cache.
        chunk: Tokens of the prompt that are read at a time; None reads it in one piece.
        source: Tokens of an encoder's text, for models that have one.
    """

    context: int
    batch: int = 1
    chunk: int | None = None
    source: int = 0

    @property
    def step(self) -> int:
        """Tokens of the longest step."""
        return self.context if self.chunk is None else min(self.chunk, self.context)

    def with_context(self, context: int) -> Workload:
        """Return the same with another length."""
        return replace(self, context=context)

    def with_batch(self, batch: int) -> Workload:
        """Return the same with another number of sequences."""
        return replace(self, batch=batch)
