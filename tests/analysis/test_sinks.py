"""Sinks by each rule, on layers where one knows which token is one."""

from dataclasses import replace

import pytest
import torch

from occamkv.analysis.sinks import find_sinks, heads_with_sink, large_columns, massive_activation
from some_trace import TOKENS, layer

TEXTS = [f"t{i}" for i in range(TOKENS)]


@pytest.mark.parametrize("at", [0, 40])
def test_a_sink_is_found_with_its_token_and_all_rules_that_fire(at):
    found = find_sinks(layer(sink_at=at), TEXTS)
    (sink,) = found.found
    assert (sink.position, sink.token, found.rate) == (at, f"t{at}", 1.0)
    assert sink.rules == ("attention", "short value", "massive activation")
    assert sink.received > 0.9
    assert sink.k_norm < 0.5
    assert sink.v_norm < 0.2
    assert sink.massive > 10
    assert (found.latent, found.column_positions) == ((), ())


def test_a_layer_without_a_sink_has_none():
    found = find_sinks(layer(), TEXTS)
    assert (found.found, found.latent, found.rate) == ((), (), 0.0)


def test_without_attention_both_norm_rules_must_fire():
    given = replace(layer(sink_at=5), received=None)
    found = find_sinks(given, TEXTS)
    assert ([sink.position for sink in found.found], found.rate) == ([5], None)
    assert found.found[0].rules == ("short value", "massive activation")
    assert found.found[0].received is None
    for changed in ({"v": torch.ones_like(given.v)}, {"hidden": torch.ones_like(given.hidden)}):
        assert find_sinks(replace(given, **changed), TEXTS).found == ()


def test_attention_decides_and_what_only_the_norms_tell_is_latent():
    plain, given = layer(), layer(sink_at=5)
    found = find_sinks(replace(given, received=plain.received), TEXTS)
    assert (found.found, found.latent) == ((), (5,))


def test_the_last_32_tokens_are_never_sinks():
    looked_at = torch.zeros(1, 64)
    looked_at[0, 31] = looked_at[0, 32] = 0.9
    assert heads_with_sink(looked_at)[0].nonzero().flatten().tolist() == [31]


def test_the_rate_is_that_of_the_token_most_heads_agree_on():
    looked_at = torch.zeros(1, 4, TOKENS)
    looked_at[0, :3, 9] = looked_at[0, 3, 70] = 0.31
    found = find_sinks(replace(layer(), received=looked_at), TEXTS)
    assert found.rate == 0.75
    assert [sink.position for sink in found.found] == [9, 70]


@pytest.mark.parametrize(("tokens", "fires"), [(1500, True), (900, False)])
def test_equation_5_needs_more_than_1000_tokens(tokens, fires):
    received = torch.zeros(1, tokens)
    received[0, 0] = 1.0  # all queries look at the first token alone: its column adds up to T, the mean column to 1
    assert large_columns(received)[0].nonzero().flatten().tolist() == [0] * fires


def test_under_a_window_no_more_queries_than_its_tokens_see_a_column():
    received = torch.zeros(1, 4000)
    received[0, 100] = 0.9  # 3510 to 512 of 4000 queries
    received[0, 2000:] = 1e-4
    assert large_columns(received)[0].nonzero().flatten().tolist() == [100]
    assert large_columns(received, window=2048)[0].nonzero().flatten().tolist() == [100]
    received[0, :2000] = 0.5
    assert not large_columns(received, window=512).any()


def test_massive_activations_are_largest_entries_over_the_median_token():
    hidden = torch.tensor([[1.0, -2.0], [0.5, 4.0], [-30.0, 1.0]])
    assert massive_activation(hidden).tolist() == [0.5, 1.0, 7.5]
