"""`occamkv inspect`: what a file is, whether a receipt is as it was written, and one line for all else."""

import json

import pytest

import saved_models
from occamkv.evals.receipt import seal
from one_line_error import complaints


@pytest.fixture(scope="module")
def files(tmp_path_factory, folder_of):
    """Files that the verbs wrote, by what they are."""
    from typer.testing import CliRunner

    from occamkv.cli.app import app

    folder = tmp_path_factory.mktemp("files")
    (folder / "words").write_text(saved_models.text(300))
    made = {name: folder / name for name in ("receipt", "plan", "analysis", "trace", "run")}
    given = {
        "run": ("--prompt-file", folder / "words", "--max-new-tokens", 4, "--receipt", made["receipt"], "--json"),
        "analyze": ("--text", folder / "words", "--plan", made["plan"], "--save-trace", made["trace"], "--json"),
    }
    for verb, last in (("run", made["run"]), ("analyze", made["analysis"])):
        args = [verb, folder_of("half sliding"), *given[verb], last]
        assert CliRunner().invoke(app, [str(arg) for arg in args]).exit_code == 0
    return made


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("receipt", ("gemma3_text", "prompt of 300 tokens, 4 generated", "all 5 controls held", "The seal holds")),
        ("plan", ("1 of 2 layers are packed", "layer 0: full precision (sliding window", "layer 1: occam, pins ")),
        ("analysis", ("analysis of ", "300 tokens of words", "Advice: ")),
        ("trace", ("trace of gemma3_text", "300 tokens", "2 of 2 layers, with Q, K, V, hidden, received")),
    ],
)
def test_a_file_is_told_in_a_few_lines(occamkv, files, kind, told):
    done = occamkv("inspect", files[kind])
    assert (done.code, done.err) == (0, "")
    assert [words for words in told if words not in done.out] == []
    assert len(done.out.splitlines()) < 6


def changed(files, tmp_path, change, *, sealed):
    data = json.loads(files["receipt"].read_text()) | change
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(seal(data) if sealed else data))
    return path


def test_a_receipt_that_was_edited_ends_with_1(occamkv, files, tmp_path):
    done = occamkv("inspect", changed(files, tmp_path, {"verdict": "all is fine"}, sealed=False))
    assert complaints(done.code, done.out, done.err, words=["changed after it was written"], wanted_code=1) == []
    assert occamkv("inspect", changed(files, tmp_path, {}, sealed=False)).code == 0


def test_a_void_receipt_ends_with_1_and_one_of_another_version_with_2(occamkv, files, tmp_path):
    done = occamkv("inspect", changed(files, tmp_path, {"void": True, "verdict": "Void: x."}, sealed=True))
    assert complaints(done.code, "", done.err, words=["Void: x."], wanted_code=1) == []
    assert "prompt of 300 tokens" in done.out
    done = occamkv("inspect", changed(files, tmp_path, {"schema_version": 2}, sealed=True))
    assert complaints(done.code, done.out, done.err, words=["schema_version is 2"]) == []


@pytest.mark.parametrize(
    "content", ["", "words", "[1]", "{}", "[" * 100_000, '{"what": "a list"}', "\xff", '{"kind": []}']
)
def test_what_is_none_of_these_is_refused(occamkv, tmp_path, content):
    (tmp_path / "some file").write_text(content, encoding="latin-1")
    done = occamkv("inspect", tmp_path / "some file")
    assert complaints(done.code, done.out, done.err, words=["some file", "--receipt"]) == []


def test_other_files_are_refused_with_what_they_lack(occamkv, files, folder_of, tmp_path):
    for path in (files["run"], tmp_path, tmp_path / "no such file", folder_of("packable") / "model.safetensors"):
        done = occamkv("inspect", path)
        assert complaints(done.code, done.out, done.err, words=[path.name]) == []
    data = json.loads(files["plan"].read_text())
    data["layers"][1]["method"] = "occm"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    done = occamkv("inspect", tmp_path / "plan.json")
    assert complaints(done.code, done.out, done.err, words=["did you mean 'occam'"]) == []
