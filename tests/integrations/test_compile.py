"""A decode step under `torch.compile(fullgraph=True)`: a packed layer is one operator, doing what eager code does."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers import PackedCache, compiled
from occamkv.integrations.transformers.attention import NAME, register

PROMPT = torch.randint(0, 64, (2, 200), generator=torch.Generator().manual_seed(0))
STEPS = 3


@pytest.fixture(scope="module")
def model():
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
    )
    made = LlamaForCausalLM(config).eval()
    made.set_attn_implementation(NAME)
    return made


@pytest.fixture
def graphs():
    """A backend that runs graphs as they are, and counts them."""
    torch._dynamo.reset()
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    yield backend, made
    torch._dynamo.reset()


def filled(model, method="occam", rows=1) -> PackedCache:
    cache = PackedCache(model, method)
    with torch.no_grad():
        model(PROMPT[:rows], past_key_values=cache)
    return cache


@torch.no_grad()
def decode(model, cache, rows=1) -> torch.Tensor:
    return torch.stack([model(PROMPT[:rows, i : i + 1], past_key_values=cache).logits for i in range(STEPS)])


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_steps_give_what_eager_steps_give_and_new_caches_need_no_new_graph(model, graphs, rows):
    backend, made = graphs
    fast = torch.compile(model, fullgraph=True, backend=backend)
    wanted = decode(model, filled(model, rows=rows), rows)
    caches = [filled(model, rows=rows) for _ in range(2)]
    assert torch.equal(decode(fast, caches[0], rows), wanted)
    count = len(made)
    assert torch.equal(decode(fast, caches[1], rows), wanted)
    assert 1 <= count == len(made) <= 2, "one graph, and one more once the length is known to vary"
    report = caches[0].report()
    assert all(layer.tokens == 200 + STEPS and layer.reads_packed for layer in report.layers)
    assert not compiled.traced


def test_twin_without_the_operator_a_packed_layer_breaks_the_graph(model, graphs, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    fast = torch.compile(model, fullgraph=True, backend=graphs[0])
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        decode(fast, filled(model))


def test_a_plain_cache_of_an_attached_model_is_compiled_as_ever(model, graphs):
    cache, other = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(PROMPT[:1], past_key_values=cache)
        model(PROMPT[:1], past_key_values=other)
    fast = torch.compile(model, fullgraph=True, backend=graphs[0])
    torch.testing.assert_close(decode(fast, cache), decode(model, other))


def test_a_copied_cache_has_handles_of_its_own(model, graphs):
    cache = filled(model)
    clone = copy.deepcopy(cache)
    assert {int(layer.handle) for layer in cache.layers}.isdisjoint(int(layer.handle) for layer in clone.layers)
    decode(torch.compile(model, fullgraph=True, backend=graphs[0]), clone)
    assert (cache.get_seq_length(), clone.get_seq_length()) == (200, 200 + STEPS)


def test_the_operator_keeps_its_promises(model):
    cache = filled(model)
    layer = cache.layers[0]
    q, k, v = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32)
    torch.library.opcheck(
        compiled.step, (q, k, v, None, layer.handle, None, None, None), test_utils=("test_schema", "test_faketensor")
    )


def test_a_cache_that_is_gone_is_refused(model):
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    with pytest.raises(UnsupportedInput, match="is gone"):
        compiled.step(q, k, k, None, torch.tensor(2**40), None, None, None)


def test_attention_that_is_not_causal_is_refused_before_it_is_traced():
    q = torch.randn(1, 4, 3, 32)
    compiled.check(q, None, causal=True)
    compiled.check(q, torch.ones(1, 1, 3, 9), causal=False)
    with pytest.raises(UnsupportedInput, match="eagerly"):
        compiled.check(q, None, causal=False)
