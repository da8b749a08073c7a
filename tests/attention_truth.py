"""What attention must return: explicit products and a softmax, in float64, in model space; and what torch itself loses.

No occamkv code. Letters: B batch, H KV heads, Hq query heads, Tq queries, D head dim, N tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def hadamard_matrix(head_dim: int, block: int | None) -> Tensor:
    """The block-diagonal orthonormal Sylvester-Hadamard matrix `[D, D]`, float64; the identity without a block."""
    if block is None:
        return torch.eye(head_dim, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    while one.shape[0] < block:
        one = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), one)
    return torch.block_diag(*[one / block**0.5] * (head_dim // block))


def additive(mask: Tensor, positions: Tensor) -> Tensor:
    """A mask over positions as a bias over stored tokens: `[B, 1 or Hq, Tq, N]`, -inf where it hides."""
    rows = []
    for row, where in enumerate(positions):
        part = mask[row if mask.shape[0] > 1 else 0][..., where.clamp_min(0)]
        hidden = ~part if part.dtype == torch.bool else part <= torch.finfo(part.dtype).min
        bias = torch.zeros(part.shape, dtype=torch.float64) if part.dtype == torch.bool else part.to(torch.float64)
        rows.append(bias.masked_fill(hidden, float("-inf")))
    return torch.stack(rows)


def bias(q_positions: Tensor, positions: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """What is added to the logits, `[B, 1 or Hq, Tq, N]`: 0 or the mask's own numbers, -inf where nothing is seen."""
    at, there = q_positions[:, :, None], positions[:, None, :]
    seen = (there >= 0) & (at >= 0)
    if window is not None:
        seen &= there > at - window
    if mask is None:
        seen &= there <= at
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))[:, None]
    return additive(mask, positions).masked_fill(~seen[:, None], float("-inf"))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor,
    positions: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Hq, Tq, D]` in the dtype of q: float64 for the truth, a short dtype to see what that dtype costs.

    `k`, `v`: `[B, H, N, D]`; `positions`: `[B, N]`, -1 for a slot that holds nothing.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias(q_positions, positions, mask, window).to(q.dtype)
    if sinks is not None:
        column = sinks.to(q.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)  # a row that sees nothing is 0 / 0
    return weights[..., : k.shape[2]] @ v


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same in the dtype of q as torch computes it: its fused attention, or plain torch where that has no option."""
    if options.get("softcap") is not None or options.get("sinks") is not None:
        return attention(q, k, v, **options)
    given = bias(options["q_positions"], options["positions"], options.get("mask"), options.get("window"))
    group = q.shape[1] // k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(group, dim=1),
        v.repeat_interleave(group, dim=1),
        attn_mask=given.to(q.dtype),
        scale=options.get("scale"),
    )
    blind = (given == float("-inf")).all(-1, keepdim=True)
    return out.masked_fill(blind, 0.0)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Root of the mean square error over that of the truth."""
    return float((out.double() - truth).norm() / truth.norm().clamp_min(1e-30))


SHORT_FACTORS = ("cpu", "cuda")
"""Backends that multiply 16-bit numbers: fixed point on CPUs, float16 on GPUs. Sums are exact or float32."""


def allowed_error(backend: str, out: Tensor, truth: Tensor, *, bfloat16: Callable[[], Tensor]) -> float:
    """What `assert_close` allows where queries are float32: 1e-5, and 1e-3 with 16-bit factors.

    Where logits are so large that this is too much to ask, such a backend must still have half the error of torch's own
    attention in bfloat16, which `bfloat16()` returns.
    """
    if backend not in SHORT_FACTORS:
        return 1e-5
    return 1e-3 if relative_error(out, truth) < 1e-3 else 0.5 * relative_error(bfloat16(), truth)


def assert_close(out: Tensor, truth: Tensor, *, torch_error: float, allowed: float = 1e-5) -> None:
    """The error is at most twice torch's own in that dtype; for float32 `allowed`, and 5 times that at the worst."""
    assert out.shape == truth.shape
    assert out.isfinite().all(), "the output holds values that are not finite"
    error = relative_error(out, truth)
    if out.dtype == torch.float32:
        worst = float((out.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
        told = f"relative error {error:.2g}, at worst {worst:.2g}; allowed {allowed:.0e}"
        assert error < allowed and worst < 5 * allowed, told
    else:
        assert error <= 2 * torch_error, f"relative error {error:.2g}; torch's own in {out.dtype} is {torch_error:.2g}"
