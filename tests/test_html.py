"""The parts of a page: what comes from outside is escaped, tables keep their rows, and the shell loads nothing."""

import re

import pytest

from occamkv import html


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ('<script a="1">&', "&lt;script a=&quot;1&quot;&gt;&amp;"),
        ("a\x00\x1b[2J\u202eb", "a��[2J�b"),
        ("\ud800", "�"),
        (7, "7"),
    ],
)
def test_anything_becomes_harmless_text(given, shown):
    assert html.text(given) == shown
    html.page(str(given), [html.text(given)], dark="").encode()


def test_a_table_keeps_its_cells_in_their_rows_and_quiets_the_named_ones():
    shown = html.table(["a", "b"], [["x", "1"], ["y", "2"]], quiet=[1])
    rows = re.findall(r"<tr(.*?)>(.*?)</tr>", shown)
    assert [re.findall(r">([^<]+)<", cells) for _, cells in rows] == [["a", "b"], ["x", "1"], ["y", "2"]]
    assert [mark for mark, _ in rows] == ["", "", " class=reference"]


def test_the_shell_loads_and_runs_nothing():
    page = html.page("a title", ["<p>one</p>", "", html.facts({"Name": "what"})], dark="--x:#000")
    assert "<title>a title</title>" in page
    assert "<dt>Name</dt><dd>what</dd>" in page
    assert "--x:#000" in page
    assert not re.search(r"<script|<link|@import|url\(|https?:", page)


def test_cells_stand_in_rows_of_two_or_as_many_as_are_asked_for():
    assert html.side_by_side(["<p>a</p>", "<p>b</p>"]) == '<div class="pair"><p>a</p><p>b</p></div>'
    assert "--columns:3" in html.side_by_side(["a", "b", "c"], columns=3)
