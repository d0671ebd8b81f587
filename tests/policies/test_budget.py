"""``vtr.at_budget``: every policy with a knob, on tiny models, has the mean that was asked for, or says why not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtr
from tests import families, learned, tiny
from vtr.budget import mean_of, typical
from vtr.cli import app
from vtr.settings import policy_class
from vtr.shares import NEAR

LAYERS = 8


def says_how(name: str) -> bool:
    """Whether the policy ``name`` says how it is set to a budget."""
    try:
        policy_class(name).settings_at(0.5, LAYERS, 6)
    except NotImplementedError:
        return False
    except ValueError:  # not to this one
        return True
    return True


KNOBS = [name for name in vtr.list_policies() if "for-test" not in name and says_how(name)]
COARSE = ("m3", "pool", "vtw")
SHARES = (0.6, 0.4)


@pytest.fixture(scope="module")
def llava() -> Any:
    return vtr.patch(tiny.llava(layers=LAYERS))


def policy_of(name: str) -> Any:
    return learned.dynamic(layers=LAYERS) if name == "dynamic-llava" else name


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", KNOBS)
def test_the_mean_is_at_most_the_budget_and_near_it(name: str, share: float, llava: Any) -> None:
    """As the report of a call says it; a count and a share say the same."""
    total = 36
    mean = round(share * total)
    try:
        policy = vtr.at_budget(policy_of(name), llava, mean)
    except ValueError as error:
        assert name in COARSE and "give another mean" in str(error)
        return
    inputs = tiny.batch(llava, [["ab", tiny.IMAGE, "what"]])
    with torch.no_grad():
        llava(**inputs, policy=policy)
    row = vtr.report(llava).rows[0]
    got = row.mean_keep * total
    assert row.total == total and got <= mean + 1e-6
    assert got >= (NEAR if name in COARSE else 0.9) * mean - (0 if name in COARSE else 1)
    assert mean_of(policy, LAYERS, typical(llava)) == pytest.approx(got)  # type: ignore[arg-type]
    assert vtr.at_budget(policy_of(name), llava, mean / total).spec == policy.spec


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl"])
@pytest.mark.parametrize("name", ["fastv", "random", "uniform", "gsearch", "pyramid"])
def test_shares_hold_for_pictures_of_any_size(family: str, name: str) -> None:
    model = vtr.patch(getattr(tiny, family)(layers=LAYERS))
    policy = vtr.at_budget(name, model, 0.5)
    with torch.no_grad():
        model(**tiny.batch(model, [["ab", tiny.IMAGE, "what"]]), policy=policy)
    assert 0.4 < vtr.report(model).rows[0].mean_keep <= 0.5


def test_settings_that_are_given_stay(llava: Any) -> None:
    assert vtr.at_budget("random:layer=3,seed=5", llava, 0.6).config() | {"keep": 0} == {
        **vtr.Random(0, 3, seed=5).config(),
        "keep": 0,
    }
    before = vtr.FastV(0.9, 4)
    made = vtr.at_budget(before, llava, 0.75)
    assert made.layer == 4 and made.keep == pytest.approx(0.5, abs=0.02) and before == vtr.FastV(0.9, 4)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"cannot be set .* or a smaller layer|cannot be set"):
        vtr.at_budget("fastv:layer=4", llava, 0.4)
    trained = learned.dynamic(layers=LAYERS)
    assert vtr.at_budget(trained, llava, 0.6).module is trained.module  # type: ignore[attr-defined]
    whole = vtr.at_budget("fastv", llava, 1.0)
    assert mean_of(whole, LAYERS, typical(llava)) >= 35  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "how", "error", "text"),
    [
        ("fastv", {"mean": 0}, ValueError, "for a share give a float"),
        ("fastv", {"mean": 192.0}, ValueError, "for a count of tokens give an int"),
        ("fastv", {"mean": True}, TypeError, "a number of tokens"),
        ("fastv", {"mean": "192"}, TypeError, "a number of tokens"),
        ("fastv", {"mean": float("nan")}, ValueError, "a share in"),
        ("fastv", {"mean": 37}, ValueError, "has 36 vision tokens; give fewer, or total="),
        ("fastv", {"mean": 4, "total": 0}, ValueError, "total=0"),
        ("fastv", {"mean": 1}, ValueError, "cannot be set"),
        ("autoscale", {"mean": 9}, ValueError, "own settings say what it keeps"),
        ("pmod", {"mean": 9}, ValueError, "own settings say what it keeps"),
        ("uniform:before_decoder=true,layer=0+fastv", {"mean": 9}, ValueError, "set its parts"),
        ("nobody", {"mean": 9}, ValueError, "nobody"),
    ],
)
def test_what_cannot_be_set_says_what_to_give(
    what: str, how: dict[str, Any], error: Any, text: str, llava: Any
) -> None:
    with pytest.raises(error, match=text):
        vtr.at_budget(what, llava, **how)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda one: one.kind)
def test_every_family(family: Any) -> None:
    """Shares hold in any; counts need a total where a picture has no usual size."""
    model = vtr.patch(family.make())
    depth = len(vtr.engine.adapters.find_adapter(model).text_model(model).layers)
    made = vtr.at_budget("random:layer=1", model, 0.7)
    assert 0.6 < (1 + made.keep * (depth - 1)) / depth <= 0.7 + 1e-4  # type: ignore[attr-defined]
    if typical(model) is None:
        with pytest.raises(ValueError, match="give total="):
            vtr.at_budget("random:layer=1", model, 280)
        assert vtr.at_budget("random:layer=1", model, 280, total=400).spec == made.spec
    else:
        assert vtr.at_budget("random:layer=1", model, round(0.7 * len(typical(model))))  # type: ignore[arg-type]


def test_the_command() -> None:
    args = ["run", "--sample", "0", "--policy", "fastv", "--repeats", "1", "--budget"]
    shown = CliRunner().invoke(app, [*args, "192"])
    assert shown.exit_code == 0, shown.output
    said = shown.output.split("into each decoder layer with fastv:")[1].partition(": ")[2]
    counts = [int(n) for n in itertools.takewhile(str.isdigit, said.split())]  # the line may be wrapped
    assert 180 < sum(counts) / len(counts) <= 192
    for wrong, text in [
        ("many", "give a count"),
        ("0", "at least 1"),
        ("1.5", "or a share above 0"),
        ("100000", "give fewer"),
    ]:
        refused = CliRunner().invoke(app, [*args, wrong])
        assert refused.exit_code == 1 and text in refused.output
    none = CliRunner().invoke(app, ["run", "--sample", "0", "--budget", "192"])
    assert none.exit_code == 1 and "name one as well" in none.output
