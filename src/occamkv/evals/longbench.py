"""LongBench and LongBench-E (Bai et al., arXiv:2308.14508) from local files.

Prompts, answer lengths (`longbench.json`) and metrics are those of the authors' repository (MIT licence), the places
where their code does something unexpected included; each says so. Left out are the three data sets in Chinese that need
a word splitter. Truncation is theirs as well: half of the tokens from the front, half from the back.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

from occamkv.errors import UnsupportedInput
from occamkv.evals.tasks import Grade, Item, Task, read_jsonl

_NEED_A_SPLITTER = ("multifieldqa_zh", "dureader", "vcsum")
_BINS = ((4000, "0-4k"), (8000, "4-8k"))  # the rest is "8k+"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "all_classes": (list, type(None)),
}


@functools.cache
def longbench_datasets() -> dict[str, dict[str, Any]]:
    """Return metric, answer length, prompt and habits of each data set by name."""
    found: dict[str, dict[str, Any]] = json.loads(files("occamkv.evals").joinpath("longbench.json").read_text("utf-8"))
    return found


def load_longbench(folder: str | Path, dataset: str, *, max_prompt_tokens: int | None = None) -> Task:
    """Return a data set of LongBench as a task.

    Args:
        folder: Where `<dataset>.jsonl` lies.
        dataset: Its name; with `_e` at its end it is of LongBench-E and has a score for each length bin too.
        max_prompt_tokens: Longer prompts lose their middle. The authors leave room for template and answer.

    Raises:
        UnsupportedInput: The data set is not known, needs a word splitter, or its file cannot be read.
    """
    name, known = dataset.removesuffix("_e"), longbench_datasets()
    if name in _NEED_A_SPLITTER:
        raise UnsupportedInput(f"{name} is scored by Chinese words, which needs a word splitter. Use another data set.")
    if name not in known:
        raise UnsupportedInput(f"no LongBench data set {dataset!r}; allowed: {', '.join(known)}, also with _e.")
    entry = known[name]
    items = tuple(
        Item(
            id=str(row.get("_id", number)),
            prompt=entry["prompt"].format(context=row["context"], input=row["input"]),
            answers=tuple(map(str, row["answers"])),
            classes=tuple(row["all_classes"] or ()),
            length=row["length"] if dataset.endswith("_e") else None,
        )
        for number, row in enumerate(read_jsonl(Path(folder) / f"{dataset}.jsonl", _FIELDS), 1)
    )
    return Task(
        f"longbench/{dataset}",
        items,
        functools.partial(_grade, metric=entry["metric"], first_line=entry["first_line"]),
        entry["max_new_tokens"],
        max_prompt_tokens=max_prompt_tokens,
        chat=entry["chat"],
        one_line=name == "samsum",  # models go on with the next dialogue
    )


def _grade(item: Item, text: str, *, metric: str, first_line: bool) -> Grade:
    if first_line:
        text = text.lstrip("\n").split("\n")[0]
    score = max((METRICS[metric](text, answer, item.classes) for answer in item.answers), default=0.0)
    scores = {metric: score}
    if item.length is not None:
        scores[next((name for limit, name in _BINS if item.length < limit), "8k+")] = score
    return Grade(scores, valid=bool(text.strip()))


def qa_f1(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return F1 of the words, without case, punctuation and articles."""
    said, wanted = (_words(x) for x in (text, answer))
    same = sum((Counter(said) & Counter(wanted)).values())
    return 0.0 if not same else 2 * same / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_l(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L F1 of the summary as the package `rouge` 1.0.1 has it, which is not Lin's of 2004.

    Sentences end at full stops. The longest common subsequences of all pairs of sentences are thrown together, and
    words are counted as sets: a word that comes twice counts once.
    """
    said, wanted = ([" ".join(part.split()).split(" ") for part in x.split(".") if part] for x in (text, answer))
    if not said or not wanted:
        return 0.0
    common = {word for sentence in wanted for other in said for word in _common_subsequence(sentence, other)}
    recall, precision = (len(common) / len({word for part in x for word in part}) for x in (wanted, said))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(a: list[str], b: list[str]) -> set[str]:
    """Return the words of the longest common subsequence; of several the one that the package finds."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    words, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.add(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def classification(text: str, answer: str, classes: Sequence[str]) -> float:
    """Return 1 over the number of classes that are named, if the right one is among them.

    Names that are part of the right one do not count. As in the authors' code, the list shrinks while it is gone
    through, so that of two such names in a row the second one stays; and there is no search for a similar name.
    """
    named = [name for name in classes if name in text]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def retrieval(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers said that are the right paragraph's."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return 0.0 if found is None else count(text, found[1])


def count(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers said that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(text: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return how similar the first line of code is, in steps of 0.01, as fuzzywuzzy's `ratio` without its C library."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}
"""Metrics by the names in `longbench.json`: (text, answer, all classes) to a score from 0 to 1."""
