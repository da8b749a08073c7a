"""A real model reads further than its window: with pins as well as with all tokens, without them not."""

import math

import pytest
import torch

from integrations.real_models import SMOLLM2, package_folder
from occamkv import PackedCache
from occamkv.cli.models import load
from occamkv.evals.texts import read_text, windows
from occamkv.methods import method

pytestmark = pytest.mark.model


@torch.no_grad()
def perplexity(model, ids, chosen) -> float:
    """Of the tokens behind the first 512, read 128 at a time."""
    cache, losses = PackedCache(model, chosen), []
    for at in range(0, ids.shape[1], 128):
        following = ids[0, at + 1 : at + 129]
        logits = model(ids[:, at : at + 128], past_key_values=cache).logits[0, : len(following)].float()
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
    return math.exp(float(torch.cat(losses)[512:].mean()))


def test_pins_keep_the_perplexity_and_a_window_alone_does_not():
    package_folder(SMOLLM2, of=SMOLLM2)
    model, tokenizer = load("smollm2")
    ids = windows(read_text().text, tokenizer, count=1, length=1664)[0]
    everything = perplexity(model, ids, method("occam"))
    pinned = perplexity(model, ids, method("occam", window=512))
    alone = perplexity(model, ids, method("occam", window=512, pins="none"))
    assert pinned < 1.12 * everything
    assert alone > 1.3 * pinned
