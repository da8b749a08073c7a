"""GSM8K: prompts, and how a number is found in an answer."""

import json

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.evals.gsm8k import load_gsm8k
from occamkv.evals.tasks import Item

PROBLEMS = [
    ("How many legs have 3 cats?", "3 cats have 3*4=<<3*4=12>>12 legs.\n#### 12"),
    ("How much are 2 cars at $600?", "2*600=$<<2*600=1200>>1,200\n#### 1,200"),
    ("How warm is 5 below zero?", "#### -5"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in PROBLEMS), encoding="utf-8")
    return path


def test_the_right_answers_stand_behind_the_marks(file):
    task = load_gsm8k(file)
    assert [item.answers for item in task.items] == [("12",), ("1200",), ("-5",)]
    assert [item.id for item in task.items] == ["1", "2", "3"]


def test_without_shots_the_model_is_asked_to_reason_and_told_the_format(file):
    prompt = load_gsm8k(file).items[0].prompt
    assert prompt.startswith("Reason step by step.")
    assert '"#### "' in prompt
    assert prompt.endswith("\n\nQuestion: How many legs have 3 cats?\nAnswer:")


def test_shots_come_first_and_no_problem_is_its_own_shot(file):
    first, second, third = load_gsm8k(file, shots_file=file, shots=2).items
    solved = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in PROBLEMS]
    assert first.prompt == f"{solved[1]}{solved[2]}Question: {PROBLEMS[0][0]}\nAnswer:"
    assert second.prompt == f"{solved[0]}{solved[2]}Question: {PROBLEMS[1][0]}\nAnswer:"
    assert third.prompt == f"{solved[0]}{solved[1]}Question: {PROBLEMS[2][0]}\nAnswer:"


ANSWERS = {
    "both": ("12 legs.\n#### 12", 1, 1, True),
    "only the last number": ("3 times 4 makes 12.", 1, 0, True),
    "with a dollar sign and cents cut": ("It is $12.", 1, 0, True),
    "another number last": ("#### 12\nThat is 2 more than 10.", 0, 1, True),
    "the first mark counts": ("#### 13\n#### 12", 1, 0, True),
    "with commas": ("#### 1,2", 1, 1, True),
    "a part of a number": ("#### 120", 0, 0, True),
    "with a fraction": ("#### 12.5", 0, 0, True),
    "no space behind the mark": ("####12", 1, 0, True),
    "negative": ("#### -12", 0, 0, True),
    "no number": ("I do not know...", 0, 0, False),
    "nothing": ("", 0, 0, False),
}


@pytest.mark.parametrize(("text", "flexible", "strict", "valid"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_read_in_two_ways(file, text, flexible, strict, valid):
    grade = load_gsm8k(file).grade(Item("1", "", ("12",)), text)
    assert grade.scores == {"flexible": flexible, "strict": strict}
    assert next(iter(grade.scores)) == "flexible"
    assert grade.valid == valid


@pytest.mark.parametrize("text", ["#### 1200", "#### 1,200.", "#### $1,200", "so 1,200. ", "-> $1200"])
def test_a_number_may_be_written_in_several_ways(file, text):
    task = load_gsm8k(file)
    assert task.grade(task.items[1], text).scores["flexible"] == 1
    assert task.grade(task.items[2], "#### -5.").scores == {"flexible": 1, "strict": 1}


def test_the_next_question_is_not_part_of_the_answer(file):
    assert load_gsm8k(file).stops == ("Question:",)


@pytest.mark.parametrize("shots", [-1, 1, 3])
def test_shots_that_are_not_there_are_refused(file, shots):
    shots_file = file if shots == 3 else None
    with pytest.raises(UnsupportedInput, match=f"{shots} shots were asked for; allowed: 0, or with a shots_file"):
        load_gsm8k(file, shots_file=shots_file, shots=shots)


def test_a_problem_without_an_answer_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "?", "answer": "none"}')
    with pytest.raises(UnsupportedInput, match=r"problem 1 of .* has no answer; allowed: it ends with '#### 42'"):
        load_gsm8k(tmp_path / "a.jsonl")
