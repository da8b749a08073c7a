"""GSM8K: grade-school word problems (Cobbe et al., arXiv:2110.14168), from a local file in its official format.

With shots, prompts are those of EleutherAI's evaluation harness: `Question: ...`, `Answer: ...`. Without, a first line
of our own asks for the reasoning and for the `#### number` that the shots would have shown. Numbers are compared as
text without commas and dollar signs, as there; unlike there, dots alone are no number.
"""

from __future__ import annotations

import re
from pathlib import Path

from occamkv.errors import UnsupportedInput
from occamkv.evals.tasks import Grade, Item, Task, read_jsonl

_ASK = 'Reason step by step. Then end with a line that has "#### " and the answer as a number.\n\n'
_STRICT = re.compile(r"#### (-?\$?[\d.,]*\d)")
_NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?")
_FIELDS: dict[str, type | tuple[type, ...]] = {"question": str, "answer": str}


def load_gsm8k(
    path: str | Path, *, shots_file: str | Path | None = None, shots: int = 0, max_new_tokens: int = 512
) -> Task:
    """Return GSM8K as a task. Its scores are `flexible` (the last number counts) and `strict` (only after `####`).

    Args:
        path: JSON Lines with `question` and `answer`; the answer ends with `#### 42`.
        shots_file: The same format, for solved problems in front of each question; best the training split. A problem
            is never its own shot.
        shots: How many of them, from the beginning of the file.
        max_new_tokens: Length at which an answer is cut off.

    Raises:
        UnsupportedInput: A file cannot be read, an answer has no number, or there are too few shots.
    """
    rows = read_jsonl(Path(path), _FIELDS)
    pool = [] if shots_file is None else read_jsonl(Path(shots_file), _FIELDS)
    if not 0 <= shots <= max(0, len(pool) - 1):
        raise UnsupportedInput(
            f"{shots} shots were asked for; allowed: 0, or with a shots_file up to one less than its problems "
            f"({len(pool)} here)."
        )
    items = []
    for number, row in enumerate(rows, 1):
        answer = _strict(row["answer"])
        if answer is None:
            raise UnsupportedInput(f"problem {number} of {str(path)!r} has no answer; allowed: it ends with '#### 42'.")
        others = [shot for shot in pool if shot["question"] != row["question"]][:shots]
        solved = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in others)
        prompt = f"{solved or _ASK}Question: {row['question']}\nAnswer:"
        items.append(Item(str(number), prompt, (answer,)))
    return Task("gsm8k", tuple(items), _grade, max_new_tokens, stops=("Question:",))


def _grade(item: Item, text: str) -> Grade:
    """Compare both readings of an answer with the right one; without any number it is invalid."""
    flexible, strict = _last_number(text), _strict(text)
    scores = {"flexible": float(flexible in item.answers), "strict": float(strict in item.answers)}
    return Grade(scores, valid=flexible is not None)


def _strict(text: str) -> str | None:
    found = _STRICT.search(text)
    return None if found is None else _plain(found[1])


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """Return a number without commas, dollar signs and the full stop behind it."""
    return number.replace(",", "").replace("$", "").rstrip(".")
