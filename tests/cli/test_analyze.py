"""`occamkv analyze`: its JSON, its table, its plan, and one line for every bad input."""

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saved_models
from occamkv.analysis import measure
from occamkv.cache import Plan
from occamkv.evals.texts import read_text
from one_line_error import complaints

FIELDS = ("date", "command", "machine", "threads", "versions", "model", "text", "bos", "tokens", "headline", "layers")


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(saved_models.text(400))
    return path


@pytest.fixture
def analyze(occamkv, folder_of, words):
    """Run the command on a tiny model and the text of words."""

    def run(*args: object, kind: str = "half sliding") -> Any:
        return occamkv("analyze", folder_of(kind), "--text", words, *args)

    return run


@pytest.fixture
def refused(analyze):
    def check(*args: object, words: tuple[str, ...], code: int = 2, kind: str = "half sliding") -> None:
        done = analyze(*args, kind=kind)
        assert complaints(done.code, done.out, done.err, words=words, wanted_code=code) == []

    return check


def test_stdout_is_json_alone(analyze, folder_of, words):
    done = analyze("--json", "-", "--method", "oscar")
    assert (done.code, done.err) == (0, "")
    result = done.json
    assert (next(iter(result)), result["schema_version"], result["kind"]) == ("schema_version", 1, "analysis")
    assert not set(FIELDS) - set(result)
    assert (result["model"], result["tokens"], result["base_method"]) == (str(folder_of("half sliding")), 400, "oscar")
    assert result["text"] == {"name": "words.txt", "sha256": read_text(words).sha256}
    assert [layer["kind"] for layer in result["layers"]] == ["sliding window of 32 tokens", "full attention"]


def test_the_table_shows_each_layer_its_advice_and_the_headline(analyze):
    done = analyze()
    assert done.code == 0
    told = json.loads(analyze("--json", "-").out)
    for shown in (*told["headline"], "sliding window of 32 tokens", "rotation gain", "pins", told["bos"]["told"]):
        assert shown in done.out


def test_the_plan_can_be_run(analyze, occamkv, folder_of, prompt_of, tmp_path):
    assert analyze("--plan", tmp_path / "plan.json", "--json", tmp_path / "result.json").code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert Plan.load(tmp_path / "plan.json").to_json() == result["plan"]
    done = occamkv(
        *("run", folder_of("half sliding"), "--prompt-file", prompt_of(300), "--max-new-tokens", 2),
        *("--plan", tmp_path / "plan.json", "--json", "-"),
    )
    assert done.json["cache"]["packed_layers"] == 1


def test_only_some_layers_and_tokens(analyze):
    result = analyze("--layers", "1", "--tokens", 300, "--json", "-").json
    assert [layer["index"] for layer in result["layers"]] == [1]
    assert (result["tokens"], len(result["plan"]["layers"])) == (300, 2)


def test_the_first_token_is_added_where_the_tokenizer_adds_it(analyze, copy_of, occamkv, words):
    plain = analyze("--json", "-").json["bos"]
    assert (plain["added"], plain["token"]) == (False, "<s>")
    assert "does not put it before a text" in plain["told"]
    folder = copy_of("half sliding")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(data))
    result = occamkv("analyze", folder, "--text", words, "--json", "-").json
    assert (result["bos"]["added"], result["tokens"]) == (True, 401)
    assert "'<s>' was put before the text" in result["bos"]["told"]


def test_a_page_shows_one_analysis_or_several_side_by_side(analyze, tmp_path):
    assert analyze("--method", "oscar", "--json", tmp_path / "oscar.json").code == 0
    assert analyze("--html", tmp_path / "one.html").code == 0
    assert analyze("--html", tmp_path / "two.html", "--compare", tmp_path / "oscar.json").code == 0
    one, two = ((tmp_path / name).read_text() for name in ("one.html", "two.html"))
    assert one.lower().startswith("<!doctype html>")
    assert ("oscar" in one, "oscar" in two) == (False, True)


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"schema_version": 1, "kind": "attend"}'])
def test_an_analysis_that_is_none_is_refused_before_a_model_is_read(refused, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    refused("--html", tmp_path / "page.html", "--compare", tmp_path / "other.json", words=("analy",))
    assert not (tmp_path / "page.html").exists()


def test_a_page_without_matplotlib_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("--html", tmp_path / "page.html", words=("matplotlib", "pip install"))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--method", "oscr"], ("'oscr'", "did you mean 'oscar'")),
        (["--method", "auto"], ("'auto'", "chooses itself")),
        (["--method", "full"], ("'full'", "packs nothing")),
        (["--layers", "one"], ("'one'",)),
        (["--text", "no such file"], ("no such file",)),
        (["--device", "frobnicator"], ("'frobnicator'",)),
        (["--json", "/no such folder/result.json"], ("/no such folder/result.json",)),
        (["--save-trace", "/no such folder/trace"], ("/no such folder/trace",)),
        (["--html", "/no such folder/page.html"], ("/no such folder/page.html",)),
        (["--html", "page.html", "--compare", "no such file"], ("no such file",)),
        (["--compare", "other.json"], ("--html",)),
        (["--plan", "/no such folder/plan.json"], ("/no such folder/plan.json",)),
        (["--tokens", "1100"], ("1100", "1024")),
        (["--layers", "0,7"], ("[7]", "0 to 1")),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_before_anything_is_measured(refused, monkeypatch, args, named):
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("a layer was measured first"))
    refused(*args, words=named)


def test_a_text_that_is_too_short_is_refused(refused, tmp_path):
    (tmp_path / "short.txt").write_text(saved_models.text(255))
    refused("--text", tmp_path / "short.txt", words=("255 tokens", "256"))


def test_fewer_tokens_than_can_be_packed_are_wrong_usage(analyze):
    done = analyze("--tokens", 255)
    assert (done.code, done.out) == (2, "")
    assert "--tokens" in done.err


def test_a_model_without_attention_ends_with_3(refused):
    refused(words=("can be packed",), code=3, kind="no attention")


def test_what_can_be_measured_where_nothing_can_be_packed_is_shown_and_ends_with_3(analyze, tmp_path):
    done = analyze(
        "--json", "-", "--html", tmp_path / "page.html", "--plan", tmp_path / "plan.json", kind="all sliding"
    )
    assert complaints(done.code, "", done.err, words=("can be packed",), wanted_code=3) == []
    assert done.json["headline"][-1].startswith("Nothing can be packed: sliding window")
    assert [layer["packs"] for layer in done.json["layers"]] == [False, False]
    assert "Nothing can be packed" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "plan.json").exists()


def test_a_saved_trace_gives_the_same_analysis_without_weights(analyze, occamkv, copy_of, tmp_path):
    path = tmp_path / "prompt.trace.safetensors"
    seen = analyze("--save-trace", path, "--json", "-").json
    folder = copy_of("half sliding")
    (folder / "model.safetensors").unlink()
    read = occamkv("analyze", folder, "--trace", path, "--json", "-").json
    for name in ("layers", "headline", "plan", "tokens", "panels"):
        assert read[name] == seen[name]
    assert (read["text"]["name"], read["bos"]["told"]) == (path.name, "The trace begins with 'w9'.")


def test_a_trace_of_another_model_or_beside_a_text_is_refused(analyze, occamkv, folder_of, tmp_path):
    path = tmp_path / "prompt.trace.safetensors"
    assert analyze("--save-trace", path, "--layers", "1").code == 0
    done = occamkv("analyze", folder_of("packable"), "--trace", path)
    assert complaints(done.code, done.out, done.err, words=("the trace is of gemma3_text", "llama")) == []
    done = analyze("--trace", path, "--layers", "1")
    assert complaints(done.code, done.out, done.err, words=("--text, --layers and --trace",)) == []
    (tmp_path / "empty").touch()
    done = occamkv("analyze", folder_of("packable"), "--trace", tmp_path / "empty")
    assert complaints(done.code, done.out, done.err, words=("empty",)) == []


def test_a_tokenizer_of_another_model_is_refused(occamkv, copy_of, words):
    folder = copy_of("packable")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["w9"] = 1000
    path.write_text(json.dumps(data))
    done = occamkv("analyze", folder, "--text", words)
    assert complaints(done.code, done.out, done.err, words=("token 1000", "knows 96")) == []


def test_activations_that_are_not_numbers_are_refused(occamkv, copy_of, words):
    folder = copy_of("packable")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = occamkv("analyze", folder, "--text", words)
    assert complaints(done.code, done.out, done.err, words=("V of layer 1", "NaN")) == []
