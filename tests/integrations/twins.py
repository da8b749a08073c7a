"""Layers of transformers' own cache beside packed ones, as the truth that shadows are held against."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from attention_truth import attention as exact_attention
from attention_truth import relative_error
from occamkv import PackedCache
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.tensor import PackedTensor


class Twins:
    """A `DynamicLayer` of transformers beside each packed layer, fed and changed alike, and errors seen with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: dict[int, DynamicLayer] = {}
        self.errors: dict[int, list[float]] = {}
        self.cosines: dict[int, list[float]] = {}
        self.patch, ours = monkeypatch, attention.attention_forward

        def follow(name: str, act) -> None:
            original = getattr(PackedLayer, name)

            def both(layer: PackedLayer, *args: Any, **kwargs: Any) -> Any:
                done = original(layer, *args, **kwargs)
                if layer.shadow is not None:
                    act(self.layers.setdefault(layer.index, DynamicLayer()), *args)
                return done

            monkeypatch.setattr(PackedLayer, name, both)

        follow("take", lambda twin, k, v: twin.update(k.double(), v.double()))
        follow("crop", lambda twin, count: twin.crop(count))
        follow("reset", lambda twin: twin.__init__())
        follow("_select", lambda twin, rows: twin.batch_select_indices(torch.tensor(rows)))

        def compare(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
            arguments = (module, query, key, value, attention_mask, dropout, scaling)
            packed = isinstance(key, PackedTensor) and key.layer.shadow and any(key.layer.cache.packed_tokens())
            out, weights = ours(*arguments, **options)
            if packed:
                self.note(key.layer.index, out, query, attention_mask, scaling, options)
            return out, weights

        monkeypatch.setattr(attention, "attention_forward", compare)
        attention.register()

    def note(self, index: int, out, query, mask, scaling, options) -> None:
        twin = self.layers[index]
        batch, _, steps, _ = query.shape
        slots = torch.arange(twin.keys.shape[2]).expand(batch, -1)
        sinks = options.get("s_aux")
        full = exact_attention(
            query.double(),
            twin.keys,
            twin.values,
            q_positions=slots[:, slots.shape[1] - steps :],
            positions=slots,
            scale=scaling,
            mask=mask,
            softcap=options.get("softcap"),
            sinks=None if sinks is None else sinks.double(),
        ).transpose(1, 2)
        out = out.double()
        self.errors.setdefault(index, []).append(relative_error(out, full))
        self.cosines.setdefault(index, []).append(float((out * full).sum() / (out.norm() * full.norm())))

    def assert_seen_by(self, cache: PackedCache) -> None:
        """Raise unless the cache's shadows report what was seen here, of each packed layer."""
        found = cache.report(verify=True).verification
        assert [layer.index for layer in found.layers] == sorted(self.errors)
        for layer in found.layers:
            errors = torch.tensor(self.errors[layer.index], dtype=torch.float64)
            assert (layer.reads, layer.steps) == (len(errors), len(errors))
            wanted = [float(x) for x in (errors.mean(), errors.quantile(0.99), errors.max())]
            assert [layer.error_mean, layer.error_p99, layer.error_max] == pytest.approx(wanted, rel=1e-3)
            cosines = self.cosines[layer.index]
            assert 1 - layer.cosine_mean == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-2)
            assert layer.error_max > 0.01
        every = torch.tensor([error for errors in self.errors.values() for error in errors], dtype=torch.float64)
        assert found.error_mean == pytest.approx(float(every.mean()), rel=1e-3)
        assert found.worst.error_max == pytest.approx(float(every.max()), rel=1e-3)
