"""The report: it says what the result says, whatever the names are, and needs nothing but itself."""

import functools
import json
import math
import re
import sys

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.evals.report import html
from occamkv.evals.result import check
from page_reader import PageReader, in_one_line
from some_result import METHODS, some_result

OPTIONAL = ("kl_by_position", "generated", "layer_errors", "probes", "tasks")


class Page(PageReader):
    """Reads words outside of styles and titles."""

    def handle_data(self, data):
        if "style" in self.open or "title" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data + (" " if "code" not in self.open else "")

    @property
    def text(self):
        return in_one_line("".join(self.words))

    @property
    def table(self):
        """The rows of the first table by method."""
        heads = next(i for i, row in enumerate(self.rows) if row[0].strip() == "Method")
        return {row[0].split("Su et")[0].strip(): row[1:] for row in self.rows[heads + 1 :][: len(METHODS)]}


def small_result(*names: str) -> dict:
    """Return a result of these methods without the optional parts."""
    result = some_result()
    rows = {row["method"]: row for row in result["rows"]}
    result["rows"] = [{k: v for k, v in rows[name].items() if k not in OPTIONAL} for name in names]
    return result


@functools.cache
def whole() -> str:
    return html(some_result())


def outside(text: str) -> list[str]:
    """Return what would load something or run something."""
    page = Page(text)
    found = [tag for tag in page.tags if tag in {"script", "link", "img", "iframe", "object", "embed", "base", "image"}]
    for tag, name, value in page.attributes:
        if name.startswith("on") or (name in {"src", "href", "srcset", "data"} and not (value or "").startswith("#")):
            found.append(f"{tag} {name}={value}")
    return found + re.findall(r"@import|url\((?!#)|https?:", text)


def test_the_page_needs_nothing_but_itself():
    assert outside(whole()) == []


@pytest.mark.parametrize(
    "bad",
    [
        "<script>1</script>",
        '<a href="x.html">x</a>',
        "<style>a{background:url(x.png)}</style>",
        '<p onload="x">x</p>',
        "<p>http://x</p>",
    ],
)
def test_the_check_finds_what_would_load_something(bad):
    assert len(outside(bad)) == 1


def test_the_same_result_gives_the_same_page():
    result = small_result("full", "oscar", "occam")
    assert html(result) == html(json.loads(json.dumps(result)))
    assert html(result) != html({**result, "seed": 1})


def test_no_id_stands_twice():
    ids = [value for _, name, value in Page(whole()).attributes if name == "id"]
    assert ids
    assert len(set(ids)) == len(ids)


def test_the_table_shows_the_numbers():
    table = Page(whole()).table
    assert set(table) == set(METHODS)
    for row in some_result()["rows"]:
        bits, kl, _, _, same, perplexity, cache = table[row["method"]]
        assert bits.split()[0] == f"{row['bits_per_value']:.2f}"
        assert float(kl.split()[0]) == pytest.approx(row["kl_mean"], abs=5e-5)
        assert float(same.split()[0]) == pytest.approx(100 * row["same_top"], abs=0.05)
        assert float(perplexity.split()[0]) == pytest.approx(row["perplexity"], abs=0.005)
        assert float(cache.split()[0]) == pytest.approx(row["cache_bytes"] / 2**20, abs=0.005)


def test_intervals_stand_below_the_numbers():
    bits, kl, *_ = Page(html(small_result("full", "oscar"))).table["oscar"]
    assert bits.split() == ["3.08", "3.60"]
    assert kl.split() == ["0.0810", "0.0745\N{EN DASH}0.0875"]


def test_rows_go_by_bits_and_full_precision_is_last():
    table = Page(whole()).table
    bits = [float(cells[0].split()[0]) for cells in table.values()]
    assert bits[:-1] == sorted(bits[:-1])
    assert list(table)[-1] == "full"


def test_how_it_was_measured_is_told():
    result = some_result()
    text = Page(html(small_result("full", "oscar"))).text
    for told in (result["command"], result["machine"], result["text"]["sha256"], result["model"]["fingerprint"]):
        assert told in text
    assert "What a packed KV cache costs some-model-270m" in text
    assert "A long novel · 8 windows of 4,096 tokens" in text
    assert "torch 2.13.0" in text
    assert "28,672 in all" in text
    assert text.count("✓ passed") == 3


def evil(value):
    """Return the value with markup in every text."""
    if isinstance(value, str):
        return f'{value}</code></title><x-evil a="1" onload=x>&lt;\'"\x00\ud800'
    if isinstance(value, dict):
        return {key: evil(item) for key, item in value.items()}
    return [evil(item) for item in value] if isinstance(value, list) else value


def test_no_text_can_become_markup():
    result = some_result()
    result["rows"] = [result["rows"][0], result["rows"][1]]
    page = html(evil(result))
    assert page.encode()
    parsed = Page(page)
    assert "x-evil" not in parsed.tags
    assert "x-evil" in parsed.text
    assert outside(page) == []


def test_the_parser_sees_markup_that_is_not_escaped():
    assert "x-evil" in Page("<p><x-evil>x</x-evil></p>").tags


@pytest.mark.parametrize("part", OPTIONAL)
@pytest.mark.parametrize("how", ["missing", "null"])
def test_what_was_not_measured_is_left_out_with_a_sentence(part, how):
    names = {
        "kl_by_position": "KL by position",
        "generated": "generated text",
        "layer_errors": "errors of single layers",
        "probes": "probes of the context",
        "tasks": "tasks",
    }
    rows = {row["method"]: row for row in some_result()["rows"]}
    result = small_result("full", "oscar")
    other = "layer_errors" if part != "layer_errors" else "tasks"
    for row in result["rows"]:
        row.update({other: rows[row["method"]][other], **({part: None} if how == "null" else {})})
    text = Page(html(result)).text
    told = re.search(r"Not in this result, so not shown: ([^.]*)\.", text)[1].split(", ")
    assert names[part] in told
    assert names[other] not in told


def test_nothing_is_said_to_be_missing_when_nothing_is():
    assert "so not shown" not in Page(whole()).text
    assert "Not measured" not in Page(whole()).text


def test_a_method_without_a_part_is_named():
    result = small_result("oscar", "occam")
    result["rows"][0]["layer_errors"] = [{"layer": 0, "error": 0.1}, {"layer": 1, "error": 0.2}]
    assert "Not measured for occam." in Page(html(result)).text


def test_full_precision_is_the_first_heat_map():
    page = whole()
    for kind in ("needle", "multikey", "quote"):
        after = page[page.index(f"<h3>{kind}</h3>") :]
        assert re.search(r"<code>(.*?)</code>", after)[1] == "full"
        assert after.index('aria-label="full, ') < after.index('aria-label="occam, ')


def test_full_precision_is_no_point_but_said_in_the_figure():
    told = "↓ full: 16 bits, KL 0"
    assert told in Page(html(small_result("full", "oscar"))).text
    assert told not in Page(html(small_result("oscar"))).text


def test_a_figure_for_each_method():
    svgs = [(name, value) for tag, name, value in Page(whole()).attributes if tag == "svg"]
    labels = [value for name, value in svgs if name == "aria-label"]
    methods = len(METHODS) - 1
    assert len(labels) == 1 + 3 * methods + 1 + 3 * (methods + 1)
    assert len([value for tag, name, value in Page(whole()).attributes if tag == "svg" and name == "role"]) == len(
        labels
    )


def verdict(*names: str, **changes) -> str:
    result = small_result(*names)
    for row in result["rows"]:
        row.update(changes.get(row["method"], {}))
    page = html(result)
    return re.sub(r"<.*?>", "", re.search(r'<p class="verdict">(.*?)</p>', page)[1]).replace("\N{NO-BREAK SPACE}", " ")


def test_the_verdict_sets_the_best_with_as_few_bits_against_the_paper():
    said = verdict(
        "full",
        "oscar",
        "occam",
        "occam_g64",
        "turboquant_k3v3",
        occam={"same_top": 0.959, "kl_mean": 0.0123, "kl_mean_ci": [0.01, 0.015], "perplexity": 16.0},
        oscar={"same_top": 0.838, "kl_mean": 0.0861, "kl_mean_ci": [0.08, 0.09]},
        turboquant_k3v3={"kl_mean": 0.02},
    )
    assert said == (
        "At 2.54 bits per value occam changes the most likely token at 4.1 % of positions; the paper's oscar at 3.08 "
        "bits at 16.2 %. Its mean KL is 7.0 times lower, and the 95 % intervals do not overlap. With occam the "
        "perplexity goes from 15.83 to 16.00 (+1.1 %), and the cache of 4,096 tokens from 72.00 MiB to 11.43 MiB."
    )


def test_the_verdict_does_not_claim_what_the_intervals_do_not_show():
    ends = {"kl_mean_ci": [0.01, 0.2]}
    assert "this run does not tell the two apart" in verdict("oscar", "occam", oscar=ends, occam=ends)
    assert "no intervals were measured" in verdict("oscar", "occam", occam={"kl_mean_ci": None})


def test_the_verdict_says_when_the_paper_wins():
    said = verdict("oscar", "rtn")
    assert said.startswith("The paper's oscar at 3.08 bits changes the most likely token at 15.4 % of positions.")
    assert "No other method here has a lower mean KL at as few bits." in said
    assert "No other method" not in verdict("oscar", "turboquant_k3v3"), "more bits are no fair rival"
    assert "Closest to full precision is turboquant_k3v3 (3.50 bits)" in verdict("oscar", "turboquant_k3v3")


def test_the_verdict_without_the_paper_or_without_anything():
    assert verdict("rtn", "occam").startswith("At 2.54 bits per value occam changes")
    assert verdict("full") == "Only full precision was measured, so there is nothing to compare."


def banner(result) -> str:
    found = re.search(r'<div class="banner".*?</div>', html(result))
    return "" if found is None else re.sub(r"<.*?>", " ", found[0])


def test_a_void_run_is_told_before_anything_else():
    result = small_result("full", "oscar", "occam")
    assert banner(result) == ""
    result["void"] = True
    assert "This run is void" in banner(result)
    result["controls"][1].update(passed=False, told="difference 3.2")
    assert "difference 3.2" in banner(result)
    assert "full against itself" not in banner(result)
    assert "There is no verdict" in html(result)
    assert "occam changes" not in html(result)
    result["void"] = False
    assert "A control failed." in banner(result)


def bold(result) -> list[str]:
    return re.findall(r"<td><b>(.*?)</b>", html(result))


def test_the_best_is_marked_only_if_its_interval_is_apart():
    result = small_result("full", "oscar", "occam")
    assert bold(result) == ["0.0118", "94.1\N{NO-BREAK SPACE}%"]
    result["rows"][1]["kl_mean_ci"] = [0.0127, 0.2]
    assert bold(result) == ["94.1\N{NO-BREAK SPACE}%"], "the intervals meet"
    result["rows"][1]["same_top_ci"] = None
    assert bold(result) == [], "without an interval nothing is known"
    assert bold(small_result("full", "occam")) == [], "nothing to be better than"


def fields(value, path=()):
    """Yield the path of every field."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from fields(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


ONE_ROW = json.dumps({**some_result(), "rows": [row for row in some_result()["rows"] if row["method"] == "oscar"]})
FIELDS = [path for path in fields(json.loads(ONE_ROW)) if path != ("schema_version",)]
CHECKED = [path for path in FIELDS if path[0] != "model" or len(path) == 1]  # facts on the model are shown as they are


def changed(path, change):
    result = at = json.loads(ONE_ROW)
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return result


MAY_MISS = {"source", "bits_with_residual", "kl_mean_ci", "same_top_ci", "logprob_ci", *OPTIONAL}


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_is_refused_unless_it_may_miss(path):
    result = changed(path, lambda at, key: at.pop(key))
    if path[-1] in MAY_MISS:
        check(result)
        return
    with pytest.raises(UnsupportedInput, match=rf"lacks '{path[-1]}'; allowed:"):
        html(result)


def test_a_row_of_required_fields_only_has_a_page():
    result = small_result("oscar")
    for name in MAY_MISS:
        result["rows"][0].pop(name, None)
    page = Page(html(result))
    assert page.rows[1][1].split() == ["3.08"]


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: ".".join(map(str, path)))
def test_a_field_of_another_kind_is_refused(path):
    with pytest.raises(UnsupportedInput, match=r"allowed: (a|an|two|true)\b"):
        html(changed(path, lambda at, key: at.update({key: {1, 2}})))


@pytest.mark.parametrize("given", [2, "1", None, True, 1.0])
def test_another_schema_is_refused(given):
    with pytest.raises(UnsupportedInput, match=r"schema_version .* reads 1"):
        html({**some_result(), "schema_version": given})


@pytest.mark.parametrize("given", [[], None, "text", {}])
def test_what_is_no_result_is_refused(given):
    with pytest.raises(UnsupportedInput, match="schema_version is None"):
        html(given)


def test_no_rows_are_refused():
    with pytest.raises(UnsupportedInput, match="has no rows; allowed"):
        html({**some_result(), "rows": []})


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1e-9, 1e-300])
def test_odd_numbers_are_shown_and_not_a_crash(value):
    result = small_result("full", "oscar", "occam")
    odd = dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "same_top", "perplexity", "perplexity_full"), value)
    result["rows"][2].update(odd, layer_errors=[{"layer": 0, "error": value}])
    assert "occam" in Page(html(result)).table
    result["rows"][2]["bits_per_value"] = value
    assert "occam" in Page(html(result)).table


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.endswith("evals.report")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("occamkv.evals.plots", "occamkv.evals.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(sys.modules["occamkv.evals"], name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    from occamkv.evals.report import html as fresh

    with pytest.raises(UnsupportedInput, match=r"pip install 'occamkv\[plots\]'"):
        fresh(small_result("oscar"))
