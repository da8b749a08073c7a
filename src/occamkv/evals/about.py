"""What every result says about its model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from occamkv.integrations.transformers.fingerprint import fingerprint
from occamkv.integrations.transformers.model import text_config


def about_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return name, type, fingerprint, dtype and the shape of the cache, JSON-ready; None where it does not say."""
    text = text_config(model.config)
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    return {
        "name": str(getattr(model, "name_or_path", "")),
        "model_type": text.model_type,
        "fingerprint": fingerprint(text),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": getattr(text, "num_hidden_layers", None),
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
    }
