"""Puts calls on a GPU: a kernel is loaded once for each format and device and runs on torch's current stream."""

import ctypes
from functools import cache
from typing import Any

import torch

from occamkv.errors import BackendUnavailable
from occamkv.kernels.cuda import building
from occamkv.kernels.cuda.kernel import THREADS, Call, Kernel

_OLDEST = (8, 0)
_ALL_SHARED = 100  # percent of a processor's L1: as many blocks share it as `building.plan` counts on


def architecture_of(capability: tuple[int, int]) -> str | None:
    """Return what the kernel is compiled for on a card, None where it does not run: cards before 8.0.

    `sm_90a` runs on 9.0 alone. Others run on every later card of the same first digit.
    """
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_87", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100"}
    if capability in known:
        return known[capability]
    same = {10: "sm_100", 12: "sm_120"}
    return same.get(capability[0]) if capability >= _OLDEST else None


def unavailable(device: torch.device) -> str | None:
    """Return why the kernel cannot run on this device, one sentence, or None."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here"
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, and this torch is made for AMD's"
    try:
        capability = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        return f"torch cannot use this GPU ({str(error).partition(chr(10))[0]})"
    if architecture_of(capability) is None:
        return f"it is compiled for compute capabilities 8, 9.0, 10 and 12, not for {'.'.join(map(str, capability))}"
    return building.unavailable() or _refuses_driver()


def _refuses_driver() -> str | None:
    """Return why the driver does not load what NVRTC makes: code of a later CUDA than its own, by the first number."""
    driver, nvrtc = driver_version(), building.nvrtc_version()
    if driver[0] >= nvrtc[0]:
        return None
    told = (".".join(map(str, version)) for version in (nvrtc, driver))
    return "NVRTC {} makes code that the driver, of CUDA {}, does not load; install a later driver".format(*told)


@cache
def driver_version() -> tuple[int, int]:
    """Return the CUDA that the driver was made for.

    Raises:
        BackendUnavailable: CUDA does not tell.
    """
    told = int(_check(_driver().cuDriverGetVersion()))
    return told // 1000, told % 1000 // 10


def processors(device: torch.device) -> int:
    """Return how many streaming multiprocessors the card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def capturing(device: torch.device) -> bool:
    """Return whether launches on the device's current stream are captured in a graph and do not run now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(call: Call) -> None:
    """Run a call on the current stream of its device.

    Raises:
        BackendUnavailable: The kernel cannot be compiled or loaded, or CUDA refuses the launch.
    """
    with torch.cuda.device(call.device):
        _bind(torch.cuda.current_device())
        function, shared = _function(call.kernel, torch.cuda.current_device())
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(call.arguments))
        stream = torch.cuda.current_stream().cuda_stream
        address = ctypes.addressof(parameters)
        _check(_driver().cuLaunchKernel(function, *call.grid, THREADS, 1, 1, shared, stream, address, 0))


def stream_of(device: torch.device) -> tuple[int, int]:
    """Return torch's current stream on a device, and the number of the graph that it captures, 0 if it captures none.

    Raises:
        BackendUnavailable: CUDA does not tell.
    """
    if device.type != "cuda":
        return 0, 0
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        if not torch.cuda.is_current_stream_capturing():
            return stream, 0
        told = _driver().cuStreamGetCaptureInfo(stream)
    _check(told)
    return stream, int(told[2])


def _bind(index: int) -> None:
    """Make torch's context that of this thread: a new thread has none until it asks CUDA's runtime for something."""
    driver = _driver()
    if not int(_check(driver.cuCtxGetCurrent())):
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index))))))


@cache
def _function(kernel: Kernel, index: int) -> tuple[Any, int]:
    """Return a kernel, and the bytes of shared memory that it is launched with."""
    driver = _driver()
    architecture = architecture_of(torch.cuda.get_device_capability(index))
    if architecture is None:
        raise BackendUnavailable(str(unavailable(torch.device("cuda", index))))
    build = building.plan(kernel, architecture)
    module = _check(driver.cuModuleLoadData(building.build(build)))
    function = _check(driver.cuModuleGetFunction(module, f"occamkv_{kernel.name}".encode()))
    attribute = driver.CUfunction_attribute
    most, carveout = (
        attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
    )
    _check(driver.cuFuncSetAttribute(function, most, build.shared_bytes))
    _check(driver.cuFuncSetAttribute(function, carveout, _ALL_SHARED))
    return function, build.shared_bytes


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(results: tuple[Any, ...]) -> Any:
    """Return what a call of the driver gave, or raise with CUDA's own name of what went wrong."""
    status, *values = results
    if int(status):
        raise BackendUnavailable(f"CUDA refuses a kernel: {status.name}.")
    return values[0] if values else None
