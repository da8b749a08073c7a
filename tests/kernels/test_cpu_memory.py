"""The CPU kernel touches no byte beyond what it is given: every tensor ends where a page begins that kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from some_attention import CPU_TARGETS

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32" or CPU_TARGETS == ("cpu",), reason="no native kernels here")

PREPARE = """
import random, sys
from itertools import product
import torch
torch.set_num_threads(1)
from occamkv import kernels
from occamkv.formats import Format
from occamkv.kernels.cpu import library
from occamkv.methods import Method
from some_attention import Held, make_case
from some_guarded_memory import byte_behind, guarded, guarded_case
library.select(sys.argv[1])
backend, rng = kernels.backend("cpu"), random.Random(0)
"""

EVERY_SHAPE = """
empty = torch.empty
def at_a_guard(*shape, **given):
    return guarded(empty(*shape, **given)) if given.get("dtype") else empty(*shape, **given)
for k_axis, k_bits, v_bits, metadata in product(("channel", "token"), (2, 3, 4), (2, 3, 4), (16, 8)):
    for head_dim in rng.sample(range(16, 257, 16), 3):
        form = Method("oscar", Format(
            k_bits=k_bits, v_bits=v_bits, k_axis=k_axis, metadata_bits=metadata, k_group=rng.choice((32, 64, 128)),
            v_group=rng.choice((32, 64, 128, 256)), token_scale=rng.random() < 0.7,
            norm_dtype=rng.choice(("float16", "float32")),
        ), k_rotation=rng.choice(("none", "balanced")), v_rotation=rng.choice(("none", "hadamard")))
        queries, gqa = rng.choice(((1, 1), (2, 3), (3, 1)))
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
        held = (Held(1, 4 * rng.choice((1, 2)), rng.randrange(1, 20)), Held(0, rng.randrange(3), rng.randrange(90)))
        case = guarded_case(make_case(form, head_dim=head_dim, queries=queries, gqa=gqa, held=held, dtype=dtype))
        mask = guarded(torch.zeros(2, 1, queries, case.mask_positions, dtype=rng.choice((dtype, torch.bool))))
        options = [{}, {"mask": mask, "sinks": guarded(torch.zeros(2 * gqa))}]
        torch.empty = at_a_guard
        for given in options:
            case.attend(backend, **given)
        torch.empty = empty
print("all read")
"""

ONE_BYTE_TOO_FAR = """
case = guarded_case(make_case(Method("oscar", Format()), held=(Held(1, 4, 3),)))
print("all read")
sys.stdout.flush()
byte_behind({what})
print("and more")
"""

WRONG_DESCRIPTION = """
from occamkv.kernels.cpu import attention
original = attention.{function}
def wrong(*given):
    made = original(*given)
    made.{field} += {amount}
    return made
attention.{function} = wrong
case = guarded_case(make_case(Method("oscar", Format()), held=(Held(1, 4, 3),)))
print("all read")
sys.stdout.flush()
case.attend(backend)
print("and more")
"""


def run(script: str, isa: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", PREPARE + script, isa]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_no_byte_beyond_a_tensor_is_touched(target):
    done = run(EVERY_SHAPE, target.removeprefix("cpu-"))
    assert (done.returncode, done.stdout) == (0, "all read\n"), done.stderr[-2000:]


@pytest.mark.parametrize("what", ["case.q", "case.packed.slabs[0].records", "case.full[0].k"])
def test_twin_the_byte_behind_a_tensor_kills(what):
    done = run(ONE_BYTE_TOO_FAR.format(what=what), CPU_TARGETS[0].removeprefix("cpu-"))
    assert done.stdout == "all read\n"
    assert done.returncode < 0


@pytest.mark.parametrize(
    ("function", "field", "amount"),
    [
        ("full_struct", "tokens", 1),
        ("packed_struct", "layout.record_bytes", 1),
        ("packed_struct", "layout.v_minimum", 1),
    ],
)
def test_twin_a_kernel_that_reads_too_far_is_killed(function, field, amount):
    script = WRONG_DESCRIPTION.format(function=function, field=field, amount=amount)
    done = run(script, CPU_TARGETS[0].removeprefix("cpu-"))
    assert done.stdout == "all read\n", done.stderr[-2000:]
    assert done.returncode < 0
