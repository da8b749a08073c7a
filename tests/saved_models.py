"""Tiny random models, and folders of them with a tokenizer of 92 words, as `save_pretrained` writes them.

Their weights are drawn wide, so that attention looks at some tokens much more than at others and packing moves the
logits far. They prove plumbing and arithmetic, not accuracy.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = 92
LONGEST = 1024
CHAT_TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
CHAT_WORDS = 3

SIZES = {
    "vocab_size": len(SPECIAL) + WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
STATE_SPACE = {
    "vocab_size": len(SPECIAL) + WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 1,
    "expand": 2,
    "chunk_size": 8,
}
SLIDING_AND_FULL = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "packable": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "half sliding": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**SIZES, **SLIDING_AND_FULL}),
    "learned sinks": ("GptOssConfig", "GptOssForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "all sliding": ("MistralConfig", "MistralForCausalLM", {**SIZES, "sliding_window": 32}),
    "no attention": ("Mamba2Config", "Mamba2ForCausalLM", STATE_SPACE),
}


@torch.no_grad()
def build(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model of one of `KINDS`; generation never ends by itself."""
    config, model_class, fields = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**fields)).eval()
    draw_weights(model, seed=seed)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def draw_weights(model: nn.Module, *, seed: int) -> None:
    """Draw all matrices anew."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 1.3 / weight.shape[-1] ** 0.5, generator=generator)


def tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer in which `w0` to `w91` are one token each and nothing is added."""
    words = {word: token for token, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=chat_template, **names)


def save(folder: Path, kind: str, *, chat_template: str | None = None) -> Path:
    """Write model and tokenizer to a folder and return it."""
    build(kind).save_pretrained(folder)
    tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def text(tokens: int, *, seed: int = 1) -> str:
    """Return a text of so many tokens; a shorter one is the beginning of a longer one."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(WORDS, (2048,), generator=generator)[:tokens].tolist())
