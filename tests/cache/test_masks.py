"""From an engine's mask over slots, pads included, to a mask over positions of real tokens: against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_mirror import left_padded
from occamkv.cache.masks import query_positions, read_mask, read_pads, visible
from occamkv.errors import UnsupportedInput

LOWEST = torch.finfo(torch.float32).min


def causal(new: int, total: int) -> torch.Tensor:
    return torch.ones(1, 1, new, total).bool().tril(total - new)


def with_pads(real: torch.Tensor, new: int) -> torch.Tensor:
    """What engines pass: bool `[B, 1, T, S]`, no query sees a pad."""
    return causal(new, real.shape[1]) & real[:, None, None, :]


def shown(seen, real: torch.Tensor, row: int, head: int, query: int, slot: int, new: int) -> bool:
    """Whether a mask that was read lets a query see a slot."""
    position = int(real[row, :slot].sum())
    at = int(real[row, : real.shape[1] - new + query].sum())
    if seen.mask is None:
        return position <= at
    mask = seen.mask[row if seen.mask.shape[0] > 1 else 0, head if seen.mask.shape[1] > 1 else 0, query, position]
    return bool(mask) if mask.dtype == torch.bool else float(mask) > LOWEST / 2


@st.composite
def padded_steps(draw):
    """Real slots, bool `[B, S]`, of a step of `new` tokens: pads before each sequence and before its new tokens."""
    batch, held, new = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    real = torch.zeros(batch, held + new, dtype=torch.bool)
    for row in range(batch):
        real[row, draw(st.integers(0, held)) : held] = True
        real[row, held + draw(st.integers(0, new - 1)) :] = True
    return real, new


@given(padded_steps(), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 999))
@settings(deadline=None, max_examples=150)
def test_a_mask_over_positions_shows_what_the_mask_over_slots_showed(step, heads, additive, is_causal, seed):
    real, new = step
    generator = torch.Generator().manual_seed(seed)
    mask = with_pads(real, new)
    if not is_causal:  # anything, as long as each real token is seen by some query
        mask = torch.rand(real.shape[0], heads, new, real.shape[1], generator=generator) < 0.5
        mask[:, :, -1] = True
        mask &= real[:, None, None, :]
    given_mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST) if additive else mask
    held = real.shape[1] - new
    before = None if bool(real[:, :held].all()) else real[:, :held]
    seen = read_mask(given_mask, before=before, new=new, batch=real.shape[0])
    kept = real[:, held:]
    assert (seen.kept is None) == bool(kept.all())
    assert seen.kept is None or torch.equal(seen.kept, kept)
    if is_causal and not additive:
        assert seen.mask is None, "plain causal attention needs no mask"
    for row, head, query, slot in torch.cartesian_prod(
        *(torch.arange(n) for n in (len(real), heads, new, real.shape[1]))
    ):
        if real[row, slot] and real[row, held + query]:
            expected = bool(mask[row, head % mask.shape[1], query, slot])
            assert shown(seen, real, int(row), int(head) % mask.shape[1], int(query), int(slot), new) == expected


def test_a_causal_mask_without_pads_is_no_mask():
    assert read_mask(causal(4, 9).expand(2, 1, -1, -1), before=None, new=4, batch=2) == (None, None)


def test_a_mask_that_is_not_causal_is_kept_as_it_is():
    window = causal(4, 9) & ~causal(4, 9).tril(9 - 4 - 3)
    assert read_mask(window, before=None, new=4, batch=2).mask is window


def test_numbers_of_an_additive_mask_stay_with_their_tokens():
    real = left_padded(5, 0, 2)
    numbers = torch.arange(50.0).reshape(2, 1, 5, 5).masked_fill(~with_pads(real, 5), LOWEST)
    mask = read_mask(numbers, before=None, new=5, batch=2).mask
    assert torch.equal(mask[0], numbers[0])
    assert torch.equal(mask[1, :, 2:, :3], numbers[1, :, 2:, 2:])


def test_one_mask_serves_the_whole_batch():
    mask = torch.rand(1, 2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, -1] = True
    assert read_mask(mask, before=None, new=3, batch=4).mask is mask
    before = left_padded(4, 0, 1, 0, 3)
    hidden = mask.clone()
    hidden[..., :3] = False
    assert read_mask(hidden, before=before, new=3, batch=4).mask.shape == (4, 2, 3, 7)


def test_a_sequence_may_begin_after_the_others():
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    first = read_mask(with_pads(real, 4), before=None, new=4, batch=2)
    assert torch.equal(first.kept, real)
    later = torch.cat((real, torch.tensor([[1, 1], [0, 1]]).bool()), dim=1)
    assert torch.equal(read_mask(with_pads(later, 2), before=real, new=2, batch=2).kept, later[:, 4:])


@pytest.mark.parametrize(
    ("kept", "row"),
    [
        pytest.param([[1, 1, 1], [1, 1, 0]], 1, id="the last token"),
        pytest.param([[0, 1, 0], [1, 1, 1]], 0, id="a token between pads"),
    ],
)
def test_right_padding_is_refused(kept, row):
    real = torch.tensor(kept).bool()
    with pytest.raises(UnsupportedInput, match=f"sequence {row} of the batch ends in padding.*on the left"):
        read_mask(with_pads(real, 3), before=None, new=3, batch=2)


def test_an_idle_sequence_in_a_later_step_is_refused():
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    with pytest.raises(UnsupportedInput, match="sequence 1"):
        read_mask(with_pads(real, 2), before=None, new=2, batch=2)


def test_a_pad_cannot_become_a_token():
    before = left_padded(4, 0, 2)
    mask = causal(1, 5).expand(2, 1, -1, -1)
    with pytest.raises(UnsupportedInput, match="hidden from every query when it came"):
        read_mask(mask, before=before, new=1, batch=2)


@pytest.mark.parametrize("hidden", [float("-inf"), LOWEST], ids=["minus infinity", "the lowest number"])
def test_additive_masks_hide(hidden):
    assert visible(torch.tensor([0.0, -50.0, 3.0, hidden])).tolist() == [True, True, True, False]
    assert visible(torch.tensor([True, False])).tolist() == [True, False]


def test_a_token_is_real_if_any_query_of_any_head_sees_it():
    mask = torch.zeros(1, 2, 2, 5, dtype=torch.bool)
    mask[0, 1, 0, 3] = mask[0, 0, 1, 4] = mask[0, 0, 1, 0] = True
    assert read_pads(mask, before=None, new=3, batch=2).tolist() == [[False, True, True]] * 2


def test_positions_count_real_tokens():
    real = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    assert query_positions(real, 4).tolist() == [[0, 1, -1, 2], [2, 3, 4, 5]]
