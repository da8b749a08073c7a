"""Controls: checks that must hold in every run, or its figures mean nothing.

The field has its share of quantized caches that nobody read. So: full precision against itself must agree exactly, a
packed cache must have been read packed, bits that are flipped in it must move the logits, and the bytes that it says it
holds must be those that its tensors take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from occamkv.cache import LayerCache
from occamkv.evals.fidelity import Reading
from occamkv.formats import records
from occamkv.integrations.transformers import PackedCache
from occamkv.integrations.transformers.layer import PackedLayer


@dataclass(frozen=True)
class Control:
    """One check: its name, whether it held, and what was seen."""

    name: str
    passed: bool
    told: str

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON-ready data."""
        return asdict(self)


def full_agrees(reading: Reading) -> Control:
    """Compare the reading of method `full` with the full cache itself: KL 0 at every position."""
    largest = float(torch.cat(reading.tally.kl).abs().max())
    same = float(torch.cat(reading.tally.same).float().mean())
    told = f"largest |KL| {largest:.3g}, same top token at {100 * same:.1f} % of the positions"
    return Control("full precision against itself gives 0", largest == 0 and same == 1, told)


def was_read_packed(name: str, reading: Reading) -> Control:
    """Check that every packed layer was read on its packed bytes, for a scored position too, and never dequantized."""
    layers = reading.cache.report().packed_layers
    packed = sum(  # the last token is not scored; the one before it must have seen something packed
        layer.packed_tokens > 0 and layer.reads_packed > 0 and layer.tokens > layer.packing_starts + 1
        for layer in layers
    )
    dense = sum(layer.reads_dense for layer in layers)
    told = f"{packed} of {len(layers)} packed layers were read packed, {dense} reads were dequantized"
    return Control(f"{name}: attention read the packed bytes", packed == len(layers) > 0 and not dense, told)


def bytes_match(name: str, reading: Reading) -> Control:
    """Compare the bytes that a cache reports with the storages of its tensors, and with the formula of its method."""
    reported, stored, computed = packed_bytes(reading.cache)
    told = f"reported {reported}, held by tensors {stored}, computed {computed} bytes"
    return Control(f"{name}: bytes are those of the tensors", reported == stored == computed > 0, told)


def packed_bytes(cache: PackedCache) -> tuple[int, int, int]:
    """Return the bytes of the packed layers of a cache: as reported, as held by tensors, as computed."""
    reported = stored = computed = 0
    for layer in cache.layers:
        if isinstance(layer, PackedLayer) and layer.cache is not None and layer.cache.store is not None:
            reported += layer.report().nbytes
            stored += _storage_bytes(layer.cache)
            computed += _computed_bytes(layer.cache)
    return reported, stored, computed


def _storage_bytes(cache: LayerCache) -> int:
    """Return the bytes of all storages in which a layer holds tokens, found by walking its objects."""
    found: dict[int, int] = {}
    queue: list[Any] = [cache.store]
    while queue:
        thing = queue.pop()
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        elif hasattr(thing, "__dict__"):
            queue += [value for key, value in vars(thing).items() if key != "feedback"]  # F belongs to the model
    return sum(found.values())


def _computed_bytes(cache: LayerCache) -> int:
    """Return the bytes that the counts of a layer's sequences need, from its method alone."""
    store = cache.store
    if store is None:
        return 0
    heads, head_dim = store.residual_k.shape[1], store.residual_k.shape[3]
    per_token = 2 * heads * head_dim * store.residual_k.element_size()
    page = store.format.page_bytes(kv_heads=heads, head_dim=head_dim)
    pages = sum(records.pages_of(row.held) for row in store.rows)
    slots = len(store.rows) * (store.ring_slots + store.pin_k.shape[2])
    return pages * page + slots * per_token


def flipped_bits_move_logits(name: str, model: nn.Module, reading: Reading, ids: Tensor) -> Control:
    """Flip the bits of one packed record of a layer: the next step's logits must change; without that they must not.

    Args:
        name: Of the method.
        model: The model that made the cache.
        reading: Whose cache is copied; it stays as it is.
        ids: The next token, `[1, 1]`.
    """
    before, again = (_next_logits(model, reading.cache, ids, None) for _ in range(2))
    packed = [index for index, layer in enumerate(reading.cache.layers) if _packs(layer)]
    moved = [
        index
        for index in dict.fromkeys((packed[0], packed[-1]) if packed else ())
        if not torch.equal(before, _next_logits(model, reading.cache, ids, _flipper(index)))
    ]
    wanted = sorted({packed[0], packed[-1]}) if packed else []
    told = f"flipped in layers {wanted}: logits moved for {sorted(moved)}; the same step twice " + (
        "gave the same logits" if torch.equal(before, again) else "gave different logits"
    )
    return Control(
        f"{name}: flipped bits move the logits", bool(moved == wanted and wanted) and torch.equal(before, again), told
    )


def _packs(layer: Any) -> bool:
    return isinstance(layer, PackedLayer) and layer.cache is not None and any(layer.cache.packed_tokens())


def _flipper(index: int) -> Callable[[PackedCache], None]:
    def flip(cache: PackedCache) -> None:
        layer: Any = cache.layers[index]
        store = layer.cache.store
        size = store.format.sections(store.residual_k.shape[3])
        first = size.k_codes + size.k_scale + size.k_minimum
        store.pool.slabs[0].records[0, :, 0, first : first + size.v_codes] ^= 0xFF

    return flip


@torch.no_grad()
def _next_logits(
    model: nn.Module, cache: PackedCache, ids: Tensor, change: Callable[[PackedCache], None] | None
) -> Tensor:
    own = copy.deepcopy(cache)
    if change is not None:
        change(own)
    out: Tensor = model(ids, past_key_values=own, use_cache=True, logits_to_keep=1).logits
    return out[0, -1]
