"""What a benchmark refuses before it builds anything."""

import os

import pytest

from occamkv.bench import Setting, Shape
from occamkv.bench.inputs import backend_of, packed_of
from occamkv.errors import BackendUnavailable, OccamError, UnsupportedFormat, UnsupportedInput
from occamkv.kernels import BACKENDS
from occamkv.methods import method
from one_line_error import WAY_OUT

TOO_MANY = (os.cpu_count() or 1) + 1


@pytest.mark.parametrize(
    ("error", "fields", "words"),
    [
        pytest.param(UnsupportedInput, {"contexts": (0,)}, ["contexts", "0", "131072"], id="no tokens"),
        pytest.param(UnsupportedInput, {"contexts": ()}, ["contexts"], id="no contexts"),
        pytest.param(UnsupportedInput, {"contexts": (512, 512)}, ["512, 512", "different"], id="twice"),
        pytest.param(UnsupportedInput, {"contexts": (2**17 + 1,)}, ["131073"], id="too long"),
        pytest.param(
            UnsupportedInput, {"threads": (TOO_MANY,)}, ["threads", str(TOO_MANY)], id="more threads than cores"
        ),
        pytest.param(UnsupportedInput, {"repetitions": 4}, ["repetitions", "4", "5"], id="few repetitions"),
        pytest.param(UnsupportedInput, {"methods": ()}, ["methods"], id="no methods"),
        pytest.param(UnsupportedInput, {"methods": ("occam", "occam")}, ["once"], id="method twice"),
        pytest.param(UnsupportedInput, {"methods": ("full",)}, ["'full' packs nothing"], id="full"),
        pytest.param(UnsupportedInput, {"methods": ("auto_b2.5",)}, ["auto_b2.5", "layer by layer"], id="budget"),
        pytest.param(UnsupportedFormat, {"methods": ("occan",)}, ["occan"], id="unknown method"),
        pytest.param(BackendUnavailable, {"backend": "gpu"}, ["gpu", *BACKENDS], id="unknown backend"),
    ],
)
def test_a_setting_refuses(error, fields, words):
    with pytest.raises(error) as caught:
        Setting(**fields)
    assert all(word in str(caught.value) for word in words)
    assert WAY_OUT.search(str(caught.value))


def test_a_good_setting_names_its_methods():
    setting = Setting(contexts=(512,), methods=("occam", "oscar_k3v2"), backend="reference")
    assert [str(one) for one in setting.chosen] == ["occam", "oscar_k3v2"]


@pytest.mark.parametrize("heads", [(9, 2, 64), (0, 1, 64), (4, 0, 64), (2, 4, 64), (4, 2, 100), (4, 2, 512)], ids=str)
def test_a_shape_that_no_cache_holds_is_refused(heads):
    with pytest.raises(OccamError, match=r"allowed|multiples of 8"):
        Shape("odd", *heads)


def test_a_backend_that_refuses_a_format_is_named_with_its_reason(monkeypatch):
    from occamkv.kernels import reference

    monkeypatch.setattr(reference, "refuses", lambda format, device: "it is tired.")
    with pytest.raises(BackendUnavailable, match=r"'reference' refuses occam: it is tired\. Leave --backend out\."):
        backend_of(method("occam"), "reference")


def test_a_context_needs_a_packed_group():
    occam = method("occam")
    assert packed_of(occam, 133, 1) == 32
    with pytest.raises(UnsupportedInput, match=r"context 132: occam packs nothing.*133 or more"):
        packed_of(occam, 132, 1)
