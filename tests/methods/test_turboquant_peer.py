"""`turboquant` against an implementation by others, turboquant-torch 0.4.0 (MIT), given our rotation.

Theirs: x / |x|, signs, Hadamard, the nearest Lloyd-Max level of each coordinate, times |x|; codes and norms unpacked.
From head_dim 256 on its levels are those of the unit normal over sqrt(D), as ours always are. Below it takes those of
Beta(D/2, D/2), which is the coordinate of a unit vector in D + 1 dimensions: other levels, the same error within 1 %.
"""

import pytest
import torch
from torch import Tensor

from occamkv import method
from occamkv.methods.crossing import random_signs
from occamkv.ops.lloyd import levels

peer = pytest.importorskip("turboquant.mse_quantizer", reason="needs: pip install turboquant-torch")
codebook = pytest.importorskip("turboquant.codebook", reason="needs: pip install turboquant-torch")

NORMAL_FROM = 256
BITS = (2, 3, 4)
UNCONVERGED = 5e-4  # at 4 bits the peer stops after 200 iterations
TOKENS = 4096

every_width = pytest.mark.parametrize("bits", BITS)


def peer_reconstruction(x: Tensor, bits: int, *, signs: Tensor) -> Tensor:
    """Return what the peer makes of x `[..., D]` (D a power of two), float32, rotated by these signs `[D]`."""
    quantizer = peer.TurboQuantMSE(x.shape[-1], bit_width=bits)
    quantizer.rht.signs = signs
    return quantizer.dequantize(quantizer.quantize(x))


def our_reconstruction(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return K and V of x `[n, D]`, packed and decoded."""
    chosen = method(name)
    return tuple(t[0, 0] for t in chosen.decode(chosen.encode(x[None, None], x[None, None])))


def vectors(kind: str, head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(TOKENS, head_dim, generator=generator)
    if kind == "with loud channels":
        return x * torch.exp(0.6 * torch.randn(head_dim, generator=generator))
    return x / x.norm(dim=-1, keepdim=True) if kind == "on the unit sphere" else x


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).square().sum() / exact.double().square().sum())


@every_width
def test_levels_are_those_of_the_peer(bits):
    theirs = torch.from_numpy(codebook.get_codebook(bits, NORMAL_FROM).centroids) * NORMAL_FROM**0.5
    assert (theirs - levels(bits)).abs().max() < (UNCONVERGED if bits == 4 else 1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_with_the_same_levels_and_signs_the_reconstruction_is_the_same(bits):
    x = vectors("on the unit sphere", NORMAL_FROM)  # norm 1 is exact in float16
    theirs = peer_reconstruction(x, bits, signs=random_signs(NORMAL_FROM))
    for ours in our_reconstruction(x, f"turboquant_k{bits}v{bits}"):
        differing = (ours - theirs).abs() > 1e-6
        assert differing.any(-1).float().mean() < 0.001  # a tie decided otherwise moves the whole token


def test_twin_other_signs_give_another_reconstruction():
    x = vectors("on the unit sphere", NORMAL_FROM)
    theirs = peer_reconstruction(x, 3, signs=-random_signs(NORMAL_FROM).flip(0))
    differing = (our_reconstruction(x, "turboquant_k3v3")[0] - theirs).abs() > 1e-6
    assert differing.any(-1).float().mean() > 0.995


@every_width
@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [
        *[(kind, head_dim) for kind in ("gaussian", "on the unit sphere") for head_dim in (64, 128, 256)],
        ("with loud channels", NORMAL_FROM),
    ],
)
def test_the_squared_error_is_that_of_the_peer(kind, head_dim, bits):
    x = vectors(kind, head_dim)
    theirs = error(peer_reconstruction(x, bits, signs=random_signs(head_dim)), x)
    for ours in our_reconstruction(x, f"turboquant_k{bits}v{bits}"):
        assert error(ours, x) / theirs == pytest.approx(1, abs=0.01)


@every_width
def test_twin_the_error_check_sees_even_levels(bits):
    x = vectors("gaussian", 128)
    theirs = error(peer_reconstruction(x, bits, signs=random_signs(128)), x)
    assert error(our_reconstruction(x, f"quarot_k{bits}v{bits}")[0], x) / theirs > 1.03
