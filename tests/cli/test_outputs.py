"""Files that commands write: stdout holds JSON alone, and a place that cannot be written ends with one line and 2."""

import json
from pathlib import Path

import pytest

import saved_models
from one_line_error import complaints

FULL = Path("/dev/full")  # opens for writing, and then has no space left
CONFIG = Path(__file__).parents[1] / "configs" / "llama-3.1-8b.json"


@pytest.fixture
def verb_of(occamkv, folder_of, tmp_path):
    """Run a verb on a small model with a text where it needs one."""
    (tmp_path / "words.txt").write_text(saved_models.text(300))

    def run(verb, *options):
        text = {"analyze": ["--text"], "run": ["--max-new-tokens", 2, "--raw", "--prompt-file"]}.get(verb)
        model = CONFIG if verb == "plan" else folder_of("packable")
        return occamkv(verb, model, *([] if text is None else [*text, tmp_path / "words.txt"]), *options)

    return run


FILES = {"plan": ("--plan", "--plot"), "analyze": ("--plan", "--html"), "run": ("--receipt", "--receipt-html")}
EVERY = [(verb, option) for verb, options in FILES.items() for option in options]


@pytest.mark.parametrize(("verb", "option"), EVERY)
def test_stdout_is_json_alone_whatever_else_is_written(verb_of, tmp_path, verb, option):
    path = tmp_path / "written.png"
    done = verb_of(verb, "--json", "-", option, path)
    assert done.code == 0
    assert "schema_version" in json.loads(done.out)
    assert path.stat().st_size


@pytest.mark.parametrize(("verb", "option"), EVERY)
def test_only_json_goes_to_stdout(verb_of, tmp_path, monkeypatch, verb, option):
    monkeypatch.chdir(tmp_path)
    done = verb_of(verb, option, "-")
    assert complaints(done.code, done.out, done.err, words=["'-'", "--json -"]) == []
    assert not Path("-").exists()


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("verb", "option"), [pair for pair in EVERY if pair[1] != "--plot"])
def test_a_file_that_cannot_be_written_in_the_end_is_one_line(verb_of, verb, option):
    done = verb_of(verb, option, FULL)
    assert (done.code, done.err) == (2, f"error: cannot write '{FULL}': No space left on device\n")
