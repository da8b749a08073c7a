"""The schema of result files, and where packed becomes faster than stock."""

import pytest

from occamkv.bench.result import check, crossover, crossover_text, tokens_text
from occamkv.errors import UnsupportedInput
from some_bench_result import RESULTS


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_is_accepted(kind):
    check(RESULTS[kind]())


def fields(kind: str) -> list[str]:
    return [name for name, value in RESULTS[kind]()["rows"][0].items() if value is not None and name != "errors"]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in RESULTS for name in fields(kind)])
def test_a_row_that_lacks_a_field_is_refused(kind, name):
    result = RESULTS[kind]()
    del result["rows"][-1][name]
    with pytest.raises(UnsupportedInput, match=rf"the result\.rows\[{len(result['rows']) - 1}\] lacks '{name}'"):
        check(result)


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("name", ["command", "date", "machine", "versions", "cpu", "rows"])
def test_a_result_that_lacks_a_field_is_refused(kind, name):
    result = RESULTS[kind]()
    del result[name]
    with pytest.raises(UnsupportedInput, match=f"the result lacks '{name}'"):
        check(result)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"kind": "sort"}, "kind is 'sort'; allowed: attend, encode, decode"),
        ({"rows": []}, "no rows"),
    ],
    ids=str,
)
def test_another_file_is_refused(changed, words):
    with pytest.raises(UnsupportedInput, match=words):
        check(RESULTS["attend"]() | changed)


def test_times_of_a_contestant_are_checked():
    result = RESULTS["attend"]()
    result["rows"][0]["contestants"]["ours"]["wall_ms"] = "fast"
    with pytest.raises(UnsupportedInput, match=r"contestants\.ours\.wall_ms is 'fast'; allowed: a number"):
        check(result)


@pytest.mark.parametrize(
    ("ratios", "tokens", "words"),
    [
        ((0.5, 2.0, 8.0), 2048, "from about 2k"),
        ((0.25, 0.5, 2.0), 8192, "from about 8k"),
        ((2.0, 0.5, 2.0), 8192, "from about 8k"),  # being faster once is not staying faster
        ((1.0, 2.0, 3.0), 1024, "from below 1k"),
        ((0.5, 1.0, 2.0), 4096, "from about 4k"),
        ((0.5, 2.0, 0.9), None, "not faster than the best stock up to 16k"),
        ((0.1, 0.2, 0.3), None, "not faster than the best stock up to 16k"),
    ],
    ids=str,
)
def test_the_crossover_is_where_packed_stays_faster(ratios, tokens, words):
    contexts = (1024, 4096, 16384)
    assert crossover(contexts, ratios) == (None if tokens is None else pytest.approx(tokens))
    assert words in crossover_text(contexts, ratios)


def test_numbers_of_tokens_are_written_short():
    assert [tokens_text(n) for n in (512, 1024, 6451, 131072)] == ["512", "1k", "6.3k", "128k"]
