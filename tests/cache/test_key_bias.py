"""A key bias is taken out of K and put back into the logits: exactly, and the groups are the better for it."""

import pytest
import torch
from torch import Tensor

from attention_truth import attention
from cache_mirror import assert_same_contents, contents
from occamkv.cache import LayerCache
from occamkv.cache.masks import read_mask
from occamkv.errors import UnsupportedInput
from occamkv.kernels import cpu
from occamkv.kernels.cpu.step import LayerStep
from occamkv.methods import method
from occamkv.methods.crossing import Statistics
from occamkv.ops.rope import KeyBias, Rotary, worth_removing
from some_attention import some_balance

HEADS, DIM = 2, 64
ROTARY = Rotary.of(10_000.0 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))
FORMS = {
    "occam": method("occam"),
    "paper, bias removed": method("oscar", key_bias="remove"),
    "pins in between": method("occam", pins="at:0,50,200"),
    "found pins": method("occam_quality", feedback=False),
    "window": method("occam", window=256),
}


def a_bias(pairs: list[int], size: float, *, heads: int = HEADS, dim: int = DIM, rotary: Rotary = ROTARY) -> KeyBias:
    generator = torch.Generator().manual_seed(5)
    chosen = torch.tensor(pairs)
    part = Rotary(rotary.frequencies[chosen], rotary.first[chosen], rotary.second[chosen])
    vector = torch.zeros(heads, dim)
    for channels in (part.first, part.second):
        vector[:, channels] = torch.randn(heads, len(pairs), generator=generator)
    return KeyBias(part, size * vector / vector.norm(dim=-1, keepdim=True))


def some_kv(
    bias: KeyBias, tokens: int, *, shift: int = 0, dtype=torch.float32, batch: int = 1
) -> tuple[Tensor, Tensor]:
    """K and V `[B, H, T, D]` of which K holds the bias as a model at positions `shift`, `shift + 1`, ... adds it."""
    generator = torch.Generator().manual_seed(6)
    k, v = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    at = torch.arange(shift, shift + tokens).expand(batch, -1)
    return (k + bias.rows(at)).to(dtype), v.to(dtype)


def a_cache(form, bias: KeyBias) -> LayerCache:
    balance = some_balance(HEADS, DIM) ** 0.2 if form.needs_model else None
    return LayerCache(form, statistics=Statistics(balance, None, bias, ROTARY))


def relative(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shift", [0, 17], ids=["the model's positions", "other positions than the model's"])
@pytest.mark.parametrize("name", [name for name in FORMS if name != "window"])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_attention_is_that_of_the_whole_keys_whatever_the_angles(name, queries, shift, backend_name):
    """Against float64 attention over what the cache reads back, bias included, at the very same bytes."""
    bias = a_bias([0, 1, 7], 30.0)
    k, v = some_kv(bias, 500, shift=shift)
    cache = a_cache(FORMS[name], bias)
    cache.update(k[:, :, :450], v[:, :, :450])
    cache.commit()
    assert cache.packed_tokens()[0] > 256 and cache.key_bias_pairs == 3
    new = slice(450, 450 + queries)
    cache.update(k[:, :, new], v[:, :, new])
    q = torch.randn(1, 2 * HEADS, queries, DIM)
    held_k, held_v = cache.dense()
    seen = torch.arange(450 + queries)[None]
    truth = attention(q.double(), held_k.double(), held_v.double(), q_positions=seen[:, 450:], positions=seen)
    unpacked = [*FORMS[name].pinning.positions, *range(cache.packed_tokens()[0] + 60, 450)]
    assert (held_k[:, :, unpacked] - k[:, :, unpacked]).abs().max() < 1e-4, "what is not packed is as it was"
    assert relative(cache.attend(q), truth) < 2e-3


@pytest.fixture(params=["cpu", "reference"])
def backend_name(request, monkeypatch):
    if request.param == "reference":
        request.getfixturevalue("reference_only")
    return request.param


def test_twin_a_cache_that_forgets_to_put_it_back_is_seen():
    bias = a_bias([0, 1, 7], 30.0)
    k, v = some_kv(bias, 450)
    cache = a_cache(FORMS["occam"], bias)
    cache.update(k, v)
    cache.commit()
    q = torch.randn(1, 2 * HEADS, 1, DIM)
    held_k, held_v = cache.dense()
    seen = torch.arange(450)[None]
    truth = attention(q.double(), held_k.double(), held_v.double(), q_positions=seen[:, -1:], positions=seen)
    object.__setattr__(cache._crossing, "key_bias", None)
    assert relative(cache.attend(q), truth) > 0.2


@pytest.mark.parametrize("name", FORMS)
def test_whole_steps_leave_the_bytes_of_the_long_way(name, monkeypatch):
    if cpu.refuses(FORMS[name].packed_format, torch.device("cpu")) is not None:
        pytest.skip("no native library")
    bias, made, outs, taken = a_bias([0, 2, 5], 20.0), [], [], []
    call = LayerStep.__call__
    monkeypatch.setattr(LayerStep, "__call__", lambda *a, **k: taken.append(1) or call(*a, **k))
    k, v = some_kv(bias, 600, dtype=torch.bfloat16, batch=2)
    q = torch.randn(2, 2 * HEADS, 600, DIM, generator=torch.Generator().manual_seed(8)).bfloat16()
    real = torch.arange(300) >= torch.tensor([[0], [45]])
    for whole in (True, False):
        with monkeypatch.context() as patch:
            if not whole:
                patch.setattr(cpu, "stepper", lambda layer: None)
            cache = a_cache(FORMS[name], bias)
            cache.update(k[:, :, :300], v[:, :, :300])
            mask = torch.ones(300, 300).bool().tril() & real[:, None, None]
            seen = read_mask(mask, before=None, new=300, batch=2)
            cache.attend(q[:, :, :300], seen=seen)
            for t in range(300, 600):
                cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
                outs.append(cache.attend(q[:, :, t : t + 1]))
            made.append(cache)
    assert len(taken) > 250
    for row in range(2):
        assert_same_contents(contents(made[0], row), contents(made[1], row))
    for a, b in zip(outs[:300], outs[300:], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-3)


def row_kl(q: Tensor, k: Tensor, read: Tensor) -> float:
    """Mean KL in nats of attention rows over keys `[H, T, D]` and over what was read of them."""
    full, packed = ((q @ x.transpose(-1, -2) * x.shape[-1] ** -0.5).log_softmax(-1) for x in (k, read))
    return float((full.exp() * (full - packed)).sum(-1).mean())


@pytest.mark.parametrize(("where", "pairs"), [("low", range(60, 64)), ("middle", range(28, 32)), ("high", range(4))])
@pytest.mark.parametrize("size", [100.0, 600.0])
def test_where_the_papers_method_fails_badly_ours_does_not(where, pairs, size):
    """Gaussian keys, whose low-bit error is large anyway, with a bias as the Qwen2 family adds it."""
    heads, dim, tokens = 1, 128, 1024
    rotary = Rotary.of(1e6 ** -(torch.arange(64, dtype=torch.float64) / 64))
    generator = torch.Generator().manual_seed(0)
    plain = 2 * torch.randn(1, heads, tokens, dim, generator=generator)
    bias = a_bias(list(pairs), size, heads=heads, dim=dim, rotary=rotary)
    k = rotary.turn(plain, torch.arange(tokens)) + bias.rows(torch.arange(tokens)[None])
    q = torch.randn(heads, 64, dim, generator=generator)
    removed = worth_removing(bias, plain[0].var(1), tokens=32)
    kl = {}
    for name, known in (("oscar", None), ("kivi", None), ("occam", removed)):
        form = method(name, k_rotation="hadamard") if name == "occam" else method(name)
        read, _ = form.decode(form.encode(k, k, key_bias=known))
        kl[name] = row_kl(q.double(), k[0].double(), read[0].double())
    without, _ = method("occam", k_rotation="hadamard").decode(
        method("occam", k_rotation="hadamard").encode(plain, plain)
    )
    floor = row_kl(q.double(), plain[0].double(), without[0].double())
    assert kl["occam"] < 1.6 * floor + 0.05
    assert kl["occam"] < kl["kivi"] + 0.05
    if where == "high":
        assert kl["oscar"] > 5 * kl["occam"]
        assert size < 600 or kl["oscar"] > 5


class TestWhatIsWorthRemoving:
    @pytest.mark.parametrize(("size", "goes"), [(20.0, False), (100.0, True)])
    def test_pairs_that_hardly_turn_within_a_group_stay_unless_a_minimum_cannot_reach_them(self, size, goes):
        slow = a_bias([30, 31], size)
        assert (worth_removing(slow, torch.ones(HEADS, DIM), tokens=32) is not None) == goes

    def test_a_bias_far_below_the_spread_of_the_keys_stays(self):
        assert worth_removing(a_bias([0, 1], 1.0), torch.ones(HEADS, DIM), tokens=32) is None

    def test_only_the_pairs_that_matter_go_and_their_values_are_kept(self):
        both = a_bias([0, 9], 1.0)
        vector = both.vector.clone()
        vector[:, [0, 32]] *= 100
        found = worth_removing(KeyBias(both.rotary, vector), torch.ones(HEADS, DIM), tokens=32)
        assert found.rotary.first.tolist() == [0] and found.rotary.second.tolist() == [32]
        assert torch.equal(found.vector[:, [0, 32]], vector[:, [0, 32]]) and int((found.vector != 0).sum()) == 2 * HEADS

    def test_what_is_left_adds_a_tenth_at_most(self):
        bias = a_bias(list(range(32)), 40.0)
        found = worth_removing(bias, torch.ones(HEADS, DIM), tokens=32)
        left = KeyBias(bias.rotary, bias.vector - found.vector)
        at = torch.arange(3200)[None]
        spread = {
            name: one.rows(at)[0].unflatten(1, (-1, 32)).var(2).mean(1).sum(1)
            for name, one in (("left", left), ("all", bias))
        }
        assert (spread["left"] < 0.12 * DIM).all() and (spread["all"] > 0.12 * DIM).all()
        assert 0 < len(found.rotary.frequencies) < 32


def test_a_crossing_with_a_bias_needs_positions():
    crossing = method("occam").crossing(torch.zeros(1, HEADS, 1, DIM), Statistics(None, None, a_bias([0], 1.0)))
    with pytest.raises(UnsupportedInput, match="needs the positions"):
        crossing.enter(torch.zeros(1, HEADS, 3, DIM), torch.zeros(1, HEADS, 3, DIM))


def test_the_papers_method_keeps_the_bias():
    cache = a_cache(method("oscar"), a_bias([0], 30.0))
    cache.update(torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, DIM))
    assert cache.key_bias_pairs == 0
