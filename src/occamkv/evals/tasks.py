"""Benchmarks with questions and answers, generated greedily through a packed cache.

A task is data: items with finished prompts, and a function that grades what the model said. `gsm8k` and `longbench`
make tasks from local files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals.prompts import Prompt, greedy
from occamkv.integrations.transformers.model import text_config

_LOOKED_AT = 16  # newest tokens in which a stop string is searched


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id: Its name or number in the file.
        prompt: What the model reads, before truncation and chat template.
        answers: The right answers; one of them is enough.
        classes: All answers there could be, in classification tasks.
        length: Length as the benchmark counts it, for its length bins.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()
    length: int | None = None


@dataclass(frozen=True)
class Grade:
    """Scores from 0 to 1 by name, the main one first; `valid`: there was an answer that could be graded."""

    scores: dict[str, float]
    valid: bool


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name: Its name.
        items: The questions.
        grade: What the text of an answer is worth.
        max_new_tokens: An answer that has not ended by then is cut off.
        max_prompt_tokens: Longer prompts lose their middle.
        chat: Whether the prompts go into a chat template if there is one.
        stops: Strings that end an answer; it is cut before them.
        one_line: The token of a line break ends an answer too, and no answer ends at its first token.

    Raises:
        UnsupportedInput: A number of tokens is too small.
    """

    name: str
    items: tuple[Item, ...]
    grade: Callable[[Item, str], Grade]
    max_new_tokens: int
    max_prompt_tokens: int | None = None
    chat: bool = True
    stops: tuple[str, ...] = ()
    one_line: bool = False

    def __post_init__(self) -> None:
        """Refuse lengths that leave nothing."""
        if self.max_new_tokens < 1 or (self.max_prompt_tokens is not None and self.max_prompt_tokens < 2):
            raise UnsupportedInput(
                f"max_new_tokens is {self.max_new_tokens} and max_prompt_tokens {self.max_prompt_tokens}; allowed: at "
                "least 1, and at least 2 or None."
            )


@dataclass(frozen=True)
class Row:
    """What the model made of one item.

    `new_tokens` counts a stop string as well; `truncated`: the answer had not ended; `score` is the first of `scores`.
    """

    id: str
    prompt_tokens: int
    new_tokens: int
    truncated: bool
    valid: bool
    score: float
    scores: dict[str, float]
    text: str


@dataclass(frozen=True)
class TaskResult:
    """All rows of a task and their means.

    `scores` holds the mean of each score over the rows that have it (from 0 to 1, papers show 100 times that), `score`
    is the main one; `mean_new_tokens` the mean length of an answer; the shares are of all rows.
    """

    task: str
    score: float
    scores: dict[str, float]
    mean_new_tokens: float
    truncated_share: float
    invalid_share: float
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-ready data."""
        return asdict(self)


def run_task(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    plan: Plan | None,
    *,
    limit: int | None = None,
    chat: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Answer the items of a task greedily and grade the answers.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        task: From `gsm8k` or `longbench`.
        plan: How the cache is packed; None for the full cache.
        limit: Only the first so many items.
        chat: Use the tokenizer's chat template, if the task wants it.
        progress: Called with the number of items done so far.

    Raises:
        UnsupportedInput: There is no item or no chat template, or an item is too long for the model.
    """
    items = task.items[:limit]
    if not items or (limit is not None and limit < 1):
        raise UnsupportedInput(
            f"{task.name} has {len(task.items)} items and limit={limit}; allowed: at least one item."
        )
    if chat and not tokenizer.chat_template:
        raise UnsupportedInput("this tokenizer has no chat template. Use chat=False.")
    rows = []
    for item in items:
        ids = prompt_ids(tokenizer, task, item, chat=chat).to(model.device)
        rows.append(_answer(model, tokenizer, task, item, ids, plan))
        if progress is not None:
            progress(len(rows))
    return _result(task, rows)


def prompt_ids(tokenizer: Any, task: Task, item: Item, *, chat: bool) -> Tensor:
    """Return what the model reads, `[1, T]`: the prompt without its middle if it is too long, in a chat template.

    The text is cut and joined before the template is put around it, as LongBench does it.
    """
    text, longest = item.prompt, task.max_prompt_tokens
    ids = tokenizer(text).input_ids
    if longest is not None and len(ids) > longest:
        half = longest // 2
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    use_chat = chat and task.chat
    if use_chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    read: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not use_chat).input_ids
    return read


def _answer(model: PreTrainedModel, tokenizer: Any, task: Task, item: Item, ids: Tensor, plan: Plan | None) -> Row:
    _check_length(model, task, item, ids.shape[1])
    prompt = Prompt.read(model, ids)
    first, ends = prompt.logits, end_ids(model, tokenizer)
    if task.one_line:
        ends.add(tokenizer("\n", add_special_tokens=False).input_ids[-1])
        first = first.index_fill(0, torch.tensor(sorted(ends), device=first.device), -torch.inf)

    def stopped(tokens: Sequence[int]) -> bool:
        newest = tokenizer.decode(tokens[-_LOOKED_AT:])
        return any(stop in newest for stop in task.stops)

    tokens = greedy(model, prompt.cache(plan), first, task.max_new_tokens, ends, until=stopped if task.stops else None)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in task.stops:
        text = text.split(stop)[0]
    grade = task.grade(item, text)
    return Row(
        id=item.id,
        prompt_tokens=ids.shape[1],
        new_tokens=len(tokens),
        truncated=len(tokens) == task.max_new_tokens and not stopped(tokens),
        valid=grade.valid,
        score=next(iter(grade.scores.values())),
        scores=grade.scores,
        text=text,
    )


def _check_length(model: PreTrainedModel, task: Task, item: Item, tokens: int) -> None:
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest is not None and tokens + task.max_new_tokens > longest:
        raise UnsupportedInput(
            f"item {item.id} of {task.name} has {tokens} tokens and its answer up to {task.max_new_tokens}; allowed: "
            f"{longest} together. Give a smaller max_prompt_tokens."
        )


def end_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the tokens with which the model ends an answer."""
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = given if isinstance(given, list) else [given]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _result(task: Task, rows: list[Row]) -> TaskResult:
    scores = {}
    for name in dict.fromkeys(name for row in rows for name in row.scores):
        given = [row.scores[name] for row in rows if name in row.scores]
        scores[name] = sum(given) / len(given)
    return TaskResult(
        task=task.name,
        score=sum(row.score for row in rows) / len(rows),
        scores=scores,
        mean_new_tokens=sum(row.new_tokens for row in rows) / len(rows),
        truncated_share=sum(row.truncated for row in rows) / len(rows),
        invalid_share=sum(not row.valid for row in rows) / len(rows),
        rows=tuple(rows),
    )


def read_jsonl(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file.

    Args:
        path: The file.
        fields: What each object must have, by name and type.

    Raises:
        UnsupportedInput: The file cannot be read, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UnsupportedInput(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnsupportedInput(f"{str(path)!r} is no text ({error}); allowed: JSON Lines in UTF-8.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnsupportedInput(
                f"line {number} of {str(path)!r} is no JSON ({error.msg}); allowed: JSON Lines, one object per line."
            ) from error
        wrong = [
            name for name, kind in fields.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)
        ]
        if wrong:
            raise UnsupportedInput(
                f"line {number} of {str(path)!r} has no {wrong[0]!r} of the right type; allowed: objects with "
                f"{', '.join(fields)}."
            )
        rows.append(row)
    if not rows:
        raise UnsupportedInput(f"{str(path)!r} is empty; allowed: JSON Lines, one object per line.")
    return rows
