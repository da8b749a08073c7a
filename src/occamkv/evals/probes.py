"""Retrieval probes: something is planted in filler text, and the model must say it at the end of the prompt.

`needle`: one pass key. `multikey`: one of several pass keys, the others distract. `quote`: a sentence that is to be
continued word by word. Pass keys are those of Mohtashami and Jaggi (arXiv:2305.16300), several of them as in RULER
(arXiv:2404.06654); the wording is ours. The answer is read under teacher forcing: its log-probability says more about
few probes than whether it is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals.intervals import bootstrap
from occamkv.evals.prompts import Prompt, continue_with

_NAMES = ("Ada", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karin", "Louis")
_KEYS = 4  # in a multikey probe
_STOPS = 5  # in a quote probe
_COLOURS = ("grey", "yellow", "purple", "silver", "brown", "golden", "crimson", "white")
_ANIMALS = ("heron", "badger", "donkey", "otter", "falcon", "goat", "lizard", "pelican")
_PLACES = ("mill", "harbour", "chapel", "bakery", "lighthouse", "orchard", "quarry", "castle", "theatre", "fountain")
_SENTENCE = re.compile(r"[^\W\d_][\w ,;:'\"()-]{20,240}[.!?]")


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer that a model with a good memory gives.

    Args:
        kind: "needle", "multikey" or "quote".
        length: Tokens of the prompt that were asked for; it has a few more or less.
        depth: Where the answer stands, from 0 (first) to 1 (last).
        seed: Seed of what is planted and of the filler.
        prompt: The text with its special tokens, up to where the answer begins.
        answer: What comes next.
    """

    kind: str
    length: int
    depth: float
    seed: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class ProbeResult:
    """What one method made of one probe.

    `tokens` and `answer_tokens` count prompt and answer; `logprob` is the mean over the answer's tokens in nats;
    `exact`: each of them was the most likely one.
    """

    kind: str
    length: int
    depth: float
    seed: int
    method: str
    tokens: int
    answer_tokens: int
    logprob: float
    exact: bool


@dataclass(frozen=True)
class Cell:
    """The probes of one length and depth: how many, their mean log-probability in nats, how many were exact."""

    length: int
    depth: float
    n: int
    logprob: float
    exact: int


@dataclass(frozen=True)
class Summary:
    """All probes of one method; `interval` is a 95 % bootstrap interval of `logprob` over probes, if there are two."""

    method: str
    n: int
    logprob: float
    interval: tuple[float, float] | None
    exact: int
    cells: tuple[Cell, ...]


class _Task(NamedTuple):
    """What is planted (sentences with their depths), what is asked, how the answer starts, and the answer."""

    planted: list[tuple[float, str]]
    question: str
    start: str
    answer: str


def _needle(random: Random, depth: float, keys: int = 1) -> _Task:
    names = random.sample(_NAMES, keys)
    numbers = random.sample(range(10_000, 100_000), keys)
    depths = [depth, *(random.random() for _ in names[1:])]
    planted = [
        (at, f"The pass key of {name} is {number}. Remember it: {name} has the pass key {number}.")
        for at, name, number in zip(depths, names, numbers, strict=True)
    ]
    return _Task(planted, f"What is the pass key of {names[0]}?", f"The pass key of {names[0]} is", f" {numbers[0]}")


def _multikey(random: Random, depth: float) -> _Task:
    return _needle(random, depth, _KEYS)


def _quote(random: Random, depth: float) -> _Task:
    places = random.sample(_PLACES, _STOPS)
    start = f"The {random.choice(_COLOURS)} {random.choice(_ANIMALS)} went to the {places[0]}, the"
    answer = f" {', the '.join(places[1:])}"
    question = f'One sentence of the text begins with "{start}". Repeat the whole sentence word for word.'
    return _Task([(depth, f"{start}{answer}.")], question, start, answer)


_MAKERS: dict[str, Callable[[Random, float], _Task]] = {"needle": _needle, "multikey": _multikey, "quote": _quote}
KINDS = tuple(_MAKERS)
"""The kinds of probes."""


def make_probes(
    text: str,
    *,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    tokenizer: Any,
    seed: int,
    per_cell: int,
    chat: bool = False,
) -> list[Probe]:
    """Return `per_cell` probes for each kind, length and depth; the same arguments give the same probes.

    Args:
        text: Ordinary English; its sentences are the filler, shuffled and repeated as often as need be.
        kinds: Some of `KINDS`.
        lengths: Tokens of the whole prompt.
        depths: From 0 to 1.
        tokenizer: The model's.
        seed: Seed of the first probe of a cell; the others have the next ones.
        per_cell: Number of probes of a kind, length and depth.
        chat: Use the tokenizer's chat template. The answer's beginning is then given as the model's own words.

    Raises:
        UnsupportedInput: A kind or depth does not exist, a length is too short, the text has no sentences, or there is
            no chat template.
    """
    wrong = [*(kind for kind in kinds if kind not in _MAKERS), *(depth for depth in depths if not 0 <= depth <= 1)]
    if wrong:
        raise UnsupportedInput(f"no probe has {wrong[0]!r}; allowed: kinds {', '.join(KINDS)}, and depths from 0 to 1.")
    if chat and not tokenizer.chat_template:
        raise UnsupportedInput("this tokenizer has no chat template. Use chat=False.")
    sentences = _sentences(text)
    sizes = [len(ids) for ids in tokenizer([" " + s for s in sentences], add_special_tokens=False).input_ids]
    filler = list(zip(sentences, sizes, strict=True))
    probes = []
    for kind, length, depth in ((k, n, d) for k in kinds for n in lengths for d in depths):
        for one in range(seed, seed + per_cell):
            random = Random(f"{kind} {length} {depth} {one}")
            task = _MAKERS[kind](random, depth)
            prompt = _prompt(task, filler, length=length, tokenizer=tokenizer, chat=chat, random=random)
            probes.append(Probe(kind, length, depth, one, prompt, task.answer))
    return probes


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text that are plain words, each once."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    parts = (part for paragraph in paragraphs for part in re.split(r"(?<=[.!?]) ", paragraph))
    found = list(dict.fromkeys(part for part in parts if _SENTENCE.fullmatch(part) and part[0].isupper()))
    if not found:
        raise UnsupportedInput("the text has no sentence for the filler; allowed: ordinary prose, whole sentences.")
    return found


def _prompt(
    task: _Task, filler: list[tuple[str, int]], *, length: int, tokenizer: Any, chat: bool, random: Random
) -> str:
    """Return the longest prompt of whole sentences of about `length` tokens."""
    left = length - len(_ids(tokenizer, _wrapped(task, [], tokenizer=tokenizer, chat=chat)))
    if left < 0:
        raise UnsupportedInput(f"a probe of {length} tokens is too short; allowed: at least {length - left} tokens.")
    chosen: list[str] = []
    smallest = min(size for _, size in filler)
    while left >= smallest:
        for sentence, size in random.sample(filler, len(filler)):
            if size <= left:
                chosen.append(sentence)
                left -= size
    return _wrapped(task, chosen, tokenizer=tokenizer, chat=chat)


def _wrapped(task: _Task, filler: list[str], *, tokenizer: Any, chat: bool) -> str:
    """Return the prompt with its special tokens: the text with what is planted, the question, the answer's start."""
    sentences = list(filler)
    for depth, sentence in task.planted:
        sentences.insert(round(depth * len(filler)), sentence)
    asked = f"{' '.join(sentences)}\n\n{task.question}"
    if chat:
        turn = [{"role": "user", "content": asked}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) + task.start
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return f"{tokenizer.bos_token if begins else ''}{asked}\n{task.start}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@torch.no_grad()
def run_probe(
    model: PreTrainedModel, tokenizer: Any, probe: Probe, plans: Mapping[str, Plan | None]
) -> list[ProbeResult]:
    """Return one result per method; the prompt is read once for all of them.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        probe: The probe.
        plans: The methods by name; None is the full cache.

    Raises:
        CacheMismatch: A plan belongs to another model.
    """
    alone, together = _ids(tokenizer, probe.prompt), _ids(tokenizer, probe.prompt + probe.answer)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, together, strict=False)))
    ids = torch.tensor([together], device=model.device)  # a token may hold the end of the prompt and the answer's start
    answer = ids[:, shared:]
    prompt = Prompt.read(model, ids[:, :shared])
    results = []
    for name, plan in plans.items():
        logits = continue_with(model, prompt.cache(plan), answer, prompt.logits).float()
        logprob = logits.log_softmax(-1).gather(-1, answer[0, :, None]).double().mean()
        exact = bool((logits.argmax(-1) == answer[0]).all())
        place = (probe.kind, probe.length, probe.depth, probe.seed)
        results.append(ProbeResult(*place, name, shared, answer.shape[1], float(logprob), exact))
    return results


def summary(results: Iterable[ProbeResult], *, seed: int = 0) -> list[Summary]:
    """Return a summary per method, in the order in which they first occur.

    Args:
        results: The results; select a kind first if kinds are not to be mixed.
        seed: Seed of the bootstrap.
    """
    methods: dict[str, list[ProbeResult]] = {}
    for result in results:
        methods.setdefault(result.method, []).append(result)
    return [_summary(name, rows, seed=seed) for name, rows in methods.items()]


def _summary(name: str, rows: list[ProbeResult], *, seed: int) -> Summary:
    places = sorted({(row.length, row.depth) for row in rows})
    cells = []
    for length, depth in places:
        here = [row for row in rows if (row.length, row.depth) == (length, depth)]
        cells.append(Cell(length, depth, len(here), _mean(here), sum(row.exact for row in here)))
    interval = bootstrap([row.logprob for row in rows], seed=seed)
    return Summary(name, len(rows), _mean(rows), interval, sum(row.exact for row in rows), tuple(cells))


def _mean(rows: Sequence[ProbeResult]) -> float:
    return sum(row.logprob for row in rows) / len(rows)
