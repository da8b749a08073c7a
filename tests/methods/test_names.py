"""Method names: `name[_kXvY][_gK[xV]][_m8|_m16][_block|_roll]`, parts equal to the default left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv import METHOD_NAMES, method
from occamkv.errors import UnsupportedFormat
from occamkv.methods.names import parse_name, unnamed_overrides

PLAIN = {"k_bits": 2, "v_bits": 2, "k_group": 32, "v_group": 32, "metadata_bits": 16, "flush": "block"}
OCCAM = PLAIN | {"metadata_bits": 8, "flush": "rolling"}
DEFAULTS = {
    "occam": OCCAM,
    "occam_small": OCCAM | {"k_group": 64, "v_group": 64},
    "occam_quality": OCCAM,
    "auto": OCCAM,
    "oscar": PLAIN,
    "kivi": PLAIN,
    "ott": PLAIN,
    "rtn": PLAIN,
    "quarot": PLAIN | {"k_group": 256, "v_group": 256},
    "rotatekv": PLAIN | {"k_group": 128, "v_group": 128},
    "turboquant": PLAIN | {"k_bits": 2.5, "v_bits": 2.5, "k_group": 256, "v_group": 256},
    "kvarn": PLAIN | {"k_bits": 4, "k_group": 128, "v_group": 128},
}
PER_TOKEN = ("rtn", "quarot", "rotatekv", "turboquant")


@st.composite
def bases_and_settings(draw) -> tuple[str, dict]:
    """Every method that a name can say."""
    base = draw(st.sampled_from(sorted(DEFAULTS)))
    lloyd = base == "turboquant"
    settings = {
        "k_bits": draw(st.sampled_from([2, 3, 4] + [2.5] * lloyd)),
        "v_bits": draw(st.sampled_from([2, 3, 4] + [2.5] * lloyd)),
        "k_group": draw(st.sampled_from([32, 64, 128] + [256] * (base in PER_TOKEN))),
        "v_group": draw(st.sampled_from([32, 64, 128, 256])),
        "metadata_bits": 16 if lloyd else draw(st.sampled_from([8, 16])),
        "flush": draw(st.sampled_from(["block", "rolling"])),
    }
    return base, settings


def full_name(base: str, s: dict) -> str:
    """The name with every part written out."""
    flush = "roll" if s["flush"] == "rolling" else "block"
    return f"{base}_k{s['k_bits']}v{s['v_bits']}_g{s['k_group']}x{s['v_group']}_m{s['metadata_bits']}_{flush}"


def short_name(base: str, s: dict) -> str:
    """The name with every part left out that equals the default."""
    d, name = DEFAULTS[base], base
    if (s["k_bits"], s["v_bits"]) != (d["k_bits"], d["v_bits"]):
        name += f"_k{s['k_bits']}v{s['v_bits']}"
    if s["v_group"] != d["v_group"]:
        name += f"_g{s['k_group']}x{s['v_group']}"
    elif s["k_group"] != d["k_group"]:
        name += f"_g{s['k_group']}"
    if s["metadata_bits"] != d["metadata_bits"]:
        name += f"_m{s['metadata_bits']}"
    if s["flush"] != d["flush"]:
        name += {"block": "_block", "rolling": "_roll"}[s["flush"]]
    return name


@given(bases_and_settings())
@settings(deadline=None, max_examples=200)
def test_names_round_trip_and_leave_defaults_out(case):
    base, wanted = case
    parsed = parse_name(full_name(base, wanted))
    said = {field: getattr(parsed.format, field, None) or getattr(parsed, field, None) for field in wanted}
    assert said == wanted
    assert str(parsed) == short_name(base, wanted)
    assert parse_name(str(parsed)) == parsed
    assert method(base, **wanted) == parsed
    assert not unnamed_overrides(parsed)


@given(bases_and_settings(), st.data())
@settings(deadline=None, max_examples=100)
def test_any_choice_of_written_parts_means_the_same(case, data):
    base, wanted = case
    names = (full_name(base, settings) for settings in (wanted, DEFAULTS[base]))
    parts, default = (name.removeprefix(f"{base}_").split("_") for name in names)
    kept = [p for p, d in zip(parts, default, strict=True) if p != d or data.draw(st.booleans())]
    assert parse_name("_".join([base, *kept])) == method(base, **wanted)


def test_every_method_is_tried():
    assert {*DEFAULTS, "full"} == set(METHOD_NAMES)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_default_method_is_named_by_one_word(name):
    assert str(method(name)) == name
    assert method(name).name == name
    assert method(name).source


EXAMPLES = {
    "oscar_k2v2_g32": "oscar",
    "oscar_k3v2_g128": "oscar_k3v2_g128",
    "kivi_g32x32_m16_block": "kivi",
    "kivi_g32x64": "kivi_g32x64",
    "rtn_g64x64_m8_roll": "rtn_g64x64_m8_roll",
    "quarot_g256": "quarot",
    "quarot_g32x32": "quarot_g32x32",
    "full": "full",
    "occam_g64x64": "occam_g64x64",
    "occam_small_m8_roll": "occam_small",
    "occam_small_g32x32": "occam_small_g32x32",
    "occam_quality_k3v3_block": "occam_quality_k3v3_block",
    "occam_m16": "occam_m16",
    "turboquant_k2.5v2.5": "turboquant",
    "turboquant_k3v2.5_g64x128": "turboquant_k3v2.5_g64x128",
    "kvarn_k4v2_g128x128": "kvarn",
}


@pytest.mark.parametrize("given", EXAMPLES)
def test_examples_from_the_documentation(given):
    assert str(method(given)) == EXAMPLES[given]


def test_k3v2_g128_means_what_it_says():
    parsed = method("oscar_k3v2_g128")
    assert (parsed.format.k_bits, parsed.format.v_bits) == (3, 2)
    assert (parsed.format.k_group, parsed.format.v_group) == (128, 32)
    assert parsed == method("oscar", k_bits=3, k_group=128)
    assert parsed != method("oscar_k2v3_g128")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("oskar", "oscar"), ("kivy_k3v3", "kivi"), ("quarrot_g64", "quarot"), ("rnt", "rtn"), ("ful", "full")],
)
def test_an_unknown_method_names_the_nearest_and_lists_all(given, nearest):
    with pytest.raises(UnsupportedFormat) as refusal:
        method(given)
    message = str(refusal.value)
    assert f"unknown method {given!r}; did you mean {nearest!r}?" in message
    assert all(name in message for name in METHOD_NAMES)


@pytest.mark.parametrize("given", ["zzzzzz", "", "+", "_k2v2", "OSCAR", " oscar", "42"], ids=repr)
def test_a_word_that_resembles_nothing_lists_all_methods(given):
    with pytest.raises(
        UnsupportedFormat, match=r"unknown method .*Methods: occam, occam_small, occam_quality, auto, oscar, kivi"
    ):
        method(given)


UNREADABLE = [
    "oscar_k3",
    "oscar_v2",
    "oscar_k3v2g64",
    "oscar_g",
    "oscar_roll_m8",
    "oscar_k3v2_k2v2",
    "oscar_",
    "oscar_x",
    "oscar_k2.0v2",
    "oscar_k2.v2",
    "oscar_k.5v2",
    "oscar_k2.25v2",
    "oscar_g64.5",
]


@pytest.mark.parametrize("given", [*UNREADABLE, "oscar_k3v2\n", "oscar_k\u0663v2", "oscar_g\uff16\uff14"], ids=ascii)
def test_a_name_that_breaks_the_grammar_is_refused_with_the_grammar(given):
    with pytest.raises(
        UnsupportedFormat, match=r"cannot read .*oscar\[_kXvY\]\[_gK\[xV\]\]\[_m8\|_m16\]\[_block\|_roll\]"
    ):
        method(given)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("oscar_k5v2", "k_bits is 5; allowed: 2, 3, 4"),
        ("oscar_k2v9", "v_bits is 9; allowed: 2, 3, 4"),
        ("oscar_g48", "k_group is 48; allowed: 32, 64, 128"),
        ("kivi_g256", "k_group is 256; allowed: 32, 64, 128"),
        ("rtn_g32x16", "v_group is 16; allowed: 32, 64, 128, 256"),
        ("oscar_m4", "metadata_bits is 4; allowed: 16, 8"),
        ("oscar_k3.5v2", r"k_bits is 3\.5; allowed: 2, 3, 4"),
        ("oscar_k2.5v2", r"2\.5 bits need levels='lloyd'"),
        ("turboquant_k2v1.5", r"v_bits is 1\.5; allowed: 2, 3, 4, 2\.5"),
        ("turboquant_m8", "metadata_bits is 8; Lloyd-Max levels have 16-bit metadata"),
    ],
)
def test_a_part_with_a_value_that_no_record_holds_is_refused(given, what):
    with pytest.raises(UnsupportedFormat, match=what):
        method(given)


@pytest.mark.parametrize("given", ["full_k2v2", "full_g64", "full_m8", "full_roll"])
def test_full_takes_no_parts(given):
    with pytest.raises(UnsupportedFormat):
        method(given)


UNNAMED = [
    {"grid": "minmax"},
    {"clip": 0.85},
    {"pins": "first:4"},
    {"k_rotation": "balanced"},
    {"norm_dtype": "float16"},
    {"token_scale": False},
    {"k_axis": "token"},
    {"clip": None},
    {"norm": "sinkhorn"},
    {"feedback": True},
    {"pins": "first:4+found"},
]


@pytest.mark.parametrize("override", UNNAMED, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_what_a_name_cannot_say_is_a_plus_and_does_not_parse(override):
    changed = method("oscar_k3v2_g64", **override)
    assert str(changed) == "oscar_k3v2_g64+"
    assert unnamed_overrides(changed) == override
    with pytest.raises(UnsupportedFormat, match="'\\+' stands for overrides that only a plan file holds"):
        method(str(changed))


@pytest.mark.parametrize("given", ["occam_tiny", "occam_smal", "occam_small_quality", "occam_quality_"])
def test_a_name_that_begins_like_ours_is_refused_with_the_grammar_of_the_longest_that_fits(given):
    base = max((name for name in METHOD_NAMES if f"{given}_".startswith(f"{name}_")), key=len)
    with pytest.raises(UnsupportedFormat, match=rf"cannot read '{given}'; a name is {base}\["):
        method(given)


def test_a_plus_keeps_the_whole_base_name():
    changed = method("turboquant_k2.5v3", pins="first:4")
    assert str(changed) == "turboquant_k2.5v3+"
    assert unnamed_overrides(changed) == {"pins": "first:4"}
    assert str(method("occam_small", clip=0.9)) == "occam_small+"
    assert unnamed_overrides(method("kivi", levels="lloyd", v_bits=2.5)) == {"levels": "lloyd"}


def test_an_override_equal_to_the_default_needs_no_plus():
    assert str(method("oscar", grid="paper", clip=1.0)) == "oscar"


TOGETHER = {
    "2.5 bits with levels that allow them": lambda: method("kivi", levels="lloyd", v_bits=2.5),
    "8-bit metadata with levels that allow it": lambda: method("turboquant_k3v3", levels="uniform", metadata_bits=8),
    "groups of 256 along an axis that allows them": lambda: method("oscar", k_axis="token", k_group=256),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_a_name_and_its_overrides_are_read_together_for_one_may_need_the_other(what):
    """This is how a plan file says a method."""
    made = TOGETHER[what]()
    name = str(made)
    assert name.endswith("+")
    assert method(name[:-1], **unnamed_overrides(made)) == made
    with pytest.raises(UnsupportedFormat):
        method(name[:-1])
