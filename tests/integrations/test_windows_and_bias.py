"""How a model embeds positions, found by looking at its keys; and what needs it: key bias, windows; a bias on pins."""

import copy

import pytest
import torch

from integrations.architectures import TINY
from integrations.steps import words
from occamkv import PackedCache, attach
from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals import compare
from occamkv.integrations.transformers.plan import plan_for
from occamkv.integrations.transformers.rotary import key_biases, model_rotaries
from occamkv.integrations.transformers.statistics import model_statistics
from occamkv.methods import method

ROTARY = [
    "llama",
    "qwen2",
    "qwen3",
    "phi3 with head_dim 24",
    "gemma2 with a soft cap",
    "gemma3",
    "gpt_oss with learned sinks",
    "qwen3_next with linear layers",
    "lfm2 with convolutions",
]
OTHERS = [
    "bloom outside the attention interface",
    "falcon outside the attention interface",
    "t5, an encoder and a decoder",
]


def keys_at(model, ids, offset: int, layers: list[int]):
    """Keys of one pass at positions `offset`, `offset + 1`, ..., from transformers' own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    at = torch.arange(offset, offset + ids.shape[1])[None]
    with torch.no_grad():
        model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    return {layer: cache.layers[layer].keys.float() for layer in layers}


@pytest.mark.parametrize("name", ROTARY)
def test_keys_turned_by_what_was_found_are_the_keys_of_other_positions(name):
    tiny = TINY[name]
    model = tiny.build_traceable()
    found = model_rotaries(model)
    assert sorted(found) == tiny.packed
    ids = words(9)[None]
    here, there = (keys_at(model, ids, offset, tiny.packed) for offset in (0, 333))
    for layer, rotary in found.items():
        turned = rotary.turn(here[layer], torch.tensor(333))
        assert (turned - there[layer]).abs().max() < 2e-3 * there[layer].abs().max()
        assert (here[layer] - there[layer]).abs().max() > 0.1 * there[layer].abs().max(), "twin: they differ"


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_rotary_tables_or_outside_the_interface_are_not_known(name):
    assert model_rotaries(TINY[name].build()) == {}


@pytest.mark.parametrize("kind", ["dynamic", "axes"])
def test_embeddings_that_change_with_the_length_or_have_axes_are_not_known(kind):
    model = TINY["llama"].build()
    model.config.rope_parameters = {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "axes": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    }[kind]
    assert model_rotaries(model) == {}


def test_a_model_that_does_not_heed_positions_is_not_known(monkeypatch):
    model = TINY["llama"].build()
    forward = model.model.forward

    def deaf(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", deaf)
    assert model_rotaries(model) == {}


class TestKeyBias:
    NAME = "qwen2 with a large key bias"

    def test_it_is_what_the_projection_adds(self):
        model = TINY[self.NAME].build()
        for layer, bias in key_biases(model).items():
            own = model.model.layers[layer].self_attn.k_proj.bias.detach().reshape(2, 32)
            assert torch.equal(bias.vector, own)
        assert sorted(key_biases(model)) == [0, 1]
        assert key_biases(TINY["llama"].build()) == {}

    def test_a_norm_behind_the_projection_leaves_it_alone(self):
        model = TINY["qwen3"].build()
        for part in model.modules():
            if hasattr(part, "k_proj"):
                part.k_proj.bias = torch.nn.Parameter(300 * torch.ones(64))
        assert {one.key_bias for one in model_statistics(model).values()} == {None}

    def test_it_is_taken_out_by_default_reported_and_lowers_the_error(self):
        model, ids = TINY[self.NAME].build(), words(700)[None]
        ours, cache, _ = compare(model, ids, "occam", score_from=300)
        kept, other, _ = compare(model, ids, method("occam", key_bias="keep"), score_from=300)
        pairs = {layer.key_bias_pairs for layer in cache.layers}
        assert pairs <= {2, 3, 4}, "some of five: the slow ones do no harm"
        assert f"key bias taken out of {max(pairs)} pairs of channels" in str(cache)
        assert "key bias" not in str(other) and other.layers[0].key_bias_pairs == 0
        assert ours.kl_mean < 0.7 * kept.kl_mean

    def test_before_anything_is_packed_logits_are_the_models_own(self):
        model, ids = TINY[self.NAME].build(), words(120)[None]
        with torch.no_grad():
            full = model(ids).logits
            cache = PackedCache(model)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(40, dim=1)]
        assert (torch.cat(parts, 1) - full).abs().max() < 1e-3 * full.abs().max()
        assert not cache.report().quantized

    def test_wrong_positions_change_nothing_before_packing(self):
        """What is taken out is what is put back, so exactness does not hang on the model's angles."""
        model, ids = TINY[self.NAME].build(), words(100)[None]
        at = torch.arange(500, 600)[None]
        with torch.no_grad():
            full = model(ids, position_ids=at).logits
            cache = PackedCache(model)
            parts = [
                model(ids[:, part], position_ids=at[:, part], past_key_values=cache).logits
                for part in (slice(0, 60), slice(60, 61), slice(61, 100))
            ]
        assert (torch.cat(parts, 1) - full).abs().max() < 1e-3 * full.abs().max()

    def test_the_balance_is_that_of_keys_without_it(self):
        plain, biased = TINY["qwen2"].build(), TINY["qwen2"].build()
        for layer in biased.model.layers:
            layer.self_attn.k_proj.bias.data[::16] += 200.0  # the first pair of each head half
        before, after = model_statistics(plain), model_statistics(biased)
        assert after[0].key_bias is not None and before[0].key_bias is None
        ratio = (after[0].balance / before[0].balance).log().abs().max()
        assert ratio < 0.35
        with_bias = model_statistics(copy.deepcopy(biased))
        assert torch.equal(with_bias[0].balance, after[0].balance)

    def test_a_configuration_cannot_tell_and_the_bias_stays(self):
        model = TINY[self.NAME].build()
        balance = {0: torch.ones(2, 32), 1: torch.ones(2, 32)}
        cache = PackedCache(model.config, "occam", balance=balance)
        model.set_attn_implementation("occamkv")
        with torch.no_grad():
            model(words(300)[None], past_key_values=cache)
        assert cache.report().layers[0].key_bias_pairs == 0


class TestWindow:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss with learned sinks", "qwen2 with a large key bias"])
    def test_generating_far_beyond_the_window_takes_no_more_memory(self, name):
        model = TINY[name].build()
        ids = words(700)[None]
        cache = PackedCache(model, method("occam", window=256))
        sizes = []
        with torch.no_grad():
            for part in ids.split(50, dim=1):
                assert model(part, past_key_values=cache).logits.isfinite().all()
                sizes.append(sum(layer.nbytes for layer in cache.report().packed_layers))
        report = cache.report()
        assert all(layer.dropped_tokens >= 256 and layer.tokens == 700 for layer in report.packed_layers)
        assert "dropped)" in str(report)
        assert max(sizes[8:]) <= 1.1 * min(sizes[8:])

    def test_whole_prompts_steps_and_generate(self):
        model = TINY["llama"].build()
        cache = PackedCache(model, method("occam", window=256))
        out = model.generate(words(600)[None], past_key_values=cache, max_new_tokens=200, do_sample=False)
        assert out.shape[1] == 800
        assert cache.report().layers[0].dropped_tokens >= 256
        with attach(model, method("oscar", window=256, pins="none")) as kv:
            model.generate(words(600)[None], max_new_tokens=5, do_sample=False)
        assert kv.report().layers[0].dropped_tokens > 0

    def test_pins_need_to_know_the_embedding(self):
        for name in ("bloom outside the attention interface", "t5, an encoder and a decoder"):
            with pytest.raises(UnsupportedInput, match="how this model embeds positions is not known"):
                PackedCache(TINY[name].build(), method("oscar", window=256, pins="first:4"))
        with pytest.raises(UnsupportedInput, match="how this model embeds positions is not known"):
            PackedCache(TINY["llama"].build().config, method("oscar", window=256, pins="first:4"))
        assert PackedCache(TINY["llama"].build().config, method("oscar", window=256)).plan.packed_layers == 2

    def test_a_window_survives_a_plan_file(self, tmp_path):
        model = TINY["llama"].build()
        plan = plan_for(model.config, method("occam", window=512, pins=[0, 9]))
        plan.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json")
        assert again == plan and again.layers[0].method.window == 512 and again.layers[0].method.pins == "at:0,9"

    def test_beams_are_refused_nowhere_and_verify_is(self):
        model = TINY["llama"].build()
        cache = PackedCache(model, method("occam", window=256))
        out = model.generate(words(400)[None], past_key_values=cache, max_new_tokens=60, num_beams=3, do_sample=False)
        assert out.shape[1] == 460
        with pytest.raises(UnsupportedInput, match="full precision is no measure of it"):
            PackedCache(model, method("occam", window=256), verify=True)


class TestPinBias:
    def weights_of_pins(self, model, pin_bias, *, tokens=300, packed=True):
        """The share of attention that the four pins get in the last step, from how the output moves with their V."""
        ids = words(tokens)[None]
        cache = PackedCache(model, "occam", pin_bias=pin_bias)
        with torch.no_grad():
            return model(ids[:, :-1], past_key_values=cache).logits, model(ids[:, -1:], past_key_values=cache).logits

    def test_zero_changes_nothing_beyond_rounding_and_more_changes_more(self):
        model = TINY["llama"].build()
        plain, zero, little, much = (self.weights_of_pins(model, bias) for bias in (None, 0.0, 1.0, 4.0))
        for part in range(2):
            scale = plain[part].abs().max()
            moved = [float((x[part] - plain[part]).abs().max() / scale) for x in (zero, little, much)]
            assert moved[0] < 2e-3 < moved[1] < moved[2]

    def test_a_very_negative_one_hides_the_pins_also_in_the_first_prompt(self):
        model = TINY["llama"].build()
        ids = words(200)[None]
        mask = torch.ones(1, 1, 200, 200).tril().bool()
        mask[..., 4:, :4] = False
        mask[..., :4, :4] = torch.ones(4, 4).tril().bool()
        with torch.no_grad():
            full = model(ids, attention_mask=mask).logits[:, 60:]
            biased = model(ids, past_key_values=PackedCache(model, "occam", pin_bias=-1e4)).logits[:, 60:]
            plain = model(ids).logits[:, 60:]
        assert (biased - full).abs().max() < 0.05 * (plain - full).abs().max()

    def test_by_layer_and_head(self):
        model = TINY["llama"].build()
        some = self.weights_of_pins(model, {0: torch.tensor([0.0, 0.0, 0.0, 3.0])})
        none = self.weights_of_pins(model, {0: torch.zeros(4)})
        assert (some[1] - none[1]).abs().max() > 1e-2
        with attach(model, "occam", pin_bias={1: torch.zeros(4)}):
            model.generate(words(200)[None], max_new_tokens=3)

    @pytest.mark.parametrize(
        ("pin_bias", "name"),
        [
            (float("nan"), "occam"),
            ({0: torch.zeros(3)}, "occam"),
            ({7: torch.zeros(4)}, "occam"),
            ({0: 1.0}, "occam"),
            (1.0, "oscar"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, pin_bias, name):
        with pytest.raises(UnsupportedInput, match="pin_bias"):
            PackedCache(TINY["llama"].build(), name, pin_bias=pin_bias)
