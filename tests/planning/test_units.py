"""Sizes and lengths as people write them."""

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.planning.result import contexts
from occamkv.planning.units import bytes_of, size_text, tokens_of, tokens_text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("24 G", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5tib", 3 * 2**39),
        ("512MiB", 2**29),
        ("7kb", 7000),
        ("0B", 0),
    ],
)
def test_a_size_is_read(text, nbytes):
    assert bytes_of(text, name="memory") == nbytes


@pytest.mark.parametrize("text", ["24", "", "GiB", "-1g", "24 gigs", "1e3g", "24GiBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UnsupportedInput, match=r"memory is .*24GiB"):
        bytes_of(text, name="memory")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128k", 131072), ("1M", 2**20), ("131072", 131072), ("1.5k", 1536), ("1", 1), ("1024m", 2**30)],
)
def test_a_length_is_read(text, tokens):
    assert tokens_of(text, name="context") == tokens


@pytest.mark.parametrize("text", ["", "0", "-4k", "128kb", "0.5", "1.0001k", "many", "1025m", "9" * 20, "9" * 400])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(UnsupportedInput, match=r"context is .*128k"):
        tokens_of(text, name="context")


def test_texts_read_back():
    assert [size_text(n) for n in (2**30, 3 * 2**19, 512)] == ["1.00 GiB", "1.50 MiB", "0.5 KiB"]
    assert [tokens_text(n) for n in (2**20, 131072, 1000, 1536)] == ["1M", "128k", "1000", "1536"]


def test_the_table_ends_where_the_model_does():
    assert contexts(40960, 100) == [100, 4096, 8192, 16384, 32768, 40960]
    assert contexts(None, 4096)[-1] == 2**20
    assert contexts(1024, 131072) == [1024, 131072]
