"""The architectures that the tests run, each as a tiny random model."""

from typing import Any

import torch
from torch import nn

from integrations.tiny import IMAGE_TOKEN, SIZES, Tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING_AND_FULL = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
FULL_AND_SLIDING = {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}
SLIDING, NO_CACHE = "sliding window", "no cache of its own"


def plant_key_bias(model: nn.Module) -> None:
    """Give a few channels of K a large constant, as some real models have it."""
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[::13] = 20.0


def _text(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **fields}


TINY = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2 with a large key bias": Tiny("Qwen2Config", "Qwen2ForCausalLM", change=plant_key_bias),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3_moe": Tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS),
    "mistral without a window": Tiny("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "phi3 with head_dim 24": Tiny("Phi3Config", "Phi3ForCausalLM", {"hidden_size": 96}, drop=("head_dim",)),
    "gemma2 with a soft cap": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**FULL_AND_SLIDING, "attn_logit_softcapping": 3.0},
        full={1: SLIDING},
        dense="eager",
    ),
    "gemma3": Tiny("Gemma3TextConfig", "Gemma3ForCausalLM", SLIDING_AND_FULL, full={0: SLIDING}),
    "gemma3n with shared KV": Tiny(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        full={0: SLIDING, 2: NO_CACHE, 3: NO_CACHE},
        layers=4,
    ),
    "gemma4 with shared KV": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
        },
        full={0: SLIDING, 2: NO_CACHE, 3: NO_CACHE},
        layers=4,
    ),
    "gpt_oss with learned sinks": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**FULL_AND_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        full={1: SLIDING},
        dense="eager",
    ),
    "qwen3_next with linear layers": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "layer_types": ["full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        full={1: "linear attention"},
        own_cache="Qwen3NextDynamicCache",
    ),
    "lfm2 with convolutions": Tiny(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        full={0: "linear attention"},
        own_cache="Lfm2HybridConvCache",
    ),
    "falcon outside the attention interface": Tiny(
        "FalconConfig", "FalconForCausalLM", {"alibi": False}, drop=("head_dim",)
    ),
    "bloom outside the attention interface": Tiny(
        "BloomConfig",
        "BloomForCausalLM",
        {"n_layer": 2, "n_head": 4},
        exact=torch.float32,
        drop=("head_dim", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    ),
    "diffllama, which repeats V": Tiny("DiffLlamaConfig", "DiffLlamaForCausalLM", changes_kv=True),
    "llava with an image": Tiny(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"image_token_id": IMAGE_TOKEN},
        inputs="image",
        sub={
            "text_config": _text("llama"),
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 32,
            },
        },
    ),
    "t5, an encoder and a decoder": Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 64,
            "d_kv": 32,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        inputs="encoder",
    ),
    "bart, an encoder and a decoder": Tiny(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "tie_word_embeddings": False,
        },
        inputs="encoder",
    ),
}
"""Architectures with at least one packed layer."""


REFUSED = {
    "mistral with a window in every layer": (
        Tiny("MistralConfig", "MistralForCausalLM", {"sliding_window": 32}),
        ["sliding window", "32 tokens"],
    ),
    "deepseek_v3 with latent attention": (
        Tiny(
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            {
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 32,
                "n_shared_experts": 1,
            },
            drop=("head_dim",),
        ),
        ["head_dim 24", "V 16"],
    ),
    "mamba2 without attention": (
        Tiny(
            "Mamba2Config",
            "Mamba2ForCausalLM",
            {"head_dim": 16, "num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2},
            drop=("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings"),
            own_cache="Mamba2Cache",
        ),
        ["linear attention"],
    ),
}
"""Architectures with no layer that can be packed, and words of the reason."""
