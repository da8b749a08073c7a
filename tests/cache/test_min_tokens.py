"""A threshold below which nothing is packed: the residual grows and shrinks, sequence by sequence."""

import pytest
import torch

from cache_mirror import Mirror, left_padded
from occamkv.cache import LayerCache
from occamkv.errors import UnsupportedInput
from occamkv.methods import method
from occamkv.methods.crossing import Statistics


@pytest.mark.parametrize("name", ["kivi", "oscar_roll", "occam", "occam_quality", "ott"])
@pytest.mark.parametrize("steps", [[60], [1] * 60, [30, 1, 1, 28]], ids=["at once", "token by token", "mixed"])
def test_one_sequence_packs_while_another_still_waits(name, steps):
    """The ring then holds more than 128 tokens of one row and fewer of the other."""
    mirror = Mirror(method(name), batch=2, outliers=0.04, min_tokens=300)
    mirror.step(250, kept=left_padded(250, 0, 130))
    for count in steps:
        mirror.step(count)
    mirror.cache.commit()
    first, second = mirror.cache.packed_tokens()
    assert first > 0
    assert second == 0
    for count in (100, 1, 200):
        mirror.step(count)
    mirror.cache.commit()
    assert min(mirror.cache.packed_tokens()) > 0


@pytest.mark.parametrize("pins", ["none", "first:4", "at:0,150", "lowest:3", "first:4+found"])
@pytest.mark.parametrize("cuts", [[200], [4, 196], [150, 50], [199, 1]], ids=str)
def test_packing_starts_with_the_token_that_the_report_names_however_a_text_was_cut(cuts, pins):
    cache = LayerCache(method("oscar", pins=pins), min_tokens=200)
    k = torch.randn(1, 2, 200, 32, generator=torch.Generator().manual_seed(0))
    for part in k.split(cuts, dim=2):
        assert cache.packed_tokens() in ([], [0])
        cache.update(part, part)
        cache.commit()
    assert cache.packing_starts == 200 and cache.packed_tokens() == [128]


def test_a_balance_vector_that_the_method_does_not_use_is_refused():
    cache = LayerCache(method("oscar"), statistics=Statistics(torch.ones(2, 32)))
    with pytest.raises(UnsupportedInput, match="balance was given"):
        cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32))
    assert cache.length == 0


def test_a_reset_cache_has_forgotten_what_it_did():
    mirror = Mirror(method("oscar"))
    mirror.step(300)
    mirror.cache.remove(200)
    assert mirror.cache.lossy_crops
    mirror.cache.reset()
    assert (mirror.cache.lossy_crops, mirror.cache.packed_reads, mirror.cache.length) == (0, 0, 0)


def test_a_prompt_after_speculation_is_packed_at_once():
    mirror = Mirror(method("oscar"))
    mirror.step(200)
    mirror.cache.records_past = True
    mirror.cache.note(mirror.put(*mirror.fresh(1100)))
    mirror.cache.settle()
    assert mirror.cache.packed_tokens() == [1280]
    mirror.cache.note(mirror.put(*mirror.fresh(200)))
    mirror.cache.settle()
    assert mirror.cache.packed_tokens() == [1280], "200 tokens may be speculation"
