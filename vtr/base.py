"""What a policy is: a small dataclass of settings, and the six questions the engine may ask it.

A policy is asked *per row* (one request of the batch). It never sees the batch, the cache, the model class or the
keyword arguments of transformers; it gets its own row's vision tokens and answers with indices. Every answer is
optional: the engine asks only the questions a policy class defines.

=============== ================================================ ==================================================
question        asked                                            answer
=============== ================================================ ==================================================
``compress``    once per image, before the decoder               kept token indices, or :class:`Pooled` tokens
``needs``       once per layer                                   which attention scores ``prune(layer)`` wants
``prune``       on entering each decoder layer                   kept indices, :class:`Best` or :class:`Merged`
``route``       on entering each decoder layer                   :class:`Route`: who passes, who goes around
``attend``      on entering each decoder layer                   :class:`Attend`: who asks, and who is seen
``remember``    per decoded token and layer                      whether its key/value enter the cache
=============== ================================================ ==================================================
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vtr.answers import SCORES as SCORES
from vtr.answers import Attend as Attend
from vtr.answers import Attention as Attention
from vtr.answers import Best as Best
from vtr.answers import KeyNorms as KeyNorms
from vtr.answers import LayerAttention as LayerAttention
from vtr.answers import Merged as Merged
from vtr.answers import Request as Request
from vtr.answers import Route as Route
from vtr.answers import Scores as Scores
from vtr.answers import left_by
from vtr.image import Image, Layer, Layout, Pooled
from vtr.settings import Settings, policy_class
from vtr.shares import one_cut, ratio
from vtr.tokens import STATES
from vtr.tokens import Token as Token
from vtr.tokens import Tokens as Tokens

if TYPE_CHECKING:
    import torch


WANTED = ("tiles", "cls", "hidden_states", "attentions", "cls_token", "projector", "question")
"""What ``compress`` may want beside the image's tokens.

``"tiles"``: ``Image.tiles``. ``"cls"``: ``Image.cls_attention()``. ``"hidden_states"``, ``"attentions"``: what
``Image.tower`` has of the layer whose output the model uses; ``"hidden_states[3]"``, ``"attentions[-1]"``: of another,
counted as transformers counts them; ``"attentions[0.375]"``: of the one at this share of the depth. ``"cls_token"``:
towers without one are refused. ``"projector"``: ``Image.tower.project``. ``"question"``: ``Image.question`` (the class
then says ``question_guided = True``)."""
_TOWER = re.compile(r"(hidden_states|attentions)(?:\[(-?\d{1,3}|0\.\d+|1\.0)\])?")


def tower_wish(wish: str) -> tuple[str, Layer] | None:
    """``"attentions[-2]"`` as ("attentions", -2), ``"attentions"`` as ("attentions", None); None for other wishes."""
    match = _TOWER.fullmatch(wish)
    if match is None or match[2] is None:
        return None if match is None else (match[1], None)
    return match[1], float(match[2]) if "." in match[2] else int(match[2])


QUESTIONS = ("compress", "prune", "route", "attend", "remember", "resolve", "accept")
"""What a policy may be asked; ``needs`` belongs to ``prune``."""
CHOOSING = ("resolve", "accept")
"""Those of policies that choose others."""


class UnsupportedError(RuntimeError):
    """Something about the model, its cache or the call that vtr cannot do; the message says what to do instead."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a row said in a try, its end-of-sequence token included.

    Attributes:
        ids: int64 [t]. logits: float [t, vocab_size], what each of them was chosen from.
    """

    ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class Began:
    """What rows begin to say under one of the options of a policy that chooses while the prompt is read.

    Attributes:
        ids: int64 [rows, t], the likeliest tokens. sure: float32 [rows, t], the probability of each.
        there: bool [rows, t], False behind a row's end-of-sequence token.
        states: float [rows, hidden_size], the text model's last hidden state, which the first token was read from.
        stayed: float32 [rows], in [0, 1]: of the attention that the prompt's last token pays to vision tokens (mean
            over heads, in the layer before a cut), the share on those that stay; the product over all cuts inside the
            decoder. None unless the policy ``gauges``.
    """

    ids: torch.Tensor
    sure: torch.Tensor
    there: torch.Tensor
    states: torch.Tensor
    stayed: torch.Tensor | None = None


class Tries(Protocol):
    """What ``resolve`` may look at and try, for those rows of a ``generate`` that have this policy.

    Rows count from 0; everything given is per row.
    """

    @property
    def layouts(self) -> list[list[Layout]]:
        """Where the tokens of each row's images lie."""

    def images(self) -> list[list[Image]]:
        """Each row's images as they would enter the text model; tower and projector run, the text model does not."""

    def questions(self) -> list[torch.Tensor]:
        """Each row's text tokens as the text model embeds them: float [n, hidden_size]."""

    def answer(self, policies: Mapping[int, Policy | None], tokens: int = 1) -> dict[int, Answer]:
        """Let some rows, each under a policy, say up to ``tokens`` tokens, greedily; what it costs is counted."""


@dataclass
class Policy(Settings):
    """Base class of every reduction policy: a dataclass whose fields are its settings.

    Subclass it, decorate with ``@dataclass`` and ``@vtr.register_policy("name")``, and define any of ``compress``,
    ``prune``, ``route``, ``attend``, ``remember`` (and ``needs``, if ``prune`` ranks by attention).
    """

    question_guided: ClassVar[bool] = False
    """True if what is kept depends on the question of this turn (a later turn may miss something)."""
    wants: ClassVar[tuple[str, ...]] = ()
    """What ``compress`` needs beside the tokens (:data:`WANTED`); nothing is captured that no row's policy wants. A
    class whose settings decide makes it a property."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that answers a question anew is asked row by row, whatever the class above does for all rows."""
        super().__init_subclass__(**kwargs)
        wider = [f"{name}_all" for name in vars(cls)] + ["compress_row"] * ("compress" in vars(cls))
        for name in wider:
            if hasattr(cls, name) and name not in vars(cls):
                setattr(cls, name, next(vars(c)[name] for c in reversed(cls.__mro__) if name in vars(c)))

    @property
    def renumbers(self) -> bool:
        """True if the tokens that stay after a cut get new, contiguous positions (False: they keep theirs).

        By default where a setting ``positions`` says "reindex".
        """
        return bool(getattr(self, "positions", "keep") == "reindex")

    # -- the six questions -----------------------------------------------------------------------------------------
    def compress(self, image: Image) -> torch.Tensor | Pooled | None:
        """Shrink one image before the decoder: kept token indices (int64), :class:`Pooled` tokens, or None for all."""
        return None

    def needs(self, layer: int) -> Request | tuple[Request, ...] | None:
        """Which attention scores, taken in layer ``layer - 1``, ``prune(layer, …)`` ranks by; None for none."""
        return None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | Best | Merged | None:
        """Which of ``tokens`` enter ``layer``; the others are gone.

        Returns:
            int64 indices, in any order; :class:`Best` (as cheap for many rows as for one); :class:`Merged`; None: all
            enter.
        """
        return None

    def route(self, layer: int, tokens: Tokens) -> Route | None:
        """Which of ``tokens`` pass through ``layer``; the others go around it and are there again after. None: all."""
        return None

    def attend(self, layer: int, tokens: Tokens, attention: LayerAttention) -> Attend | None:
        """Who asks and who is seen in this layer's attention; all tokens have its MLP and are there again after.

        A class answers this or ``route``. None: all ask, all are seen.
        """
        return None

    def remember(self, layer: int, token: Token) -> bool | torch.Tensor:
        """Whether ``layer`` caches this decoded token's key and value: a bool, or a bool tensor of one element."""
        return True

    def resolve(self, tries: Tries) -> list[Policy | None]:
        """Before ``generate`` runs: the policy of each row that has this one. It may look at pictures and try answers.

        A policy that defines it answers none of the six questions, and is refused in a direct forward.
        """
        raise NotImplementedError(f"{type(self).__name__} is no policy that chooses others")

    def options(self) -> Sequence[Policy | None]:
        """Of a policy that defines :meth:`accept`: the policies it chooses among, in the order in which they are tried
        (None: no reduction)."""
        return ()

    def accept(self, step: int, began: Sequence[Began]) -> torch.Tensor:
        """While ``generate`` reads the prompt: which rows go on with option ``step``, whose beginning ``began[-1]`` is.

        Rows that are not accepted are read again under the next option, without the others; the last option is not
        asked about. An accepted try is the answer: nothing of it is run again.
        A policy that defines it answers none of the six questions, and is refused in a direct forward.

        Args:
            began: of every option tried so far, for the rows that this option was tried on.

        Returns:
            bool [rows].
        """
        raise NotImplementedError(f"{type(self).__name__} is no policy that chooses while the prompt is read")

    @property
    def hears(self) -> int:
        """How many tokens of its answer :meth:`accept` is to see of each option."""
        return 1

    @property
    def gauges(self) -> bool:
        """Whether :meth:`accept` is to see how much attention each option's cuts have left (``Began.stayed``)."""
        return False

    def asks(self, question: str) -> bool:
        """Whether this policy answers one of :data:`QUESTIONS`."""
        return getattr(type(self), question) is not getattr(Policy, question)

    def check(self, num_hidden_layers: int) -> None:
        """Raise ValueError if these settings cannot work on a model of so many decoder layers."""

    def check_model(self, model: Any) -> None:
        """Raise ValueError if what this policy has learned cannot be used with ``model``."""

    # -- how many stay, before anything has run -----------------------------------------------------------------------
    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The settings with which ``share`` of the vision tokens enters a decoder layer, in the mean over layers.

        Derived here for classes with a ``keep``: with a ``layer`` they cut where they do by default, or as much earlier
        as the budget asks for; without, they keep the share itself. Other classes say it themselves.

        Args:
            share: in (0, 1). side: of a typical tile, in tokens. layer: cut there; None: where it suits the budget.

        Raises:
            NotImplementedError: this class does not say how it is set to a budget.
            ValueError: it cannot be set to this one.
        """
        known: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}
        if "keep" not in known:
            raise NotImplementedError(f"{cls.name} has no keep, so its settings_at must say how it is set to a budget")
        if "layer" not in known:
            return {"keep": ratio(share)}
        earliest, latest = int(cls.question_guided), known["layer"]
        keep, at = one_cut(share, num_hidden_layers, [layer] if layer is not None else range(latest, earliest - 1, -1))
        return {"keep": keep, "layer": at}

    def kept_of(self, layout: Layout) -> int:
        """How many tokens ``compress`` makes of an image of this layout, newlines included: from its size alone.

        Raises:
            ValueError: this policy does not compress, or how many stay depends on what the picture shows.
        """
        if self.asks("compress"):
            raise ValueError(f"how many tokens {self.spec} leaves of an image is not known before it is encoded")
        raise ValueError(f"{self.spec} leaves images as they are before the decoder")

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many of a row's ``total`` vision tokens enter each layer: asks ``prune``, with equal scores and states.

        Raises:
            ValueError: it depends on more than their number.
        """
        import torch

        return rehearsed(self, num_hidden_layers, total, torch.zeros(total))

    def entering_of(self, num_hidden_layers: int, layout: Layout) -> list[int]:
        """How many vision tokens enter each layer, of a row with one image of this layout: ``kept_of``, then
        ``entering``. Policies that compress say it themselves if later layers keep a share of what there was before.

        Raises:
            ValueError: it depends on more than sizes.
        """
        return self.entering(num_hidden_layers, self.kept_of(layout) if self.asks("compress") else len(layout))

    def of_image(self, index: int, count: int) -> Policy | None:
        """What acts on image ``index`` of a row of ``count`` before the decoder: this policy, unless its settings say
        something else of each image. None: nothing does."""
        return self

    def compress_row(self, images: Sequence[Image]) -> Sequence[torch.Tensor | Pooled | None]:
        """:meth:`compress`, asked of all images of a row at once; for methods that divide one budget among them. An
        answer for each; define :meth:`compress` as well, for one image alone."""
        return [self.compress(image) for image in images]

    def prune_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[torch.Tensor | Best | Merged | None]:
        """:meth:`prune`, asked of all rows that share this policy; for where that is cheaper. An answer for each."""
        return [self.prune(layer, one) for one in tokens]

    def route_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[Route | None]:
        """:meth:`route`, asked of all rows that share this policy; for where that is cheaper. An answer for each."""
        return [self.route(layer, one) for one in tokens]

    def remember_all(self, layer: int, tokens: Sequence[Token]) -> Any:
        """:meth:`remember`, asked of the new tokens of all rows that share this policy; for where that is cheaper.

        Returns:
            A bool tensor [len(tokens)], or a list of bools and bool tensors.
        """
        return [self.remember(layer, token) for token in tokens]

    def recall(self, layer: int, tokens: Sequence[Token]) -> Any:
        """:meth:`remember`, asked without a cache: of all that one row has decoded but for the newest token, at every
        step again. Who is not remembered here is gone from this layer on, so a policy that forgets a token at one layer
        and remembers it at a deeper one says something else than with a cache. Answers as :meth:`remember_all`.
        """
        return self.remember_all(layer, tokens)

    def __add__(self, other: Policy) -> Policy:
        """``compressor + pruner``: both act, the left one first. Each question may be answered by one of them only."""
        return policy_class("chain")([self, other])  # type: ignore[call-arg]


def acting(policy: Policy | None) -> list[Policy]:
    """The policies that may act on a row of this one: what it chooses among, or itself; none for no reduction."""
    if policy is None:
        return []
    return [one for one in policy.options() if one is not None] if policy.asks("accept") else [policy]


def rehearsed(policy: Policy, num_hidden_layers: int, total: int, scores: torch.Tensor) -> list[int]:
    """How many of a row's ``total`` vision tokens enter each layer if ``prune`` ranks them by these scores.

    States are zeros, places are those of one image's only row.

    Args:
        scores: float32 [total].
    """
    import torch

    here, counts = total, []
    even = torch.zeros(total)
    for layer in range(num_hidden_layers):
        n = here

        def field(name: str, n: int = n) -> torch.Tensor:
            return even[:n, None] if name in STATES else even[:n].bool() if name == "behind" else even[:n].long()

        tokens = Tokens(layer, num_hidden_layers, total, n, field, scores[:n], lambda n=n: scores[:n], (n,), n)  # type: ignore[misc]
        if policy.asks("prune"):
            here = left_by(policy.prune(layer, tokens), n)
        counts.append(here)
    return counts
