"""One layer of a transformers cache, packed."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from occamkv.cache import LayerCache, LayerReport
from occamkv.cache.chooser import Chooser
from occamkv.cache.masks import Seen, read_mask, read_pads
from occamkv.errors import CacheMismatch, OccamError, UnsupportedFormat, UnsupportedInput
from occamkv.formats import check_head_dim
from occamkv.integrations.transformers import compiled
from occamkv.integrations.transformers.model import folded_layers
from occamkv.integrations.transformers.tensor import PackedTensor
from occamkv.methods import Method
from occamkv.methods.auto import Dial
from occamkv.methods.crossing import Statistics
from occamkv.methods.trial import Reading

if TYPE_CHECKING:
    from occamkv.integrations.transformers.shadow import Shadow

Observer = Callable[[Tensor, LayerCache, Reading], None]


class Shared:
    """What the layers of one cache share: the model they belong to, the mask of this step, and each other.

    Args:
        fingerprint: Fingerprint of the model's configuration.
        layers: All layers of the cache, packed or not.
    """

    def __init__(self, fingerprint: str, layers: Sequence[Any]) -> None:
        self.fingerprint = fingerprint
        self.broken = False
        self.pads: Tensor | None = None
        self._layers = [weakref.ref(layer) for layer in layers]
        self._known: tuple[int, frozenset[int]] | None = None
        self._last: tuple[weakref.ref[Tensor], tuple[int, bool], Seen] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Copy what is shared; the links then lead to the copies of the layers."""
        clone = Shared(self.fingerprint, ())
        clone.broken = self.broken
        memo[id(self)] = clone
        layers = (reference() for reference in self._layers)
        clone._layers = [weakref.ref(copy.deepcopy(layer, memo)) for layer in layers if layer is not None]
        return clone

    def check_model(self, config: Any, fingerprint_of: Any) -> None:
        """Raise `CacheMismatch` if an attention layer of another model reads the cache."""
        if config is None or not self.fingerprint:
            return
        known = (id(config), folded_layers(config))  # folding changes what the cached V means
        if known == self._known:
            return
        given = fingerprint_of(config)
        if given != self.fingerprint:
            raise CacheMismatch(
                f"this cache was made for a model with fingerprint {self.fingerprint}, the attention layer belongs to "
                f"{given}. Make a cache for this model: PackedCache(model, ...)."
            )
        self._known = known

    def seen(self, mask: Tensor, layer: LayerCache, new: int) -> Seen:
        """Read a mask once for all layers of a step."""
        by_engine = layer.waiting is not None and layer.pin_bias is None  # a first step, by the engine's own mask
        kind = layer.length, by_engine
        if self._last is not None and self._last[0]() is mask and self._last[1] == kind:
            return self._last[2]
        before, batch = layer.slots_before(new), layer.batch
        if by_engine:
            seen = Seen(read_pads(mask, before=before, new=new, batch=batch), None)
        else:
            seen = read_mask(mask, before=before, new=new, batch=batch)
        self._last = (weakref.ref(mask), kind, seen)
        return seen

    def roll_back(self, length: int, *, failed: int) -> None:
        """Bring layers that are ahead back to `length` slots, after layer `failed` refused a step.

        A linear state has no length and cannot go back: if one lies below the layer that failed, it has moved on.
        """
        for index, reference in enumerate(self._layers):
            other = reference()
            if not isinstance(other, DynamicLayer):
                self.broken |= index < failed and has_state(other)
                continue
            if not other.is_initialized:
                continue
            if length == 0 and isinstance(other, PackedLayer):
                other.forget()
            elif other.get_seq_length() <= length:
                continue
            elif type(other) in (DynamicLayer, PackedLayer):
                other.crop(length - other.get_seq_length())
            else:
                self.broken = True


class PackedLayer(DynamicLayer):
    """A full-attention layer whose K and V are packed. `update` returns `PackedTensor`s for our attention function.

    An `observer` is called with Q `[B, Hq, T, D]` of each step in model space, the cache before it packs anything of
    that step, and how the layer reads its tokens. A `shadow` is given K and V of each step.

    Args:
        index: Number of the layer.
        method: How tokens are packed.
        statistics: Of the model's queries and keys, for methods that need them.
        min_tokens: Nothing is packed below this many tokens.
        pack_after_attend: See `LayerCache`.
        pin_bias: See `LayerCache`.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        index: int,
        method: Method,
        *,
        statistics: Statistics | None = None,
        min_tokens: int = 0,
        pack_after_attend: bool = True,
        pin_bias: Tensor | None = None,
    ) -> None:
        self.index = index
        self.cache: LayerCache | None = LayerCache(
            method,
            statistics=statistics,
            min_tokens=min_tokens,
            pack_after_attend=pack_after_attend,
            pin_bias=pin_bias,
        )
        self.reason: str | None = None
        self.observer: Observer | None = None
        self.shadow: Shadow | None = None
        self.shared = Shared("", ())
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.handle = compiled.handle_of(self)
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        """Copy the layer; the copy has a handle of its own."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "handle"})
        clone.handle = compiled.handle_of(clone)
        return clone

    def choose_by(self, dial: Dial) -> None:
        """Choose the method when the first tokens are due, by a dial that the layers of the cache share."""
        if self.cache is not None:
            self.cache.chooser = Chooser(dial, self.index)
            self.observer = self.cache.chooser.see

    @property
    def looked_at(self) -> bool:
        """Whether anybody is shown each step: an observer, unless it is a chooser that has chosen, or a shadow."""
        chooser = getattr(self.observer, "__self__", None)
        chose = isinstance(chooser, Chooser) and self.cache is not None and self.cache.chooser is None
        return self.shadow is not None or (self.observer is not None and not chose)

    @property
    def keys(self) -> Tensor | None:
        """K of all slots, dequantized, `[B, H, S, D]`; None before the first update."""
        if self.cache is None:
            return self._keys
        return self.dense()[0] if self.cache.length else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set(value, "_keys")

    @property
    def values(self) -> Tensor | None:
        """V of all slots, dequantized, `[B, H, S, D]`; None before the first update."""
        if self.cache is None:
            return self._values
        return self.dense()[1] if self.cache.length else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set(value, "_values")

    def _set(self, value: Tensor | None, name: str) -> None:
        if self.cache is not None and value is not None:
            raise UnsupportedInput("K and V of a packed layer cannot be replaced; use crop, reorder_cache or reset.")
        setattr(self, name, value)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return K and V dequantized, `[B, H, S, D]` in model space."""
        if self.cache is None:
            raise UnsupportedInput(f"layer {self.index} is not packed ({self.reason}); read keys and values.")
        return self.cache.dense()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; a layer whose shape no record can hold stays in full precision from here on."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        if self.cache is None:
            super().lazy_initialization(key_states, value_states)
            return
        reason = _refusal(key_states, value_states)
        if reason is not None:
            self.cache, self.reason = None, reason
            warnings.warn(f"layer {self.index} stays in full precision: {reason}.", stacklevel=2)
            super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take K and V of a step, `[B, H, T, D]`; return what attention reads."""
        if torch.compiler.is_compiling():
            compiled.traced[self.index] = self.handle
            return key_states, value_states
        return self.take(key_states, value_states)

    def take(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Do what `update` does, when it is not traced."""
        if key_states.requires_grad or value_states.requires_grad:
            self.shared.roll_back(self.get_seq_length(), failed=self.index)
            raise UnsupportedInput(
                "a packed cache has no gradients. Call the model under torch.no_grad(), or pass use_cache=False."
            )
        self._refuse_broken()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache is None:
            return super().update(key_states, value_states)
        try:
            self.cache.update(key_states, value_states)
            length, pads = self.cache.length, self.shared.pads
            if pads is not None and pads.shape == (self.cache.batch, length):
                self.cache.note_pads(pads[:, length - key_states.shape[2] :].to(key_states.device))
        except OccamError:
            self.shared.roll_back(self.cache.length, failed=self.index)
            raise
        if self.shadow is not None:
            self.shadow.take(key_states, value_states, length=length)
        return (
            PackedTensor(self, is_value=False, like=key_states, length=length),
            PackedTensor(self, is_value=True, like=value_states, length=length),
        )

    def _refuse_broken(self) -> None:
        if self.shared.broken:
            raise CacheMismatch(
                "an earlier error left the layers of this cache at different lengths. reset() it first."
            )

    def get_seq_length(self) -> int:
        """Return the slots seen so far, pads included."""
        return super().get_seq_length() if self.cache is None else self.cache.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return length and offset of K for a step of `query_length` tokens (older versions pass positions)."""
        self._refuse_broken()
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1, under the name of older versions."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.shared.broken = False
        self.forget()

    def forget(self) -> None:
        """Forget everything this layer holds."""
        if self.cache is None:
            self._keys = self._values = None
        else:
            self.cache.reset()
        if self.shadow is not None:
            self.shadow.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` tokens; a positive number is the length to keep, as in older versions."""
        length = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if count == 0 or not self.is_initialized:
            return
        if self.cache is None:
            super().crop(-count)
        else:
            self.cache.remove(min(count, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence `beam_idx[i]` was."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times; full pages are shared, not copied."""
        batch = self._batch()
        self._select([row for row in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        rows = torch.arange(self._batch())[indices.cpu()]
        self._select(rows.tolist())

    def _batch(self) -> int:
        if self.cache is not None:
            return self.cache.batch
        return 0 if self._keys is None else self._keys.shape[0]

    def _select(self, rows: list[int]) -> None:
        if not self.get_seq_length():
            return
        if self.cache is not None:
            self.cache.select(rows)
            if self.shadow is not None:
                self.shadow.select(rows)
        elif self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def activate_past_recording(self) -> None:
        """Pack nothing that speculative decoding may still take back."""
        if self.cache is not None:
            self.cache.records_past = True

    def offload(self) -> None:
        """Refuse: a packed layer stays on its device."""
        raise UnsupportedInput("offloading is not supported by packed layers. Use offloading=False.")

    def prefetch(self) -> None:
        """Refuse, as `offload` does."""
        self.offload()

    def report(self) -> LayerReport:
        """Say what this layer holds."""
        if self.cache is None:
            held = 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes
            return LayerReport(
                self.index, "full", self.reason, tokens=self.get_seq_length(), residual_bytes=held, full_bytes=held
            )
        store, held_bytes = self.cache.store, self.cache.nbytes()
        if store is None:
            return LayerReport(self.index, str(self.cache.method), packing_starts=self.cache.packing_starts)
        batch, heads, _, head_dim = store.residual_k.shape
        bits = self.cache.method.bits_per_value(kv_heads=heads, head_dim=head_dim)
        full_bits = 8 * store.residual_k.element_size()
        packed, found = sum(self.cache.packed_tokens()), store.found_pins()
        per_slot = 2 * batch * heads * head_dim * store.residual_k.element_size()
        return LayerReport(
            index=self.index,
            method=str(self.cache.method),
            backend=store.backend.name,
            bits_per_value=bits if not packed else (bits * packed + full_bits * found) / (packed + found),
            tokens=self.cache.length,
            packed_tokens=packed,
            found_pins=found,
            packed_bytes=held_bytes["packed"],
            residual_bytes=held_bytes["residual"],
            pin_bytes=held_bytes["pins"],
            full_bytes=per_slot * self.cache.length,
            reads_packed=self.cache.packed_reads,
            reads_dense=self.cache.dense_reads,
            lossy_crops=self.cache.lossy_crops,
            packing_starts=self.cache.packing_starts,
            dropped_tokens=sum(row.dropped for row in store.rows),
            key_bias_pairs=self.cache.key_bias_pairs,
            shadow_bytes=0 if self.shadow is None else self.shadow.nbytes,
        )


def has_state(layer: Any) -> bool:
    """Tell whether a layer without K and V holds a state of earlier tokens."""
    state = getattr(layer, "has_previous_state", False)
    return any(state.values()) if isinstance(state, dict) else bool(state)


def _refusal(k: Tensor, v: Tensor) -> str | None:
    """Return why K and V of these shapes cannot be packed, or None."""
    if k.shape[-1] != v.shape[-1]:
        return f"K has head_dim {k.shape[-1]} and V {v.shape[-1]}; records hold one head_dim"
    try:
        check_head_dim(k.shape[-1])
    except UnsupportedFormat as error:
        return str(error)
    return None
