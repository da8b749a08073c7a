"""A tiny random model that reads bytes, with its tokenizer: any English text goes through it, and says nothing."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import saved_models

SPECIAL = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tokenizer(
    *, chat: bool = False, begins: bool = False, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, one for each merged pair; `begins`: with a first token."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    words = {word: number for number, word in enumerate([*SPECIAL, *letters])}
    plain = Tokenizer(models.BPE(words, list(merges)))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    if begins:
        plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        chat_template=CHAT_TEMPLATE if chat else None,
        clean_up_tokenization_spaces=False,
        **names,
    )


@functools.cache
@torch.no_grad()
def model() -> LlamaForCausalLM:
    """Return the model; it never ends by itself."""
    sizes = {**saved_models.SIZES, "vocab_size": 300, "max_position_embeddings": 8192}
    made = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    saved_models.draw_weights(made, seed=0)
    made.generation_config.eos_token_id = None
    return made
