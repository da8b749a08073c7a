"""The cache object for `past_key_values=`, and `attach`, which gives every new cache of a model packed layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from occamkv.cache import CacheReport, LayerReport, Plan
from occamkv.errors import CacheMismatch, NothingQuantized, UnsupportedInput
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.layer import PackedLayer, has_state
from occamkv.integrations.transformers.model import decoders, text_config, use_attention
from occamkv.integrations.transformers.pin_bias import PinBias
from occamkv.integrations.transformers.plan import build_layers, current_plan, plan_for
from occamkv.integrations.transformers.shadow import Verify, cast_shadows, read_verify, verification_of
from occamkv.integrations.transformers.statistics import statistics_for
from occamkv.methods import DEFAULT_METHOD, Method


class PackedCache(DynamicCache):
    """A cache whose full-attention layers are packed: `model.generate(..., past_key_values=PackedCache(model))`.

    Given a model, its attention implementation is set to "occamkv" by transformers' own switch; with any other cache
    that function computes what sdpa computes. Given only a configuration, call `register()` and load the model with
    `attn_implementation="occamkv"`; otherwise attention reads the cache dequantized, which the report shows.

    Args:
        model: A transformers model, or its configuration.
        method: A method or its name.
        plan: A plan (object or JSON file) instead of one method for all layers.
        balance: d of each layer, `{layer: [H, D]}`, for methods with a balanced rotation; by default it is taken from
            the model, by one short pass over random token ids.
        min_tokens: Keep a sequence in full precision until it has this many tokens.
        verify: Shadow some layers in full precision (True, or a `Verify`), so that `report(verify=True)` can say how
            far their attention was from it.
        pin_bias: Added to the logits of pinned tokens, to give them more attention or less: one number, or `[Hq]` by
            layer.

    Raises:
        NothingQuantized: No layer of the model can be packed.
        UnsupportedFormat: The method does not exist or a value of it is not allowed.
        CacheMismatch: The plan belongs to another model.
    """

    is_compileable = False

    def __init__(
        self,
        model: PreTrainedModel | Any,
        method: Method | str = DEFAULT_METHOD,
        *,
        plan: Plan | str | Path | None = None,
        balance: Mapping[int, Tensor] | None = None,
        min_tokens: int = 0,
        verify: Verify | bool | None = None,
        pin_bias: PinBias = None,
    ) -> None:
        attention.register()
        refuse_own_cache(model)
        wanted = read_verify(verify)
        config = model.config if isinstance(model, nn.Module) else model
        self._plan, statistics = statistics_for(model, make_plan(config, method, plan), balance)
        options: dict[str, Any] = {"statistics": statistics, "min_tokens": min_tokens, "pin_bias": pin_bias}
        Cache.__init__(self, layers=build_layers(config, self._plan, **options))
        cast_shadows(self.layers, wanted)
        if isinstance(model, nn.Module) and self._plan.packed_layers:
            use_attention(model, attention.NAME)

    @property
    def plan(self) -> Plan:
        """The method of each layer; a budget's place is taken by the method that was chosen, once it was."""
        return current_plan(self._plan, self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Take K and V of a step of one layer, `[B, H, T, D]`; return what attention reads."""
        if layer_idx >= len(self.layers):
            raise CacheMismatch(
                f"this cache has {len(self.layers)} layers, the model asks for layer {layer_idx}. "
                "Make a cache for this model: PackedCache(model, ...)."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def report(self, *, verify: bool = False) -> CacheReport:
        """Say, layer by layer, what is packed, how, and how many bytes it takes.

        Args:
            verify: Also say what the shadows saw.

        Raises:
            UnsupportedInput: It shall, and the cache was made without `verify`.
        """
        return report_of(self, self.plan, verify=verify)

    def nbytes(self) -> int:
        """Return the bytes of all tensors that hold tokens, shadows included."""
        report = self.report()
        return report.nbytes + report.shadow_bytes


def refuse_own_cache(model: Any) -> None:
    """Raise `NothingQuantized` if a model brings a cache class of its own."""
    standard = getattr(model, "_supports_default_dynamic_cache", None)
    if standard is not None and not standard():
        raise NothingQuantized(
            f"{type(model).__name__} has a cache of its own in transformers {transformers.__version__} "
            "and does not take a DynamicCache. Use it without occamkv, or try a newer transformers."
        )


def make_plan(config: Any, method: Method | str, plan: Plan | str | Path | None) -> Plan:
    """Return `plan`, read from a file if need be, or the plan that `method` makes for all layers."""
    if plan is None:
        return plan_for(config, method)
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def report_of(cache: Cache, plan: Plan, *, verify: bool = False) -> CacheReport:
    """Report on any transformers cache with packed layers, as `PackedCache.report` does."""
    if not isinstance(verify, bool):
        raise UnsupportedInput(
            f"verify is {verify!r}; allowed: True or False. The error of the whole model's logits takes a second pass "
            "over the prompt: receipt(model, ids, cache) of occamkv.evals.receipt."
        )
    rows = []
    for entry, layer in zip(plan.layers, cache.layers, strict=True):
        if isinstance(layer, PackedLayer):
            rows.append(layer.report())
            continue
        held = sum(t.nbytes for t in _tensors(layer))
        tokens = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) and layer.is_initialized else 0
        rows.append(LayerReport(entry.index, "full", entry.reason, tokens=tokens, residual_bytes=held, full_bytes=held))
    return CacheReport(tuple(rows), verification_of(cache.layers) if verify else None)


def _tensors(layer: Any) -> list[Tensor]:
    found = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [part for part in parts if isinstance(part, Tensor) and part.dim() > 1]
    return found


class Attachment:
    """What `attach` returns: `remove()` or the end of a `with` block undoes it; `report()` is of the newest cache."""

    def __init__(self, model: nn.Module, plan: Plan, layers: Callable[[], list[Any]], *, verifies: bool) -> None:
        self._model, self._plan, self._layers, self._verifies = model, plan, layers, verifies
        self._newest: Cache | None = None
        self._last_report: CacheReport | None = None
        self._warned = False
        self._before = use_attention(model, attention.NAME)
        self._hooks = [
            part.register_forward_pre_hook(self._give_cache, with_kwargs=True)
            for part in {id(p): p for p in (model, *decoders(model))}.values()
        ]

    def __enter__(self) -> Attachment:
        """Return the handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo `attach`."""
        self.remove()

    @property
    def plan(self) -> Plan:
        """The plan; of the newest cache, where methods are chosen by a budget."""
        return self._plan if self._newest is None else current_plan(self._plan, self._newest.layers)

    def remove(self) -> None:
        """Undo `attach`: new caches are transformers' own again. Caches made meanwhile stay packed."""
        if not self._hooks:
            return
        self._last_report, self._plan = self.report(verify=self._verifies), self.plan
        self._newest = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._before is not None:
            use_attention(self._model, self._before)

    def report(self, *, verify: bool = False) -> CacheReport | None:
        """Report on the newest packed cache, which is held until the next one or `remove`; None if there was none.

        Args:
            verify: As in `PackedCache.report`.

        Raises:
            UnsupportedInput: As there.
        """
        if verify and not self._verifies:
            verification_of(())
        if self._newest is not None:
            return report_of(self._newest, self._plan, verify=verify)
        return (
            self._last_report if verify or self._last_report is None else replace(self._last_report, verification=None)
        )

    def _give_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        if isinstance(cache, Cache):
            self._convert(cache)
            _note_mask(cache, kwargs.get("attention_mask"))
            return None
        if cache is not None or not _would_make_cache(module, args, kwargs):
            return None
        text = text_config(self._model.config)
        fresh: Cache = DynamicCache(config=text)
        self._convert(fresh)
        _note_mask(fresh, kwargs.get("attention_mask"))
        if getattr(self._model.config, "is_encoder_decoder", False):
            fresh = EncoderDecoderCache(fresh, DynamicCache(config=text))
        return args, {**kwargs, "past_key_values": fresh}

    def _convert(self, cache: Cache) -> None:
        """Swap the layers of a cache that has seen nothing yet."""
        if cache is self._newest or any(isinstance(layer, PackedLayer) for layer in cache.layers):
            return
        if type(cache) is not DynamicCache or any(_used(layer) for layer in cache.layers):
            if not self._warned:
                kind = type(cache).__name__
                warnings.warn(
                    f"this call brought a {kind} that cannot be packed (only a DynamicCache that is still empty can); "
                    "it stays in full precision. Leave past_key_values and cache_implementation out.",
                    stacklevel=2,
                )
            self._warned = True
            return
        cache.layers = self._layers()
        cache.layer_class_to_replicate = None
        self._newest = cache


def _note_mask(cache: Cache, mask: Any) -> None:
    """Tell packed layers which tokens are pads, for models whose attention is outside the interface."""
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.shared.pads = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _used(layer: Any) -> bool:
    if isinstance(layer, CacheLayerMixin):
        return bool(layer.is_initialized and layer.get_seq_length())
    return has_state(layer)


def _would_make_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether this call would make a cache of its own."""
    if module.training:
        return False
    if "past_key_values" not in inspect.signature(module.forward).parameters:
        return False
    names = list(inspect.signature(module.forward).parameters)
    if len(args) > names.index("past_key_values"):
        return False
    wanted = kwargs.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if wanted is None else wanted)


def attach(
    model: nn.Module,
    method: Method | str = DEFAULT_METHOD,
    *,
    plan: Plan | str | Path | None = None,
    balance: Mapping[int, Tensor] | None = None,
    min_tokens: int = 0,
    verify: Verify | bool | None = None,
    pin_bias: PinBias = None,
) -> Attachment:
    """Give every new cache of a model packed layers; plain `generate` and pipelines then use them.

    Args:
        model: A transformers model, or a pipeline that has one.
        method: A method or its name.
        plan: A plan (object or JSON file) instead of one method for all layers.
        balance: d of each layer, `{layer: [H, D]}`, for methods with a balanced rotation; by default it is taken from
            the model, by one short pass over random token ids.
        min_tokens: Keep a sequence in full precision until it has this many tokens.
        verify: Shadow some layers in full precision (True, or a `Verify`), so that `report(verify=True)` can say how
            far their attention was from it.
        pin_bias: Added to the logits of pinned tokens, to give them more attention or less: one number, or `[Hq]` by
            layer.

    Returns:
        A handle with `remove()` and `report()`, also a context manager.

    Raises:
        NothingQuantized: No layer of the model can be packed.
        UnsupportedInput: `model` is no transformers model, or already has packed caches.
    """
    attention.register()
    target = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    if not isinstance(target, nn.Module) or not hasattr(target, "config"):
        raise UnsupportedInput(f"attach got a {type(model).__name__}; allowed: a transformers model or pipeline.")
    refuse_own_cache(target)
    if target.training:
        warnings.warn("this model is in training mode and makes no packed caches by itself; call eval().", stacklevel=2)
    wanted = read_verify(verify)
    chosen, statistics = statistics_for(target, make_plan(target.config, method, plan), balance)

    def layers() -> list[Any]:
        made = build_layers(target.config, chosen, statistics=statistics, min_tokens=min_tokens, pin_bias=pin_bias)
        cast_shadows(made, wanted)
        return made

    layers()  # refuses what does not fit
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in target._forward_pre_hooks.values()):
        raise UnsupportedInput(
            "this model is already attached. Call remove() on the first handle, or leave its with block."
        )
    return Attachment(target, chosen, layers, verifies=wanted is not None)
