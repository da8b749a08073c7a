"""What `occamkv run` does: load, generate with a packed cache, time it, and compare it with the full cache."""

from __future__ import annotations

import inspect
import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO, cast

import torch
import transformers
from jinja2 import TemplateError
from rich.progress import Progress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, TextStreamer

from occamkv import __version__
from occamkv.cache import CacheReport, Plan
from occamkv.cli import models
from occamkv.cli.conditions import conditions
from occamkv.cli.memory import Memory, Watch
from occamkv.errors import NothingQuantized, UnsupportedInput
from occamkv.evals import Fidelity
from occamkv.evals.receipt import SecondPass, receipt, second_pass
from occamkv.formats import PAGE_TOKENS
from occamkv.integrations.transformers import PackedCache, Verify
from occamkv.integrations.transformers.model import text_config, use_attention
from occamkv.methods import Method


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    model: str
    text: str
    chat: bool | None
    method: Method
    plan: Plan | None
    min_tokens: int
    device: str
    dtype: str
    max_new_tokens: int
    temperature: float
    seed: int
    scored_tokens: int
    verify: Verify | None = None
    receipt: bool = False


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a generation; `decode` is None for a single token."""

    prefill: float
    decode: float | None

    @staticmethod
    def of(times: list[float], *, started: float, prompt: int) -> Speed:
        """Return the speed of a generation whose prompt and tokens came at these times, in seconds."""
        new = len(times) - 1
        decode = (new - 1) / (times[-1] - times[1]) if new > 1 else None
        return Speed(prompt / (times[1] - started), decode)


@dataclass(frozen=True)
class Outcome:
    """What happened."""

    settings: Settings
    dtype: str
    prompt_tokens: int
    text: str
    new_tokens: int
    speed: Speed
    memory: Memory
    report: CacheReport
    computed_bytes: int
    computed_full_bytes: int
    fidelity: Fidelity | None
    fidelity_skipped: str | None
    measured_full_bytes: int | None
    full_speed: Speed | None
    receipt: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-ready data."""
        packed = self.report.packed_layers
        tokens = self.prompt_tokens + self.new_tokens - 1
        bits = [layer.bits_per_value for layer in packed if layer.bits_per_value]
        held, full = sum(layer.nbytes for layer in packed), sum(layer.full_bytes for layer in packed)
        width = 8 * getattr(torch, self.dtype).itemsize
        return {
            "schema_version": 1,
            "command": sys.argv[1:],
            "versions": {
                "occamkv": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "model": self.settings.model,
            "method": str(self.settings.method) if self.settings.plan is None else "plan",
            "device": self.settings.device,
            "dtype": self.dtype,
            "seed": self.settings.seed,
            "backend": next((layer.backend for layer in packed if layer.backend), None),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "text": self.text,
            "prefill_tokens_per_s": self.speed.prefill,
            "decode_tokens_per_s": self.speed.decode,
            "full_cache": None
            if self.full_speed is None
            else {"prefill_tokens_per_s": self.full_speed.prefill, "decode_tokens_per_s": self.full_speed.decode},
            "rss_growth_bytes": self.memory.growth_bytes,
            "gpu_memory": self.memory.gpu,
            "cache": {
                "tokens": tokens,
                "bits_per_value": sum(bits) / len(bits) if bits else float(width),
                "bits_with_residual": width * held / full if full else float(width),
                "computed_bytes": self.computed_bytes,
                "computed_full_bytes": self.computed_full_bytes,
                "measured_bytes": self.report.nbytes,
                "measured_full_bytes": self.measured_full_bytes,
                "packed_layers": len(packed),
                "full_layers": len(self.report.layers) - len(packed),
                "quantized": self.report.quantized,
            },
            "report": self.report.to_json(),
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "fidelity_skipped": self.fidelity_skipped,
        }


class _Clock(TextStreamer):
    """Streams text and notes when the first and the last token came."""

    def __init__(self, tokenizer: Any, stream: TextIO | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream, self.times = stream, []

    times: list[float]

    def put(self, value: Tensor) -> None:
        """Note the time and pass the token on; the first call is the prompt."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is complete."""
        if self.stream is not None:
            self.stream.write(text + ("\n" if stream_end else ""))
            self.stream.flush()


def generate(settings: Settings, *, progress: Progress, stream: TextIO | None) -> Outcome:
    """Run the whole job.

    Raises:
        UnsupportedModel: The model cannot be loaded.
        UnsupportedInput: The prompt is empty or does not fit the model.
        NothingQuantized: The model has no layer that can be packed.
    """
    task = progress.add_task(f"loading {settings.model}", total=1)
    model, tokenizer = models.load(settings.model, device=settings.device, dtype=settings.dtype)
    progress.update(task, completed=1)
    ids = _tokenize(settings, tokenizer).to(model.device)
    endless = settings.plan is None and settings.method.window is not None
    _check_length(model, ids.shape[1] + (0 if endless else settings.max_new_tokens))
    cache = PackedCache(
        model, settings.method, plan=settings.plan, min_tokens=settings.min_tokens, verify=settings.verify
    )
    _check_model(model, ids)
    memory = Watch(model.device)
    watch = _watch_prefill(model, progress, ids.shape[1])
    sequence, speed = _timed(settings, model, tokenizer, ids, cache, stream)
    while watch:
        watch.pop().remove()
    taken = memory.read()
    report = cache.report(verify=settings.verify is not None)
    new = sequence[0, ids.shape[1] :]
    computed, computed_full = _computed(cache, report)
    proof = _second_pass(settings, model, ids, cache, progress)
    full_speed = None if proof.fidelity is None else _full_speed(settings, model, tokenizer, ids, progress)
    made = None
    if settings.receipt:
        made = receipt(
            model,
            ids,
            cache,
            proof=proof,
            generated=new,
            text=settings.text,
            name=settings.model,
            conditions=conditions(settings.device),
        )
    return Outcome(
        settings=settings,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=ids.shape[1],
        text=tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        speed=speed,
        memory=taken,
        report=report,
        computed_bytes=computed,
        computed_full_bytes=computed_full,
        fidelity=proof.fidelity,
        fidelity_skipped=proof.skipped,
        measured_full_bytes=proof.full_bytes,
        full_speed=full_speed,
        receipt=made,
    )


def _timed(
    settings: Settings, model: PreTrainedModel, tokenizer: Any, ids: Tensor, cache: Any, stream: TextIO | None
) -> tuple[Tensor, Speed]:
    """Generate, and return the tokens with those of the prompt, `[1, T]`, and how fast they came."""
    clock = _Clock(tokenizer, stream)
    torch.manual_seed(settings.seed)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    started = time.perf_counter()
    sequence = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=settings.max_new_tokens,
        streamer=clock,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return sequence, Speed.of(clock.times, started=started, prompt=ids.shape[1])


def _full_speed(
    settings: Settings, model: PreTrainedModel, tokenizer: Any, ids: Tensor, progress: Progress
) -> Speed | None:
    """Return the speed of the same generation with transformers' own cache and SDPA; None where it has no SDPA."""
    task = progress.add_task("the same with the full cache", total=1)
    try:
        before = use_attention(model, "sdpa")
    except ValueError:  # transformers says so of models with learned sinks, for example
        before = None
    if before is None:
        return None
    try:
        full = DynamicCache(config=text_config(model.config))
        return _timed(settings, model, tokenizer, ids, full, None)[1]
    finally:
        use_attention(model, before)
        progress.update(task, completed=1)


def _tokenize(settings: Settings, tokenizer: Any) -> Tensor:
    chat = settings.chat if settings.chat is not None else tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise UnsupportedInput("--chat was given, but this tokenizer has no chat template. Use --raw.")
    if not settings.text.strip():
        raise UnsupportedInput("the prompt is empty; allowed: at least one token of text.")
    text = settings.text
    if chat:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UnsupportedInput(f"the chat template of this tokenizer fails: {error}. Use --raw.") from error
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    if ids.shape[1] == 0:
        raise UnsupportedInput("the prompt has no tokens; allowed: at least one token of text.")
    return ids


def _check_model(model: PreTrainedModel, ids: Tensor) -> None:
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise NothingQuantized(f"this {model.config.model_type} has no KV cache. Use it without occamkv.")
    models.check_tokens(model, ids)


def _check_length(model: nn.Module, tokens: int) -> None:
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise UnsupportedInput(
            f"prompt and new tokens are {tokens} together; this model takes {longest}. "
            "Shorten the prompt or --max-new-tokens."
        )


def _watch_prefill(model: nn.Module, progress: Progress, tokens: int) -> list[Any]:
    """Move a progress bar with each layer that has read the prompt; it goes away with the first token."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    task = progress.add_task(f"reading {tokens} tokens (layers)", total=len(layers))

    hooks: list[Any] = []

    def advance(_module: nn.Module, _args: Any, _out: Any) -> None:
        progress.advance(task)
        if progress.tasks[task].finished and hooks:
            progress.stop()
            while hooks:
                hooks.pop().remove()

    hooks += [layer.register_forward_hook(advance) for layer in layers]
    return hooks


def _computed(cache: PackedCache, report: CacheReport) -> tuple[int, int]:
    """Return the bytes that the plan predicts for the packed layers (others as held), and those of a full cache."""
    total = 0
    for entry, layer in zip(cache.plan.layers, cache.layers, strict=True):
        row = report.layers[entry.index]
        store = getattr(getattr(layer, "cache", None), "store", None)
        if store is None:
            total += row.nbytes
            continue
        _, heads, _, head_dim = store.residual_k.shape
        size = store.residual_k.element_size()
        tokens = row.tokens if row.packed_tokens else 0
        total += entry.method.nbytes(tokens, kv_heads=heads, head_dim=head_dim, dtype_bytes=size)
        if not row.packed_tokens:  # below min_tokens the residual grows by whole pages
            waiting = max(1, row.tokens - entry.method.pinning.before(row.tokens))
            total += (-(-waiting // PAGE_TOKENS) - 1) * PAGE_TOKENS * 2 * heads * head_dim * size
    return total, report.full_bytes


def _second_pass(
    settings: Settings, model: PreTrainedModel, ids: Tensor, cache: PackedCache, progress: Progress
) -> SecondPass:
    """Compare packed and full cache on the tail of the prompt, unless that is not asked for."""
    if not settings.scored_tokens:
        return SecondPass(skipped="not asked for (--no-check)")
    task = progress.add_task("comparing with the full cache (tokens)", total=ids.shape[1])
    progress.start()
    return second_pass(
        model,
        ids,
        cache.plan,
        scored_tokens=settings.scored_tokens,
        min_tokens=settings.min_tokens,
        controlled=settings.receipt,
        progress=lambda done: progress.update(task, completed=done),
    )
