"""The whole evaluation on a tiny model, against plain runs, loops and float64 sums of our own."""

import functools
import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saved_models
from occamkv import PackedCache, method
from occamkv.errors import NothingQuantized, UnsupportedInput
from occamkv.evals import controls, suite
from occamkv.evals.controls import Control
from occamkv.evals.fidelity import step_ends
from occamkv.evals.result import check
from occamkv.evals.suite import Protocol, evaluate
from occamkv.evals.tasks import Grade, Item, Task
from occamkv.evals.texts import Text
from occamkv.integrations.transformers import plan_for

FIRST, LENGTH, PROMPT, GENERATED = 10, 300, 200, 24
PROTOCOL = Protocol(
    windows=2, length=LENGTH, first_token=FIRST, score_from=150, generated=GENERATED, prompt=PROMPT, seed=3
)
TEXT = Text("words", saved_models.text(1500))
METHODS = ("oscar", "kivi", "occam", "ott")
CONDITIONS = {
    "command": "",
    "date": "",
    "machine": "",
    "threads": 1,
    "versions": dict.fromkeys(("occamkv", "torch", "transformers", "python"), ""),
}


@functools.cache
def model(kind: str = "packable"):
    return saved_models.build(kind)


def run(*names: str, protocol: Protocol = PROTOCOL, kind: str = "packable", **options: Any) -> dict[str, Any]:
    chosen = [method(name) for name in names]
    return evaluate(model(kind), saved_models.tokenizer(), chosen, TEXT, protocol, **options)


@functools.cache
def together() -> dict[str, Any]:
    return run(*METHODS)


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result["rows"]}


def window(number: int) -> Tensor:
    at = FIRST + number * LENGTH
    return saved_models.tokenizer()(TEXT.text, return_tensors="pt").input_ids[:, at : at + LENGTH]


@torch.no_grad()
def logits(ids: Tensor, cache: DynamicCache, ends: list[int]) -> np.ndarray:
    """Read a text in these steps with plain calls; float64 `[T, vocabulary]`."""
    steps = itertools.pairwise([0, *ends])
    return torch.cat([model()(ids[:, a:b], past_key_values=cache).logits[0] for a, b in steps]).double().numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def by_hand(name: str, score_from: int = PROTOCOL.score_from) -> dict[str, Any]:
    """Return the figures of a method over both windows, from two plain runs."""
    plan = plan_for(model().config, name)
    ends = step_ends(plan, start=0, end=LENGTH)
    kl, same, nll, nll_full = [], [], [], []
    for number in range(PROTOCOL.windows):
        ids = window(number)
        p = log_softmax(logits(ids, DynamicCache(config=model().config), ends))[score_from:-1]
        q = log_softmax(logits(ids, PackedCache(model(), plan=plan), ends))[score_from:-1]
        at = np.arange(len(p)), ids[0, score_from + 1 :].numpy()
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        nll.append(-q[at])
        nll_full.append(-p[at])
    kl, same, nll, nll_full = (np.concatenate(x) for x in (kl, same, nll, nll_full))
    return {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "same_top": same.mean(),
        "perplexity": np.exp(nll.mean()),
        "perplexity_full": np.exp(nll_full.mean()),
        "positions": len(kl),
    }


@pytest.mark.parametrize("name", METHODS)
def test_figures_are_those_of_two_plain_runs(name):
    row = rows(together())[name]
    assert {key: row[key] for key in by_hand(name)} == pytest.approx(by_hand(name), rel=1e-4, abs=1e-6)


def test_another_method_or_other_positions_have_other_figures():
    right = by_hand("oscar")
    for other in (by_hand("kivi"), by_hand("oscar", PROTOCOL.score_from + 1)):
        assert other != pytest.approx(right, rel=1e-4, abs=1e-6)


def test_full_precision_costs_exactly_nothing():
    full = rows(together())["full"]
    assert together()["rows"][0] is full
    figures = [full[key] for key in ("kl_mean", "kl_median", "kl_p99", "same_top")]
    assert figures == [0, 0, 0, 1]
    assert full["perplexity"] == full["perplexity_full"]
    assert full["cache_bytes"] == full["full_bytes"]
    assert full["generated"]["agreement_length_mean"] == GENERATED
    assert {one["kl"] for one in full["kl_by_position"] + full["generated"]["kl_by_index"]} == {0}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_figures_that_it_has_alone(name):
    assert rows(run(name))[name] == rows(together())[name]


def test_positions_of_all_windows_are_in_one_bin_each():
    first, last = PROTOCOL.score_from, LENGTH - 2
    for row in together()["rows"]:
        found = row["kl_by_position"]
        assert [p for one in found for p in range(one["first"], one["last"] + 1)] == [*range(first, last + 1)]
        assert sum(one["count"] for one in found) == row["positions"] == 2 * (last + 1 - first)
        mean = sum(one["kl"] * one["count"] for one in found) / row["positions"]
        assert mean == pytest.approx(row["kl_mean"])


@torch.no_grad()
def continuation(number: int, cache: DynamicCache) -> list[int]:
    """Read the beginning of a window in one call and let the model write on, token by token."""
    ids, tokens = window(number)[:, :PROMPT], []
    while len(tokens) < GENERATED:
        ids = model()(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_own_text_leaves_that_of_the_full_cache_where_agreement_ends(name):
    lengths = []
    for number in range(PROTOCOL.windows):
        full = continuation(number, DynamicCache(config=model().config))
        own = continuation(number, PackedCache(model(), name))
        lengths.append(next((i for i, (a, b) in enumerate(zip(full, own, strict=True)) if a != b), GENERATED))
    assert rows(together())[name]["generated"]["agreement_length_mean"] == np.mean(lengths)
    assert 0 < min(lengths) < GENERATED


def test_the_result_fits_the_schema_and_survives_json():
    result = json.loads(json.dumps(together()))
    check(result | CONDITIONS)
    assert (result["what"], result["seed"], result["void"]) == ("occamkv eval", 3, False)
    assert result["text"] == {"name": "words", "sha256": TEXT.sha256}
    assert [row["method"] for row in result["rows"]] == ["full", *METHODS]
    assert (result["protocol"]["length"], result["protocol"]["score_from"]) == (LENGTH, 150)
    about = result["model"]
    assert (about["layers"], about["kv_heads"], about["head_dim"], about["dtype"]) == (2, 2, 32, "float32")


@pytest.mark.parametrize("name", METHODS)
def test_bits_and_bytes_are_those_of_the_formulas(name):
    row, sizes = rows(together())[name], {"kv_heads": 2, "head_dim": 32}
    chosen = method(name)
    full_bytes = 2 * 2 * LENGTH * 2 * 32 * 4
    assert row["full_bytes"] == full_bytes
    assert row["bits_with_residual"] == pytest.approx(32 * row["cache_bytes"] / full_bytes)
    if not chosen.finds_pins:
        assert row["bits_per_value"] == chosen.bits_per_value(**sizes)
        assert row["cache_bytes"] == 2 * chosen.nbytes(LENGTH, **sizes, dtype_bytes=4)


def test_each_control_is_there_once_and_holds():
    names = [one["name"] for one in together()["controls"]]
    assert len(names) == len(set(names)) == 1 + 3 * len(METHODS)
    assert all(one["passed"] for one in together()["controls"])


@pytest.mark.parametrize("failing", [0, 1], ids=["in the first window", "in the second window"])
def test_a_control_that_fails_in_any_window_makes_the_run_void(monkeypatch, failing):
    seen = []

    def told(name: str, _reading: Any) -> Control:
        seen.append(name)
        return Control(f"{name}: bytes", len(seen) - 1 != failing, f"window {len(seen)}")

    monkeypatch.setattr(controls, "bytes_match", told)
    result = run("oscar")
    assert result["void"]
    assert [one for one in result["controls"] if not one["passed"]] == [
        {"name": "oscar: bytes", "passed": False, "told": f"window {failing + 1}"}
    ]


def test_windows_too_short_to_pack_are_void():
    assert run("oscar", protocol=Protocol(windows=1, length=100, first_token=0, score_from=50, generated=0))["void"]


def test_layers_that_are_not_packed_do_not_count():
    row = rows(run("oscar", kind="half sliding"))["oscar"]
    assert (row["packed_layers"], row["layers"], [one["layer"] for one in row["layer_errors"]]) == (1, 2, [1])


def test_plans_keep_the_names_that_they_are_given():
    plan = plan_for(model().config, method("oscar", pins="first:4"))
    result = evaluate(model(), saved_models.tokenizer(), {"a plan of mine": plan}, TEXT, PROTOCOL)
    row = rows(result)["a plan of mine"]
    assert 0 < row["kl_mean"] != rows(together())["oscar"]["kl_mean"]
    assert not result["void"]


def test_one_method_twice_is_refused():
    with pytest.raises(UnsupportedInput, match="occurs twice"):
        run("oscar", "kivi", "oscar")


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(UnsupportedInput, match="the text has 1500"):
        run("oscar", protocol=Protocol(windows=2, length=800, score_from=100))


def test_a_model_without_layers_to_pack_is_refused():
    with pytest.raises(NothingQuantized):
        run("oscar", kind="all sliding")


def test_progress_goes_up_to_its_total_in_every_stage():
    seen: dict[str, list[tuple[int, int]]] = {}
    run("oscar", "occam", progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert set(seen) == {"text", "generated tokens"}
    for steps in seen.values():
        done, totals = zip(*steps, strict=True)
        assert list(done) == sorted(done)
        assert {done[-1]} == set(totals)


PROSE = " ".join(f"The {i} old man went to the sea and looked for the boats of his friends." for i in range(80))
WITH_PROBES = Protocol(
    windows=1,
    length=150,
    first_token=0,
    score_from=10,
    generated=0,
    probes=2,
    probe_lengths=(200,),
    probe_depths=(0.0, 1.0),
    probe_kinds=("quote",),
    task_items=3,
)
TASK = Task("four questions", tuple(Item(str(i), f"w{i} w{i + 1}", ("w1",)) for i in range(4)), lambda *_: GRADE, 5)
GRADE = Grade({"mine": 0.5}, valid=False)


def with_probes(**options: Any) -> dict[str, Any]:
    text = Text("prose", PROSE)
    return evaluate(model(), saved_models.tokenizer(), [method("oscar")], text, WITH_PROBES, tasks=[TASK], **options)


def test_probes_and_tasks_are_asked_of_every_method():
    result = with_probes()
    check(result | CONDITIONS)
    for row in result["rows"]:
        probes, (task,) = row["probes"], row["tasks"]
        assert [(cell["depth"], cell["count"]) for cell in probes["cells"]] == [(0.0, 2), (1.0, 2)]
        assert (task["task"], task["count"], task["score"], task["invalid"]) == ("four questions", 3, 0.5, 3)
        assert task["generated_mean"] == 5
    full, oscar = (row["probes"]["logprob"] for row in result["rows"])
    assert full != oscar
    assert "generated" not in result["rows"][0]


class Stop(Exception):
    """What stops a run."""


def count_work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls that do the work."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(suite, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(suite, name, call)

    for name in ("read_together", "greedy", "run_probe", "run_task"):
        counted(name)
    return counts


def stop_at(stage: str, done: int) -> Any:
    def progress(at: str, now: int, _total: int) -> None:
        if (at, now) == (stage, done):
            raise Stop

    return progress


STOPS = {
    "in the second group": (stop_at("text", 2 * LENGTH + 132), {"read_together": 3, "greedy": 2}),
    "in the second window": (stop_at("text", 3 * LENGTH + 2 * 128), {"read_together": 2, "greedy": 2}),
    "before the second continuation": (stop_at("generated tokens", 1), {"greedy": 1}),
    "at the very end": (stop_at("generated tokens", 2), {}),
}


@functools.cache
def uninterrupted() -> dict[str, Any]:
    return run("oscar", "occam")


@pytest.mark.parametrize(("progress", "left"), STOPS.values(), ids=STOPS)
def test_a_run_that_was_stopped_goes_on_where_it_was(monkeypatch, tmp_path, progress, left):
    expected, path = uninterrupted(), tmp_path / "run.journal"
    with pytest.raises(Stop):
        run("oscar", "occam", journal=path, progress=progress)
    counts = count_work(monkeypatch)
    assert run("oscar", "occam", journal=path) == expected
    assert counts == left
    assert not path.exists()


def test_stopped_probes_and_tasks_go_on_too(monkeypatch, tmp_path):
    expected, path = with_probes(), tmp_path / "run.journal"
    for progress in (stop_at("probes", 2), stop_at("four questions", 4)):
        with pytest.raises(Stop):
            with_probes(journal=path, progress=progress)
    counts = count_work(monkeypatch)
    assert with_probes(journal=path) == expected
    assert counts == {"run_task": 1}


def test_a_run_that_was_killed_while_it_wrote_goes_on_too(monkeypatch, tmp_path):
    expected, path = uninterrupted(), tmp_path / "run.journal"
    with pytest.raises(Stop):
        run("oscar", "occam", journal=path, progress=stop_at("generated tokens", 1))
    path.write_bytes(path.read_bytes()[:-20])
    counts = count_work(monkeypatch)
    assert run("oscar", "occam", journal=path) == expected
    assert counts == {"greedy": 2}


OTHER_RUNS = {
    "another protocol": {"protocol": Protocol(**{**vars(PROTOCOL), "score_from": 151})},
    "another method": {"names": ("oscar", "kivi")},
    "another model": {"kind": "half sliding"},
    "a task more": {"tasks": [TASK]},
}


@pytest.mark.parametrize("change", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_the_journal_of_another_run_is_refused(tmp_path, change):
    path = tmp_path / "run.journal"
    with pytest.raises(Stop):
        run("oscar", "occam", journal=path, progress=stop_at("text", 2 * LENGTH))
    options = {"names": ("oscar", "occam"), **change}
    with pytest.raises(UnsupportedInput, match="a run with other settings"):
        run(*options.pop("names"), journal=path, **options)
