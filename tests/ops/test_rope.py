import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from occamkv.ops.rope import KeyBias, Rotary

FREQUENCIES = 10_000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)


def test_turn_is_what_transformers_does():
    x, at = torch.randn(2, 3, 50, 64), torch.arange(50)
    angles = torch.cat([at[:, None] * FREQUENCIES] * 2, -1)[None]
    wanted, _ = apply_rotary_pos_emb(x.double(), x.double(), angles.cos(), angles.sin())
    assert torch.allclose(Rotary.of(FREQUENCIES).turn(x, at).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_add_up_and_keep_lengths(interleaved):
    rotary, x = Rotary.of(FREQUENCIES, interleaved=interleaved), torch.randn(1, 2, 9, 80)
    at = torch.tensor([0, 1, 5, 100, 1000, 5000, 40_000, 100_000, 1_000_000])
    there = rotary.turn(x, at)
    assert torch.equal(there[..., 64:], x[..., 64:])
    assert torch.allclose(there.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotary.turn(there, -at), x, atol=1e-5)
    assert not torch.allclose(rotary.turn(there, 1 - at), x, atol=1e-2)


def test_layouts_differ():
    x = torch.randn(4, 64)
    at = torch.arange(4)
    plain, interleaved = (Rotary.of(FREQUENCIES, interleaved=kind).turn(x, at) for kind in (False, True))
    assert not torch.allclose(plain, interleaved, atol=0.1)


def test_rows_of_a_key_bias():
    bias = KeyBias(Rotary.of(FREQUENCIES), torch.randn(3, 64))
    at = torch.tensor([[0, 7, 8], [3, 3, 100]])
    rows = bias.rows(at)
    assert rows.shape == (2, 3, 3, 64)
    assert torch.equal(rows[0, :, 0], bias.vector)
    assert torch.allclose(rows[1, 2, 2], bias.rotary.turn(bias.vector[2], torch.tensor(100)), atol=1e-6)
