"""Plans as JSON: every method, override, pin and reason comes back; anything else is refused in a sentence."""

import json

import pytest

from occamkv.cache import LayerPlan, Plan
from occamkv.errors import OccamError, UnsupportedFormat, UnsupportedInput
from occamkv.methods import METHOD_NAMES, method

METHODS = {
    **{name: method(name) for name in METHOD_NAMES},
    "oscar_k3v2_g128": method("oscar_k3v2_g128"),
    "kivi_k4v3_g64x128_m8_roll": method("kivi_k4v3_g64x128_m8_roll"),
    "pins": method("oscar", pins="first:4"),
    "a grid": method("oscar", grid="minmax"),
    "clip": method("kivi", clip=0.85, pins="first:1"),
    "rotations": method("oscar", k_rotation="balanced", v_rotation="none"),
    "fields of the format": method("oscar", norm_dtype="float16", k_axis="token"),
    "no token scale": method("oscar_k2v4", token_scale=False, flush="rolling"),
}


def plan_of(*forms) -> Plan:
    layers = [LayerPlan(i, form, None if form.format else "a sliding window") for i, form in enumerate(forms)]
    return Plan(tuple(layers), model_type="some", fingerprint="abc123")


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_comes_back_from_json(name):
    plan = plan_of(METHODS[name], method("full"))
    data = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data) == plan
    assert data["schema_version"] == 1
    assert data["model"] == {"fingerprint": "abc123", "model_type": "some", "layers": 2}
    assert data["layers"][0].keys() == {"index", "method", "pins", "overrides", "reason"}
    assert data["layers"][0]["pins"] == METHODS[name].pins
    assert data["layers"][1] == {
        "index": 1,
        "method": "full",
        "pins": "none",
        "overrides": {},
        "reason": "a sliding window",
    }


def test_a_plan_comes_back_from_a_file(tmp_path):
    plan = plan_of(*METHODS.values())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")).packed_layers == len(METHODS) - 1


def test_twin_two_plans_that_differ_in_an_override_are_not_equal():
    assert plan_of(method("oscar")) != plan_of(method("oscar", clip=0.9))
    assert plan_of(method("oscar")).to_json() != plan_of(method("oscar", clip=0.9)).to_json()


def changed(**changes) -> dict:
    return plan_of(method("oscar")).to_json() | changes


def changed_layer(**changes) -> dict:
    plan = plan_of(method("oscar")).to_json()
    plan["layers"][0] |= changes
    return plan


def without(name: str) -> dict:
    plan = plan_of(method("oscar")).to_json()
    del plan["layers"][0][name]
    return plan


BAD = {
    "a newer version": (changed(schema_version=2), "schema_version 2; this version reads 1"),
    "no version": ({"layers": []}, "schema_version None"),
    "no layers": ({"schema_version": 1, "model": {}}, "lacks 'layers'"),
    "no model": ({"schema_version": 1, "layers": []}, "lacks 'model'"),
    "a layer without a method": (without("method"), "lacks 'method'"),
    "a layer without a reason": (without("reason"), "lacks 'reason'"),
    "a list": ([], "plan"),
    "text": ("oscar", "plan"),
    "layers that are text": (changed(layers="oscar"), "plan"),
    "a layer that is text": (changed(layers=["oscar"]), "plan"),
    "an index that is text": (changed_layer(index="first"), "plan"),
    "a method that is a number": (changed_layer(method=3), "plan"),
    "overrides that are a list": (changed_layer(overrides=["clip"]), "plan"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_plan_is_refused(what, tmp_path):
    data, told = BAD[what]
    with pytest.raises(UnsupportedInput, match=told):
        Plan.from_json(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedInput, match=told):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"method": "oscr"}, "did you mean 'oscar'", id="an unknown method"),
        pytest.param({"overrides": {"k_bits": 5}}, "k_bits is 5; allowed: 2, 3, 4", id="a value that is not allowed"),
        pytest.param({"overrides": {"k_bit": 3}}, "did you mean 'k_bits'", id="an unknown override"),
        pytest.param({"pins": "last:4"}, "pins is 'last:4'", id="unknown pins"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(changes, told):
    with pytest.raises(UnsupportedFormat, match=told):
        Plan.from_json(changed_layer(**changes))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.json").write_text('{"schema_version": 1,')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "broken.json", "bytes.json", ""):
        with pytest.raises(OccamError, match=r"cannot read the plan|is no JSON"):
            Plan.load(tmp_path / name)
