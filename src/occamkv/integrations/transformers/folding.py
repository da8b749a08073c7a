"""Fold V's rotation or K's balance into a transformers model, layer by layer, and check each layer by running it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from occamkv.cache.folding import fold_output, fold_value, scale_heads
from occamkv.errors import UnsupportedModel
from occamkv.formats import check_head_dim
from occamkv.integrations.transformers.model import (
    FOLDED_FIELD,
    FUSED_NAMES,
    attention_modules,
    decoders,
    folded_layers,
    text_config,
)
from occamkv.integrations.transformers.plan import plan_for
from occamkv.integrations.transformers.statistics import model_statistics

_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")
_CHECK_TOKENS = 16


@dataclass(frozen=True)
class FoldReport:
    """Layers whose weights were changed, and why the others were not."""

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

    def fold_one(_index: int, module: nn.Module) -> str | None:
        return _shared(text) or _refusal(module, text) or _fold_layer(decoder, module, text)

    report = _fold_layers(decoder, wanted, fold_one, what="V's rotation")
    setattr(text, FOLDED_FIELD, list(report.folded))
    return report


def _fold_layers(
    decoder: nn.Module, wanted: Collection[int], fold_one: Callable[[int, nn.Module], str | None], *, what: str
) -> FoldReport:
    """Fold the wanted layers one by one; `fold_one` returns why it left a layer as it was, or None."""
    folded, refused = [], {}
    for index, module in attention_modules(decoder):
        if index not in wanted:
            continue
        reason = fold_one(index, module)
        if reason is None:
            folded.append(index)
        else:
            refused[index] = reason
    if not folded:
        told = sorted(set(refused.values())) or ["no attention layer with a value projection was found"]
        raise UnsupportedModel(f"{what} cannot be folded into this model: {'; '.join(told)}. Nothing was changed.")
    return FoldReport(tuple(sorted(folded)), refused)


def _shared(text: Any) -> str | None:
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers of this model share V, and folding one would have to fold the output projections of all"
    return None


def _projections(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    outputs = (getattr(module, name, None) for name in _OUTPUT_NAMES)
    return getattr(module, "v_proj", None), next((out for out in outputs if isinstance(out, nn.Module)), None)


def _head_dim(module: nn.Module, text: Any) -> int:
    own = getattr(module, "head_dim", None) or getattr(text, "head_dim", None)
    return int(own or text.hidden_size // text.num_attention_heads)


def _refusal(module: nn.Module, text: Any) -> str | None:
    value, output = _projections(module)
    if value is None:
        fused = next(name for name in FUSED_NAMES if isinstance(getattr(module, name, None), nn.Module))
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
    """Fold one layer's V and run it; put it back and return a reason if its output moved."""
    value, output = _projections(module)
    if not isinstance(value, nn.Linear) or not isinstance(output, nn.Linear):
        return "its projections are not plain linear layers"
    head_dim = _head_dim(module, text)
    weight, bias = fold_value(value.weight, value.bias, heads=value.out_features // head_dim)
    new = {value.weight: weight, output.weight: fold_output(output.weight, heads=output.in_features // head_dim)}
    if bias is not None:
        new[value.bias] = bias
    moved = _change(decoder, output, new)
    if moved is None:
        return None
    return f"something between V and the output projection is not linear per head (its output moved by {moved:.2g})"


@torch.no_grad()
def _change(decoder: nn.Module, output: nn.Linear, new: dict[Tensor, Tensor]) -> float | None:
    """Set parameters of a layer; if the output then moves by more than rounding, set them back and say by how much."""
    before = _output_of(decoder, output)
    old = {parameter: parameter.detach().clone() for parameter in new}
    for parameter, value in new.items():
        parameter.copy_(value)
    moved = float((_output_of(decoder, output) - before).norm() / before.norm().clamp_min(1e-30))
    if moved <= (1e-4 if output.weight.dtype == torch.float32 else 0.05):
        return None
    for parameter, value in old.items():
        parameter.copy_(value)
    return moved


def fold_balance(model: nn.Module) -> FoldReport:
    """Fold each layer's balance vector into its query and key projections: K then comes out balanced.

    Nothing needs to be noted: the statistics of the changed model give d = 1 by themselves. Layers with a norm or
    another RoPE pairing between projection and cache cannot be folded; each layer is checked by running it.

    Args:
        model: A transformers model; its weights are changed in place.

    Raises:
        UnsupportedModel: No layer can be folded, with the reason of each kind.
    """
    text = text_config(model.config)
    decoder, found = decoders(model)[0], model_statistics(model)

    def fold_one(index: int, module: nn.Module) -> str | None:
        vector = found[index].balance
        return "no balance vector" if vector is None else _shared(text) or _fold_balance(decoder, module, vector)

    return _fold_layers(decoder, found, fold_one, what="the balance")


def _fold_balance(decoder: nn.Module, module: nn.Module, vector: Tensor) -> str | None:
    _, output = _projections(module)
    query, key = getattr(module, "q_proj", None), getattr(module, "k_proj", None)
    if type(query) is not nn.Linear or type(key) is not nn.Linear or not isinstance(output, nn.Linear):
        return "Q and K do not come out of plain linear layers of their own"
    heads, head_dim = vector.shape
    new: dict[Tensor, Tensor] = {}
    for part, scale in ((query, 1 / vector), (key, vector)):
        count = part.out_features // head_dim
        if part.out_features % head_dim or count % heads:
            return f"a projection has {part.out_features} channels, no multiple of {heads} heads of {head_dim}"
        new[part.weight] = scale_heads(part.weight, scale, heads=count)
        if part.bias is not None:
            new[part.bias] = scale_heads(part.bias, scale, heads=count)
    moved = _change(decoder, output, new)
    if moved is None:
        return None
    return (
        f"something between the projections and the cache is not linear per channel (its output moved by {moved:.2g})"
    )


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
