"""The crossing between model space and cache space: what one layer does to K, V, Q and the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.ops import rotate, rotate_back
from occamkv.ops.balance import feedback_matrix
from occamkv.ops.rope import KeyBias, Rotary

if TYPE_CHECKING:
    from occamkv.methods.method import Method

FEEDBACK_DAMPING = 0.2
"""Of the mean diagonal of the second moment; between .05 and 1 it hardly matters."""

_SIGN_SEED = 0x6F6363616D6B76  # any number: stored bytes depend on it, so it never changes


@dataclass(frozen=True)
class Statistics:
    """What a model says about one layer: its own queries and keys (see `ops.balance`), and how it embeds positions.

    `balance` is d, float32 `[H, D]`; `moment` is E[q q^T], float32 `[H, D, D]`, for error feedback; `key_bias` is what
    all keys have in common, where it is worth taking out; `rotary` turns keys to other positions. None: not known.
    """

    balance: Tensor | None = None
    moment: Tensor | None = None
    key_bias: KeyBias | None = None
    rotary: Rotary | None = None
    _feedback: dict[tuple[int | None, bool, torch.device], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def feedback(self, *, hadamard_block: int | None, balanced: bool, device: torch.device) -> Tensor | None:
        """Return F of `ops.balance.feedback_matrix`, one for all caches of the model; None without a moment."""
        if self.moment is None:
            return None
        key = (hadamard_block, balanced, device)
        if key not in self._feedback:
            vector = self.balance.to(device) if balanced and self.balance is not None else None
            self._feedback[key] = feedback_matrix(
                self.moment.to(device), hadamard_block=hadamard_block, balance=vector, damping=FEEDBACK_DAMPING
            )
        return self._feedback[key]

    def used_by(self, method: Method) -> Statistics:
        """Return what of it a method uses: only balanced rotations and error feedback know queries."""
        return self if method.needs_model else replace(self, balance=None, moment=None)

    def check(self, heads: int, head_dim: int) -> None:
        """Raise unless the statistics are those of a layer of `heads` KV heads.

        Raises:
            CacheMismatch: They are a model's own, of another shape.
            UnsupportedInput: A value is not finite, or a balance vector has another shape or is not above 0.
        """
        if self.moment is not None and self.moment.shape != (heads, head_dim, head_dim):
            raise CacheMismatch(
                f"this cache has statistics of a layer with [H, D] = {tuple(self.moment.shape[:2])}, K has "
                f"{(heads, head_dim)}. Make a cache for this model: PackedCache(model, ...)."
            )
        if self.key_bias is not None and self.key_bias.vector.shape != (heads, head_dim):
            raise CacheMismatch(
                f"key_bias is of a layer with [H, D] = {tuple(self.key_bias.vector.shape)}, K has {(heads, head_dim)}. "
                "Make a cache for this model: PackedCache(model, ...)."
            )
        if self.moment is not None and not bool(self.moment.isfinite().all()):
            raise UnsupportedInput("the queries' second moment has NaN or infinite values; allowed: finite ones.")
        if self.balance is None:
            return
        good = bool((self.balance.isfinite() & (self.balance > 0)).all())
        if self.balance.shape != (heads, head_dim) or not good:
            raise UnsupportedInput(
                f"balance has shape {tuple(self.balance.shape)}; allowed: finite values above 0, shape "
                f"[H, D] = {(heads, head_dim)}."
            )


@dataclass(frozen=True)
class Crossing:
    """How K, V, Q and the output of one layer cross between the spaces.

    `k_vector` `[H, D]` is multiplied into K before the rotation, and Q is divided by it: d, or random signs. `v_signs`
    `[D]` are multiplied into V before its rotation and into the output after it is rotated back. `feedback` is F.
    `key_bias` is taken out of K; backends put it back into the logits.
    """

    k_block: int | None
    v_block: int | None
    k_vector: Tensor | None
    v_signs: Tensor | None
    feedback: Tensor | None
    key_bias: KeyBias | None = None

    def enter(self, k: Tensor, v: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take K and V `[B, H, T, D]` from model space to cache space, float32.

        A key bias needs their positions `at`, int64 `[B, T]`.
        """
        if self.key_bias is not None:
            k = k.float() - self._bias_rows(at)
        k = rotate(k, hadamard_block=self.k_block, balance=self.k_vector)
        return k, rotate(v, hadamard_block=self.v_block, balance=self._v_vector(v))

    def leave(self, k: Tensor, v: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take K and V `[B, H, T, D]` back from cache space to model space, float32; `at` as in `enter`."""
        k = rotate_back(k, hadamard_block=self.k_block, balance=self.k_vector)
        if self.key_bias is not None:
            k = k + self._bias_rows(at)
        return k, rotate_back(v, hadamard_block=self.v_block, balance=self._v_vector(v))

    def mover(self, statistics: Statistics | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return what takes K in cache space, `[B, H, P, D]`, from positions to others, int64 `[B, P]` both.

        Raises:
            UnsupportedInput: It is not known how the model embeds positions.
        """
        rotary = known_rotary(statistics)

        def move(k: Tensor, old: Tensor, new: Tensor) -> Tensor:
            in_model, _ = self.leave(k, k, old)
            moved, _ = self.enter(rotary.turn(in_model, (new - old)[:, None]), k, new)
            return moved.to(k.dtype)

        return move

    def leave_output(self, out: Tensor) -> Tensor:
        """Finish an output `[B, Hq, T, D]` that a backend has rotated back."""
        return out if self.v_signs is None else out * self.v_signs.to(out)

    def bound(self, k: Tensor, v: Tensor) -> float:
        """Return a number that neither V's values nor K's token norms can be above in cache space."""
        largest_k, largest_v = (max(abs(float(x)) for x in t.aminmax()) for t in (k, v))
        if self.key_bias is not None:
            largest_k += float(self.key_bias.vector.abs().sum(-1).max())
        stretch = 1.0 if self.k_vector is None else float(self.k_vector.max())
        norm = largest_k * stretch * (self.k_block or 1) ** 0.5 * (k.shape[1] * k.shape[3]) ** 0.5
        return max(norm, largest_v * (self.v_block or 1) ** 0.5)

    def _bias_rows(self, at: Tensor | None) -> Tensor:
        if self.key_bias is None or at is None:
            raise UnsupportedInput("a key bias is taken out of K, which needs the positions of its tokens.")
        return self.key_bias.rows(at)

    def _v_vector(self, v: Tensor) -> Tensor | None:
        return None if self.v_signs is None else self.v_signs.to(v.device).expand(v.shape[1], -1)


def known_rotary(statistics: Statistics | None) -> Rotary:
    """Return how a layer embeds positions.

    Raises:
        UnsupportedInput: It is not known.
    """
    if statistics is None or statistics.rotary is None:
        raise UnsupportedInput(
            "a window moves pinned tokens to other positions, and how this model embeds positions is not known. "
            "Pass the model, not its configuration; if it has no rotary embedding of one axis, set pins='none'."
        )
    return statistics.rotary


@cache
def random_signs(head_dim: int) -> Tensor:
    """Return fixed random signs, float32 `[D]`, from the splitmix64 generator."""
    state, signs = _SIGN_SEED, []
    for _ in range(head_dim):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        signs.append(1.0 if (z ^ (z >> 31)) & 1 else -1.0)
    return torch.tensor(signs)
