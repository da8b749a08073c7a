"""A rig without a GPU: tiny tensors on the CPU, and a clock that counts instead of measuring."""

import pytest
import torch

from occamkv.bench import gpu_decode
from occamkv.bench.gpu_timing import Rig


class CountingClock:
    """Runs calls and says what `ms_of` says of the first one; notes how many calls each contestant rotates over."""

    def __init__(self, ms_of=lambda call: 1.0):
        self.ms_of, self.rotations = ms_of, []

    def __call__(self, calls):
        calls = list(calls)
        self.rotations.append(len(calls))

        def run():
            with torch.no_grad():
                for call in calls:
                    call()
            return self.ms_of(calls[0])

        return run


def cpu_rig(*, l2_bytes=2**14, memory_bytes=2**33, ms_of=lambda call: 1.0):
    clock = CountingClock(ms_of)
    return Rig(torch.device("cpu"), clock, clock, l2_bytes, memory_bytes)


class EagerStep:
    """Stands in for a captured step: runs it, and counts the steps it was made for."""

    def __init__(self, model, cache, *, steps):
        self.model, self.cache, self.left = model, cache, steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, tokens):
        assert self.left > 0, "more steps than there is room for"
        self.left -= 1
        return self.model(tokens, past_key_values=self.cache, logits_to_keep=1).logits


@pytest.fixture(scope="module")
def eager_steps():
    """Put `EagerStep` where the benchmark takes captured steps from; the module where it is put."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "CapturedStep", EagerStep)
        yield gpu_decode
