"""``vtr.testing.check_policy``: shipped policies pass, and every way of being wrong is told in plain words."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import pytest
import torch

import vtr
from vtr import settings
from vtr.testing import PolicyError, check_policy, dense, oracles, tiny

SLOW = [vtr.GSearch([1.0, 0.8, 0.5, 0.5, 0.2]), vtr.Random(0.3), vtr.UniformGrid(0.25, layer=1), vtr.Pool(3)]
GOOD = [
    vtr.FastV(0.5),
    vtr.Pyramid(),
    vtr.GlobalCom2(0.25),
    vtr.Matryoshka(9) + vtr.FastV(0.5),
    vtr.AutoScale(),
    *(pytest.param(p, marks=pytest.mark.slow, id=p.spec) for p in [*SLOW, vtr.Matryoshka(9)]),
]


@pytest.mark.parametrize("policy", GOOD)
def test_shipped_policies_pass(policy: vtr.Policy) -> None:
    found = check_policy(policy, families=("llava_next",))
    asked = {question for question in ("compress", "prune", "resolve") if policy.asks(question)}
    assert {"settings", "determinism", "row invariance", "cache", "off is off"} <= set(found.passed)
    assert ("dense mask" in found.passed) == (asked == {"prune"})
    assert ("shorter prompt" in found.passed) == (policy.name == "globalcom2")
    assert ("accounting" in found.passed) == ("resolve" not in asked)
    assert len(found.passed) + len(found.skipped) == 14 and f"✓ {found.passed[0]}" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [vtr.FastV(0.5), vtr.Random(0.3), vtr.UniformGrid(0.25), vtr.GlobalCom2(0.25)])
def test_shipped_policies_pass_on_every_family(policy: vtr.Policy) -> None:
    check_policy(policy, families=tiny.FAMILIES)


def half(tokens: Any) -> torch.Tensor:
    return torch.arange(0, len(tokens), 2)


@dataclass
class Prunes(vtr.Policy):
    """Cuts before layer 1; what is wrong is in the subclass."""

    layer: int = 1

    def prune(self, layer: int, tokens: Any) -> Any:
        return self.choose(tokens) if layer == self.layer else None

    def choose(self, tokens: Any) -> Any:
        raise NotImplementedError


class PlaceInBatch(Prunes):
    """Every other row that it is asked about keeps the other half."""

    def choose(self, tokens: Any) -> Any:
        self.asked = not getattr(self, "asked", False)
        return half(tokens) + (len(tokens) // 2 * 2 == len(tokens)) * int(self.asked)


class RowsTogether(Prunes):
    """Looks at how many rows the call has: each call is the same when repeated, but no row is what it is alone."""

    def choose(self, tokens: Any) -> Any:
        frame = sys._getframe()
        while frame is not None and "session" not in str(type(frame.f_locals.get("self"))).lower():
            frame = frame.f_back  # type: ignore[assignment]
        rows = len(frame.f_locals["self"].rows)
        return torch.arange(len(tokens))[:: 2 if rows == 1 else 3]


class GlobalRandom(Prunes):
    def choose(self, tokens: Any) -> Any:
        return torch.randperm(len(tokens))[: len(tokens) // 2]


class Reseeds(Prunes):
    def choose(self, tokens: Any) -> Any:
        torch.manual_seed(0)
        return torch.randperm(len(tokens))[: len(tokens) // 2]


class OutOfRange(Prunes):
    def choose(self, tokens: Any) -> Any:
        return torch.tensor([0, len(tokens)])


class Slots(Prunes):
    """Places in the prompt instead of indices."""

    def choose(self, tokens: Any) -> Any:
        return tokens.place[-4:]


class Twice(Prunes):
    def choose(self, tokens: Any) -> Any:
        return torch.zeros(2, dtype=torch.long)


class Mask(Prunes):
    def choose(self, tokens: Any) -> Any:
        return tokens.y % 2 == 0


class TooMany(Prunes):
    """Takes a number from ``total`` where fewer are left."""

    def prune(self, layer: int, tokens: Any) -> Any:
        return tokens.hidden.norm(dim=1).topk(tokens.total // 2).indices[layer:]

    def compress(self, image: Any) -> Any:
        return torch.arange(len(image) // 3)


class Unasked(Prunes):
    """Reads scores without saying that it needs them."""

    def choose(self, tokens: Any) -> Any:
        return tokens.scores.topk(3).indices


class UnaskedTower(vtr.Policy):
    def compress(self, image: Any) -> Any:
        return image.cls_attention()[0].topk(3).indices


class QuestionUnsaid(Prunes):
    """Ranks by attention, and does not say that it listens to the question."""

    def needs(self, layer: int) -> Any:
        return "last" if layer == self.layer else None

    def choose(self, tokens: Any) -> Any:
        return tokens.scores.topk(3).indices


class TextUnsaid(Prunes):
    def choose(self, tokens: Any) -> Any:
        return (tokens.hidden @ tokens.text[-1]).topk(3).indices


class InPlace(Prunes):
    """Scales the very hidden states that go on."""

    def compress(self, image: Any) -> Any:
        image.features.mul_(1.1)
        return torch.arange(len(image) // 2)

    def choose(self, tokens: Any) -> Any:
        return None


class WritesHidden(Prunes):
    """Means to merge what it drops into what it keeps."""

    def choose(self, tokens: Any) -> Any:
        tokens.hidden[::2] += tokens.hidden[1::2]
        return half(tokens)


class WritesText(Prunes):
    def choose(self, tokens: Any) -> Any:
        tokens.text.zero_()
        return half(tokens)


class WritesScores(QuestionUnsaid):
    question_guided: ClassVar[bool] = True

    def choose(self, tokens: Any) -> Any:
        tokens.scores[0] = torch.inf
        return tokens.scores.topk(3).indices


class WritesUnseen(Prunes):
    """Past torch's own count of writes."""

    def choose(self, tokens: Any) -> Any:
        tokens.hidden.detach().numpy()[0] = 7
        return half(tokens)


class WritesPlaces(Prunes):
    def choose(self, tokens: Any) -> Any:
        tokens.y.add_(1)
        return half(tokens)


class WritesLayout(vtr.Policy):
    def compress(self, image: Any) -> Any:
        image.layout.x.add_(0)  # the layout is shared by all pictures of this size: a test must leave it right
        return torch.arange(len(image) // 2)


class WritesWords(vtr.Policy):
    def remember(self, layer: int, token: Any) -> bool:
        token.hidden.mul_(1.5)
        return True


class FirstSeen(Prunes):
    """Takes the number of the first prompt for all later ones."""

    def choose(self, tokens: Any) -> Any:
        self.count = getattr(self, "count", None) or len(tokens) // 2
        return torch.arange(min(self.count, len(tokens)))


class FirstSeenHidden(Prunes):
    def choose(self, tokens: Any) -> Any:
        self._count = getattr(self, "_count", None) or len(tokens) // 2
        return torch.arange(min(self._count, len(tokens)))


class FirstSeenClass(Prunes):
    def choose(self, tokens: Any) -> Any:
        FirstSeenClass.count = getattr(FirstSeenClass, "count", None) or len(tokens) // 2  # type: ignore[attr-defined]
        return torch.arange(min(FirstSeenClass.count, len(tokens)))  # type: ignore[attr-defined]


SEEN: dict[str, int] = {}


class FirstSeenModule(Prunes):
    def choose(self, tokens: Any) -> Any:
        return torch.arange(min(SEEN.setdefault("count", len(tokens) // 2), len(tokens)))


class FirstSeenDefault(Prunes):
    def choose(self, tokens: Any, seen: list[int] = []) -> Any:  # noqa: B006
        seen.append(len(tokens) // 2)
        return torch.arange(min(seen[0], len(tokens)))


class Listed(Prunes):
    """Notes whom it was asked about, and makes nothing of it."""

    def choose(self, tokens: Any) -> Any:
        self.seen.append(len(tokens))
        return half(tokens)

    def __post_init__(self) -> None:
        self.seen: list[int] = []


class NoSuchScores(QuestionUnsaid):
    def needs(self, layer: int) -> Any:
        return "lastt" if layer == self.layer else None


class ScoresOfNothing(QuestionUnsaid):
    def needs(self, layer: int) -> Any:
        return "last"


class NoSuchWish(Prunes):
    wants: ClassVar[Any] = ("clss",)

    def choose(self, tokens: Any) -> Any:
        return half(tokens)


class KeptOfWrong(vtr.Policy):
    def compress(self, image: Any) -> Any:
        return torch.arange(0, len(image), 2)

    def kept_of(self, layout: Any) -> int:
        return 3


class EnteringWrong(Prunes):
    def choose(self, tokens: Any) -> Any:
        return half(tokens)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        return [total, *[1] * (num_hidden_layers - 1)]


class NoRoute(vtr.Policy):
    def route(self, layer: int, tokens: Any) -> Any:
        return half(tokens)


class FewWeights(vtr.Policy):
    def route(self, layer: int, tokens: Any) -> Any:
        return vtr.Route(half(tokens), torch.ones(len(half(tokens))))


class Forgetful(vtr.Policy):
    def remember(self, layer: int, token: Any) -> Any:
        return None


class Uncounted(Prunes):
    def choose(self, tokens: Any) -> Any:
        return (tokens.hidden @ tokens.hidden.T).mean(1).topk(3).indices


class Overcounted(Prunes):
    def choose(self, tokens: Any) -> Any:
        tokens.flops += 7
        return half(tokens)


class Nothing(vtr.Policy):
    def prunes(self, layer: int, tokens: Any) -> Any:
        return half(tokens)


class Everything(Prunes):
    def choose(self, tokens: Any) -> Any:
        return torch.arange(len(tokens))


class Weights(Prunes):
    """Changes the model through what it was shown."""

    def choose(self, tokens: Any) -> Any:
        for frame in _frames():
            text = frame.f_locals.get("module")
            if text is not None and hasattr(text, "mlp"):
                text.mlp.down_proj.weight.data[0, 0] += 1e-3
                break
        return half(tokens)


def _frames() -> Any:
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


class DecodedToo(vtr.Policy):
    """Forgets every other decoded token as a cache asks, and none without a cache."""

    def remember(self, layer: int, token: Any) -> bool:
        return False

    def recall(self, layer: int, tokens: Any) -> Any:
        return [True] * len(tokens)


@dataclass
class Unwritable(Prunes):
    table: Any = field(default_factory=lambda: torch.ones(3))

    def choose(self, tokens: Any) -> Any:
        return half(tokens)


@dataclass
class Derived(Prunes):
    """A setting that its constructor changes each time."""

    keep: float = 0.5

    def __post_init__(self) -> None:
        self.keep = self.keep / 2

    def choose(self, tokens: Any) -> Any:
        return half(tokens)


BROKEN = [
    (PlaceInBatch, "determinism", "the same call made twice keeps other tokens", "keep nothing on self"),
    (RowsTogether, "row invariance", "of a batch of 4 keeps other tokens than alone", "together with whom"),
    (GlobalRandom, "determinism", "with another seed of the global random generator", "torch.Generator().manual_seed"),
    (Reseeds, "determinism", "draws from the global random generator, or seeds it", "torch.Generator() of your own"),
    (OutOfRange, "answers", "OutOfRange.prune must return distinct indices in [0, 36)", "0 … len(tokens) - 1"),
    (Slots, "answers", "must return distinct indices", "not slots of the prompt"),
    (Twice, "answers", "must return distinct indices", "at most once"),
    (Mask, "answers", "must return a 1-D int64 tensor", "mask.nonzero().squeeze(1) for a mask"),
    (TooMany, "answers", "TooMany.prune raises RuntimeError", "min(k, len(tokens))"),
    (Unasked, "answers", "Unasked.prune raises AttributeError", "tokens.scores without needs(layer)"),
    (UnaskedTower, "answers", "UnaskedTower.compress raises ValueError", "in the class body"),
    (QuestionUnsaid, "question", "needs(1) asks for attention", "question_guided: ClassVar[bool] = True"),
    (TextUnsaid, "question", "what it keeps depends on the question (into layer 1 go", "question_guided"),
    (InPlace, "answers", "InPlace.compress writes into image.features", "clone()"),
    (WritesHidden, "in place", "WritesHidden.prune writes into tokens.hidden", "clone()"),
    (WritesText, "in place", "WritesText.prune writes into tokens.text", "clone()"),
    (WritesScores, "in place", "WritesScores.prune writes into tokens.scores", "clone()"),
    (WritesUnseen, "in place", "WritesUnseen.prune writes into tokens.hidden", "clone()"),
    (WritesPlaces, "answers", "WritesPlaces.prune writes into tokens.y", "clone()"),
    (WritesLayout, "answers", "WritesLayout.compress writes into image.layout.x", "clone()"),
    (WritesWords, "answers", "WritesWords.remember writes into token.hidden", "clone()"),
    (FirstSeen, "memory", "self.count changed while it was asked", "underscore"),
    (FirstSeenHidden, "memory", "self._count remembers", "keep nothing"),
    (FirstSeenClass, "memory", "FirstSeenClass.count changed while it was asked", "underscore"),
    (FirstSeenModule, "memory", "SEEN remembers", "keep nothing"),
    (FirstSeenDefault, "memory", "default 0 of FirstSeenDefault.choose remembers", "keep nothing"),
    (Listed, "memory", "self.seen changed while it was asked", "underscore"),
    (NoSuchScores, "answers", "needs(1) answers 'lastt', which are no scores: choose among 'last'", "spell it so"),
    (ScoresOfNothing, "answers", "layer 0 has none", "return None if layer == 0"),
    (NoSuchWish, "answers", "wants = ('clss',)", "in the class body"),
    (
        KeptOfWrong,
        "counts",
        "kept_of says that 3 of an image's 36 tokens stay; compress keeps 18",
        "newline tokens too",
    ),
    (EnteringWrong, "counts", "entering says that [36, 1, 1, 1, 1] of 36 tokens enter", "count as prune"),
    (NoRoute, "answers", "NoRoute.route must return vtr.Route", "own"),
    (FewWeights, "answers", "weights are floats [36], one for each token", "own"),
    (Forgetful, "answers", "Forgetful.remember must return a bool", "own"),
    (Uncounted, "accounting", "FLOPs of matrix products that the report does not know of", "tokens.flops +="),
    (Overcounted, "accounting", "it reports 21 FLOPs more than it computes", "2 · rows"),
    (Nothing, "answers", "answers none of the six questions", "spelt like this"),
    (Everything, "answers", "keeps every vision token in every layer", "must_reduce=False"),
    (Weights, "off is off", "it has changed the model's weight", "nor the model"),
    (DecodedToo, "cache", "without a cache it says something else", "whenever it is asked"),
    (Unwritable, "settings", "cannot be written and read again", "plain data"),
    (Derived, "settings", "is not equal to the policy it was made from", "no fields"),
]


@pytest.mark.parametrize(("cls", "oracle", "what", "mend"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_broken_policies_are_told_what_is_wrong(
    cls: type[vtr.Policy], oracle: str, what: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(oracles, "ALL", {name: oracles.ALL[name] for name in ("settings", "answers", oracle)})
    made = dataclass(cls) if "__dataclass_fields__" not in cls.__dict__ else cls
    policy = vtr.register_policy("broken")(made)()
    with pytest.raises(PolicyError) as error:
        check_policy(policy, families=("llava",))
    told = next(line for line in str(error.value).split("\n  ") if line.startswith(f"✗ {oracle} (on llava)"))
    block = str(error.value).partition(told)[2].split("\n  ✗")[0]
    assert what in told and mend in block


class KeepsCaches(Prunes):
    """Caches that change no answer: by name of its own, lazily, in its class, in its module."""

    _known: ClassVar[dict[int, Any]] = {}

    @cached_property
    def step(self) -> int:
        return 2

    def choose(self, tokens: Any) -> Any:
        self._last = len(tokens)
        SEEN[f"half of {len(tokens)}"] = len(tokens) // self.step
        return self._known.setdefault(len(tokens), half(tokens))


def test_caches_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(oracles, "ALL", {name: oracles.ALL[name] for name in ("answers", "memory")})
    policy = vtr.register_policy("caches")(dataclass(KeepsCaches))()
    assert "memory" in check_policy(policy, families=("llava",)).passed


def test_what_a_policy_that_was_used_before_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count from an earlier call, before check_policy was there to see it change."""
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(oracles, "ALL", {name: oracles.ALL[name] for name in ("answers", "memory")})
    policy = vtr.register_policy("used")(dataclass(FirstSeen))()
    policy.count = 5
    with pytest.raises(PolicyError, match=r"self\.count (changed|remembers)"):
        check_policy(policy, families=("llava",))


@pytest.mark.slow
def test_keeps_at_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("settings", "answers", "memory", "in place", "counts", "row invariance", "cache")
    monkeypatch.setattr(oracles, "ALL", {name: oracles.ALL[name] for name in names})
    for keep in (0, 0.0, 1, 1e-12, 1.0, 10**9):
        for policy in (vtr.FastV(keep), vtr.UniformGrid(keep, before_decoder=True), vtr.policy(f"cls:keep={keep!r}")):
            check_policy(policy, families=("llava",), must_reduce=False)


def test_unregistered_and_no_policies() -> None:
    @dataclass
    class Plain(Prunes):
        def choose(self, tokens: Any) -> Any:
            return half(tokens)

    with pytest.raises(PolicyError, match=r"Plain is not registered.*\n.*@vtr.register_policy"):
        check_policy(Plain(), families=("llava",))
    with pytest.raises(TypeError, match=r"takes a vtr.Policy \(an instance, or its class\), got 'fastv'"):
        check_policy("fastv")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"_NeedsAnArgument\(\) cannot be made .*keep.*give check_policy an instance"):
        check_policy(_NeedsAnArgument)
    with pytest.raises(ValueError, match="unknown families bert: choose among llava, "):
        check_policy(vtr.FastV(), families=("bert",))


@dataclass
class _NeedsAnArgument(Prunes):
    keep: float = field(kw_only=True)


def test_settings_that_keep_all_can_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "ALL", {"answers": oracles.answers, "dense mask": oracles.dense_mask})
    assert "answers" in check_policy(vtr.FastV(1.0), families=("llava",), must_reduce=False).passed


def test_a_class_will_do_and_the_question_flag_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Said(QuestionUnsaid):
        question_guided: ClassVar[bool] = True

    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(oracles, "ALL", {"question": oracles.question})
    assert check_policy(vtr.register_policy("said")(dataclass(Said)), families=("llava",)).passed == ["question"]


def test_the_references_tell_a_wrong_choice_apart() -> None:
    """The masked model and the shorter prompt give other logits if one token is exchanged."""
    stock = tiny.llava()
    inputs = tiny.batch(stock, [["ab", tiny.IMAGE, "what"]])
    prompt, depth = dense.row(stock, inputs), len(stock.get_decoder().layers)
    vision, everything = prompt.slots, list(range(len(prompt.embeds)))

    def masked(kept: list[int], renumber: bool = False) -> torch.Tensor:
        return dense.run(stock, prompt, dense.Given([kept] * depth, renumber)).logits

    def shorter(slots: list[int]) -> torch.Tensor:
        return dense.run(stock, dense.Row(prompt.embeds[slots], prompt.vision[slots])).logits

    with torch.no_grad():
        want = stock(**inputs).logits[0]
    torch.testing.assert_close(masked(vision), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(shorter(everything), want, atol=1e-5, rtol=0)
    one, other = masked(vision[:9])[-1], masked([*vision[:8], vision[9]])[-1]
    assert (one - other).abs().max() > 1e-3
    slots = [slot for slot in everything if slot not in vision[9:]]
    torch.testing.assert_close(masked(vision[:9], True)[-1], shorter(slots)[-1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_in_place_where_torch_does_not_count_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made in inference mode, a remembered layout among it, has no version."""
    monkeypatch.setattr(settings, "_POLICIES", dict(settings._POLICIES))
    monkeypatch.setattr(oracles, "ALL", {name: oracles.ALL[name] for name in ("answers", "in place")})
    assert "in place" in check_policy(vtr.FastV(0.5, layer=1), families=("llava_next",)).passed
    with pytest.raises(PolicyError, match=r"writes into tokens\.hidden"):
        check_policy(vtr.register_policy("writes")(dataclass(WritesHidden))(), families=("llava_next",))
