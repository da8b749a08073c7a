"""Shadows: what they report equals the error of float64 attention on a copy that transformers itself kept."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import occamkv
from attention_truth import relative_error
from integrations.architectures import TINY
from integrations.steps import prompt, words
from integrations.test_generate import ABOVE_ALL, FEATURES, LLAMA, NEW, PROMPT, SHORTER, generate
from integrations.twins import Twins
from occamkv import PackedCache, Verify, attach
from occamkv.cache import LayerCache
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.plan import plan_for
from occamkv.integrations.transformers.shadow import Shadow

ALWAYS = Verify(layers=99, fraction=1)


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


@pytest.fixture
def twins(monkeypatch):
    yield Twins(monkeypatch)
    monkeypatch.undo()
    attention.register()


KINDS = ["llama", "gemma3", "gemma2 with a soft cap", "gpt_oss with learned sinks", "qwen2 with a large key bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_float64_attention_on_what_transformers_kept(kind, twins):
    tiny = TINY[kind]
    made = tiny.build()
    cache = PackedCache(made, verify=ALWAYS)
    made.generate(**prompt(tiny, {0: 300, 1: 200}), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert sorted(twins.errors) == tiny.packed
    twins.assert_seen_by(cache)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "greedy"])
def test_shadows_follow_their_layers_through_all_that_generate_does(feature, model, twins):
    cache = PackedCache(model, verify=ALWAYS)
    generate(model, feature, past_key_values=cache)
    twins.assert_seen_by(cache)


def test_shadows_follow_crop_select_repeat_and_reset(model, twins):
    cache, mask = PackedCache(model, verify=ALWAYS), prompt(LLAMA, {0: PROMPT, 1: SHORTER})["attention_mask"]

    @torch.no_grad()
    def step(ids, mask) -> None:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)

    def more(mask, count: int):
        return torch.cat((mask, mask.new_ones(mask.shape[0], count)), dim=1)

    step(prompt(LLAMA, {0: PROMPT, 1: SHORTER})["input_ids"], mask)
    cache.crop(-150)
    mask = more(mask[:, :-150], 1)
    step(words(1, row=2).expand(2, 1), mask)
    for change, rows in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda: cache.batch_select_indices(torch.tensor([0, 3])), [0, 3]),
    ):
        change()
        cache.crop(-1)
        mask = more(mask[rows][:, :-1], 2)
        step(torch.stack([words(2, row=row) for row in rows]), mask)
    twins.assert_seen_by(cache)
    cache.reset()
    twins.errors.clear()
    twins.cosines.clear()
    assert cache.nbytes() == 0
    step(words(300)[None], torch.ones(1, 300, dtype=torch.int64))
    step(words(1, row=3)[None], torch.ones(1, 301, dtype=torch.int64))
    twins.assert_seen_by(cache)


def test_the_first_layer_agrees_with_a_full_precision_run_of_its_own(model, monkeypatch):
    """K, V and Q of the first layer depend on the tokens alone, so another run has the same ones."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    note = Shadow.note
    monkeypatch.setattr(
        Shadow, "note", lambda self, out, full, kept: (seen.append((out, full)), note(self, out, full, kept))[1]
    )
    ids, cache, full = words(340)[None], PackedCache(model, verify=Verify(layers=(0,), fraction=1)), DynamicCache()
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        for held in (full, cache):
            model(ids[:, :320], past_key_values=held)
            for at in range(320, 340):
                model(ids[:, at : at + 1], past_key_values=held)
    hook.remove()
    exact, packed = outputs[1:21], outputs[22:]
    errors = [relative_error(given, wanted.double()) for given, wanted in zip(packed, exact, strict=True)]
    assert len(seen) == 20
    for (_, said), wanted in zip(seen, exact, strict=True):
        assert relative_error(said.flatten(2), wanted.double()) < 1e-5
    assert cache.report(verify=True).verification.error_mean == pytest.approx(sum(errors) / 20, rel=1e-3)


def test_compiled_steps_are_verified_as_eager_ones(model):
    def decoded(run) -> Any:
        cache = PackedCache(model, verify=ALWAYS)
        with torch.no_grad():
            model(words(200)[None], past_key_values=cache)
            for token in words(4, row=1):
                run(token[None, None], past_key_values=cache)
        return cache.report(verify=True).verification

    torch._dynamo.reset()
    eager, fast = decoded(model), decoded(torch.compile(model, fullgraph=True, backend="eager"))
    torch._dynamo.reset()
    assert eager.steps == 4
    assert fast == eager


def test_with_nothing_but_rounding_between_the_two_reads_the_error_is_rounding(model, monkeypatch):
    """The control: the residual alone, which is in full precision, taken for packed tokens."""
    monkeypatch.setattr(LayerCache, "packed_tokens", lambda self: [1])
    cache = PackedCache(model, min_tokens=ABOVE_ALL, verify=ALWAYS)
    generate(model, "greedy", past_key_values=cache)
    found = cache.report(verify=True).verification
    assert found.steps == NEW - 1
    assert 0 < found.worst.error_max < 2e-3
    assert min(layer.cosine_mean for layer in found.layers) > 1 - 1e-5


def test_twin_one_record_that_is_broken_makes_the_error_jump(model):
    def error(spoil: bool) -> float:
        cache = PackedCache(model, "occam_k4v4", verify=Verify(layers=(1,), fraction=1))
        with torch.no_grad():
            model(words(300)[None], past_key_values=cache)
            store = cache.layers[1].cache.store
            size = store.format.sections(store.residual_k.shape[3])
            scale = slice(size.k_codes, size.k_codes + size.k_scale)
            if spoil:
                store.pool.slabs[0].records[0, :, 0, scale] = 0x7E
            model(words(1, row=1)[None], past_key_values=cache)
        return cache.report(verify=True).verification.error_mean

    whole, broken = error(False), error(True)
    assert whole < 0.1
    assert broken > 3 * whole


def test_what_a_read_gives_for_pads_does_not_count():
    shadow, out = Shadow(ALWAYS), torch.randn(2, 3, 4, 32)
    kept, full = torch.tensor([[False, True, True], [True, True, True]]), out.clone()
    full[0, 0] += 100.0
    shadow.note(out, full, kept)
    shadow.note(out, full, None)
    layer = shadow.verification(0)
    assert (layer.error_max > 0.5, layer.error_mean) == (True, layer.error_max / 2)


def test_more_bits_have_a_smaller_error(model):
    errors = []
    for bits in (2, 3, 4):
        cache = PackedCache(model, f"occam_k{bits}v{bits}", verify=ALWAYS)
        generate(model, "greedy", past_key_values=cache)
        errors.append(cache.report(verify=True).verification.error_mean)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


def test_a_shadow_changes_nothing_that_the_model_says(model):
    alone, shadowed = PackedCache(model), PackedCache(model, verify=ALWAYS)
    assert torch.equal(
        generate(model, "greedy", past_key_values=alone), generate(model, "greedy", past_key_values=shadowed)
    )
    rows = zip(alone.report().layers, shadowed.report().layers, strict=True)
    assert all(one.nbytes == other.nbytes and one.packed_tokens == other.packed_tokens for one, other in rows)


def test_bytes_of_shadows_are_counted_apart_and_not_hidden(model):
    cache, alone = PackedCache(model, verify=Verify(layers=(1,), fraction=1 / 4)), PackedCache(model)
    for each in (cache, alone):
        generate(model, "greedy", past_key_values=each)
    report = cache.report()
    full = 2 * 2 * 2 * 32 * 4 * (PROMPT + NEW - 1)  # K and V of 2 sequences and heads, float32
    assert [layer.shadow_bytes for layer in report.layers] == [0, full]
    assert report.nbytes == alone.nbytes() == cache.nbytes() - full
    assert f"shadows that verify: {full / 2**20:.2f} MiB" in str(report)
    assert "shadows" not in str(alone.report())


def test_a_copy_has_a_shadow_of_its_own(model):
    cache = PackedCache(model, verify=ALWAYS)
    with torch.no_grad():
        model(words(300)[None], past_key_values=cache)
        clone = copy.deepcopy(cache)
        model(words(1)[None], past_key_values=clone)
    assert [each.report(verify=True).verification.steps for each in (cache, clone)] == [0, 1]
    assert clone.layers[0].shadow.tokens == cache.layers[0].shadow.tokens + 1 == 301


def test_a_refused_step_leaves_no_trace(model):
    cache = PackedCache(model, verify=ALWAYS)
    with torch.no_grad():
        model(words(300)[None], past_key_values=cache)
        with pytest.raises(UnsupportedInput, match="columns"):
            attention.attend_step(
                torch.randn(1, 4, 1, 32),
                *torch.randn(2, 1, 2, 1, 32),
                cache.layers[0],
                torch.ones(1, 1, 1, 7, dtype=torch.bool),
                attention.Reading(None, None, None),
            )
        model(words(1)[None], past_key_values=cache)
    k, _ = cache.layers[0].shadow.copy()
    assert k.shape[2] == cache.get_seq_length() == 301
    assert cache.report(verify=True).verification.steps == 1


@pytest.mark.parametrize(("fraction", "least"), [(1, 3200), (0.75, 2000), (0.5, 1600), (1 / 16, 200), (0.01, 32)])
def test_the_sampled_share_is_the_fraction_and_every_layer_samples_the_same_steps(fraction, least):
    chosen = []
    for _ in range(2):
        shadow = Shadow(Verify(fraction=fraction))
        chosen.append([step for step in range(3200) if shadow.samples()])
    assert chosen[0] == chosen[1]
    assert least <= len(chosen[0]) <= 3200 * fraction


def test_the_gaps_between_sampled_steps_vary_so_that_no_rhythm_of_packing_is_missed():
    shadow = Shadow(Verify(fraction=1 / 16))
    chosen = [step for step in range(3200) if shadow.samples()]
    assert {step % 32 for step in chosen} == set(range(32))
    assert all(16 * place <= step < 16 * place + 16 for place, step in enumerate(chosen))
    other = Shadow(Verify(fraction=1 / 16, seed=1))
    assert [step for step in range(3200) if other.samples()] != chosen


@pytest.mark.parametrize(
    ("layers", "packed", "wanted"),
    [
        (3, range(30), [0, 14, 29]),
        (1, range(30), [0]),
        (2, [3, 5, 11], [3, 11]),
        (5, [3, 5], [3, 5]),
        ((5, 3, 5), [3, 5], [3, 5]),
    ],
)
def test_which_layers_are_shadowed(layers, packed, wanted):
    assert Verify(layers=layers).chosen(list(packed)) == wanted


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UnsupportedInput, match="above 0 to 1"):
        Verify(fraction=fraction)


@pytest.mark.parametrize("layers", [0, -1, ()])
def test_no_layers_are_refused(layers):
    with pytest.raises(UnsupportedInput, match="from 1 on"):
        Verify(layers=layers)


def test_a_layer_that_is_not_packed_is_refused():
    made = TINY["gemma3"].build()
    for way in (PackedCache, attach):
        with pytest.raises(UnsupportedInput, match=r"layers \[0, 7\] that are not packed; allowed: \[1\]"):
            way(made, verify=Verify(layers=(0, 1, 7)))


def test_where_nothing_is_packed_there_is_nothing_to_verify(model):
    with pytest.raises(UnsupportedInput, match="no layer of this cache is packed"):
        PackedCache(model, plan=plan_for(model.config, "full"), verify=True)


@pytest.mark.parametrize(("given", "told"), [("logits", "--receipt"), (3, "allowed: True"), ("yes", "allowed: True")])
def test_what_verify_can_be(model, given, told):
    with pytest.raises(UnsupportedInput, match=told):
        PackedCache(model, verify=given)


@pytest.mark.parametrize("verify", [None, False])
def test_without_shadows_a_report_cannot_verify_and_says_how(model, verify):
    cache = PackedCache(model, verify=verify)
    with pytest.raises(UnsupportedInput, match="verify=True"):
        cache.report(verify=True)
    with attach(model, verify=verify) as handle, pytest.raises(UnsupportedInput, match="verify=True"):
        handle.report(verify=True)


def test_a_prompt_too_short_to_pack_is_not_verified_and_says_so(model):
    cache = PackedCache(model, verify=ALWAYS)
    model.generate(words(20)[None], past_key_values=cache, max_new_tokens=5, do_sample=False)
    found = cache.report(verify=True).verification
    assert (found.steps, found.error_mean, found.worst) == (0, None, None)
    assert str(found) == "not verified: 2 of 2 packed layers are shadowed, no step read packed ones"
    assert found.to_json()["error_mean"] is found.to_json()["layers"][0]["error_max"] is None


def test_steps_that_were_all_passed_over_are_no_proof_and_it_is_said(model):
    cache = PackedCache(model, verify=Verify(fraction=1e-6))
    generate(model, "greedy", past_key_values=cache)
    told = (
        f"not verified: 2 of 2 packed layers are shadowed, none of {NEW - 1} steps that read packed tokens was sampled"
    )
    assert str(cache.report(verify=True)).splitlines()[-1] == told


@pytest.mark.filterwarnings("ignore:this model's queries")
def test_a_model_that_reads_dequantized_is_not_verified():
    made = TINY["diffllama, which repeats V"].build()
    cache = PackedCache(made, verify=ALWAYS)
    made.generate(words(300)[None], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.report().layers[0].reads_dense
    assert "no step read packed ones" in str(cache.report(verify=True))


def test_attached_models_are_verified_too(model):
    with attach(model, verify=Verify(layers=(1,), fraction=0.5)) as handle:
        assert handle.report(verify=True) is None
        generate(model, "greedy")
        inside = handle.report(verify=True)
        assert handle.report().verification is None
    assert handle.report(verify=True) == inside
    assert handle.report().verification is None
    assert [layer.index for layer in inside.verification.layers] == [1]
    assert 15 <= inside.verification.steps <= 20
    assert "verified: 1 of 2 packed layers" in str(inside)
    assert inside.to_json()["verification"]["layers"][0]["error_mean"] == inside.verification.error_mean


def test_the_name_is_public():
    assert occamkv.Verify is Verify


def test_a_report_cannot_verify_logits_and_says_what_can(model):
    with pytest.raises(UnsupportedInput, match=r"verify is 'logits'; allowed: True or False\. .*receipt\(model"):
        PackedCache(model, verify=True).report(verify="logits")
