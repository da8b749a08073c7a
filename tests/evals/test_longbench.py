"""LongBench: metrics against values counted by hand or given by the authors' packages, and the files."""

import json

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.evals.longbench import (
    METRICS,
    classification,
    code_similarity,
    count,
    load_longbench,
    longbench_datasets,
    qa_f1,
    retrieval,
    rouge_l,
)

ROW = {"input": "Who?", "context": "A {story}.", "answers": ["Ann", "Ann Lee"], "length": 3999, "all_classes": None}


def folder(tmp_path, dataset: str, *rows: dict):
    lines = "\n".join(json.dumps({**ROW, **row}) for row in rows or ({},))
    (tmp_path / f"{dataset}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


F1 = {
    "the same": ("Ann Lee", "Ann Lee", 1),
    "case, articles and punctuation": ("The  ANN, a Lee!", "ann lee", 1),
    "half of it": ("Ann", "Ann Lee", 2 / 3),
    "a word too often": ("Ann Ann Ann", "Ann Lee", 2 / 5),
    "joined by punctuation": ("Ann-Lee", "Ann Lee", 0),
    "an article inside a word": ("theatre", "atre", 0),
    "nothing": ("", "Ann", 0),
    "only articles": ("the", "a", 0),
}


@pytest.mark.parametrize(("text", "answer", "score"), F1.values(), ids=F1)
def test_f1_of_words(text, answer, score):
    assert qa_f1(text, answer) == pytest.approx(score)


# Values of the package rouge 1.0.1, get_scores(text, answer)["rouge-l"]["f"].
ROUGE = {
    "two sentences": (
        "The cat sat on the mat. The dog ate the cat.",
        "The dog sat on the mat. A cat ate.",
        0.94117646561,
    ),
    "other order": ("a b c d. e f a.", "d c b a. a e f", 0.499999995),
    "a space behind the last stop": ("one two three ", "one three. ", 0.66666666167),
    "twice is once": ("a a a a", "a", 1 - 5e-9),
    "nothing": ("", "a", 0),
    "only stops": ("...", "a", 0),
    "nothing in common": ("a b", "c d", 0),
}


@pytest.mark.parametrize(("text", "answer", "score"), ROUGE.values(), ids=ROUGE)
def test_rouge_l_is_that_of_the_package(text, answer, score):
    assert rouge_l(text, answer) == pytest.approx(score, abs=1e-10)


CLASSES = ("food", "Dog food", "City", "Big city")
CLASSIFIED = {
    "the right one alone": ("City", "City", 1),
    "in a sentence": ("It is a City.", "City", 1),
    "two classes": ("food or City", "City", 1 / 2),
    "a part of the right one does not count": ("food in a Dog food can", "Dog food", 1),
    "a whole around the right one does": ("Dog food and food", "food", 1 / 2),
    "wrong": ("food", "City", 0),
    "none": ("river", "City", 0),
    "other case": ("city", "City", 0),
}


@pytest.mark.parametrize(("text", "answer", "score"), CLASSIFIED.values(), ids=CLASSIFIED)
def test_classification(text, answer, score):
    assert classification(text, answer, CLASSES) == pytest.approx(score)


def test_of_two_parts_in_a_row_the_second_stays_as_in_the_authors_code():
    assert classification("ab abc b", "abc", ("a", "b", "abc")) == 1 / 2
    assert classification("ab abc b", "abc", ("a", "abc", "b")) == 1


NUMBERS = {
    "right": ("Paragraph 7", 1),
    "one of two": ("Paragraph 7 or 12", 1 / 2),
    "part of a number": ("Paragraph 70", 0),
    "no number": ("seven", 0),
}


@pytest.mark.parametrize(("text", "score"), NUMBERS.values(), ids=NUMBERS)
def test_retrieval_and_count_are_shares_of_the_numbers_said(text, score):
    assert retrieval(text, "Paragraph 7") == retrieval(text, "段落7") == count(text, "7") == pytest.approx(score)


# Values of fuzzywuzzy 0.18 without its C library.
CODE = {
    "the same": ("return x", "return x", 1),
    "another end": ("return x + 1", "return x - 10", 0.88),
    "the first line that is code": ("\n\n```python\n# comment\n// comment\nreturn x\nreturn y", "return x", 1),
    "later lines do not count": ("return x\nreturn y", "return y", 0.88),
    "only comments": ("# return x", "return x", 0),
    "nothing": ("", "return x", 0),
}


@pytest.mark.parametrize(("text", "answer", "score"), CODE.values(), ids=CODE)
def test_code_similarity(text, answer, score):
    assert code_similarity(text, answer) == score


def test_every_data_set_has_a_metric_and_a_prompt_with_a_place_for_the_context():
    known = longbench_datasets()
    assert len(known) == 18
    for entry in known.values():
        assert entry["metric"] in METRICS
        assert entry["prompt"].count("{context}") == 1
        assert entry["prompt"].count("{input}") <= 1
    assert {name for name, entry in known.items() if "{input}" not in entry["prompt"]} == {
        "gov_report",
        "multi_news",
        "passage_count",
        "lcc",
    }
    assert {n for n, e in known.items() if e["first_line"]} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {n for n, e in known.items() if not e["chat"]} == {
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "lcc",
        "repobench-p",
    }
    lengths = {32: 7, 64: 5, 128: 3, 512: 3}
    assert {n: sum(e["max_new_tokens"] == n for e in known.values()) for n in lengths} == lengths


def test_a_data_set_is_read_with_its_prompt_and_length(tmp_path):
    task = load_longbench(folder(tmp_path, "hotpotqa", {}, {"_id": "ab12"}), "hotpotqa", max_prompt_tokens=3500)
    only = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    assert task.items[0].prompt == (
        f"{only}\n\nThe following are given passages.\nA {{story}}.\n\n{only}\n\nQuestion: Who?\nAnswer:"
    )
    assert [item.id for item in task.items] == ["1", "ab12"]
    assert (task.max_new_tokens, task.max_prompt_tokens, task.chat, task.one_line) == (32, 3500, True, False)


def test_the_best_of_the_answers_counts(tmp_path):
    task = load_longbench(folder(tmp_path, "hotpotqa"), "hotpotqa")
    assert task.grade(task.items[0], "Ann Lee").scores == {"qa_f1": 1}
    assert task.grade(task.items[0], "Ann").scores == {"qa_f1": 1}
    assert task.grade(task.items[0], "Lee").scores == {"qa_f1": pytest.approx(2 / 3)}
    assert [task.grade(task.items[0], text).valid for text in ("Bob", " \n")] == [True, False]


def test_only_the_first_line_counts_where_models_go_on_with_examples(tmp_path):
    task, other = (load_longbench(folder(tmp_path, name), name) for name in ("triviaqa", "hotpotqa"))
    text = "\nAnn Lee\nPassage: another one"
    assert task.grade(task.items[0], text).scores["qa_f1"] == 1
    assert other.grade(other.items[0], text).scores["qa_f1"] < 1
    assert not task.chat
    assert load_longbench(folder(tmp_path, "samsum"), "samsum").one_line


def test_classes_are_those_of_the_row(tmp_path):
    task = load_longbench(folder(tmp_path, "trec", {"answers": ["City"], "all_classes": [*CLASSES]}), "trec")
    assert task.grade(task.items[0], "City or food\nCity").scores == {"classification": 1 / 2}


@pytest.mark.parametrize(
    ("length", "name"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (30000, "8k+")]
)
def test_in_longbench_e_a_score_also_counts_in_its_length_bin(tmp_path, length, name):
    task = load_longbench(folder(tmp_path, "hotpotqa_e", {"length": length}), "hotpotqa_e")
    assert task.name == "longbench/hotpotqa_e"
    assert task.grade(task.items[0], "Ann").scores == {"qa_f1": 1, name: 1}


REFUSED = {
    "by words": ("dureader", "needs a word splitter. Use another data set"),
    "by words, of the other list": ("vcsum_e", "needs a word splitter"),
    "unknown": ("nq", "no LongBench data set 'nq'; allowed: narrativeqa, .* also with _e"),
    "not there": ("qasper", "cannot read .*qasper.jsonl': No such file"),
}


@pytest.mark.parametrize(("dataset", "words"), REFUSED.values(), ids=REFUSED)
def test_a_data_set_that_cannot_be_read_is_refused(tmp_path, dataset, words):
    with pytest.raises(UnsupportedInput, match=words):
        load_longbench(tmp_path, dataset)


@pytest.mark.parametrize("wrong", [{"answers": "Ann"}, {"length": None}, {"all_classes": "City"}], ids=str)
def test_a_row_of_another_shape_is_refused(tmp_path, wrong):
    with pytest.raises(UnsupportedInput, match=f"no '{next(iter(wrong))}' of the right type"):
        load_longbench(folder(tmp_path, "qasper", wrong), "qasper")
