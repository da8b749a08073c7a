"""The page of an analysis says what its JSON says, names what is missing, and is harmless whatever the tokens are."""

import functools
import json
import re
import sys
from html import unescape

import pytest

from occamkv.analysis.page import labels, page
from occamkv.analysis.tables import Shown, advice_section, ranges, sinks_section, visible
from occamkv.errors import UnsupportedInput
from page_reader import PageReader, in_one_line
from some_analysis_result import even_norm_result, low_norm_result

pytest.importorskip("matplotlib", reason="needs: pip install 'occamkv[plots]'")

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
EVIL = """<script>alert("x")</script></td><img src=x onerror='1'>\x00\x1b[2J\n\t\u202e\u200b\ud800"""


class Reader(PageReader):
    """Reads words outside of figures."""

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data + " "
        if not {"svg", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return in_one_line(" ".join(self.words))

    def table(self, first: str, second: str) -> list[list[str]]:
        """Return the rows below the head that begins with these two cells."""
        start = next(i for i, row in enumerate(self.rows) if [cell.split()[0] for cell in row[:2]] == [first, second])
        size = len(self.rows[start])
        heads = {"Layer", "Token"}
        below = [[" ".join(cell.split()) for cell in row] for row in self.rows[start + 1 :]]
        end = next((i for i, row in enumerate(below) if row[0] in heads or len(row) != size), len(below))
        return below[:end]


@functools.cache
def text_of(*names: str) -> str:
    made = {"low": low_norm_result, "even": even_norm_result}
    return page([made[name]() for name in names])


@functools.cache
def whole(*names: str) -> Reader:
    return Reader(text_of(*names))


def test_what_the_headline_says_comes_first_and_its_figures_next():
    text = whole("low").text
    order = ["A sentence about low.", "Norm of K by position", "Error of attention with K in 2 bits", "Layer by layer"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_the_norm_of_the_sink_is_told_beside_its_figure():
    assert f"sink “<|start|>” at 0: 0.27 {TIMES} the median norm; low in 4 of 4 packed layers" in whole("low").text
    assert f"sink “<bos>” at 0: 1.02 {TIMES} the median norm; low in 0 of 2 packed layers" in whole("even").text


def test_the_change_of_the_error_is_told_beside_its_figure():
    assert f"rotated and scaled 0.54 {TIMES}, balanced before that 0.25 {TIMES} that of K as it is" in whole("low").text
    assert (
        f"rotated and scaled 3.50 {TIMES}, balanced before that 0.50 {TIMES} that of K as it is" in whole("even").text
    )


def test_the_numbers_of_each_layer_are_those_of_the_json():
    rows = whole("low").table("Layer", "Heads")
    assert len(rows) == 4
    values = ["9/3 of 64", "0.11", "1.23", "3.46", "0.08", "0.65", "0", DASH, "0.77", "4,321", "0.0123 0.0456"]
    assert rows[2] == ["2 full", *values]
    costs = whole("low").table("Layer", "As")
    assert costs[2][:8] == ["2 full", "0.400", "0.360", "0.300", "0.220", "0.100", "1.11", "1.33"]
    assert costs[2][-1] == "occam , pins first:4, k_bits = 3 reason 2"


def test_another_number_gives_another_cell():
    result = low_norm_result()
    result["layers"][1]["errors"]["rotation"] = 0.987
    row = Reader(advice_section([Shown("low", result)])).table("Layer", "As")[1]
    assert row[2] == "0.987" != whole("low").table("Layer", "As")[1][2]


def test_what_was_not_measured_is_a_dash_and_never_0():
    costs = whole("even").table("Layer", "As")
    assert costs[0][1:7] == [DASH] * 6
    assert costs[1][1:7] == ["0.200", "0.600", "0.180", "0.700", "0.100", "0.33"]
    rows = whole("even").table("Layer", "Heads")
    assert rows[0][-3] == DASH
    assert rows[0][-1] == f"{DASH} 0.0456"
    assert f"{DASH} stands where nothing was measured" in whole("even").text


def test_layers_that_are_not_packed_are_pale_and_counted():
    assert "2 of 4 layers are packed" in whole("even").text
    assert whole("even").attributes.count(("tr", "class", "reference")) == 2 * 2
    assert ("tr", "class", "reference") not in whole("low").attributes


def test_sinks_are_drawn_together_over_layers():
    (row,) = whole("low").table("Token", "Position")
    values = [f"0.50{DASH}0.53", f"0.25{DASH}0.28", "0.10", "1,234", "attention, short value"]
    assert row == ["<|start|>", "0", f"0{DASH}3", *values]


def test_a_result_without_sinks_says_so():
    result = low_norm_result()
    for layer in result["layers"]:
        layer |= {"sinks": [], "sink_positions": []}
    from occamkv.analysis.figures import sinks_told

    assert "No sink was found." in sinks_section([Shown("low", result)])
    assert sinks_told(Shown("low", result)) == "no sink was found in 4 packed layers"


def harm(text: str) -> list[str]:
    """Return what would load or run something."""
    read = Reader(text)
    found = [tag for tag in read.tags if tag in {"script", "link", "iframe", "object", "embed", "base", "img"}]
    for tag, name, value in read.attributes:
        embedded = tag == "image" and (value or "").startswith("data:image/png;base64,")
        if name.startswith("on") or (name in {"src", "href"} and not (embedded or (value or "").startswith("#"))):
            found.append(f"{tag} {name}")
    return found + re.findall(r"@import|url\((?!#)|https?:", text)


def test_the_page_needs_nothing_but_itself_and_stays_small():
    text = text_of("low", "even")
    assert harm(text) == []
    assert len(text.encode()) < 3_000_000


@pytest.mark.parametrize("bad", ["<script>1</script>", '<img src="x"/>', '<p onclick="x">x</p>', "<p>https://x</p>"])
def test_the_check_of_the_page_can_fail(bad):
    assert harm(bad) != []


def test_no_text_from_outside_breaks_out():
    result = low_norm_result(layers=2)
    for layer in result["layers"]:
        layer["sinks"][0] |= {"token": EVIL, "rules": [EVIL]}
        layer["kind"] = EVIL
        layer["advice"] = {"method": EVIL, "pins": EVIL, "overrides": {EVIL: EVIL}, "why": EVIL}
    result["panels"][0]["why"] = EVIL
    result |= dict.fromkeys(("model", "model_type", "machine", "command", "date", "fingerprint", "base_method"), EVIL)
    result |= {"headline": [f"{EVIL}: {EVIL}"], "text": {"name": EVIL, "sha256": EVIL}, "modality": {EVIL: 1}}
    result |= {"versions": {EVIL: EVIL}, "bos": {"added": True, "token": EVIL, "told": EVIL}}
    result["plan"]["layers"][0]["reason"] = EVIL
    text = page([result])
    assert text.encode()
    assert harm(text) == []
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_blanks_and_control_characters_of_tokens_are_seen():
    assert visible(" the\n\t") == "␣the␊␉"
    assert visible("\u202ea") == "[U+202E]a"
    assert visible("") == "(empty)"
    assert len(visible("x" * 999)) == 40
    assert visible("日本") == "日本"


def test_parts_that_are_missing_are_named_and_the_rest_is_shown():
    result = low_norm_result()
    for name in ("panels", "plan", "headline", "machine", "versions", "bos", "text", "fingerprint"):
        del result[name]
    for layer in result["layers"]:
        for name in ("errors", "profile", "sinks", "advice", "heads", "rotation_gain", "error_bound"):
            layer[name] = None
    text = Reader(page([result])).text
    assert "Not in this result, so not shown: headline, panels, plan." in text
    assert text.count("Not measured.") >= 4
    assert "Machine unknown" in text
    assert "Not in this result" not in whole("low").text
    assert "Kinds of tokens 236 text, 64 image" in whole("low").text


def test_the_plan_can_be_copied_from_the_page():
    text = text_of("low")
    blocks = [unescape(block) for block in re.findall(r"<pre><code>(.*?)</code></pre>", text, flags=re.DOTALL)]
    plans = [json.loads(block) for block in blocks if block.startswith("{")]
    assert plans == [low_norm_result()["plan"]]


def test_two_models_stand_side_by_side_on_the_same_axes():
    both = whole("low", "even").text
    for name in ("low", "even"):
        assert f"A sentence about {name}." in both
        assert f"{name}: Norm of K by position" in both
    assert both.index("low: Norm of K") < both.index("even: Norm of K") < both.index("low: Error of attention")

    def first_axes(text):
        svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
        return [re.findall(r">([\d.]+)</text>", one) for one in svgs[:2]]

    one, other = first_axes(text_of("low", "even"))
    assert one == other
    assert first_axes(text_of("even"))[0] == one, "the limits have a least"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{"model": "a"}, {"model": "b"}], ["a", "b"]),
        ([{"base_method": "occam"}, {"base_method": "oscar"}], ["low, occam", "low, oscar"]),
        ([{"text": {"name": "x"}}, {"text": {"name": "y"}}], ["low, x", "low, y"]),
        ([{}, {}], ["low (1)", "low (2)"]),
    ],
)
def test_results_of_one_model_are_told_apart(changes, names):
    assert labels([low_norm_result() | change for change in changes]) == names


def test_the_same_results_give_the_same_page():
    assert page([low_norm_result()]) == text_of("low")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"kind": "plan"}, "no such page of kind 'plan'"),
        ({"layers": []}, "result.layers is empty"),
        ({"layers": [{"index": 0}]}, r"result.layers\[0\] lacks 'packs'"),
        ({"model": 3}, "result.model is '3'"),
    ],
    ids=str,
)
def test_what_is_no_analysis_is_refused(change, words):
    with pytest.raises(UnsupportedInput, match=words):
        page([low_norm_result() | change])


def test_a_profile_with_lists_of_two_lengths_is_refused():
    result = low_norm_result()
    result["layers"][3]["profile"]["v_norm"].pop()
    with pytest.raises(UnsupportedInput, match=r"the profile of layer 3 has lists of .*'v_norm': 299.*one length"):
        page([result])


def test_nothing_to_show_is_refused():
    with pytest.raises(UnsupportedInput, match="no analysis to show"):
        page([])


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedInput, match=r"pip install 'occamkv\[plots\]'"):
        page([low_norm_result()])


@pytest.mark.parametrize(("given", "told"), [([3, 0, 1, 2, 7], f"0{DASH}3, 7"), ([5], "5"), ([], DASH)])
def test_ranges_draw_runs_together(given, told):
    assert ranges(given) == told


def test_layers_are_shown_in_their_order():
    result = low_norm_result()
    result["layers"].reverse()
    assert [layer["index"] for layer in Shown("x", result).layers] == [0, 1, 2, 3]
