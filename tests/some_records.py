"""Inputs shared by the tests of records: every format, and keys and values that no torch version changes."""

import random

import numpy as np
import torch
from hypothesis import strategies as st

from occamkv.formats import Format
from occamkv.formats.records import Records


@st.composite
def formats(draw, *levels: str) -> Format:
    """Every format that can be written; with `levels` only those."""
    k_axis = draw(st.sampled_from(["channel", "token"]))
    chosen = draw(st.sampled_from(levels or ("uniform", "lloyd")))
    widths = [2, 3, 4] + [2.5] * (chosen == "lloyd")
    return Format(
        k_bits=draw(st.sampled_from(widths)),
        v_bits=draw(st.sampled_from(widths)),
        k_axis=k_axis,
        k_group=draw(st.sampled_from([32, 64, 128] if k_axis == "channel" else [32, 64, 128, 256])),
        v_group=draw(st.sampled_from([32, 64, 128, 256])),
        token_scale=draw(st.booleans()),
        norm_dtype=draw(st.sampled_from(["float32", "float16"])),
        metadata_bits=16 if chosen == "lloyd" else draw(st.sampled_from([16, 8])),
        levels=chosen,
    )


head_dims = st.one_of(st.sampled_from([8, 64, 80, 128, 256]), st.integers(1, 32).map(lambda n: 8 * n))


def keys_and_values(
    format: Format, *, groups: int, heads: int, head_dim: int, seed: int = 0, offset: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[N, H, G, D]` with unequal channels and unequal tokens."""
    generator = np.random.default_rng(seed)
    shape = (groups, heads, format.record_tokens, head_dim)
    pair = []
    for _ in range(2):
        x = generator.standard_normal(shape) * np.exp(generator.standard_normal((1, heads, 1, head_dim)))
        x = x * np.exp(0.5 * generator.standard_normal((groups, 1, format.record_tokens, 1))) + offset
        pair.append(torch.from_numpy(x.astype(np.float32)))
    return pair[0], pair[1]


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "heads inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "in a wider tensor":
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if how == "channels apart":
        return x.mT.contiguous().mT
    return x


def planted(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Values that are hard to round: ties, constant channels and tokens, zeros of both signs, tiny and large ones."""
    generator = np.random.default_rng(seed)
    some = lambda n: int(generator.integers(n))  # noqa: E731
    kind, (_, _, tokens, channels) = some(8), x.shape
    x = (x * 4).round() / 4 if kind == 0 else x * [1, 1e-6, 1e-39, 1e-30, 1e3, 1, 1, 1][kind]
    if some(3) == 0:
        x[some(len(x)), :, :, some(channels)] = [0.0, 0.7, -0.0, 6e4][some(4)]
    if some(3) == 0:
        x[some(len(x)), :, some(tokens)] = [0.0, 0.7, -0.0][some(3)]
    if some(6) == 0:
        x[x.abs() < 0.3] = -0.0
    return x


def raw(t: torch.Tensor | None) -> np.ndarray | None:
    """The bytes of a tensor: NaN and zeros of both signs are what they are."""
    return None if t is None else t.contiguous().view(torch.uint8).numpy()


def same(a: Records, b: Records) -> bool:
    """Whether two records hold the same bytes."""
    return all(np.array_equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))


def some_format(rng: random.Random) -> Format:
    """A format that the CUDA kernels read: uniform levels, K groups along tokens."""
    return Format(
        k_bits=rng.choice((2, 3, 4)),
        v_bits=rng.choice((2, 3, 4)),
        k_group=rng.choice((32, 64, 128)),
        v_group=rng.choice((32, 64, 128, 256)),
        token_scale=rng.random() < 0.6,
        norm_dtype=rng.choice(("float32", "float16")),
        metadata_bits=rng.choice((16, 8)),
    )
