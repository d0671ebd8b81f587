"""Policies that own weights: how these follow a model, are saved beside the settings, and know the model they fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from vtr.base import Policy
from vtr.files import check_finite, check_int
from vtr.settings import CONFIG_NAME, WEIGHTS_NAME

SHIPPED: dict[str, Path] = {}
"""What may stand as ``weights=`` instead of a folder, and the folder that holds one folder a policy (vtr.pocket's)."""

SAMPLED = (0.31, 0.77)
"""Where each matrix of the decoder is sampled for a fingerprint, as parts of its length."""
ROUNDING, TINIEST = 2.0**-7, 1e-7
"""Two samples are the same if they differ by no more than bfloat16 and float16 round away."""

WIDEST, DEEPEST = 2**20, 4096
"""hidden_size and decoder layers that no model exceeds."""

_fitting: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""Which weights have been found to fit a model, so that the model is not read again at every call."""


def fingerprint(model: Any) -> dict[str, list[float]]:
    """Two weights of every matrix of ``model``'s decoder, by name: tells apart models, not the dtypes they are in.

    Quantized and offloaded matrices are left out. Reads the device once.
    """
    names, picked = [], []
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)  # some wrap a whole language model, head and all
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2 and weight.is_floating_point() and weight.device.type != "meta" and weight.numel():
            at = torch.tensor([int(part * weight.numel()) for part in SAMPLED], device=weight.device)
            names.append(name.replace(".base_layer", ""))
            picked.append(weight.detach().flatten().index_select(0, at).float())
    if not picked:
        return {}
    values = torch.stack([p.to(picked[0].device) for p in picked]).cpu().tolist()
    return dict(zip(names, values, strict=True))


def differing(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[str]:
    """The names whose samples are not the same, of those that both fingerprints have.

    The embedding is left out: with a word more or less in it, its samples are others.
    """

    def same(a: float, b: float) -> bool:
        return abs(a - b) <= ROUNDING * max(abs(a), abs(b)) + TINIEST

    shared = [n for n in ours if n in theirs and "embed_tokens" not in n]
    return [n for n in shared if not all(map(same, ours[n], theirs[n]))]


def misfits(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], called: Mapping[str, str] | None = None
) -> list[str]:
    """What keeps ``given`` tensors from being ``wanted`` ones: missing, unknown, of another shape; sorted.

    Args:
        called: what each of ``given`` is called in the messages; None: its key.
    """
    said = dict(zip(given, given, strict=True)) if called is None else called
    wrong = [f"missing {name} {list(t.shape)}" for name, t in wanted.items() if name not in given]
    wrong += [f"unknown {said[name]} {list(t.shape)}" for name, t in given.items() if name not in wanted]
    both = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    wrong += [f"{said[n]} is {list(given[n].shape)}, not {list(wanted[n].shape)}" for n in both]
    kinds = [n for n in wanted if n in given and given[n].is_floating_point() != wanted[n].is_floating_point()]
    return sorted(wrong + [f"{said[n]} has {given[n].dtype} values" for n in kinds])


def checked_sizes(about: Any, name: str) -> dict[str, int]:
    """hidden_size and num_hidden_layers of the models that weights fit, of what was saved beside them.

    Raises:
        ValueError: they are missing, no whole numbers, or larger than any model's; or the fingerprint is none.
    """
    if not isinstance(about, dict) or not {"hidden_size", "num_hidden_layers"} <= set(about):
        raise ValueError(
            f"nothing says the hidden_size and num_hidden_layers of these {name} weights: "
            "policy.save_pretrained(folder) notes them beside the settings"
        )
    base = about.get("base")
    samples = list(base.values()) if isinstance(base, dict) else []
    if not (base is None or isinstance(base, dict)) or not all(map(_is_sample, samples)):
        raise ValueError(f"the fingerprint (base) of these {name} weights is not two numbers for each matrix")
    return {
        "hidden_size": check_int(about["hidden_size"], "hidden_size", 1, WIDEST),
        "num_hidden_layers": check_int(about["num_hidden_layers"], "num_hidden_layers", 1, DEEPEST),
    }


def _is_sample(values: Any) -> bool:
    return isinstance(values, list) and len(values) == len(SAMPLED) and all(type(v) in (int, float) for v in values)


@dataclass(eq=False)
class Learned(Policy):
    """Base class of policies with weights. Settings are dataclass fields; weights hang beside them in ``module``.

    Two such policies are equal if settings and weights are. Copies and pickles carry the weights along. The spec string
    names the folder they were loaded from (``pmod:weights=runs/pmod``); a policy whose weights came from no folder has
    a spec without weights, which the model will refuse.

    Attributes (none of them settings):
        module: the weights, or None. A subclass's :meth:`make` says what they are.
        sizes: {"hidden_size", "num_hidden_layers"} of the models they fit, or None.
        base: the fingerprint of the model they were trained with, or None if nobody noted it.
        allow_mismatch: use them on another model all the same.
        folder: where they were loaded from, or None.
    """

    def __post_init__(self) -> None:
        self.module: nn.Module | None = None
        self.sizes: dict[str, int] | None = None
        self.base: dict[str, list[float]] | None = None
        self.allow_mismatch = False
        self.folder: str | None = None
        self._copies: dict[Any, nn.Module] = {}
        self._listed: list[nn.Parameter] = []

    @classmethod
    def first_setting(cls) -> str:
        return "weights"

    @classmethod
    def example(cls) -> str:
        return f"{cls.name}:weights=pocket"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Policy:
        """Make one. ``weights`` is the folder that its weights are in, or a name of ``SHIPPED``: the settings saved
        there hold unless others are named. ``allow_mismatch``: see :meth:`vtr.Policy.from_pretrained`."""
        if "weights" not in settings:
            return super().from_settings(settings)
        found, given = named_weights(cls, settings)
        made = super().from_settings({**found.config(), **given})
        assert isinstance(made, Learned)
        assert isinstance(found, Learned)
        made.share(found)
        return made

    def make(self, hidden_size: int, num_hidden_layers: int) -> nn.Module:
        """A new module of these settings, as training begins with it."""
        raise NotImplementedError(f"{type(self).__name__} must define make(): the module that is its weights")

    # -- getting weights -------------------------------------------------------------------------------------------
    def init_weights(self, model: Any) -> Any:
        """Take new weights, as training begins with them, of ``model``'s sizes, device and (float32) dtype.

        Returns:
            The policy itself.
        """
        config = model.get_decoder().config
        self.start(config.hidden_size, config.num_hidden_layers)
        assert self.module is not None
        self.module.to(next(model.get_decoder().parameters()).device)
        return self

    def fit(self, model: Any) -> Any:
        """Note ``model`` as the one these weights belong to (its fingerprint). Returns the policy itself."""
        self.base = fingerprint(model)
        return self

    def share(self, other: Learned) -> None:
        """Take the weights of ``other``, a policy of the same class, perhaps with other settings."""
        for name in ("module", "sizes", "base", "allow_mismatch", "folder"):
            setattr(self, name, getattr(other, name))

    def start(self, hidden_size: int, num_hidden_layers: int) -> None:
        """Take new weights for models of these sizes, as training begins with them."""
        self.sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
        self.module, self.base, self.folder, self._copies = self.make(**self.sizes), None, None, {}

    # -- using them ------------------------------------------------------------------------------------------------
    def at(self, like: torch.Tensor) -> Callable[..., Any]:
        """The module as a function, its weights on the device and in the dtype of ``like``.

        Weights that learn are cast with gradients; others are copied once per device and dtype. Under autocast they
        stay in their own dtype.
        """
        assert self.module is not None
        weights = self._weights()
        first = weights[0]
        if first.device == like.device and (first.dtype == like.dtype or torch.is_autocast_enabled(like.device.type)):
            return self.module
        if torch.is_grad_enabled() and any(p.requires_grad for p in weights):
            cast = {name: p.to(like) for name, p in self.module.named_parameters()}
            return partial(torch.func.functional_call, self.module, cast)
        changes = sum(0 if p.is_inference() else p._version for p in weights)
        known = (like.device, like.dtype, changes)
        if known not in self._copies:
            self._copies = {k: v for k, v in self._copies.items() if k[2] == changes}
            self._copies[known] = copy.deepcopy(self.module).requires_grad_(False).to(like)
        return self._copies[known]

    def _weights(self) -> list[nn.Parameter]:
        """The module's parameters, listed once: to find them again takes longer than to decide about a token."""
        assert self.module is not None
        if not self._listed or self._listed[0] is not next(self.module.parameters()):
            self._listed = list(self.module.parameters())
        return self._listed

    def check(self, num_hidden_layers: int) -> None:
        if self.module is None or self.sizes is None:
            raise ValueError(
                f"{self.name!r} has no weights: load trained ones with vtr.Policy.from_pretrained(folder) or the spec "
                f"{self.name}:weights=FOLDER, or begin training with policy.init_weights(model)"
            )
        if self.sizes["num_hidden_layers"] != num_hidden_layers:
            raise ValueError(
                f"the weights of {self.spec!r} are for {self.sizes['num_hidden_layers']} decoder layers, this model "
                f"has {num_hidden_layers}: use the model they were trained with"
            )

    def check_model(self, model: Any) -> None:
        """Raise ValueError if the weights belong to another model."""
        module = self.module
        if module is None or self.sizes is None or module in _fitting.get(model, ()):
            return
        width = model.get_decoder().config.hidden_size
        if self.sizes["hidden_size"] != width:
            raise ValueError(
                f"the weights of {self.spec!r} are for hidden states of {self.sizes['hidden_size']}, this model's have "
                f"{width}: use the model they were trained with"
            )
        if self.base is not None and not self.allow_mismatch:
            wrong = differing(fingerprint(model), self.base)
            if wrong:
                raise ValueError(
                    f"the weights of {self.spec!r} were trained with another model: {len(wrong)} of its "
                    f"{len(self.base)} matrices differ from this one's ({wrong[0]} is the first). Load the model they "
                    "belong to, or load the policy with allow_mismatch=True to use them all the same"
                )
        _fitting.setdefault(model, WeakSet()).add(module)

    # -- as data ---------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> str:
        """As for any policy; the folder of the weights stands in front."""
        return weights_spec(self.name, self.folder, self.allow_mismatch, super().spec.partition(":")[2])

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.module is None:
            return {}
        return {name: t.detach().cpu().contiguous() for name, t in self.module.state_dict().items()}

    def about(self) -> dict[str, Any] | None:
        """What is saved beside the settings to load the weights again: sizes and fingerprint."""
        return None if self.module is None else {**(self.sizes or {}), "base": self.base}

    def loaded_from(self, folder: str | None, allow_mismatch: bool) -> None:
        self.folder, self.allow_mismatch = folder, allow_mismatch

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Take the weights that :meth:`tensors` and :meth:`about` gave; they do not learn unless asked to.

        Raises:
            ValueError: tensors are missing, unknown or of another shape (all are listed) or not finite, or nothing says
                their sizes.
        """
        if about is None and not tensors:
            return
        self.expect(tensors, about)
        check_finite(tensors)
        assert about is not None
        self.start(about["hidden_size"], about["num_hidden_layers"])
        assert self.module is not None
        self.module = self.module.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
        self.module.load_state_dict(tensors)
        self.module.requires_grad_(False).eval()
        self.base = about.get("base")

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Raise ValueError unless ``tensors`` have the names and shapes of this policy's weights.

        The module is made on the meta device for that: sizes that a file merely claims take no memory.
        """
        sizes = checked_sizes(about, self.name)
        try:
            with torch.device("meta"):
                wanted = self.make(**sizes).state_dict()
        except (TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
            raise ValueError(f"no weights of {self.spec!r} can have these sizes ({sizes}): {error}") from error
        if wrong := misfits(wanted, tensors):
            raise ValueError(f"these are not the weights of {self.spec!r}: " + "; ".join(wrong))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Learned) or type(self) is not type(other) or self.config() != other.config():
            return NotImplemented if not isinstance(other, Policy) else False
        if self.module is other.module:
            return True
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}, "_listed": []}


def named_weights(cls: type[Policy], settings: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The policy of class ``cls`` in the folder that ``weights`` names, and the settings named beside it.

    Raises:
        ValueError: another policy is there, or ``allow_mismatch`` is no bool. FileNotFoundError: nothing is.
    """
    given = {k: v for k, v in settings.items() if k not in ("weights", "allow_mismatch")}
    allow, folder = settings.get("allow_mismatch", False), str(settings["weights"])
    if not isinstance(allow, bool):
        raise ValueError(f"allow_mismatch={allow!r}: say true or false")
    found = _loaded(cls.name, folder, allow)
    if type(found) is not cls:
        raise ValueError(f"{folder} holds a policy {found.name!r}, not {cls.name!r}: name a folder of that one's")
    return found, given


def weights_spec(name: str, folder: str | None, allow_mismatch: bool, settings: str) -> str:
    """The spec string of a policy whose weights came from ``folder``. settings: the others, as they stand in it."""
    quoted = json.dumps(folder) if set(folder or "") & set(',+[]{}" ') else folder
    parts = [f"weights={quoted}"] if folder else []
    parts += ["allow_mismatch=true"] if folder and allow_mismatch else []
    shown = ",".join([*parts, settings] if settings else parts)
    return name + (":" + shown if shown else "")


def _loaded(name: str, folder: str, allow_mismatch: bool) -> Policy:
    """The policy in ``folder``, read again only if its files have changed."""
    if folder in SHIPPED:
        shipped = _loaded(name, str(SHIPPED[folder] / name), allow_mismatch)
        shipped.loaded_from(folder, allow_mismatch)
        return shipped
    try:
        there = Path(folder).exists()
    except (OSError, ValueError) as error:  # too long for a path, or no path at all
        raise FileNotFoundError(f"weights={folder[:80]}: there is no such folder ({error})") from error
    if not there and len(Path(folder).parts) == 1:
        raise FileNotFoundError(f"weights={folder}: there is no such folder; shipped are {', '.join(SHIPPED)}")
    files = (Path(folder) / file for file in (CONFIG_NAME, WEIGHTS_NAME))
    return _read(folder, allow_mismatch, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=16)
def _read(folder: str, allow_mismatch: bool, stamps: tuple[int, ...]) -> Policy:
    return Policy.from_pretrained(folder, allow_mismatch)
