"""Fold V's rotation into a transformers model, layer by layer, and check each layer by running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from occamkv.cache.folding import fold_output, fold_value
from occamkv.errors import UnsupportedModel
from occamkv.formats import check_head_dim
from occamkv.integrations.transformers.model import FOLDED_FIELD, decoders, folded_layers, text_config
from occamkv.integrations.transformers.plan import plan_for

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")
_FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "kv_proj", "in_proj")
_CHECK_TOKENS = 16


@dataclass(frozen=True)
class FoldReport:
    """Layers whose weights now hold V's rotation, and why the others do not."""

    folded: tuple[int, ...]
    refused: dict[int, str]


def fold(model: nn.Module) -> FoldReport:
    """Fold V's rotation into the projections around it, so that a cache made afterwards need not rotate V.

    The change is noted in the model's configuration and is saved with it. Each layer is run before and after on the
    same tokens; one whose output moves by more than rounding is put back and refused.

    Args:
        model: A transformers model; its weights are changed in place.

    Raises:
        UnsupportedModel: No layer can be folded, with the reason of each kind, or the model is folded already.
    """
    text = text_config(model.config)
    if folded_layers(text):
        raise UnsupportedModel(
            f"V's rotation is already folded into layers {sorted(folded_layers(text))} of this model."
        )
    wanted = {entry.index for entry in plan_for(model.config, "oscar").layers if entry.packs}
    decoder = decoders(model)[0]
    folded, refused = [], {}
    for index, module in _attention_modules(decoder):
        if index not in wanted:
            continue
        reason = _shared(text) or _refusal(module, text) or _fold_layer(decoder, module, text)
        if reason is None:
            folded.append(index)
        else:
            refused[index] = reason
    if not folded:
        told = sorted(set(refused.values())) or ["no attention layer with a value projection was found"]
        raise UnsupportedModel(
            f"V's rotation cannot be folded into this model: {'; '.join(told)}. Nothing was changed."
        )
    setattr(text, FOLDED_FIELD, sorted(folded))
    return FoldReport(tuple(sorted(folded)), refused)


def _shared(text: Any) -> str | None:
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers of this model share V, and folding one would have to fold the output projections of all"
    return None


def _attention_modules(decoder: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    names = ("v_proj", *_FUSED_NAMES)
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(isinstance(getattr(module, name, None), nn.Module) for name in names):
            yield index, module


def _projections(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    outputs = (getattr(module, name, None) for name in _OUTPUT_NAMES)
    return getattr(module, "v_proj", None), next((out for out in outputs if isinstance(out, nn.Module)), None)


def _head_dim(module: nn.Module, text: Any) -> int:
    own = getattr(module, "head_dim", None) or getattr(text, "head_dim", None)
    return int(own or text.hidden_size // text.num_attention_heads)


def _refusal(module: nn.Module, text: Any) -> str | None:
    value, output = _projections(module)
    if value is None:
        fused = next(name for name in _FUSED_NAMES if isinstance(getattr(module, name, None), nn.Module))
        return f"V comes out of a fused projection ({fused}), which also makes Q and K"
    if output is None:
        return f"no output projection was found beside v_proj (looked for {', '.join(_OUTPUT_NAMES)})"
    head_dim = _head_dim(module, text)
    check_head_dim(head_dim)
    for part in (value, output):
        if type(part) is not nn.Linear or not part.weight.is_floating_point():
            return f"a projection is a {type(part).__name__}, not a plain linear layer with float weights"
        width = part.out_features if part is value else part.in_features
        if width % head_dim:
            return f"a projection has {width} channels, no multiple of head_dim {head_dim}"
    return None


def _fold_layer(decoder: nn.Module, module: nn.Module, text: Any) -> str | None:
    """Fold one layer and run it; put it back and return a reason if its output moved."""
    value, output = _projections(module)
    if not isinstance(value, nn.Linear) or not isinstance(output, nn.Linear):
        return "its projections are not plain linear layers"
    before = _output_of(decoder, output)
    saved = [p.detach().clone() for p in (value.weight, output.weight)]
    saved_bias = None if value.bias is None else value.bias.detach().clone()
    head_dim = _head_dim(module, text)
    heads, q_heads = value.out_features // head_dim, output.in_features // head_dim
    weight, bias = fold_value(saved[0], saved_bias, heads=heads)
    with torch.no_grad():
        value.weight.copy_(weight)
        output.weight.copy_(fold_output(saved[1], heads=q_heads))
        if bias is not None:
            value.bias.copy_(bias)
    moved = float((_output_of(decoder, output) - before).norm() / before.norm().clamp_min(1e-30))
    allowed = 1e-4 if value.weight.dtype == torch.float32 else 0.05
    if moved <= allowed:
        return None
    with torch.no_grad():
        value.weight.copy_(saved[0])
        output.weight.copy_(saved[1])
        if saved_bias is not None:
            value.bias.copy_(saved_bias)
    return f"something between V and the output projection is not linear per head (its output moved by {moved:.2g})"


@torch.no_grad()
def _output_of(decoder: nn.Module, output: nn.Linear) -> Tensor:
    """Run a few fixed tokens through the decoder and return what an output projection makes of them, float32."""
    found: list[Tensor] = []
    hook = output.register_forward_hook(lambda _module, _args, out: found.append(out.detach().float()))
    generator = torch.Generator().manual_seed(0)
    embeddings = decoder.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(embeddings.num_embeddings, (1, _CHECK_TOKENS), generator=generator)
    training = decoder.training
    try:
        decoder.eval()(input_ids=ids.to(output.weight.device), use_cache=False)
    finally:
        hook.remove()
        decoder.train(training)
    return found[0]
