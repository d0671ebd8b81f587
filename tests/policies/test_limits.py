"""Settings from outside have bounds: no spec string, however extreme, costs time or memory before it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import vtr.eval.accuracy.blind  # "diverse"
from vtr.integrations.vllm.specs import RequestError, spec_of

import vtr
from vtr import settings as known
from vtr.limits import MOST_ENTRIES, MOST_LAYERS, check_bounds, short
from vtr.policies.trained.autoscale import calibrated
from vtr.settings import LONGEST, MOST_PARTS, build, policy_class

SECONDS, BYTES = 0.2, 50 * 2**20
EXTREME: list[str] = [
    "0", "-1", "1", "1024", "20000000", str(2**31), str(2**63 - 1), str(2**63), "-" + str(2**63), "9" * 400, "9" * 4301,
    "1e308", "-1e308", "5e-324", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0.5", "1.0",
    "true", "null", "{}", "[]", '""', '"x"', "٣", "१२", "\\ud800", "a\x00b", "x" * 400, "x" * 19000,
    "[1.0]", "[1,2]", "[[1,2],[3,4]]", "[1e999,2]", "[NaN]", '["1","2"]', "[true,false]", "[null]", '{"a":{"b":1}}',
    "[" + "1," * 9000 + "1]", "[" + "1.0," * 2000 + "1.0]", "[" * 19000, "[" * 9000 + "]" * 9000,
    '{"a":' * 3000 + "1" + "}" * 3000,
]  # fmt: skip
"""What stands behind a setting's key."""


def tried(spec: str) -> None:
    """Make a policy in both ways, or be refused."""
    for make in (vtr.policy, lambda text: spec_of(text, 32)):
        with contextlib.suppress(ValueError, TypeError, OSError):
            make(spec)


def check_cheap(specs: list[str]) -> None:
    """Each in little time of this thread (of two tries), all of them in little memory."""
    for spec in specs:
        took = []
        while not took or (min(took) >= SECONDS and len(took) < 3):
            start = time.thread_time()
            tried(spec)
            took.append(time.thread_time() - start)
        assert min(took) < SECONDS, (spec[:80], took)
    tracemalloc.start()
    for spec in specs:
        tried(spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BYTES


def settings() -> list[tuple[str, str]]:
    names = [name for name in vtr.list_policies() if "for-test" not in name]
    return [(name, f.name) for name in names for f in dataclasses.fields(policy_class(name)) if f.init]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "setting"), settings(), ids=lambda text: text)
def test_an_extreme_setting_is_cheap(name: str, setting: str) -> None:
    before = {"gsearch": "schedule=[1.0],", "autoscale": "scales=[1,4],"}.get(name, "")
    check_cheap([f"{name}:{before}{setting}={value}" for value in EXTREME])
    check_cheap([f"m3+{name}:{setting}={value}" for value in EXTREME if len(value) < 400])


@pytest.mark.parametrize(
    "spec",
    [
        "+".join(["m3"] * 6000), "+" * 19000, "m3:" + "a=1," * 4000, "m3:" + "," * 19000, ":" * 19000, "=" * 19000,
        "m3" * 10**7, '"' * 19000, "[" * 19000, "]" * 19000, "chain:policies=" + "[" * 50 + "]" * 50,
        "chain:policies=" + '[{"policy":"chain","settings":{"policies":' * 30 + "[]" + "}}]" * 30,
        "chain:policies=[" + '{"policy":"m3","settings":{}},' * 400 + "5]", "chain:policies=[5]", "chain:policies=abc",
        'chain:policies=[{"policy":[]}]', "ｍ３", "m3:tokens=３６", "\ufeffm3", "m\n3:tokens=36", "\0", "", " ",
        "+", ":",
    ],
    ids=lambda spec: spec[:20].encode("unicode_escape").decode() + f"…{len(spec)}",
)  # fmt: skip
def test_odd_specs_are_refused_in_few_words(spec: str) -> None:
    with pytest.raises((ValueError, TypeError)) as said:
        vtr.policy(spec)
    assert len(str(said.value)) <= 2000
    if spec.strip():
        with pytest.raises(RequestError) as told:
            spec_of(spec, 32)
        assert len(str(told.value)) <= 600
    check_cheap([spec])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vtr.GSearch([1.0], layers=20_000_000), "at most 1024"),
        (lambda: vtr.Schedule([1.0] * (MOST_LAYERS + 1)), "at most 1024 layers"),
        (lambda: vtr.policy("gsearch:schedule=[1.0],layers=20000000"), "at most 1024"),
        (lambda: vtr.policy("dynamic-llava:width=1000000"), "width=1000000: choose 4…16384"),
        (lambda: vtr.policy("dynamic-llava:heads=0"), "heads=0: choose"),
        (lambda: vtr.policy("dynamic-llava:blocks=100000"), "blocks=100000: choose"),
        (lambda: vtr.policy("dynamic-llava:inner=1000000000"), "inner=1000000000: choose"),
        (lambda: vtr.policy("autoscale:answer_tokens=1000000"), "at 1024 at most"),
        (lambda: vtr.policy("autoscale:scales=[1,1e999]"), "scales must be an int"),
        (lambda: vtr.policy('autoscale:scales=["1","4"]'), "scales must be an int"),
        (lambda: vtr.policy("autoscale:scales=[1,4],calibration=[[1e999,0]]"), "must be a finite number"),
        (lambda: vtr.policy("pmod:factor=1e999"), "factor=inf must be a finite number"),
        (lambda: vtr.policy("pmod:norm=tanh_inf_1"), "write activation_scale_bias"),
        (lambda: vtr.policy("pmod:ratios=[0.5,1e999]"), "must be a finite number"),
        (lambda: vtr.policy("pmod:period=100000"), "period=100000: choose 1…1024"),
        (lambda: vtr.policy("fastv:keep=NaN"), "holds NaN"),
        (lambda: vtr.policy(f"random:seed={2**63}"), "integer of 64 bits"),
        (lambda: vtr.policy("random:seed=" + "9" * 5000), "too long a number"),
        (lambda: vtr.policy("+".join(["m3"] * (MOST_PARTS + 1))), "joins at most 16 policies"),
        (lambda: vtr.policy("m3:tokens=" + "9" * LONGEST), f"at most {LONGEST} characters"),
        (lambda: build("m3", {"tokens": [1] * (MOST_ENTRIES + 1)}), f"at most {MOST_ENTRIES}"),
    ],
)  # fmt: skip
def test_what_is_refused_says_how_much_there_may_be(make: Callable[[], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as said:
        make()
    assert says in str(said.value)


def test_what_a_policy_stumbles_over_is_a_value_error() -> None:
    @vtr.register_policy("stumbles-for-test")
    @dataclasses.dataclass
    class Stumbles(vtr.Policy):
        how: str = "zero"

        def __post_init__(self) -> None:
            {"zero": lambda: 1 // 0, "key": lambda: {}["x"], "over": lambda: math.exp(1e9)}[self.how]()

    try:
        for how in ("zero", "key", "over", "other"):
            with pytest.raises(ValueError, match="'stumbles-for-test' cannot be made of these settings"):
                build("stumbles-for-test", {"how": how})
    finally:
        del known._POLICIES["stumbles-for-test"]  # others list and make all policies


def test_classes_that_can_never_serve_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(vtr.AutoScale, "__post_init__", never)
    monkeypatch.setattr(vtr.GSearch, "__post_init__", never)
    for spec in ("autoscale:threshold=0.7", "m3+autoscale", "gsearch:schedule=[1.0],layers=33", "gsearch:layers=[1]"):
        with pytest.raises(RequestError, match=r"use a policy before it|name a scale"):
            spec_of(spec, 32)


def test_long_messages_keep_their_ends() -> None:
    assert short("abc") == "abc" and short("a" * 200) == "a" * 200
    said = short("start" + "x" * 10**6 + "end")
    assert said.startswith("start") and said.endswith("end") and "1000008 characters" in said and len(said) <= 200
    assert len(str(RequestError("x" * 10**6))) <= 600


def test_ordinary_settings_are_within_bounds() -> None:
    check_bounds({"schedule": [1.0] * 200, "temperature": math.inf, "name": "x", "nested": [{"a": [1, None]}]}, "x")
    assert vtr.policy("globalcom2:temperature=Infinity").temperature == math.inf
    deep = vtr.GSearch([1.0] * MOST_LAYERS)
    assert vtr.policy(deep.spec) == deep
    chain = vtr.Matryoshka(36) + deep
    assert vtr.policy(f"chain:policies={json.dumps(chain.config()['policies'])}") == chain


def test_calibration_does_not_overflow() -> None:
    assert calibrated(0.0, (1e300, 0.0)) < 1e-300 and calibrated(1.0, (1e300, 0.0)) == 1.0
