"""EleutherAI's lm-evaluation-harness on a packed cache: `python -m occamkv.evals.lm_eval --model occamkv ...`.

Generation tasks only. The harness scores a text (loglikelihood, multiple choice) in one call, and a first call reads
nothing packed: the score would be that of full precision, whatever the method.

Needs `pip install 'occamkv[lm-eval]'`; nothing else of occamkv imports this module.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from occamkv import __version__
from occamkv.cache import CacheReport, Plan
from occamkv.errors import NothingQuantized, OccamError, UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.integrations.transformers import attach
from occamkv.integrations.transformers.cache import make_plan
from occamkv.methods import DEFAULT_METHOD, Method
from occamkv.methods import method as find_method

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed. Run: pip install 'occamkv[lm-eval]'", name=error.name
    ) from error

NAME = "occamkv"
"""Name of the model in the harness's registry."""


class PackedLM(HFLM):  # type: ignore[misc]
    """The harness's transformers model with a packed cache in every `generate`: `simple_evaluate(model=PackedLM(...))`.

    `requests` counts the requests answered so far, `packed_requests` those whose answer has a token that was computed
    from packed ones, and `report` is of the newest cache.

    Args:
        pretrained: A model, or what `from_pretrained` takes.
        method: A method or its name; `full` gives the harness's own results.
        plan: A plan (object or JSON file) instead of one method for all layers.
        **options: Options of the harness's `HFLM`: tokenizer, batch_size, device, dtype, ...

    Raises:
        NothingQuantized: No layer of the model can be packed.
        UnsupportedFormat: The method does not exist.
        CacheMismatch: The plan belongs to another model.
        UnsupportedInput: The model has an encoder.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        method: Method | str = DEFAULT_METHOD,
        plan: Plan | str | Path | None = None,
        **options: Any,
    ) -> None:
        chosen = find_method(method) if isinstance(method, str) else method  # a typo is told before a model is loaded
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise UnsupportedInput(
                f"the model is of the kind {self.backend!r}; allowed: a decoder (causal), whose prompt is in its cache."
            )
        self.plan = make_plan(self.model.config, chosen, plan)
        self.requests = self.packed_requests = 0
        self.report: CacheReport | None = None
        self._warned = False
        with attach(self.model, plan=self.plan):  # refuses what does not fit before any request is answered
            pass

    @property
    def packed_share(self) -> float | None:
        """Share of the requests whose answer was computed from packed tokens; None before the first."""
        return self.packed_requests / self.requests if self.requests else None

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its result file, with what was packed."""
        packed = {
            "version": __version__,
            "plan": self.plan.to_json(),
            "requests": self.requests,
            "packed_share": self.packed_share,
            "newest_cache": None if self.report is None else self.report.to_json(),
        }
        return {**super().get_model_info(), NAME: packed}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """Answer requests with a packed cache.

        Raises:
            NothingQuantized: The plan packs layers, but no answer was computed from a packed token.
        """
        before = self.packed_requests
        answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        if self.plan.packed_layers:
            self._judge(len(requests), packed=self.packed_requests - before)
        return answers

    def _judge(self, requests: int, *, packed: int) -> None:
        """Raise or warn where answers are those of full precision."""
        if packed == requests:
            return
        why = (
            f"prompt and answer together were shorter than {PAGE_TOKENS} tokens and the pins, the answer was a single "
            "token, or the generation options brought another cache"
        )
        if not packed:
            raise NothingQuantized(
                f"not one of {requests} answers was computed from a packed token: {why}. The scores would be those of "
                "full precision. Use longer prompts (--num_fewshot), or the harness's own model hf."
            )
        if not self._warned:
            warnings.warn(
                f"{requests - packed} of {requests} answers were computed in full precision: {why}. "
                "packed_share says how many were not.",
                stacklevel=3,
            )
        self._warned = True

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate for a batch of prompts, `[B, T]`, with a cache of its own; return prompts and answers."""
        with attach(self.model, plan=self.plan) as attached:
            sequences: Tensor = super()._model_generate(context, max_length, stop, **options)
        self.report = attached.report()
        self.requests += len(sequences)
        if self.report is not None and self.report.quantized:
            starts = min(layer.packing_starts for layer in self.report.packed_layers)
            prompts = options["attention_mask"].sum(1).tolist()
            for prompt, row in zip(prompts, sequences[:, context.shape[1] :], strict=True):
                written = self._answer_tokens(row, stop)
                # The step that writes the last token finds all older ones in the cache, but not the one that it reads.
                self.packed_requests += written > 1 and prompt + written - 2 >= starts
        return sequences

    def _answer_tokens(self, row: Tensor, stop: list[str]) -> int:
        """Return how many of the tokens `[T]` make the answer; the others were written while the batch went on."""
        ends = [text for text in (*stop, self.tokenizer.pad_token) if text]

        def over(count: int) -> bool:
            text = self.tok_decode(row[:count], skip_special_tokens=False)
            return any(end in text for end in ends)

        return 1 + bisect_left(range(1, len(row)), x=True, key=over)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:  # noqa: FBT001, FBT002
        """Refuse: scoring in one call reads nothing packed."""
        _refuse("loglikelihood (also multiple choice)")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:  # noqa: FBT001, FBT002
        """Refuse: scoring in one call reads nothing packed."""
        _refuse("loglikelihood_rolling")


def _refuse(kind: str) -> NoReturn:
    raise UnsupportedInput(
        f"a task asks for {kind}; allowed: generate_until. The harness scores a text in one call, which reads nothing "
        "packed and would report full precision. Use a generation task, or `occamkv eval`, which reads a text through "
        "the packed cache."
    )


def register() -> None:
    """Add the model `occamkv` to the harness's registry, for `simple_evaluate(model="occamkv", model_args=...)`."""
    register_model(NAME)(PackedLM)


def main() -> None:
    """Run the harness's command line with the model `occamkv` in its registry; our errors become one line."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except OccamError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
