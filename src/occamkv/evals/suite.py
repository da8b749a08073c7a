"""The whole evaluation of a model: text, generated tokens, probes and tasks, for several methods at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from occamkv import __version__
from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals import controls
from occamkv.evals.about import about_model
from occamkv.evals.fidelity import Reading, read_together, step_ends
from occamkv.evals.journal import Journal
from occamkv.evals.probes import KINDS, Probe, make_probes, run_probe
from occamkv.evals.prompts import Prompt, continue_with, greedy
from occamkv.evals.result import SCHEMA_VERSION
from occamkv.evals.rows import Outcome, make_row
from occamkv.evals.tasks import Task, run_task
from occamkv.evals.texts import Text, windows
from occamkv.integrations.transformers import plan_for
from occamkv.integrations.transformers.model import text_config
from occamkv.methods import Method

FULL = "full"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Protocol:
    """What is measured. Lengths are in tokens; zero leaves a part out.

    Args:
        windows: Windows of the text, one behind the other.
        length: Length of each.
        first_token: Where the first one begins.
        score_from: First scored position of a window.
        generated: Tokens generated after the beginning of each window.
        prompt: Length of that beginning, read in one call.
        probes: Probes for each kind, length and depth.
        probe_lengths: Lengths of their prompts.
        probe_depths: Where the answer stands, 0 to 1.
        probe_kinds: Some of `probes.KINDS`.
        task_items: Items of each task at most; 0 for all.
        chat: Put probes and tasks into the tokenizer's chat template.
        seed: Seed of probes and intervals.
    """

    windows: int = 2
    length: int = 2048
    first_token: int = 3000
    score_from: int = 512
    generated: int = 64
    prompt: int = 1024
    probes: int = 0
    probe_lengths: tuple[int, ...] = (768,)
    probe_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    probe_kinds: tuple[str, ...] = KINDS
    task_items: int = 0
    chat: bool = False
    seed: int = 0


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[Method] | Mapping[str, Plan],
    text: Text,
    protocol: Protocol,
    *,
    tasks: Sequence[Task] = (),
    journal: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what methods cost on a text, and more where the protocol says so.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        methods: Methods, or plans by name. Full precision is added as the control.
        text: What is read, and the filler of probes.
        protocol: What is measured.
        tasks: Benchmarks, see `gsm8k` and `longbench`.
        journal: Remember finished parts in this file, and take up those that it holds.
        progress: Called with the stage, what is done and what there is to do.

    Returns:
        `model`, `text`, `protocol`, `controls`, `void` and `rows`, JSON-ready (docs/eval.md).

    Raises:
        UnsupportedInput: The text is too short, a name occurs twice, or the protocol does not fit the model.
        NothingQuantized: The model has no layer that can be packed.
    """
    if not isinstance(methods, Mapping):
        names = [str(one) for one in methods]
        if len(set(names)) < len(names):
            raise UnsupportedInput(f"methods {', '.join(names)}: one occurs twice; allowed: each once.")
        methods = {name: plan_for(model.config, one) for name, one in zip(names, methods, strict=True)}
    _check_lengths(model, protocol)
    plans = {FULL: plan_for(model.config, FULL), **methods}
    cut = windows(
        text.text, tokenizer, count=protocol.windows, length=protocol.length, first_token=protocol.first_token
    )
    probes = _probes(text.text, tokenizer, protocol)
    about = {
        "model": about_model(model),
        "text": {"name": text.name, "sha256": text.sha256},
        "protocol": asdict(protocol),
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "tasks": {task.name: sha256(repr(task.items).encode()).hexdigest() for task in tasks},
        "occamkv": __version__,
    }
    run = _Run(model, tokenizer, plans, protocol, Journal(journal, about), progress or (lambda *_: None))
    outcomes = {name: Outcome() for name in plans}
    checks = run.read_text(cut, outcomes)
    run.generate(cut, outcomes)
    run.probe(probes, outcomes)
    run.solve(tasks, outcomes)
    run.journal.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "what": "occamkv eval",
        "seed": protocol.seed,
        **{key: about[key] for key in ("model", "text", "protocol")},
        "controls": checks,
        "void": not all(check["passed"] for check in checks),
        "rows": [
            make_row(name, plans[name], outcome, first=protocol.score_from, seed=protocol.seed)
            for name, outcome in outcomes.items()
        ],
    }


def _check_lengths(model: PreTrainedModel, protocol: Protocol) -> None:
    """Refuse lengths that leave nothing to score, or that are beyond the model's positions."""
    if not 0 <= protocol.score_from < protocol.length - 1:
        raise UnsupportedInput(
            f"score_from is {protocol.score_from} with windows of {protocol.length} tokens; allowed: below length - 1."
        )
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    written = min(protocol.prompt, protocol.length) + protocol.generated if protocol.generated else 0
    needed = max(protocol.length, written, *(protocol.probe_lengths if protocol.probes else ()))
    if longest is not None and needed > longest:
        raise UnsupportedInput(f"{needed} tokens are to be read; allowed: {longest}, which this model was made for.")


def _probes(text: str, tokenizer: Any, protocol: Protocol) -> list[Probe]:
    if not protocol.probes:
        return []
    return make_probes(
        text,
        kinds=protocol.probe_kinds,
        lengths=protocol.probe_lengths,
        depths=protocol.probe_depths,
        tokenizer=tokenizer,
        seed=protocol.seed,
        per_cell=protocol.probes,
        chat=protocol.chat,
    )


@dataclass
class _Run:
    """One evaluation under way."""

    model: PreTrainedModel
    tokenizer: Any
    plans: dict[str, Plan]
    protocol: Protocol
    journal: Journal
    progress: Progress

    def read_text(self, cut: Sequence[Tensor], outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
        """Read all windows through all caches; return the controls."""
        groups: dict[tuple[int, ...], dict[str, Plan]] = {}
        for name, plan in self.plans.items():  # methods that flush alike share the steps of the full cache
            groups.setdefault(tuple(step_ends(plan, start=0, end=self.protocol.length)), {})[name] = plan
        checks: dict[str, dict[str, Any]] = {}
        total, done = len(cut) * len(self.plans) * self.protocol.length, 0
        for number, ids in enumerate(cut):
            for index, group in enumerate(groups.values()):
                share = len(group)
                advance = partial(self._advance, "text", done, share, total)
                work = partial(self._read, ids, group, first=number == 0, advance=advance)
                data = self.journal.get(f"text, window {number}, group {index}", work)
                done += share * self.protocol.length
                self.progress("text", done, total)
                for name, found in data.items():
                    outcomes[name].windows.append(found)
                    for check in found["controls"]:
                        worse = checks.setdefault(check["name"], check)
                        if worse["passed"] and not check["passed"]:
                            checks[check["name"]] = check
        return list(checks.values())

    def _read(
        self, ids: Tensor, group: dict[str, Plan], *, first: bool, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        readings = read_together(
            self.model, ids, group, score_from=self.protocol.score_from, watch_layers=True, progress=advance
        )
        return {name: self._found(name, reading, ids, first=first) for name, reading in readings.items()}

    def _found(self, name: str, reading: Reading, ids: Tensor, *, first: bool) -> dict[str, Any]:
        report = reading.cache.report()
        packed = report.packed_layers
        if name == FULL:
            checks = [controls.full_agrees(reading)]
        else:
            checks = [controls.was_read_packed(name, reading), controls.bytes_match(name, reading)]
            if first:
                last = ids[:, -1:].to(self.model.device)
                checks.append(controls.flipped_bits_move_logits(name, self.model, reading, last))
        tally = reading.tally
        width = 8.0 * self.model.dtype.itemsize
        bits = [layer.bits_per_value for layer in packed if layer.bits_per_value is not None]
        held, full = (sum(getattr(layer, key) for layer in packed) for key in ("nbytes", "full_bytes"))
        return {
            "kl": torch.cat(tally.kl).tolist(),
            "same": torch.cat(tally.same).int().tolist(),
            "nll": torch.cat(tally.nll).tolist(),
            "nll_full": torch.cat(tally.nll_full).tolist(),
            "bits_per_value": sum(bits) / len(bits) if bits else width,
            "bits_with_residual": width * held / full if full else width,
            "cache_bytes": report.nbytes,
            "full_bytes": reading.full_bytes,
            "packed_layers": len(packed),
            "layers": len(report.layers),
            "tokens": ids.shape[1],
            "layer_errors": [[layer, error] for layer, error in reading.layer_errors.items()],
            "controls": [check.to_json() for check in checks],
        }

    def generate(self, cut: Sequence[Tensor], outcomes: dict[str, Outcome]) -> None:
        """Let the full cache write on after the beginning of each window, and ask each method at every token."""
        if not self.protocol.generated:
            return
        for number, ids in enumerate(cut):
            self.progress("generated tokens", number, len(cut))
            data = self.journal.get(f"generated, window {number}", partial(self._generate, ids))
            for name, found in data.items():
                outcomes[name].generated.append(found)
        self.progress("generated tokens", len(cut), len(cut))

    def _generate(self, ids: Tensor) -> dict[str, Any]:
        prompt = Prompt.read(self.model, ids[:, : self.protocol.prompt].to(self.model.device))
        tokens = greedy(self.model, prompt.cache(None), prompt.logits, self.protocol.generated)
        written = torch.tensor([tokens], device=self.model.device)
        found: dict[str, Any] = {}
        for name, plan in self.plans.items():
            expected, logits = (
                continue_with(self.model, cache, written, prompt.logits, like=plan).float().log_softmax(-1)
                for cache in (prompt.cache(None), prompt.cache(plan))
            )
            same = expected.argmax(-1) == logits.argmax(-1)
            kl = (expected.exp() * (expected - logits)).sum(-1)
            found[name] = {"kl": kl.tolist(), "same": same.int().tolist()}
        return found

    def probe(self, probes: Sequence[Probe], outcomes: dict[str, Outcome]) -> None:
        """Ask every method what was planted in the prompts."""
        plans = {name: None if name == FULL else plan for name, plan in self.plans.items()}
        for number, probe in enumerate(probes):
            self.progress("probes", number, len(probes))
            results = self.journal.get(f"probe {number}", partial(self._ask, probe, plans))
            for result in results:
                outcomes[result["method"]].probes.append(result)
        if probes:
            self.progress("probes", len(probes), len(probes))

    def _ask(self, probe: Probe, plans: Mapping[str, Plan | None]) -> list[dict[str, Any]]:
        return [asdict(result) for result in run_probe(self.model, self.tokenizer, probe, plans)]

    def solve(self, tasks: Sequence[Task], outcomes: dict[str, Outcome]) -> None:
        """Let every method solve every task."""
        limit = self.protocol.task_items or None
        for task in tasks:
            items = len(task.items[:limit])
            for number, (name, plan) in enumerate(self.plans.items()):
                advance = partial(self._advance, task.name, number * items, 1, items * len(self.plans))
                work = partial(self._solve, task, None if name == FULL else plan, limit, advance)
                outcomes[name].tasks.append(self.journal.get(f"task {task.name}, {name}", work))

    def _solve(
        self, task: Task, plan: Plan | None, limit: int | None, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        result = run_task(
            self.model, self.tokenizer, task, plan, limit=limit, chat=self.protocol.chat, progress=advance
        )
        return result.to_json()

    def _advance(self, stage: str, before: int, share: int, total: int, at: int) -> None:
        self.progress(stage, before + share * at, total)
