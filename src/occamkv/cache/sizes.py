"""What a model's layers keep of a sequence, in numbers alone: what a planner needs to know of an engine and a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """What one layer keeps. K of a token is `k_heads * k_dim` values, V likewise; a state does not grow with tokens.

    Args:
        index: Number of the layer.
        k_heads: Heads of K as the cache gets it.
        k_dim: Channels of such a head.
        v_heads: Heads of V.
        v_dim: Channels of such a head.
        other_values: Values per token besides K and V, such as an indexer's keys.
        most_tokens: Tokens after which a window forgets; None where nothing is forgotten.
        state_bytes: Fixed bytes of a sequence: convolution and recurrent states.
        source_values: Values per token of an encoder's text, for attention to it.
        reads_packed: Whether the attention function gets K and V as the cache returned them. If not, a packed layer is
            read dequantized and packs only with the next step.
    """

    index: int
    k_heads: int = 0
    k_dim: int = 0
    v_heads: int = 0
    v_dim: int = 0
    other_values: int = 0
    most_tokens: int | None = None
    state_bytes: int = 0
    source_values: int = 0
    reads_packed: bool = True

    @property
    def k_values(self) -> int:
        """Values of K per token."""
        return self.k_heads * self.k_dim

    @property
    def v_values(self) -> int:
        """Values of V per token."""
        return self.v_heads * self.v_dim

    @property
    def values(self) -> int:
        """All values per token."""
        return self.k_values + self.v_values + self.other_values


@dataclass(frozen=True)
class ModelSizes:
    """A model without its weights.

    Args:
        model_type: The engine's word for the architecture.
        layers: What each layer of the decoder keeps.
        dtype: Of weights and cache, such as "bfloat16".
        dtype_bytes: Bytes of one value of it.
        parameters: All parameters, tied ones once.
        weight_bytes: Their bytes in `dtype`.
        matrix_parameters: Those that quantization of weights takes: matrices, without embeddings and output head.
        limit: Longest context the model was made for, in tokens; None where its configuration does not say.
        has_encoder: Whether layers also attend to an encoder's text.
        packs_late: Whether a step's tokens are packed only with the next step, as layers that share K and V need it.
        stored_as: How the configuration says that the weights are quantized, or None.
    """

    model_type: str
    layers: tuple[LayerSizes, ...]
    dtype: str
    dtype_bytes: int
    parameters: int
    weight_bytes: int
    matrix_parameters: int
    limit: int | None = None
    has_encoder: bool = False
    packs_late: bool = False
    stored_as: str | None = None
