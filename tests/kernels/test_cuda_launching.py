"""What the launcher says to CUDA's driver: through the real cuda-bindings, to a libcuda that only writes it down."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from occamkv.formats import Format
from occamkv.kernels.cuda import building
from occamkv.kernels.cuda.kernel import Kernel

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    building.unavailable() is not None or shutil.which("g++") is None,
    reason="it takes cuda-bindings (pip install 'occamkv[cuda]') and g++",
)

FAILURES = ("cuCtxSetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel")

SCRIPT = """
import ctypes, json, os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import torch
from cuda.bindings import driver
from occamkv.errors import BackendUnavailable
from occamkv.formats import Format
from occamkv.kernels.cuda import building, launching
from occamkv.kernels.cuda.kernel import Call, Kernel

devices, capturing = [], False
torch.cuda.device = lambda device: devices.append(str(device)) or nullcontext()
torch.cuda.current_device = lambda: 3
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=77)
torch.cuda.is_current_stream_capturing = lambda: capturing
torch.cuda.get_device_capability = lambda index: (9, 0)
building.build = lambda wanted: b"machine code of " + wanted.architecture.encode() + bytes(1)

class Arguments(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int64), ("second", ctypes.c_float))

device = torch.device("cuda", 3)
call = Call(Kernel("attend", Format(), 128), Arguments(5, 0.5), (6, 8, 2), device, [])
launching.launch(call)
launching.launch(call)
streams = [launching.stream_of(torch.device("cpu")), launching.stream_of(device)]
capturing = True
streams.append(launching.stream_of(device))
calls = Path(os.environ["OKV_TOLD"]).read_text().splitlines()
failures = {}
for name in os.environ["NAMES"].split():
    driver.cuCtxSetCurrent(0)
    launching._function.cache_clear()
    os.environ["OKV_FAILS"] = name
    try:
        launching.launch(call)
    except BackendUnavailable as refused:
        failures[name] = str(refused)
print(json.dumps({"calls": calls, "devices": devices, "failures": failures, "streams": streams,
                  "driver": launching.driver_version()}))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the script printed: among it the calls that the driver saw."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", ROOT / "tests/cuda/driver.cpp", "-o", library], check=True)
    more = {
        "LD_LIBRARY_PATH": str(folder),
        "OKV_TOLD": str(folder / "told"),
        "OKV_BYTES": "12",
        "NAMES": " ".join(FAILURES),
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernel_is_loaded_once_and_launched_with_what_the_call_says(said):
    shared = building.plan(Kernel("attend", Format(), 128), "sm_90a").shared_bytes
    given = bytes(ctypes.c_int64(5)) + bytes(ctypes.c_float(0.5))
    launch = f"launch 22 6 8 2 128 1 1 {shared} 77 0 {given.hex()}"
    loading = [
        "load machine code of sm_90a",
        "function 11 occamkv_attend",
        f"attribute 22 8 {shared}",
        "attribute 22 9 100",
    ]
    assert said["calls"] == [
        "context 1103",
        *loading,
        launch,
        launch,
        "capture 77",
    ]  # 8 and 9: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, .._PREFERRED_SHARED_MEMORY_CARVEOUT
    assert said["driver"] == [12, 8]


def test_every_refusal_carries_the_name_that_cuda_gives_it(said):
    failures = said["failures"]
    assert list(failures) == list(FAILURES)
    assert all("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" in told for told in failures.values())


def test_calls_run_on_their_own_device_and_know_their_stream_and_graph(said):
    assert set(said["devices"]) == {"cuda:3"}
    assert said["streams"] == [[0, 0], [77, 0], [77, 7]]
