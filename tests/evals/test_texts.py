"""Texts to score: what is read from a file, and how it is cut into windows."""

import hashlib
from types import SimpleNamespace

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.evals.texts import HELP_TOPICS, Text, read_text, windows
from one_line_error import WAY_OUT

BOS = 7


class Words:
    """A tokenizer whose tokens are the numbers that the text is made of, behind so many special first tokens."""

    def __init__(self, first: int = 1) -> None:
        self.first = first

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[BOS] * (self.first * add_special_tokens) + [int(w) for w in text.split()])


def numbers(count: int) -> str:
    return " ".join(str(100 + i) for i in range(count))


def cut(tokens: int, *, first: int = 1, **where: int) -> list[list[int]]:
    found = windows(numbers(tokens), Words(first), **where)
    assert all(window.shape == (1, where["length"]) and window.dtype.is_signed for window in found)
    return [window[0].tolist() for window in found]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (0, [[110, 111, 112, 113], [114, 115, 116, 117]]),
        (1, [[7, 110, 111, 112], [7, 114, 115, 116]]),
        (2, [[7, 7, 110, 111], [7, 7, 114, 115]]),
    ],
)
def test_windows_begin_with_the_special_tokens_and_stand_one_behind_the_other(first, expected):
    assert cut(100, first=first, count=2, length=4, first_token=10) == expected


def test_windows_begin_at_the_first_token_by_default():
    assert cut(10, count=1, length=4) == [[7, 100, 101, 102]]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_text_that_just_suffices_is_taken_and_one_token_less_is_refused(first):
    where = {"count": 3, "length": 10, "first_token": 5}
    needed = 5 + 2 * 10 + 10 - first
    assert cut(needed, first=first, **where)[-1][-1] == 100 + needed - 1
    with pytest.raises(UnsupportedInput, match=f"need {needed} tokens, the text has {needed - 1}") as error:
        cut(needed - 1, first=first, **where)
    assert WAY_OUT.search(str(error.value))


REFUSED = {
    "no window": {"count": 0, "length": 10},
    "fewer than none": {"count": -1, "length": 10},
    "nothing behind the special tokens": {"count": 1, "length": 2},
    "from before the text": {"count": 1, "length": 10, "first_token": -1},
    "from behind the text": {"count": 1, "length": 10, "first_token": 101},
}


@pytest.mark.parametrize("where", REFUSED.values(), ids=REFUSED)
def test_windows_that_cannot_be_cut_are_refused(where):
    with pytest.raises(UnsupportedInput, match="the text has 100"):
        cut(100, first=2, **where)


def test_the_bundled_tokenizers_special_token_is_found():
    import saved_models

    plain = saved_models.tokenizer()
    assert windows("w0 w1 w2 w3", plain, count=1, length=3)[0].tolist() == [[4, 5, 6]]


@pytest.fixture
def write(tmp_path):
    def make(content: bytes):
        path = tmp_path / "a text.txt"
        path.write_bytes(content)
        return path

    return make


def test_a_file_is_read_with_its_name_and_the_hash_of_what_is_read(write):
    text = read_text(write("Größe - “x”\n\n".encode()))
    assert text == Text("a text.txt", "Größe - “x”\n\n")
    assert text.sha256 == hashlib.sha256("Größe - “x”\n\n".encode()).hexdigest()


def test_marks_of_word_level_corpora_are_undone(write):
    text = read_text(write(b"a full @-@ precision cache of 1 @,@ 024 tokens , 2 @.@ 5 bits ; mail @ home a@-@b"))
    assert text.text == "a full-precision cache of 1,024 tokens , 2.5 bits ; mail @ home a@-@b"


def test_another_text_has_another_hash():
    assert Text("a", "x").sha256 == Text("b", "x").sha256 != Text("a", "y").sha256


def test_without_a_file_the_help_of_python_is_read_and_it_is_long():
    text = read_text()
    assert text.name == HELP_TOPICS
    assert len(text.text) > 300_000
    assert text == read_text()


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"a \xff\xfe b"], ids=["empty", "blank", "no UTF-8"])
def test_a_file_that_is_no_text_is_refused_with_its_name_and_a_way_out(write, content):
    with pytest.raises(UnsupportedInput, match=r"'.*a text.txt'") as error:
        read_text(write(content))
    assert WAY_OUT.search(str(error.value))


@pytest.mark.parametrize(("name", "told"), [("missing.txt", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path, name, told):
    with pytest.raises(UnsupportedInput, match=told):
        read_text(tmp_path / name)
