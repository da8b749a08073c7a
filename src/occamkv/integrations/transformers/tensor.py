"""The object that carries a packed layer from `Cache.update` to the attention function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from occamkv.integrations.transformers.layer import PackedLayer


class PackedTensor(Tensor):
    """K or V of a layer: shape, dtype and device of the full tensor `[B, H, S, D]`, its data still packed.

    Our attention function takes `layer` from it. Any other operation gets the dequantized tensor, which the layer
    counts, so that the report can say it.
    """

    layer: PackedLayer
    is_value: bool

    @staticmethod
    def __new__(cls, layer: PackedLayer, *, is_value: bool, like: Tensor, length: int) -> PackedTensor:
        """Wrap one of the two tensors of a layer."""
        shape = (like.shape[0], like.shape[1], length, like.shape[3])
        wrapper = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        wrapper.layer, wrapper.is_value = layer, is_value
        return wrapper

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done in `__new__`, as for every tensor subclass."""

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it stands for without dequantizing it."""
        return f"PackedTensor({'V' if self.is_value else 'K'}, {tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        """Return the dequantized tensor, `[B, H, S, D]` in model space.

        Raises:
            UnsupportedInput: The layer adds a number to the logits of pins, which only our attention function does.
        """
        if self.layer.cache is not None and self.layer.cache.pin_bias is not None:
            raise UnsupportedInput(
                f"layer {self.layer.index} has a pin_bias, and this model reads K and V outside occamkv's attention "
                "function, where it would be left out. Pass the model, not its configuration, or leave pin_bias out."
            )
        return self.layer.dense()[int(self.is_value)].contiguous()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Dequantize for every operation that does not know this class."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = pytree.tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)
