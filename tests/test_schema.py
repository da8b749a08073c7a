"""The schema of result files names the first thing that does not fit."""

import pytest

from occamkv.errors import UnsupportedInput
from occamkv.schema import NUMBER, check_fields, check_version

SCHEMA = {"name": str, "good": bool, "pair?": (NUMBER, NUMBER), "rows": [{"ms": NUMBER}], "by": {"*": {"n": NUMBER}}}
VALUE = {"name": "x", "good": True, "pair": [1, 2.5], "rows": [{"ms": 1}], "by": {"a": {"n": 1}}, "more": object()}


@pytest.mark.parametrize("changed", [{}, {"pair": None}, {"rows": []}, {"by": {}}], ids=str)
def test_what_fits_is_accepted(changed):
    check_fields(VALUE | changed, SCHEMA, "it", command="c")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": 1}, "it.name is '1'; allowed: a text."),
        ({"good": 1}, "it.good is '1'; allowed: true or false."),
        ({"pair": [1]}, "it.pair is '[1]'; allowed: two numbers."),
        ({"pair": [1, True]}, "it.pair is 'True'; allowed: a number."),
        ({"rows": {}}, "it.rows is '{}'; allowed: a list."),
        ({"rows": [{"ms": 1}, {}]}, "it.rows[1] lacks 'ms'; allowed: a JSON file that `c --json` wrote."),
        ({"by": []}, "it.by is '[]'; allowed: an object."),
        ({"by": {"a": {"n": "1"}}}, "it.by.a.n is '1'; allowed: a number."),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(changed, words):
    with pytest.raises(UnsupportedInput) as caught:
        check_fields(VALUE | changed, SCHEMA, "it", command="c")
    assert str(caught.value) == words


@pytest.mark.parametrize("given", [{"schema_version": 2}, {"schema_version": True}, {}, [], None], ids=str)
def test_another_version_is_refused(given):
    check_version({"schema_version": 1}, 1, "c")
    with pytest.raises(UnsupportedInput, match="no result of c that can be read"):
        check_version(given, 1, "c")
