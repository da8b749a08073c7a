"""`occamkv eval`: its JSON, its page, its exit codes, and one line for every bad input."""

import json
from typing import Any

import pytest

import saved_models
from occamkv import method
from occamkv.evals import controls, fidelity, suite
from occamkv.evals.controls import Control
from occamkv.evals.result import check
from occamkv.evals.texts import read_text
from occamkv.integrations.transformers.plan import plan_for
from one_line_error import complaints

ROW = {
    **dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "same_top", "perplexity", "perplexity_full"), float),
    **{"method": str, "bits_per_value": float, "cache_bytes": int, "full_bytes": int, "tokens": int},
}
SHORT = ("--windows", 1, "--length", 200, "--first-token", 0, "--score-from", 140, "--generated", 0)
WORDS = 1500


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(saved_models.text(WORDS))
    return path


@pytest.fixture
def evaluate(occamkv, folder_of, words):
    """Run the command on a tiny model and the text of words."""

    def run(*args: object, kind: str = "packable") -> Any:
        return occamkv("eval", folder_of(kind), "--text", words, *SHORT, *args)

    return run


@pytest.fixture
def refused(evaluate, monkeypatch):
    """Check that the command refuses these arguments in the right form, naming these words, before it reads a text."""

    def check_refusal(*args: object, words: tuple[str, ...], early: bool = True) -> None:
        if early:
            monkeypatch.setattr(fidelity, "_step", lambda *_: pytest.fail("a text was read first"))
        done = evaluate(*args)
        assert complaints(done.code, done.out, done.err, words=words) == []

    return check_refusal


def test_stdout_is_json_alone_and_holds_every_field(evaluate, words, folder_of):
    done = evaluate("--method", "oscar,occam", "--generated", 4, "--prompt", 150, "--seed", 5, "--json", "-")
    assert (done.code, done.err) == (0, "")
    result = done.json
    check(result)
    assert next(iter(result)) == "schema_version"
    assert [row["method"] for row in result["rows"]] == ["full", "oscar", "occam"]
    for row in result["rows"]:
        assert {key for key, kind in ROW.items() if type(row.get(key)) is not kind} == set()
        assert (row["tokens"], row["positions"], row["generated"]["tokens"]) == (200, 59, 4)
    assert result["model"]["name"] == str(folder_of("packable"))
    assert result["model"]["dtype"] == "bfloat16"
    assert result["text"] == {"name": "words.txt", "sha256": read_text(words).sha256}
    assert (result["seed"], result["threads"], result["void"]) == (5, 1, False)
    protocol = {"windows": 1, "length": 200, "first_token": 0, "score_from": 140, "generated": 4, "prompt": 150}
    assert {key: result["protocol"][key] for key in protocol} == protocol


def test_the_table_shows_each_method_and_how_many_controls_held(evaluate):
    done = evaluate("--method", "oscar,kivi")
    assert done.code == 0
    for shown in ("full", "oscar", "kivi", "KL", "bits", "words.txt", "controls: 7 of 7 held"):
        assert shown in done.out


def test_the_file_holds_what_stdout_holds_and_no_journal_is_left(evaluate, tmp_path):
    assert evaluate("--method", "oscar", "--json", tmp_path / "result.json").code == 0
    on_stdout = evaluate("--method", "oscar", "--json", "-").json
    in_file = json.loads((tmp_path / "result.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    for field in ("rows", "controls", "text", "protocol", "model"):
        assert in_file[field] == on_stdout[field]


def test_a_page_is_written(evaluate, tmp_path):
    assert evaluate("--method", "oscar", "--html", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "oscar" in page


def test_a_stopped_run_is_taken_up_by_the_same_command(evaluate, tmp_path, monkeypatch):
    command = ("--method", "oscar,occam", "--generated", 4, "--prompt", 150, "--json", tmp_path / "result.json")
    expected = evaluate(*command[:-1], "-").json["rows"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit, AssertionError)):
        patched.setattr(suite, "greedy", stop)
        assert evaluate(*command).code == 0
    assert (tmp_path / "result.json.journal").exists()
    monkeypatch.setattr(suite, "read_together", lambda *_, **__: pytest.fail("the text was read again"))
    assert evaluate(*command).code == 0
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == expected
    assert not (tmp_path / "result.json.journal").exists()


def test_a_plan_is_measured_under_the_name_of_its_file(evaluate, tmp_path):
    config = saved_models.build("packable").config
    plan_for(config, method("oscar", pins="first:4")).save(tmp_path / "my plan.json")
    done = evaluate("--method", "oscar", "--plan", tmp_path / "my plan.json", "--json", "-")
    assert [row["method"] for row in done.json["rows"]] == ["full", "oscar", "my plan"]
    figures = {row["method"]: row["kl_mean"] for row in done.json["rows"]}
    assert 0 < figures["my plan"] != figures["oscar"]


def test_full_may_be_named_too(evaluate):
    assert [row["method"] for row in evaluate("--method", "full,oscar", "--json", "-").json["rows"]] == [
        "full",
        "oscar",
    ]


@pytest.mark.parametrize("name", ["full_agrees", "was_read_packed", "bytes_match", "flipped_bits_move_logits"])
def test_a_void_run_ends_with_1_names_the_control_and_still_writes(evaluate, tmp_path, monkeypatch, name):
    monkeypatch.setattr(controls, name, lambda *_: Control(f"broken: {name}", passed=False, told="seen by a test"))
    done = evaluate("--method", "oscar", "--json", tmp_path / "void.json", "--html", tmp_path / "void.html")
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert f"error: the run is void, a control failed: broken: {name} (seen by a test)" in done.err
    result = json.loads((tmp_path / "void.json").read_text())
    check(result)
    assert result["void"] is True
    assert [one["name"] for one in result["controls"] if not one["passed"]] == [f"broken: {name}"]
    assert (tmp_path / "void.html").exists()


@pytest.mark.parametrize("kind", ["all sliding", "no attention"])
def test_a_model_without_layers_to_pack_ends_with_3(evaluate, kind):
    done = evaluate("--method", "oscar", "--json", "-", kind=kind)
    assert complaints(done.code, done.out, done.err, words=["can be packed"], wanted_code=3) == []


OPTIONS = {
    "unknown method": (["--method", "oscr"], ["'oscr'", "did you mean 'oscar'"]),
    "unknown method behind a good one": (["--method", "occam,oscr"], ["'oscr'"]),
    "a blank between names": (["--method", "occam, oscar"], ["' oscar'"]),
    "one method twice": (["--method", "oscar,kivi,oscar"], ["oscar"]),
    "no method": (["--method", ""], ["method"]),
    "full alone": (["--method", "full"], ["method"]),
    "unknown device": (["--device", "frobnicator"], ["'frobnicator'"]),
    "unknown dtype": (["--dtype", "int8"], ["'int8'"]),
    "windows longer than the text": (["--length", "1000", "--windows", "2"], ["2000", "1500"]),
    "a window that begins behind the text": (["--first-token", "1500"], ["1500"]),
    "nothing scored": (["--score-from", "199"], ["score_from"]),
    "a window longer than the model takes": (["--length", "1100"], ["1100", "1024"]),
    "a list of words": (["--probe-lengths", "one,two"], ["'one,two'"]),
    "a length that is no whole number": (["--probe-lengths", "700.5"], ["'700.5'"]),
    "a depth that is a word": (["--probe-depths", "0,deep"], ["'0,deep'"]),
    "a depth beyond the end": (["--probes", "1", "--probe-depths", "0,1.5"], ["1.5"]),
    "an unknown kind of probe": (["--probes", "1", "--probe-kinds", "needle,haystack"], ["haystack", "needle"]),
    "probes too short": (["--probes", "1", "--probe-lengths", "5"], ["5 tokens"]),
    "chat without a template": (["--probes", "1", "--chat"], ["chat template"]),
    "longbench without datasets": (["--longbench", "/"], ["--longbench", "--datasets"]),
    "datasets without longbench": (["--datasets", "qasper"], ["--longbench", "--datasets"]),
    "an unknown dataset": (["--longbench", "/", "--datasets", "qaspr"], ["'qaspr'"]),
    "shots without a file of shots": (["--gsm8k", "PROBLEM", "--shots", "3"], ["3 shots"]),
    "json in no folder": (["--json", "/no such folder/result.json"], ["/no such folder/result.json"]),
    "json that is a folder": (["--json", "/"], ["'/'"]),
    "a page in no folder": (["--html", "/no such folder/page.html"], ["/no such folder/page.html"]),
    "a page that is a folder": (["--html", "/"], ["'/'"]),
}
PROBLEM = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
PROSE = "The old man went to the sea and looked for the boats of his friends.\n" * 120


@pytest.mark.parametrize(("args", "named"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_refused_before_anything_is_read(refused, tmp_path, args, named):
    (tmp_path / "problem.jsonl").write_text(json.dumps(PROBLEM))
    (tmp_path / "prose.txt").write_text(PROSE)
    given = [str(tmp_path / "problem.jsonl") if arg == "PROBLEM" else arg for arg in args]
    text = ["--text", tmp_path / "prose.txt"] if "--probes" in args else []
    refused(*text, *given, words=named)


MISSING = {
    "text": ["--text", "no such file"],
    "plan": ["--plan", "no such file"],
    "problems": ["--gsm8k", "no such file"],
    "shots": ["--gsm8k", "PROBLEM", "--shots-file", "no such file", "--shots", "1"],
    "longbench": ["--longbench", "no such file", "--datasets", "qasper"],
}


@pytest.mark.parametrize("args", MISSING.values(), ids=MISSING)
def test_a_file_that_does_not_exist_is_refused(refused, tmp_path, args):
    (tmp_path / "problem.jsonl").write_text(json.dumps(PROBLEM))
    refused(*[str(tmp_path / "problem.jsonl") if arg == "PROBLEM" else arg for arg in args], words=("no such file",))


@pytest.mark.parametrize("content", [b"", b" \n", b"w1 \xff w2"], ids=["empty", "blank", "no UTF-8"])
def test_a_bad_text_is_refused(refused, tmp_path, content):
    (tmp_path / "a text").write_bytes(content)
    refused("--text", tmp_path / "a text", words=("a text",))


def test_a_plan_with_the_name_of_a_method_is_refused(refused, tmp_path):
    for name in ("oscar", "full"):
        path = tmp_path / f"{name}.json"
        plan_for(saved_models.build("packable").config, "kivi").save(path)
        refused("--method", "oscar", "--plan", path, words=("name",))


def test_a_refused_command_leaves_no_journal_in_the_way_of_the_right_one(refused, evaluate, tmp_path):
    command = ("--method", "oscar", "--json", tmp_path / "result.json")
    for wrong in (["--score-from", 199], ["--length", 1100], ["--probes", 1, "--probe-kinds", "haystack"]):
        refused(*command, *wrong, words=(), early=False)
    assert evaluate(*command).code == 0


def test_the_journal_of_another_command_is_refused(refused, tmp_path):
    (tmp_path / "result.json.journal").write_text("{}\n")
    refused("--method", "oscar", "--json", tmp_path / "result.json", words=("result.json.journal", "Delete it"))


def test_a_page_without_matplotlib_is_refused_before_anything_is_read(refused, tmp_path, monkeypatch):
    import sys

    for name in [*sys.modules]:
        if name.split(".")[0] == "matplotlib" or name in ("occamkv.evals.plots", "occamkv.evals.figures"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("--method", "oscar", "--html", tmp_path / "page.html", words=("matplotlib", "pip install"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "-1") for option in ("--windows", "--length", "--first-token", "--score-from", "--generated")),
        *((option, "-1") for option in ("--prompt", "--probes", "--items", "--shots", "--seed")),
        ("--windows", "0"),
        ("--length", "many"),
        ("--seed", "9" * 20),
        ("--frobnicate", "1"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_option(evaluate, option, value):
    done = evaluate(option, value)
    assert (done.code, done.out) == (2, "")
    assert option in done.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "oscar", "--bits", "2.5"], "give it with --method auto"),
        (["--method", "auto", "--bits", "9"], "budget is 9"),
        (["--method", "auto", "--quality", "good"], "allowed: 'same-top>=95%'"),
        (["--method", "oscar", "--quality", "same-top>=95%"], "give --method auto, once"),
        (["--method", "auto", "--save-plan", "plan.json"], "give both"),
    ],
)
def test_a_budget_that_cannot_be_had_is_refused(options, told, refused):
    refused(*options, words=(told,))


def test_a_quality_finds_a_budget_and_saves_its_plan(evaluate, tmp_path):
    plan = tmp_path / "plan.json"
    done = evaluate("--method", "auto", "--quality", "same-top>=1%", "--save-plan", plan, "--json", "-")
    assert done.code == 0
    name = done.json["rows"][1]["method"]
    assert f"budget {name.removeprefix('auto_b')}: " in done.err
    reused = evaluate("--method", "", "--plan", plan, "--json", "-")
    assert reused.code == 0
    assert reused.json["rows"][1]["kl_mean"] == pytest.approx(done.json["rows"][1]["kl_mean"], rel=1e-3)
