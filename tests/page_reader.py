"""Reads a page that we made: its tags, attributes, tables and words; a tag that is not closed in order is an error."""

import re
from html.parser import HTMLParser

VOID_TAGS = {"meta", "wbr", "br"}


class PageReader(HTMLParser):
    """Collects tags, attributes, rows of tables and words; which words count says `handle_data` of a subclass."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.words = [], [], [], [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]


def in_one_line(text: str) -> str:
    """Return a text with runs of white space as one space."""
    return re.sub(r"\s+", " ", text)
