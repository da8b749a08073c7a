"""Prompts for tiny models, and generate() with tokens chosen beforehand, so that paths can be compared by logits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from integrations.tiny import FIRST_WORD, IMAGE_TOKEN, Tiny

IMAGE_AT = slice(5, 9)
ENCODER_TOKENS = 20


def words(tokens: int, *, row: int = 0, seed: int = 1) -> Tensor:
    """Return `tokens` words of row `row`, int64 `[tokens]`; a shorter row is the beginning of the longer one."""
    generator = torch.Generator().manual_seed(1000 * seed + row)
    return torch.randint(FIRST_WORD, IMAGE_TOKEN, (2048,), generator=generator)[:tokens]


def prompt(tiny: Tiny, rows: Mapping[int, int]) -> dict[str, Tensor]:
    """Return the arguments of generate() for rows of these lengths, `{row: tokens}`, padded on the left."""
    longest = max(rows.values())
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for place, (row, tokens) in enumerate(rows.items()):
        ids[place, longest - tokens :] = words(tokens, row=row)
        mask[place, longest - tokens :] = 1
        if tiny.inputs == "image":
            ids[place, longest - tokens :][IMAGE_AT] = IMAGE_TOKEN
    if tiny.inputs == "encoder":
        text = torch.stack([words(ENCODER_TOKENS, row=row, seed=2) for row in rows])
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "decoder_input_ids": ids}
    if tiny.inputs == "image":
        pictures = [torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(row)) for row in rows]
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack(pictures)}
    return {"input_ids": ids, "attention_mask": mask}


class _Forced(LogitsProcessor):
    def __init__(self, tokens: Tensor, after_prompt: Callable[[], object] | None) -> None:
        self.tokens, self.after_prompt, self.step = tokens, after_prompt, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == 0 and self.after_prompt is not None:
            self.after_prompt()
        forced = torch.full_like(scores, float("-inf"))
        forced.scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


class Run(NamedTuple):
    """What generate() made of a prompt and forced tokens: logits `[B, n, V]`, and the cache it leaves."""

    logits: Tensor
    cache: Cache


def run(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    after_prompt: Callable[[], object] | None = None,
    **options: Any,
) -> Run:
    """Generate exactly `tokens`, `[B, n]`, and return the model's own logits before each of them.

    `after_prompt` is called once, between the prompt and the first decoding step.
    """
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model.generate(
        **inputs,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        logits_processor=LogitsProcessorList([_Forced(tokens, after_prompt)]),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return Run(torch.stack(out.logits, dim=1), out.past_key_values)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def own_layers(cache: Cache) -> list[Any]:
    """Return the layers of the cache that the decoder's own text lies in."""
    return getattr(cache, "self_attention_cache", cache).layers
