"""`occamkv run --receipt`: the file, the page, the sentence on the terminal, and how it ends."""

import json
import re

import pytest

from occamkv.evals import controls
from occamkv.evals.receipt import read_receipt

NEW = 40


@pytest.fixture
def run(occamkv, folder_of, prompt_of):
    def run_it(*args: object, tokens: int = 300, kind: str = "packable"):
        return occamkv("run", folder_of(kind), "--prompt-file", prompt_of(tokens), "--max-new-tokens", NEW, *args)

    return run_it


def test_the_receipt_is_written_checked_drawn_and_said(run, tmp_path):
    path, page = tmp_path / "receipt.json", tmp_path / "receipt.html"
    done = run("--receipt", path, "--receipt-html", page, "--verify-fraction", 0.5, "--json", tmp_path / "run.json")
    assert done.code == 0, done.err
    receipt, report = read_receipt(path), json.loads((tmp_path / "run.json").read_text())
    assert f"receipt: {receipt['verdict']}" in done.out
    assert re.search("verified: 2 of 2 packed layers, (19|20) steps", done.out)
    assert receipt["sha256"] in page.read_text()
    for field, own in (("fidelity", "fidelity"), ("prompt_tokens", ("prompt", "tokens"))):
        assert report[field] == (receipt[own] if isinstance(own, str) else receipt[own[0]][own[1]])
    cache = report["cache"]
    assert [receipt["bytes"][key] for key in ("computed", "cache", "full")] == [
        cache[key] for key in ("computed_bytes", "measured_bytes", "computed_full_bytes")
    ]
    assert receipt["live"] == report["report"]["verification"]
    assert (receipt["live"]["fraction"], receipt["void"]) == (0.5, False)
    assert {"date", "command", "machine", "threads", "versions"} <= receipt["conditions"].keys()


def test_with_a_receipt_one_step_in_16_is_verified_and_the_text_and_kl_stay(run, tmp_path):
    alone, proven = run("--json", "-"), run("--json", "-", "--receipt", tmp_path / "receipt.json")
    receipt = read_receipt(tmp_path / "receipt.json")
    assert receipt["live"]["fraction"] == 1 / 16
    assert receipt["live"]["steps"] in (2, 3)
    for field in ("text", "fidelity", "cache"):
        assert alone.json[field] == proven.json[field]
    assert alone.json["report"]["verification"] is None


def test_a_fraction_alone_verifies_without_a_receipt(run):
    done = run("--verify-fraction", 1)
    assert done.code == 0
    assert f"verified: 2 of 2 packed layers, {NEW - 1} steps" in done.out
    assert "receipt:" not in done.out
    assert "verif" not in run().out


def test_fewer_layers_can_be_verified(run):
    assert "verified: 1 of 2 packed layers, " in run("--verify-layers", 1).out


def test_layers_that_are_not_packed_are_in_the_receipt_with_their_reason(run, tmp_path):
    assert run("--receipt", tmp_path / "r.json", "--verify-fraction", 1, kind="half sliding").code == 0
    sliding, packed = read_receipt(tmp_path / "r.json")["layers"]
    assert "window of 32 tokens" in sliding["reason"] and sliding["live"] is None
    assert packed["live"]["steps"] == NEW - 1


def test_a_void_receipt_is_written_and_ends_with_1(run, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "_flipper", lambda index: lambda cache: None)
    done = run("--receipt", tmp_path / "r.json")
    assert (done.code, read_receipt(tmp_path / "r.json")["void"]) == (1, True)
    assert "Void: " in done.err and "receipt:" not in done.out


@pytest.mark.parametrize(
    ("tokens", "more", "told"),
    [
        (20, (), "Nothing is proven: nothing was packed"),
        (200, (), "was not measured (the prompt has 200 tokens"),
        (300, ("--no-check",), "was not measured (not asked for (--no-check))"),
    ],
)
def test_what_is_missing_is_said(run, tmp_path, tokens, more, told):
    done = run("--receipt", tmp_path / "r.json", *more, tokens=tokens)
    assert (done.code, told in re.sub(r"\s+", " ", done.out)) == (0, True)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--receipt", "/no/such/folder/r.json"), "cannot write"),
        (("--verify-fraction", "0"), "above 0 to 1"),
        (("--verify-fraction", "1.5"), "above 0 to 1"),
        (("--verify-layers", "0"), "from 1 on"),
        (("--method", "full", "--verify-fraction", "1"), "no layer of this cache is packed"),
        (("--window", "256", "--receipt", "r.json"), "Leave out --window, or --receipt"),
        (("--window", "256", "--verify-layers", "2"), "Leave out --window, or --receipt"),
    ],
)
def test_bad_input_ends_with_2(run, args, told):
    done = run(*args)
    assert (done.code, told in done.err) == (2, True)
