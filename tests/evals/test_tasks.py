"""Running a task: what is read, where an answer ends, and what is counted."""

import json

import pytest
import torch

from evals.byte_model import model, tokenizer
from occamkv import PackedCache
from occamkv.errors import UnsupportedInput
from occamkv.evals.tasks import Grade, Item, Row, Task, end_ids, prompt_ids, read_jsonl, run_task
from occamkv.integrations.transformers.plan import plan_for

QUESTION = "Some words that a random model reads, about as long as one page of tokens. " * 3
ITEMS = (Item("first", QUESTION, ("x",)), Item("second", "Another one.", ("y",)), Item("third", "And more.", ("z",)))


def grade(item: Item, text: str) -> Grade:
    """Give the first item 1 and the others 0; the second also has a score of its own, the third is invalid."""
    scores = {"main": float(item.id == "first")} | ({"own": 0.5} if item.id == "second" else {})
    return Grade(scores, valid=item.id != "third")


def task(**changes) -> Task:
    return Task(**{"name": "t", "items": ITEMS, "grade": grade, "max_new_tokens": 12, **changes})


def generated(text: str, tokens: int, cache=None) -> list[int]:
    ids = tokenizer()(text, return_tensors="pt").input_ids
    return (
        model().generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    )


@pytest.mark.parametrize("packs", [False, True], ids=["full", "packed"])
def test_the_answers_are_those_that_generate_gives(packs):
    plan = plan_for(model().config, "oscar") if packs else None
    result = run_task(model(), tokenizer(), task(max_new_tokens=40), plan)
    for row, item in zip(result.rows, ITEMS, strict=True):
        cache = PackedCache(model(), plan=plan) if packs else None
        assert row.text == tokenizer().decode(generated(item.prompt, 40, cache), skip_special_tokens=True)
        assert (row.id, row.prompt_tokens, row.new_tokens, row.truncated) == (item.id, len(item.prompt), 40, True)


def test_a_packed_cache_says_something_else():
    plan = plan_for(model().config, "oscar")
    full, packed = (run_task(model(), tokenizer(), task(max_new_tokens=40), p, limit=1) for p in (None, plan))
    assert full.rows[0].text != packed.rows[0].text


def test_scores_are_means_over_the_rows_that_have_them():
    result = run_task(model(), tokenizer(), task(), None)
    assert result.scores == {"main": pytest.approx(1 / 3), "own": 0.5}
    assert result.score == pytest.approx(1 / 3)
    assert [row.score for row in result.rows] == [1, 0, 0]
    assert (result.invalid_share, result.truncated_share, result.mean_new_tokens) == (pytest.approx(1 / 3), 1, 12)
    assert json.loads(json.dumps(result.to_json()))["rows"][1]["scores"] == {"main": 0, "own": 0.5}


def test_a_limit_takes_the_first_items_and_progress_counts_them():
    seen = []
    result = run_task(model(), tokenizer(), task(), None, limit=2, progress=seen.append)
    assert [row.id for row in result.rows] == ["first", "second"]
    assert seen == [1, 2]


def answer(monkeypatch, said: list[int], **changes) -> Row:
    """Return the row of a model that says these tokens, whatever it is asked; after them it says "?" for good."""
    script = iter(said)
    forward = model().forward

    def scripted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[0, -1] = torch.nn.functional.one_hot(torch.tensor(next(script, letter("?"))), 300).float()
        return out

    monkeypatch.setattr(model(), "forward", scripted)
    return run_task(model(), tokenizer(), task(**changes), None, limit=1).rows[0]


def letter(char: str) -> int:
    return tokenizer()(char).input_ids[0]


END = 2


def test_an_end_token_ends_an_answer_and_is_not_part_of_it(monkeypatch):
    row = answer(monkeypatch, [letter("o"), letter("k"), END, letter("x")])
    assert (row.text, row.new_tokens, row.truncated) == ("ok", 2, False)


def test_a_stop_string_ends_an_answer_and_is_cut_off(monkeypatch):
    row = answer(monkeypatch, [letter(c) for c in "4.\nQ: and so on"], stops=("\nQ:",))
    assert (row.text, row.new_tokens, row.truncated) == ("4.", 5, False)


def test_an_answer_without_its_stop_string_is_truncated(monkeypatch):
    row = answer(monkeypatch, [letter("4")], stops=("\nQ:",))
    assert (row.text, row.new_tokens, row.truncated) == ("4" + "?" * 11, 12, True)


def test_an_answer_that_ends_with_the_last_token_it_may_have_is_truncated_but_a_stop_string_is_an_end(monkeypatch):
    assert answer(monkeypatch, [letter("a")] * 12).truncated
    assert not answer(monkeypatch, [letter("a")] * 11 + [letter("Q")], stops=("Q",)).truncated


def test_an_answer_of_one_line_ends_with_the_line_but_not_at_its_first_token(monkeypatch):
    row = answer(monkeypatch, [letter("a"), letter("b"), letter("\n"), letter("c")], one_line=True)
    assert (row.text, row.new_tokens, row.truncated) == ("ab", 2, False)
    for first in (END, letter("\n")):
        row = answer(monkeypatch, [first, letter("b"), END], one_line=True)
        assert (row.new_tokens, row.text[-1]) == (2, "b")
    assert answer(monkeypatch, [letter("\n"), letter("b"), END]).text == "\nb"


@pytest.mark.parametrize(("given", "ids"), [(None, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9})], ids=str)
def test_tokens_that_end_an_answer_are_those_of_the_model_and_of_the_tokenizer(monkeypatch, given, ids):
    monkeypatch.setattr(model().generation_config, "eos_token_id", given)
    assert end_ids(model(), tokenizer()) == ids


def read(text: str, *, chat: bool = False, **changes) -> str:
    words = tokenizer(chat=True)
    return words.decode(prompt_ids(words, task(**changes), Item("1", text, ()), chat=chat)[0])


def test_a_prompt_that_is_too_long_loses_its_middle():
    assert read("0123456789", max_prompt_tokens=10) == "0123456789"
    assert read("0123456789", max_prompt_tokens=9) == "01236789"
    assert read("0123456789", max_prompt_tokens=2) == "09"


def test_a_chat_template_stands_around_what_is_left_if_the_task_wants_one():
    assert read("01239", chat=True) == "<s>user: 01239</s><s>assistant: "
    assert read("0123456789", chat=True, max_prompt_tokens=4) == "<s>user: 0189</s><s>assistant: "
    no_chat = Task("t", ITEMS, grade, 12, chat=False)
    ids = prompt_ids(tokenizer(chat=True), no_chat, Item("1", "01239", ()), chat=True)
    assert tokenizer().decode(ids[0]) == "01239"


@pytest.mark.parametrize("chat", [False, True])
def test_a_first_token_comes_from_the_template_or_from_the_tokenizer_but_not_from_both(chat):
    ids = prompt_ids(tokenizer(chat=True, begins=True), task(), Item("1", "ab", ()), chat=chat)[0].tolist()
    assert (ids[0], ids[1]) == (1, letter("u") if chat else letter("a"))


REFUSED = {
    "no item": ({"items": ()}, {}, "0 items and limit=None; allowed: at least one item"),
    "limit 0": ({}, {"limit": 0}, "3 items and limit=0; allowed: at least one item"),
    "limit -1": ({}, {"limit": -1}, "3 items and limit=-1; allowed: at least one item"),
    "no template": ({}, {"chat": True}, "no chat template. Use chat=False"),
    "too long": ({"max_new_tokens": 8000}, {}, "item first of t has 225 tokens .* allowed: 8192 together"),
}


@pytest.mark.parametrize(("changes", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_task_that_cannot_be_run_is_refused(changes, options, words):
    with pytest.raises(UnsupportedInput, match=words):
        run_task(model(), tokenizer(), task(**changes), None, **options)


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"max_prompt_tokens": 1}], ids=str)
def test_lengths_that_leave_nothing_are_refused(changes):
    with pytest.raises(UnsupportedInput, match="allowed: at least 1, and at least 2 or None"):
        task(**changes)


def test_lines_are_read_and_empty_ones_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one\\u2028", "b": 1}\n\n{"a": "two"}\n', encoding="utf-8")
    assert [row["a"] for row in read_jsonl(path, {"a": str})] == ["one\u2028", "two"]


BAD_FILES = {
    "broken": (b'{"a": "x"}\n{"a": \n', "line 2 .* is no JSON .*; allowed: JSON Lines"),
    "a list": (b'["a"]\n', "line 1 .* no 'a' of the right type; allowed: objects with a"),
    "another field": (b'{"b": "x"}\n', "line 1 .* no 'a'"),
    "another type": (b'{"a": 5}\n', "line 1 .* no 'a'"),
    "empty": (b"\n\n", "is empty; allowed: JSON Lines"),
    "no text": (b"\xff\xfe\x00", "is no text .*; allowed: JSON Lines in UTF-8"),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UnsupportedInput, match=words):
        read_jsonl(tmp_path / "a.jsonl", {"a": str})


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnsupportedInput, match=r"cannot read .*: No such file"):
        read_jsonl(tmp_path / "a.jsonl", {})
