"""What is compared: policies by spec string, no reduction; and one of each at a common budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtr.eval.accuracy import blind  # noqa: F401  (registers the question-blind selector)
from vtr.eval.accuracy.frames import FRAMES, Frames

import vtr
from vtr.budget import at_share
from vtr.engine.adapters import find_adapter
from vtr.inputs import InputPolicy, parts_of
from vtr.learned import Learned
from vtr.limits import short, similar
from vtr.parts import Parts
from vtr.policies.picture._frames import Framewise
from vtr.settings import policy_class
from vtr.shares import check_share

NONE = "none"
ALL = "all"
BUDGET = 0.25
FIRST = (NONE, "random", "uniform", "pool", vtr.Downsample.name)
"""What ``all`` begins with: no reduction and the baselines every policy has to beat."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        policy: what acts in the model, or None. before: what acts on pictures, before the tower, or None.
        frames: which frames of a video the processor gets; None for all.
    """

    spec: str
    name: str
    policy: vtr.Policy | None = None
    before: vtr.Policy | None = None
    frames: Frames | None = None


@dataclass(frozen=True)
class Shapes:
    """What budgets depend on: decoder layers, patches along a tile's side; the family, where it is known; and whether
    the data may hold films."""

    layers: int
    side: int
    family: Any = None
    films: bool = True

    @classmethod
    def from_model(cls, model: Any) -> Shapes:
        """Of a model whose vision tower has square patches."""
        vision = model.config.vision_config
        size, patch = (n[0] if isinstance(n, (list, tuple)) else n for n in (vision.image_size, vision.patch_size))
        shrink = getattr(model.config, "downsample_ratio", 1)
        return cls(len(model.get_decoder().layers), int(size // patch * shrink), find_adapter(model))


def contender(spec: str) -> Contender:
    """The contender of a spec: ``none``, or a policy's; what of it acts before the tower is split off. Of videos also
    ``frames:keep=0.5``, or ``frames:keep=0.5+POLICY``.

    Raises:
        TypeError, ValueError: no such policy, or settings it refuses.
    """
    spec = spec.strip()
    if spec == NONE:
        return Contender(NONE, NONE)
    head, _, more = spec.partition("+")
    name, _, settings = head.partition(":")
    if name == FRAMES:
        fewer, behind = _fewer(head, settings), _policy(more) if more else None
        return Contender(fewer.spec + (f"+{behind.spec}" if behind else ""), FRAMES, behind, frames=fewer)
    policy = _policy(spec)
    before, rest = vtr.split(policy)
    return Contender(policy.spec, policy.name if before is None else parts_of(before)[0].name, rest, before)


def _fewer(head: str, settings: str) -> Frames:
    """The baseline of ``frames``, ``frames:0.5`` or ``frames:keep=0.5``."""
    key, equals, value = settings.rpartition("=")
    if equals and key != "keep":
        raise ValueError(f"{FRAMES} has no setting {key!r}; it has: keep, e.g. {FRAMES}:keep=0.5")
    try:
        return Frames(float(value)) if settings else Frames()
    except ValueError as error:
        raise ValueError(f"{head!r}: {error}") from error


def _policy(spec: str) -> vtr.Policy:
    """As :func:`vtr.policy`; where several policies are joined by commas, the message says how they are joined here."""
    known = [*vtr.list_policies(), NONE, ALL, FRAMES]
    if "," in spec:
        parts = [part.strip() for part in spec.split(",")]
        if any(part.partition(":")[0] in known and "=" not in part.partition(":")[0] for part in parts[1:]):
            raise ValueError(
                f"{short(spec)!r}: policies are joined by a semicolon, like fastv:keep=0.25;random:keep=0.25"
            )
    name, own = spec.partition(":")[0].strip(), (NONE, ALL, FRAMES)
    if name not in known and (hint := similar(name, own)) and not similar(name, vtr.list_policies()):
        raise ValueError(f"unknown policy {short(name)!r}{hint}; {ALL} is one of each that `vtr list` shows")
    return vtr.policy(spec)


def specs_of(given: Sequence[str]) -> list[str]:
    """The specs that are joined by ``;``, one by one.

    Raises:
        ValueError: there is none.
    """
    found = [part.strip() for text in given for part in text.split(";") if part.strip()]
    if not found:
        raise ValueError(f"no policy is named: give {ALL}, or specs joined by a semicolon")
    return found


def contenders(
    specs: Sequence[str], shapes: Shapes, budget: float = BUDGET, weights: str | None = None
) -> tuple[list[Contender], list[Contender], dict[str, str]]:
    """No reduction first, then what ``specs`` name.

    Args:
        specs: each one or several specs joined by ``;``; ``all`` is one per registered policy, at ``budget``.
        weights: what trained policies of ``all`` get as theirs; without, they are left out.

    Returns:
        All of them; those of them that only ``all`` named; and why registered policies were left out of ``all``.

    Raises:
        TypeError, ValueError: an unknown policy, one that cannot work on this model, the same one twice.
    """
    found, left_out = [Contender(NONE, NONE)], dict[str, str]()
    only_all: list[Contender] = []
    for spec in specs_of(specs):
        if spec == ALL:
            more, left_out = at_budget(budget, shapes, weights)
            more = [one for one in more if one not in found]
            only_all += more
        else:
            more = [contender(spec)] if spec != NONE else []
        found += more
    for one in found:
        if one.policy is not None:
            one.policy.check(shapes.layers)
    names = [one.spec for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is there twice: name each policy once")
    return found, only_all, left_out


def at_budget(budget: float, shapes: Shapes, weights: str | None = None) -> tuple[list[Contender], dict[str, str]]:
    """One contender per registered policy, and why others are left out.

    A policy that does not say how it is set to a budget gets its defaults: the table shows what it keeps.
    A budget of 1 or more is a count of tokens, of those of one tile.

    Raises:
        ValueError: no such budget.
    """
    if budget >= 1 and budget == int(budget):
        if budget >= shapes.side**2:
            raise ValueError(f"budget={budget:g}: a tile has {shapes.side**2} tokens: give fewer, or a share (0.25)")
        budget = budget / shapes.side**2
    check_share(budget)
    registered = [name for name in vtr.list_policies() if not issubclass(policy_class(name), Parts)]
    order = [name for name in FIRST if name in registered]
    made, left_out = [], {}
    for name in order + [name for name in registered if name not in FIRST]:
        try:
            if name == vtr.Downsample.name:
                one = contender(vtr.Downsample(round(budget**0.5, 4)).spec)
            elif issubclass(policy_class(name), InputPolicy):
                raise ValueError("it acts on pictures, so a budget says nothing to it: name it")
            elif issubclass(policy_class(name), Framewise) and not shapes.films:
                raise ValueError("it thins films, and leaves pictures whole")
            else:
                learned = weights is not None and issubclass(policy_class(name), Learned)
                one = _set(f"{name}:weights={weights}" if learned else name, budget, shapes)
            if one.policy is not None:
                one.policy.check(shapes.layers)
                if shapes.family is not None:
                    shapes.family.refuse([one.policy])
            made.append(one)
        except (TypeError, ValueError, OSError, vtr.UnsupportedError) as error:
            left_out[name] = str(error)
    return made, left_out


def _set(spec: str, budget: float, shapes: Shapes) -> Contender:
    """The contender of a spec at a budget; as it is, if its class does not say how it is set to one."""
    try:
        made = at_share(spec, budget, shapes.layers, shapes.side)
    except NotImplementedError:
        made = vtr.policy(spec)
    return Contender(made.spec, made.name, made)
