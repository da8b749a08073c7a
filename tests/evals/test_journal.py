"""The journal: what it remembers, what it refuses, and that a broken-off line costs one unit and no more."""

import json

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.evals.journal import Journal
from one_line_error import WAY_OUT

KEY = {"model": "m", "plans": {"b": [1, 2], "a": (3, 4)}}


class Work:
    """Units of work that note which of them were done."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.done = journal, []

    def get(self, unit: str):
        def work():
            self.done.append(unit)
            return {"value": (unit, 1.5)}

        return self.journal.get(unit, work)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.journal"


def run(path, *units: str) -> list[str]:
    """Ask for units and return those that had to be done."""
    work = Work(Journal(path, KEY))
    for unit in units:
        assert work.get(unit) == {"value": [unit, 1.5]}
    return work.done


def test_what_is_on_file_is_not_done_again(path):
    assert run(path, "a", "b") == ["a", "b"]
    assert run(path, "a", "b", "c", "a") == ["c"]
    assert run(path, "c", "b", "a") == []


def test_a_unit_has_the_same_form_fresh_and_from_the_file(path):
    assert Work(Journal(path, KEY)).get("a") == Work(Journal(path, KEY)).get("a") == {"value": ["a", 1.5]}


def test_work_that_fails_is_not_filed(path):
    run(path, "a")

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(path, KEY).get("b", fails)
    assert run(path, "a", "b") == ["b"]


def test_without_a_path_nothing_is_written_and_a_run_still_remembers(tmp_path):
    work = Work(Journal(None, KEY))
    assert work.get("a") == work.get("a")
    assert (work.done, list(tmp_path.iterdir())) == (["a"], [])
    work.journal.close()


def test_a_complete_run_leaves_no_file(path):
    journal = Journal(path, KEY)
    journal.get("a", lambda: 1)
    assert path.exists()
    journal.close()
    assert not path.exists()


@pytest.mark.parametrize("key", [{**KEY, "model": "n"}, {"model": "m"}, {}], ids=["another", "less", "none"])
def test_the_journal_of_another_run_is_refused_and_left_as_it_is(path, key):
    run(path, "a")
    before = path.read_text()
    with pytest.raises(UnsupportedInput, match=r"run\.journal' is the journal of a run with other settings"):
        Journal(path, key)
    assert path.read_text() == before


def test_the_order_of_a_key_does_not_matter(path):
    run(path, "a")
    assert Journal(path, dict(reversed(KEY.items()))).get("a", lambda: pytest.fail("done again"))


@pytest.mark.parametrize("cut", [1, 5, 20], ids=lambda n: f"{n} bytes")
def test_a_line_that_was_cut_off_costs_its_unit_alone(path, cut):
    run(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    assert run(path, "a") == []
    assert run(path, "a", "b", "c") in (["b", "c"], ["c"])  # without its line break alone, a line is whole
    assert run(path, "a", "b", "c") == []


def test_an_empty_file_is_a_new_journal(path):
    path.touch()
    assert run(path, "a") == ["a"]
    assert run(path, "a") == []


SPOILED = {
    "another file": b"some text\n",
    "a result": json.dumps({"schema_version": 1}).encode(),
    "bytes that are no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(UnsupportedInput, match=r"run\.journal'") as error:
        Journal(path, KEY)
    assert WAY_OUT.search(str(error.value))
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["3", "{}", '{"unit": "b"}'], ids=["a number", "no unit", "no data"])
def test_a_line_that_is_no_unit_is_as_good_as_cut_off(path, line):
    run(path, "a")
    with path.open("a") as file:
        file.write(line + "\n")
    assert run(path, "a", "b") == ["b"]
    assert run(path, "a", "b") == []


def test_a_folder_or_a_place_that_does_not_exist_is_refused_with_the_reason(tmp_path):
    for place, told in ((tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file or directory")):
        with pytest.raises(UnsupportedInput, match=told):
            Journal(place, KEY)


def test_a_file_that_can_no_longer_be_written_is_an_error_of_ours(path):
    journal = Journal(path, KEY)
    path.unlink()
    path.mkdir()
    with pytest.raises(UnsupportedInput, match=r"cannot use the journal .*run\.journal': Is a directory"):
        journal.get("a", lambda: 1)
