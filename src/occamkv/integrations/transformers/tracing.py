"""Tracing: one forward pass that hands over what every attention layer of the decoder saw.

The model runs with its fast attention, through the attention registry, under a name of our own; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from occamkv.errors import UnsupportedModel
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.model import decoders, text_config, use_attention
from occamkv.methods.trial import Reading

NAME = "occamkv_trace"


class Call(NamedTuple):
    """One self-attention call of the decoder, in model space.

    Args:
        layer: Number of the layer.
        q: `[B, Hq, T, D]`.
        k: `[B, H, T, D]`.
        v: `[B, H, T, D]`.
        mask: `[B or 1, 1 or Hq, T, T]`, boolean (True is seen) or additive; None: `causal` decides.
        bias: Position bias that is added to the logits, `[B or 1, Hq, T, T]`, or None.
        causal: Without a mask: whether a query sees only tokens up to its own.
        reading: Softmax scale, soft cap, learned sink logits.
        window: Sliding window in tokens, which the mask holds already; None for full attention.
        hidden: What entered the decoder layer, if it was asked for.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    reading: Reading
    window: int | None
    hidden: Tensor | None


class _Run:
    """One traced forward pass: whose calls count, and which layers were seen."""

    def __init__(self, model: nn.Module, consume: Callable[[Call], None], layers: Collection[int] | None) -> None:
        self.decoder = _decoder(model)
        self.consume, self.layers = consume, layers
        self.seen: list[int] = []
        self.entered: dict[int, Tensor] = {}
        self._modules = set(self.decoder.modules())
        self._skipped = set(getattr(text_config(model.config), "cross_attention_layers", None) or ())

    def takes(self, module: nn.Module, query: Tensor, key: Tensor) -> bool:
        """Tell whether a call is the self-attention of a layer that was asked for.

        A layer with cross-attention makes its self-attention call first; both have the layer's number.
        """
        index = getattr(module, "layer_idx", None)
        if module not in self._modules or not isinstance(index, int) or index in self.seen or index in self._skipped:
            return False
        if query.shape[2] != key.shape[2]:
            return False
        self.seen.append(index)
        return self.layers is None or index in self.layers


_running: ContextVar[_Run | None] = ContextVar("occamkv_trace", default=None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Show the call to the trace that is being made, and attend in full precision; the signature is transformers'."""
    run = _running.get()
    if run is not None and run.takes(module, query, key):
        sinks = options.get("s_aux")
        reading = Reading(scaling, options.get("softcap"), None if sinks is None else sinks.detach())
        causal = attention.is_causal(module, options)
        bias, window = options.get("position_bias"), options.get("sliding_window")
        hidden = run.entered.get(run.seen[-1])
        run.consume(Call(run.seen[-1], query, key, value, attention_mask, bias, causal, reading, window, hidden))
    return attention.attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)


@torch.no_grad()
def trace_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    consume: Callable[[Call], None],
    *,
    layers: Collection[int] | None = None,
    hidden: bool = False,
) -> list[int]:
    """Run a model once, without a cache, and hand over each self-attention call of its decoder.

    Args:
        model: A transformers model. Afterwards it is as it was, also when something failed.
        inputs: Its arguments.
        consume: Gets the calls in the order in which the layers run, each before its attention is computed.
        layers: Hand over these layers alone; default: all.
        hidden: Hand over what entered the decoder layer, too.

    Returns:
        The layers that have self-attention.

    Raises:
        UnsupportedModel: No attention of the model goes through transformers' attention interface.
    """
    run = _Run(model, consume, layers)
    with _evaluation(model), _traced(model, run), _hooked(_hooks(model, run, hidden=hidden)):
        model(**{**inputs, "use_cache": False})
    if not run.seen:
        raise UnsupportedModel(
            f"{type(model).__name__} has no self-attention that goes through transformers' attention interface, so "
            "there is nothing to record. Allowed: models whose decoder calls ALL_ATTENTION_FUNCTIONS."
        )
    return run.seen


def _decoder(model: Any) -> nn.Module:
    if getattr(model.config, "is_encoder_decoder", False):
        found: nn.Module = model.get_decoder()
        return found
    parts = decoders(model)
    return parts[-1] if parts else model


@contextmanager
def _traced(model: nn.Module, run: _Run) -> Iterator[None]:
    """Put our attention function in place, for this pass."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it no mask is passed at all
    before = {part: part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    if use_attention(model, NAME) is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has attention outside transformers' attention interface, which shows no queries "
            "and keys. Allowed: models whose attention implementation can be set."
        )
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)
        for part, name in before.items():  # outermost first: setting it sets its parts
            if part.config._attn_implementation != name:
                part.set_attn_implementation(name)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call each hook before its module runs, and remove them all at the end."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: Any, run: _Run, *, hidden: bool) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return hooks that note what enters the decoder layers, and one that leaves all logits but the last unmade."""

    def entering(index: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.entered = {index: args[0] if args else kwargs["hidden_states"]}

        return hook

    def last(_head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((args[0][..., -1:, :], *args[1:]), kwargs) if args else None

    head = model.get_output_embeddings()
    layers = _layers(run.decoder).items() if hidden else ()
    return [(layer, entering(index)) for index, layer in layers] + (
        [(head, last)] if isinstance(head, nn.Module) else []
    )


def _layers(decoder: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers by number: items of a list of modules in which something has a layer number."""
    found: dict[int, nn.Module] = {}
    for stack in (part for part in decoder.modules() if isinstance(part, nn.ModuleList)):
        for layer in stack:
            numbers = (getattr(part, "layer_idx", None) for part in layer.modules())
            index = next((number for number in numbers if isinstance(number, int)), None)
            if index is not None:
                found.setdefault(index, layer)
    return found
