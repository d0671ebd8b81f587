"""What a reduced call must be equal to, on painted prompts: :class:`Oracles` asks one policy after the other."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

import vtr
from tests.models.paint import Inputs, apart, batch, extras, generate, marks, prompts
from vtr.base import UnsupportedError
from vtr.chain import policy as from_spec
from vtr.engine.install import patch_of

TOLERANCE = 2e-5
"""Of logits, in float32."""
PASSES, REFUSED = "passes", "refused"
BEFORE = {"random": "random:keep=0.5,before_decoder=true", "m3": "m3:tokens=4", "pool": "pool:grid=2"}
INSIDE = {
    "fastv": "fastv:keep=0.5,layer=2",
    "uniform": "uniform:keep=0.5",
    "gsearch": "gsearch:schedule=[1.0,0.75,0.5,0.25]",
    "pyramid": "pyramid:keeps=[0.5,0.25],layers=[1,2],positions=keep",
    "vtw": "vtw:layer=2",
    "renumbered": "pyramid:keeps=[0.5,0.25],layers=[1,2],positions=reindex",
}
ROUTE = {"reroute": "reroute:keeps=[0.5,0.5],layers=[1,2]", "pmod": "pmod:high=0.9"}
ATTEND = {"ee-mllm": "ee-mllm", "zipvl": "zipvl:tau=0.6"}
FORGET = {"dynamic-llava": "dynamic-llava:keep=0.4,width=16,heads=2,inner=24,blocks=2"}
GROUPS: dict[str, dict[str, str]] = {
    "before": BEFORE, "inside": INSIDE, "route": ROUTE, "attend": ATTEND, "forget": FORGET,
}  # fmt: skip
"""Policies by what they do: before the decoder, dropping inside of it, going around layers, attention, the cache."""
SPECS = {name: spec for group in GROUPS.values() for name, spec in group.items()}


def policy_of(name: str, text: Any) -> Any:
    """The policy of this name; one that owns weights gets random ones that decide one way and the other."""
    policy: Any = from_spec(SPECS[name])
    if not hasattr(policy, "start"):
        return policy
    policy.start(text.config.hidden_size, len(text.layers))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.module.parameters():
            if weight.dim() == 2:
                weight.normal_(std=2 / weight.shape[1] ** 0.5, generator=draw)
    policy.module.requires_grad_(False).eval()
    return policy


class Oracles:
    """Runs of one model, patched and not, on the prompts of :func:`tests.models.paint.prompts`.

    Attributes:
        stock, model: the model as transformers made it, and the patched one; both painted.
        unsteady: what the unpatched model itself does not keep, of "batch" and "cache": such a one is not asked for.
    """

    def __init__(self, stock: Any, model: Any) -> None:
        self.stock, self.model = stock, model
        self.text = patch_of(model).decoder.text
        self.rows = prompts(marks(stock)[0])

    @cached_property
    def alone(self) -> list[torch.Tensor]:
        """What each row says unpatched and alone: float [STEPS, vocabulary]."""
        return [generate(self.stock, batch([row]))[0][:, 0] for row in self.rows]

    @cached_property
    def mask(self) -> str:
        return mask_kind(self.stock)

    @cached_property
    def unsteady(self) -> list[str]:
        whole = generate(self.stock, batch(self.rows))[0]
        tests: Mapping[str, Callable[[], torch.Tensor]] = {
            "batch": lambda: torch.stack(self.alone, 1),
            "cache": lambda: generate(self.stock, batch(self.rows), use_cache=False)[0],
        }
        return [name for name, other in tests.items() if not self.equal(lambda other=other: (whole, other()))]

    @cached_property
    def noise(self) -> float:
        """By how much the reduced model may differ: a few times what a cache changes in the unpatched one."""
        if "cache" in self.unsteady:
            return TOLERANCE
        inputs = batch([self.rows[0]])
        return max(
            TOLERANCE, 4 * apart(generate(self.stock, inputs)[0], generate(self.stock, inputs, use_cache=False)[0])
        )

    def equal(self, pair: Callable[[], tuple[torch.Tensor, torch.Tensor]], most: float = TOLERANCE) -> bool:
        """Whether two runs say the same; not if one of them breaks off."""
        try:
            return apart(*pair()) <= most
        except UnsupportedError:
            raise
        except Exception:
            return False

    def off(self) -> bool:
        """Without a policy, logits and tokens are bit-identical."""
        inputs = batch(self.rows)
        mine, wanted = generate(self.model, inputs), generate(self.stock, inputs)
        return torch.equal(mine[0], wanted[0]) and torch.equal(mine[1], wanted[1])

    def policy(self, name: str) -> str:
        """Whether a policy passes: "passes", "refused: why", "fails: the oracles it fails", or "raises: what"."""
        return said(lambda: self.failed(name))

    def failed(self, name: str) -> list[str]:
        """The oracles that a policy does not pass: "batch" (a row beside others says what it says alone), "cache" (the
        same without one), "others" (rows without a policy beside a reduced one are the unpatched model's), "short" (the
        unpatched model says the same on the shortened prompt), "acts" (on the whole one, something else)."""
        policy, rows = policy_of(name, self.text), self.rows
        if name in ("m3", "pool"):  # scales want pictures that are squares
            rows = [rows[0], [11, *rows[0][1:]], rows[2]]
        one, other = (generate(self.model, batch([row]), policy=policy)[0][:, 0] for row in rows[:2])
        got = generate(self.model, batch(rows), policy=policy)[0]
        mixed = generate(self.model, batch(self.rows), policy=[policy, None, None])[0]
        found = {
            "batch": lambda: (got[:, :2], torch.stack([one, other], 1)),
            "cache": lambda: (got, generate(self.model, batch(rows), policy=policy, use_cache=False)[0]),
            "others": lambda: (mixed[:, 1:], torch.stack(self.alone[1:], 1)),
        }
        failed = [
            test for test, pair in found.items() if test not in self.unsteady and not self.equal(pair, self.noise)
        ]
        if name == "random" and not self.short(policy):
            failed.append("short")
        return failed if apart(one, self.alone[0]) > TOLERANCE else [*failed, "acts"]

    def short(self, policy: Any) -> bool:
        """Whether the unpatched model says of the first row's embeddings that are left what the reduced one says."""
        logits, words = generate(self.model, batch([self.rows[0]]), policy=policy)
        said = logits[:, 0]
        if self.mask == "prompt":  # what is said is no part of the prompt
            said = said[:1]
        kept = {source for sources in vtr.report(self.model).rows[0].sources(0) for source in sources}
        text = patch_of(self.model).adapter.text_model(self.stock)
        answer = words[0, len(self.rows[0]) :].tolist()  # a generate of the model's own may force none
        return shortened(self.stock, text, [*self.rows[0], *answer[: len(said) - 1]], kept, said)


def said(failed: Callable[[], list[str]]) -> str:
    """The outcome of a policy in words, from the oracles that it fails."""
    try:
        found = failed()
    except UnsupportedError as error:
        return f"{REFUSED}: {error}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # settings that cannot be on this model: vtr's own words, not an accident
        if isinstance(error, ValueError) and (frame.line or "").startswith("raise ") and "/vtr/" in frame.filename:
            return f"{REFUSED}: {error}"
        return f"raises: {type(error).__name__}: {first_line(error)}"
    return f"fails: {', '.join(found)}" if found else PASSES


def first_line(error: BaseException) -> str:
    """An error's first line, without what differs from run to run."""
    return (str(error).strip().splitlines() or [""])[0][:160]


@contextmanager
def caught(module: Any) -> Iterator[dict[str, Any]]:
    """The keyword arguments of the module's call, while it lasts."""
    found: dict[str, Any] = {}
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: found.update(kwargs), with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def shortened(stock: Any, text: Any, row: list[int], keep: set[int], said: torch.Tensor) -> bool:
    """Whether the unpatched model says the same on the embeddings of a row that are left.

    Tried with the whole model, then with its text model alone: some models let no embeddings through.

    Args:
        row: a prompt, followed by what was said on it but for the last token.
        keep: slots of the vision tokens that are left. said: float [steps, vocabulary], what the reduced row said.
    """
    ids = torch.tensor([row])
    whole: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = extras(stock, whole)
    if type(stock).__name__.startswith("PaliGemma"):  # what was said is no part of the prompt that sees itself
        more["token_type_ids"][:, len(row) :] = 1
    with caught(text) as given:
        stock(**whole, **more, use_cache=False)
    slots = torch.tensor([i for i, token in enumerate(ids[0].tolist()) if token != marks(stock)[0] or i in keep])
    embeds = given.get("inputs_embeds")
    embeds = stock.get_input_embeddings()(ids) if embeds is None else embeds
    mask = torch.ones(1, len(slots)).long()

    per_token = {n: v[:, slots] for n, v in given.items() if torch.is_tensor(v) and v.shape[:2] == ids.shape}
    per_token.pop("input_ids", None)
    takes = inspect.signature(type(stock).forward).parameters

    def by_model(common: Inputs) -> torch.Tensor:
        own = {n: v for n, v in per_token.items() if n in takes} | {n: v[:, slots] for n, v in more.items()}
        return stock(**{**own, **common}, use_cache=False).logits

    def by_text(common: Inputs) -> torch.Tensor:
        rest = {n: v for n, v in given.items() if n not in ("input_ids", "attention_mask")}
        logits = stock.get_output_embeddings()(text(**{**rest, **per_token, **common}).last_hidden_state)
        scale = getattr(text.config, "logit_scale", None) or 1.0
        return logits * scale / (getattr(text.config, "logits_scaling", None) or 1.0)

    for at in places(given.get("position_ids"), slots, text):
        for way in (by_model, by_text):
            try:
                logits = way({"inputs_embeds": embeds[:, slots], "position_ids": at, "attention_mask": mask})
            except Exception:  # whatever a model raises that does not take these arguments
                continue
            if apart(logits[0, -len(said) :], said) <= TOLERANCE:
                return True
    return False


def places(given: torch.Tensor | None, slots: torch.Tensor, text: Any) -> Iterator[torch.Tensor]:
    """Positions of the tokens that are left: counted anew where they have one axis; of several, each keeps its own."""
    if given is not None and given.dim() > 2:
        yield given[..., slots]
        return
    if getattr(getattr(text, "rotary_emb", None), "mrope_section", None) is not None:
        yield slots.expand(3, 1, -1)  # where the model gives none, a path may keep them or count
    yield torch.arange(len(slots))[None] + (0 if given is None else given[..., :1])


def mask_kind(stock: Any) -> str:
    """What an unpatched decoder lets a token see beyond the ones before it: "causal" (nothing), "image" (the tokens of
    its image), "prompt" (all)."""
    row = prompts(marks(stock)[0])[0]
    first = 3  # slot of the first vision token

    def seen(tokens: list[int]) -> torch.Tensor:
        inputs = batch([tokens])
        with torch.no_grad():
            return stock(**inputs, **extras(stock, inputs), use_cache=False).logits[0, first]

    whole = seen(row)
    if apart(whole, seen(row[:-2])) > TOLERANCE:
        return "prompt"
    return "image" if apart(whole, seen([*row[:first], *row[first + 8 :]])) > TOLERANCE else "causal"


def traces(model: Any) -> tuple[int, frozenset[str]]:
    """What a patch could leave behind: the number of hooks, and the names of attributes set on modules."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    names = frozenset(
        f"{path}.{name}" for path, m in model.named_modules() for name in vars(m) if not name.startswith("_forward")
    )
    return hooks, names


def leaves_nothing(model: Any) -> bool:
    """Whether patching and unpatching a model (a copy of it) leaves no hook, no attribute and the same config."""
    other = copy.deepcopy(model)
    before, config = traces(other), other.config.to_json_string()
    vtr.unpatch(vtr.patch(other, self_test=False))
    return traces(other) == before and other.config.to_json_string() == config
