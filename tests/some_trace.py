"""Traces that were made up: a layer whose queries, keys and values are known."""

from dataclasses import replace

import torch

from occamkv.analysis.trace import LayerTrace, Trace
from occamkv.methods.trial import Reading

TOKENS, DIM, HEADS, GQA = 384, 32, 2, 2


def received(q: torch.Tensor, k: torch.Tensor, *, window: int | None = None) -> torch.Tensor:
    """Mean attention of the queries that see each token, float64, in plain loops over heads. q `[Hq, T, D]`."""
    length, group = k.shape[1], q.shape[0] // k.shape[0]
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind < (window or length))
    rows = []
    for head in range(q.shape[0]):
        logits = q[head].double() @ k[head // group].double().T * k.shape[2] ** -0.5
        rows.append(logits.masked_fill(~seen, float("-inf")).softmax(-1).sum(0) / seen.sum(0))
    return torch.stack(rows)[None].float()


def layer(
    *, seed: int = 0, sink_at: int | None = None, window: int | None = None, tokens: int = TOKENS, heads: int = HEADS
) -> LayerTrace:
    """Gaussian q, k, v and hidden states. With a sink: a token with a short k and v that all queries look at."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = draw(heads * GQA, tokens, DIM), draw(heads, tokens, DIM), draw(heads, tokens, DIM)
    hidden = draw(tokens, 64)
    if sink_at is not None:
        k[:, :, 0] = 0
        k[:, sink_at] = 0
        k[:, sink_at, 0] = 1.5
        q[:, :, 0] = 60.0
        v[:, sink_at] *= 0.1
        hidden[sink_at, 0] = 100.0
    return LayerTrace(0, q[None], k[None], v[None], Reading(), window, hidden[None], received(q, k, window=window))


def fixed_where_looked_at() -> LayerTrace:
    """Queries look at two RoPE pairs of channels alone; K hardly varies there within a group."""
    given, looked_at = layer(), [0, 1, DIM // 2, DIM // 2 + 1]
    others = [channel for channel in range(DIM) if channel not in looked_at]
    q, k = given.q.clone(), given.k.clone()
    q[..., others] *= 0.01
    q[..., looked_at] *= 3
    k[..., looked_at] = k[..., looked_at] * 0.05 + torch.linspace(-1, 1, TOKENS)[:, None]
    return replace(given, q=q, k=k)


def trace(*layers: LayerTrace, **changes) -> Trace:
    """A trace of these layers; the tokens are called t0, t1, ..."""
    count = layers[0].k.shape[2]
    fields = {
        "layers": layers,
        "ids": torch.arange(count)[None],
        "texts": tuple(f"t{i}" for i in range(count)),
        "real": torch.ones(1, count, dtype=torch.bool),
        "modality": ("text",) * count,
        "model_type": "made up",
        "fingerprint": "f" * 16,
        "layer_count": len(layers),
        "positions": tuple(range(count)),
    }
    return Trace(**{**fields, **changes})
