"""Reads a model's configuration, and refuses one in which transformers would quietly put its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from occamkv.errors import UnsupportedInput, UnsupportedModel
from occamkv.integrations.transformers.model import text_config
from occamkv.methods.names import nearest

_NEEDED = ("hidden_size", "num_hidden_layers")
_ASSUMED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
_OLD_NAMES = {"hidden_size": ("n_embed", "n_embd", "d_model"), "num_hidden_layers": ("n_layer", "decoder_layers")}


def read_config(where: str | Path, **options: Any) -> tuple[Any, list[str]]:
    """Return the configuration of a model, and sentences about fields that it leaves to transformers' defaults.

    Args:
        where: A folder, a config.json, or a hub id that lies in the local cache.
        **options: As `from_pretrained` takes them, such as `gguf_file`.

    Raises:
        UnsupportedInput: The file is no configuration, or lacks a field without which nothing can be counted.
        UnsupportedModel: transformers does not know the type of model, or cannot read the configuration.
    """
    path = Path(where)
    file = path / "config.json" if path.is_dir() else path
    raw = _json(file) if file.is_file() and not options else None
    if raw is not None:
        _check_type(raw, file)
    try:
        config = AutoConfig.from_pretrained(str(where), local_files_only=True, **options)
    except Exception as error:  # a damaged file can make its reader raise anything
        told = " ".join(str(error).split())[:300].rstrip(".")
        hint = "" if path.exists() else f" Run: hf download {where} config.json"
        raise UnsupportedModel(
            f"transformers cannot read the configuration of {str(where)!r}: {told}.{hint}"
        ) from error
    return config, [] if raw is None else _check_fields(raw, config, file)


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnsupportedInput(
            f"cannot read the configuration {str(file)!r} as JSON: {error}. Take the config.json that came "
            "with the model."
        ) from error
    if not isinstance(raw, dict):
        raise UnsupportedInput(f"{str(file)!r} holds a {type(raw).__name__}; allowed: a configuration, a JSON object.")
    return raw


def _check_type(raw: dict[str, Any], file: Path) -> None:
    given = raw.get("model_type")
    if not isinstance(given, str):
        raise UnsupportedInput(
            f"{str(file)!r} lacks 'model_type', so it cannot be told what its fields mean. Take the config.json that "
            "came with the model."
        )
    if given not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"transformers has no model_type {given!r}{nearest(given, CONFIG_MAPPING)} A model that brings its own "
            "code cannot be counted: that code is not run here."
        )


def _check_fields(raw: dict[str, Any], config: Any, file: Path) -> list[str]:
    """Refuse a file without the fields that say how large the model is; return what is said of the others."""
    text = text_config(config)
    inside = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    given, prefix = (raw, "") if inside is None else (raw.get(inside) or {}, f"{inside}.")
    missing = [name for name in (*_NEEDED, *_ASSUMED) if not _given(name, given, text)]
    for name in _NEEDED:
        if name in missing:
            raise UnsupportedInput(
                f"{str(file)!r} lacks {prefix + name!r}; transformers would take its default, "
                f"{getattr(text, name, None)}. Say it in the file, or take the one that came with the model."
            )
    return [
        f"the configuration does not say {prefix}{name}; transformers takes {getattr(text, name)}"
        for name in missing
        if hasattr(text, name)
    ]


def _given(name: str, given: dict[str, Any], text: Any) -> bool:
    words = (name, text.attribute_map.get(name, name), *_OLD_NAMES.get(name, ()))
    return any(given.get(word) is not None for word in words)
