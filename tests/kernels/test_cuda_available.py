"""Which backend a CUDA device gets: our kernels, or the reference with the reason in `doctor`."""

import sys

import pytest
import torch

from occamkv import kernels
from occamkv.cli import doctor
from occamkv.kernels.cuda import building, launching
from some_attention import METHODS

FORM = METHODS["oscar"].packed_format


@pytest.fixture
def card(monkeypatch):
    """A machine with an NVIDIA card of this generation and NVRTC, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(building, "unavailable", lambda: None)
    monkeypatch.setattr(building, "nvrtc_version", lambda: (13, 3))
    monkeypatch.setattr(launching, "driver_version", lambda: (13, 0))
    return monkeypatch


def rows() -> dict[str, dict]:
    return {row["method"]: row for row in doctor.examine()["backends"] if row["device"] == "cuda"}


def test_a_card_of_today_gets_the_kernels(card):
    assert kernels.backend_for(FORM, "cuda").name == "cuda"
    found = rows()
    assert found["oscar"]["backend"] == "cuda" and not any("cuda:" in reason for reason in found["oscar"]["refusals"])
    assert found["turboquant"]["backend"] == "reference" and "lloyd" in found["turboquant"]["refusals"][0]
    assert found["rtn"]["backend"] == "reference" and "one for each token" in found["rtn"]["refusals"][0]


def no_nvrtc(patch):
    patch.undo()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(building, "_nvrtc", building._nvrtc.__wrapped__)
    patch.setitem(sys.modules, "cuda.bindings", None)


def no_answer(device=None):
    raise RuntimeError("CUDA error: all devices are busy\nand a page about it")


CAUSES = {
    "no card": (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), "finds no NVIDIA GPU"),
    "an old card": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5)),
        "8, 9.0, 10 and 12, not for 7.5",
    ),
    "a card that nobody knows yet": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (13, 0)),
        "not for 13.0",
    ),
    "a card that does not answer": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", no_answer),
        "cannot use this GPU (CUDA error: all devices are busy)",
    ),
    "torch for AMD": (lambda patch: patch.setattr(torch.version, "hip", "6.4"), "made for AMD's"),
    "an old driver": (
        lambda patch: patch.setattr(launching, "driver_version", lambda: (12, 8)),
        "NVRTC 13.3 makes code that the driver, of CUDA 12.8, does not load",
    ),
    "no NVRTC": (no_nvrtc, "pip install 'occamkv[cuda]'"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_without_a_fit_card_the_reference_runs_and_doctor_says_why(cause, card):
    change, told = CAUSES[cause]
    change(card)
    assert kernels.backend_for(FORM, "cuda").name == "reference"
    assert told in kernels.refusals(FORM, "cuda")["cuda"]
    if torch.cuda.is_available():
        row = rows()["oscar"]
        assert row["backend"] == "reference" and any(told in reason for reason in row["refusals"])
