"""Auto: any policies, cheapest first, and each request goes on with the first one whose answer will do.

How often that may go wrong is tuned to a promise on one's own questions: ``vtr tune auto`` (:mod:`vtr.training.auto`).
The cascade is ours; the promise is Learn-then-Test's (Angelopoulos et al., arXiv 2110.01052).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtr.base import CHOOSING, Began, Policy
from vtr.chain import policy
from vtr.checks import check_count, check_number
from vtr.files import check_finite
from vtr.inputs import split
from vtr.learned import differing, fingerprint, misfits, named_weights, weights_spec
from vtr.limits import short
from vtr.parts import Parts
from vtr.settings import build, check_names_no_file, parse, policy_class, register_policy

NONE = "none"
SIGNALS = ("confidence", "agreement", "attention", "probe")
MOST_CHOICES, MOST_TOKENS = 16, 1024
SUREST = 1 - 2.0**-20
"""No estimate is above this, so that a threshold of 1 takes the last choice."""
PLAIN = 3
"""Numbers that a probe sees beside the hidden state: see :func:`features`."""
SOME = 64
"""Vision tokens, to see where a policy cuts."""
PROBE = ("mean", "scale", "weight", "bias")
"""A probe's tensors: how its inputs are normalised, [F] each; weight [choices - 1, F]; bias [choices - 1]."""


def confidence(began: Began, tokens: int) -> torch.Tensor:
    """float32 [rows]: the smallest probability among the first tokens of each answer, as far as it goes."""
    seen = torch.where(began.there, began.sure, 1.0)[:, :tokens]
    return seen.amin(1)


def agreement(one: Began, other: Began, tokens: int) -> torch.Tensor:
    """bool [rows]: whether two answers begin with the same tokens."""
    n = min(tokens, one.ids.shape[1], other.ids.shape[1])
    same = (one.ids[:, :n] == other.ids[:, :n]) | ~(one.there[:, :n] | other.there[:, :n])
    return same.all(1) & (one.there[:, :n] == other.there[:, :n]).all(1)


def logit(p: torch.Tensor) -> torch.Tensor:
    """Of probabilities, which are kept within 1e-6 of 0 and 1."""
    return torch.logit(p.float().double(), eps=1e-6).float()


def features(began: Sequence[Began], tokens: int) -> torch.Tensor:
    """What a probe sees of the last try: float32 [rows, PLAIN + hidden_size].

    The logit of its confidence, that of the try before, whether the two agree (0 for the first try), and the hidden
    state that the first token was read from.
    """
    last = began[-1]
    sure, before, same = logit(confidence(last, tokens)), torch.zeros(len(last.ids)), torch.zeros(len(last.ids))
    if len(began) > 1:
        before = logit(confidence(began[-2], tokens))
        same = agreement(last, began[-2], tokens).float()
    plain = torch.stack([t.to(last.states.device) for t in (sure, before, same)], 1)
    return torch.cat([plain, last.states.float()], 1)


def attention(began: Began) -> torch.Tensor:
    """float32 [rows]: of the attention on the picture, what is left at the cuts (``Began.stayed``)."""
    if began.stayed is None:
        raise ValueError("this try's cuts were not gauged: signal='attention' judges those of a policy that gauges")
    return began.stayed


def why_not_gauged(choice: Policy | None, num_hidden_layers: int | None = None) -> str | None:
    """Why attention says nothing of what a choice drops, or None.

    Args:
        num_hidden_layers: where it is known, cuts at the first layer are looked for too.
    """
    if choice is None:
        return None
    if choice.asks("compress"):
        return "drops or pools tokens before the decoder, where nobody has paid them attention"
    if choice.asks("route") or choice.asks("attend") or not choice.asks("prune"):
        return "drops no tokens inside the decoder"
    try:
        first = 0 if num_hidden_layers is None else SOME - choice.entering(num_hidden_layers, SOME)[0]
    except ValueError:  # depends on what the picture shows: the engine refuses such a cut when it comes to it
        first = 0
    return "drops tokens at layer 0, in front of which there is no attention" if first else None


@register_policy("auto")
@dataclass
class AutoPolicy(Parts):
    """Each request under the first of several policies whose answer will do, by its own estimate.

    While ``generate`` reads the prompt, every request is read under the first choice. Those whose answer begins surely
    enough go on with it: the try is the answer, nothing of it is run twice. The others are read again under the next
    choice, without those that are done; the last choice is taken as it is. Pictures are encoded once. The report says
    which choice each row got (``rows[b].policy``), and what was tried and left (``rows[b].tries``); both are in its
    FLOPs.

    ``vtr tune auto`` sorts choices by what they cost, fits the estimate and finds the thresholds with which accuracy
    falls by at most ``--loss``, with confidence ``--confidence``: what is promised of them is in ``promise``. Saved and
    loaded as any policy with weights: ``auto:weights=FOLDER``.

    Works with sampling, beams and streamers, and beside other policies in a batch. Not for a direct forward, a
    conversation that goes on, drafts of another model, a static cache, or decoders that cannot run packed rows.

    Args:
        choices: policies or their spec strings, cheapest first; "none" is no reduction. They act behind the vision
            tower. One alone is that policy.
        thresholds: a choice is taken if the estimate that it suffices is at least this, in [0, 1]; one for all choices
            but the last, or one for each. 1.0: never.
        signal: "confidence": the smallest probability of the answer's first tokens; "agreement": that, once a choice
            says what the one before said (so the first is never taken); "attention": of the attention that the
            prompt's last token pays to vision tokens (mean over heads, in the layer before a cut) the share on those
            that stay, the product over all cuts, for choices that drop tokens inside the decoder (what they merge
            counts as dropped); "probe": a linear probe of confidence, agreement and the hidden state, which ``vtr tune
            auto`` fits.
        tokens: of the answer, so many are seen. Those an accepted try has said are not computed again.
        calibration: of signals without a probe, (slope, intercept) of every choice but the last: Platt's scaling of the
            confidence, or of the attention. None: as it is.
        promise: what ``vtr tune auto`` has found out about these thresholds, as data; says nothing to the policy.

    Raises:
        TypeError, ValueError: no choices, one that chooses itself or acts before the vision tower, one whose dropped
            tokens had no attention for signal="attention", or settings out of range.
    """

    choices: Sequence[str | Policy | None] = ()
    thresholds: float | Sequence[float] = 0.9
    signal: str = "confidence"
    tokens: int = 1
    calibration: Sequence[Sequence[float]] | None = None
    promise: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence):
            raise TypeError(f'choices={self.choices!r}: a list of policies, e.g. ["m3:9","m3:36","none"]')
        if not 1 <= len(self.choices) <= MOST_CHOICES:
            raise ValueError(
                f"auto chooses among 1 to {MOST_CHOICES} policies, cheapest first: say e.g. "
                'auto:choices=["m3:9","m3:36","none"], or auto:weights=FOLDER of what `vtr tune auto` wrote'
            )
        self.choices = [_choice(one) for one in self.choices]
        self.thresholds = self._thresholds(self.thresholds)
        if self.signal not in SIGNALS:
            raise ValueError(f"signal={self.signal!r}: choose one of {', '.join(SIGNALS)}")
        self._check_gauged()
        check_count(self.tokens, "tokens", 1, MOST_TOKENS)
        if self.calibration is not None:
            self.calibration = [[check_number(n, "calibration") for n in line] for line in self.calibration]
            if len(self.calibration) != self.last or any(len(line) != 2 for line in self.calibration):
                raise ValueError("calibration has one (slope, intercept) for every choice but the last")
        if self.promise is not None and not isinstance(self.promise, Mapping):
            raise TypeError(f"promise={short(repr(self.promise))}: what `vtr tune auto` wrote, a mapping")
        self.probe: dict[str, torch.Tensor] = {}
        self.allow_mismatch, self.named = False, ""
        self.folder: str | None = None
        self._fits: weakref.ref[Any] | None = None

    def _thresholds(self, given: Any) -> float | list[float]:
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        for one in several:
            if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one <= 1:
                raise ValueError(f"thresholds={given!r}: probabilities, from 0 to 1")
        if isinstance(given, (list, tuple)) and len(several) != self.last:
            raise ValueError(f"{len(several)} thresholds for {self.last} choices before the last: one for each, or one")
        return [float(one) for one in several] if isinstance(given, (list, tuple)) else float(given)

    def _check_gauged(self, num_hidden_layers: int | None = None) -> None:
        for one in self.options()[:-1] if self.signal == "attention" else []:
            if why := why_not_gauged(one, num_hidden_layers):
                raise ValueError(
                    f"signal='attention' cannot judge {short(one.spec) if one else NONE}, which {why}: choose among "
                    "policies that cut later (fastv:keep=0.25,layer=2, gsearch), or use signal='confidence'"
                )

    # -- choosing ------------------------------------------------------------------------------------------------------
    @property
    def last(self) -> int:
        """Which choice is taken if no other will do."""
        return len(self.choices) - 1

    @property
    def names(self) -> list[str]:
        """The spec string of every choice, "none" for no reduction."""
        return ["none" if one is None else one.spec for one in self.options()]

    def options(self) -> list[Policy | None]:
        return [one if isinstance(one, Policy) else None for one in self.choices]

    @property
    def hears(self) -> int:
        return self.tokens

    @property
    def gauges(self) -> bool:
        return self.signal == "attention"

    def accept(self, step: int, began: Sequence[Began]) -> torch.Tensor:
        return self.estimate(step, began) >= self.threshold(step)

    def threshold(self, step: int) -> float:
        """What the estimate of choice ``step`` must be at least."""
        return self.thresholds[step] if isinstance(self.thresholds, list) else float(self.thresholds)  # type: ignore[arg-type]

    def estimate(self, step: int, began: Sequence[Began]) -> torch.Tensor:
        """float32 [rows]: how probable it is that choice ``step`` suffices, of what its rows begin to say."""
        if self.signal == "probe":
            x = features(began, self.tokens)
            weights = {name: t.to(x.device) for name, t in self.probe.items()}
            x = (x - weights["mean"]) / weights["scale"]
            return (x @ weights["weight"][step] + weights["bias"][step]).sigmoid().clamp(max=SUREST)
        raw = attention(began[-1]) if self.signal == "attention" else confidence(began[-1], self.tokens)
        if self.calibration is not None:
            slope, intercept = self.calibration[step]
            raw = (slope * logit(raw) + intercept).sigmoid()
        if self.signal == "agreement":
            same = agreement(began[-1], began[-2], self.tokens) if step else torch.zeros_like(raw, dtype=torch.bool)
            raw = raw * same
        return raw.clamp(max=SUREST)

    # -- what it is made of --------------------------------------------------------------------------------------------
    def parts(self) -> list[Policy]:
        return [one for one in self.choices if isinstance(one, Policy)]

    def check(self, num_hidden_layers: int) -> None:
        super().check(num_hidden_layers)
        self._check_gauged(num_hidden_layers)
        if self.signal == "probe" and not self.probe:
            raise ValueError(
                "signal='probe' has no weights: `vtr tune auto` fits some, auto:weights=FOLDER loads them; or use "
                "signal='confidence'"
            )

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        width = model.get_decoder().config.hidden_size
        if self.probe and len(self.probe["mean"]) != PLAIN + width:
            raise ValueError(
                f"this auto's probe is for hidden states of {len(self.probe['mean']) - PLAIN}, this model's have "
                f"{width}: tune one for this model, `vtr tune auto --model …`"
            )
        base = (self.promise or {}).get("model")
        if not isinstance(base, dict) or self.allow_mismatch or (self._fits is not None and self._fits() is model):
            return
        if wrong := differing(fingerprint(model), base):
            raise ValueError(
                f"this auto was tuned on another model, so what it promises does not hold here: {len(wrong)} of "
                f"{len(base)} matrices differ ({wrong[0]} is the first). Tune one for this model, `vtr tune auto "
                "--model …`, or load it with allow_mismatch=true to use its thresholds all the same"
            )
        self._fits = weakref.ref(model)

    # -- as data -------------------------------------------------------------------------------------------------------
    @classmethod
    def first_setting(cls) -> str:
        return "weights"

    @classmethod
    def example(cls) -> str:
        return cls(["m3:9", NONE], thresholds=0.95).spec

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Policy:
        """Make one. ``weights`` is the folder that `vtr tune auto` wrote: the settings saved there hold unless others
        are named, and with others nothing is promised."""
        if "weights" not in settings:
            return super().from_settings(settings)
        found, given = named_weights(cls, settings)
        assert isinstance(found, AutoPolicy)
        if not given:
            return found
        made = super().from_settings({**found.config(), "promise": None, **given})
        assert isinstance(made, AutoPolicy)
        if made.last == found.last:
            made.probe = found.probe
        made.folder, made.allow_mismatch = found.folder, found.allow_mismatch
        made.named = ",".join(f"{key}={_said(value)}" for key, value in given.items())
        return made

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        for one in settings.get("choices", []):
            if isinstance(one, Mapping):
                check_names_no_file(one["policy"], one["settings"])
            elif isinstance(one, str) and one != NONE:
                for name, inner in parse(one):
                    if "weights" in inner or policy_class(name).names_file(inner):
                        return True
        return False

    def config(self) -> dict[str, Any]:
        """The settings as plain JSON data; a choice with weights, which are saved beside them, names no folder."""
        own = super().config()
        return own | {"choices": [_plain(one) for one in self.choices], "promise": self.promise and {**self.promise}}

    @property
    def spec(self) -> str:
        if self.folder:
            return weights_spec(self.name, self.folder, self.allow_mismatch, self.named)
        return super().spec

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**super().tensors(), **{f"probe.{name}": t.detach().cpu() for name, t in self.probe.items()}}

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Take what :meth:`tensors` gave: the weights of the choices, and the probe's.

        Raises:
            ValueError: other tensors, of other shapes, or not finite.
        """
        self.expect(tensors, about)
        check_finite(tensors)
        mine, others = _probe_of(tensors)
        super().load_tensors(others, about)
        self.probe = {name: t.detach().float() for name, t in mine.items()}
        if self.probe and not bool((self.probe["scale"] > 0).all()):
            raise ValueError("an auto's probe divides by its scale, which must be above 0")

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        mine, others = _probe_of(tensors)
        super().expect(others, about)
        if not mine:
            return
        if "mean" not in mine or mine["mean"].dim() != 1:
            raise ValueError("an auto's probe has a probe.mean of one axis, its inputs")
        width = len(mine["mean"])
        shapes = {"mean": (width,), "scale": (width,), "weight": (self.last, width), "bias": (self.last,)}
        wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        if wrong := misfits(wanted, mine, {name: f"probe.{name}" for name in mine}):
            raise ValueError(f"this is no probe of an auto with {self.last + 1} choices: " + "; ".join(wrong))

    def loaded_from(self, folder: str | None, allow_mismatch: bool) -> None:
        super().loaded_from(folder, allow_mismatch)
        self.folder, self.allow_mismatch = folder, allow_mismatch


def _choice(given: Any) -> Policy | str:
    """A policy to choose, or "none".

    Raises:
        TypeError, ValueError: it is none, chooses itself, or acts before the vision tower.
    """
    if given is None or (isinstance(given, str) and given.strip().lower() == NONE):
        return NONE
    if isinstance(given, Mapping):
        given = build(given["policy"], given["settings"])
    if not isinstance(given, (str, Policy)):
        raise TypeError(f'choices are policies, spec strings or "none", got {short(repr(given))}')
    made = policy(given)
    if any(map(made.asks, CHOOSING)):
        raise ValueError(f"auto chooses among fixed policies, and {short(made.spec)} chooses itself: name its choices")
    before, rest = split(made)
    if before is not None:
        instead = "one that takes few tokens of every crop, e.g. m3:tokens=36 or divprune:keep=0.1"
        raise ValueError(
            f"{short(before.spec)} makes another picture before the processor, of other crops and another prompt, so "
            "a try under it would be of no use to the next. As a choice name "
            f"{instead if rest is None else repr(short(rest.spec))} instead; or have {short(before.spec)} for all "
            f"choices: encode with vtr.processor(processor, {short(before.spec)!r})"
        )
    return made


def _plain(one: Any) -> Any:
    if not isinstance(one, Policy):
        return one
    return {"policy": one.name, "settings": one.config()} if one.tensors() else one.spec


def _said(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _probe_of(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The probe's tensors, and those of the choices."""
    mine = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("probe.")}
    return mine, {n: t for n, t in tensors.items() if not n.startswith("probe.")}
