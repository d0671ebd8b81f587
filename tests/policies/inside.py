"""Golden cases of methods inside the decoder: the official tiny text model, its prompts, and what vtr makes of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtr
from tests import official
from tests.official import close

Case = dict[str, Any]


@dataclass
class Ran:
    """A prefill and some decoded tokens.

    Attributes:
        entering: tokens (text too) that enter each layer. cached: keys each layer keeps after the prefill.
        kept: per layer, which vision tokens enter, counted from the first one.
        logits: [1 + steps, vocabulary], behind the prompt and behind each decoded token. last: what enters the last
            layer.
    """

    entering: list[int]
    cached: list[int]
    kept: list[list[int]]
    logits: Tensor
    last: Tensor


@functools.cache
def model(method: str, weights: str) -> Any:
    return official.given(method, attn="eager", weights=weights)


@functools.cache
def data(method: str) -> dict[str, Tensor]:
    return official.tensors(method, "fixtures")


def of(method: str, case: Case) -> dict[str, Tensor]:
    """The tensors of a case, without its name in front."""
    name = f"c{case['case']}."
    return {key.removeprefix(name): value for key, value in data(method).items() if key.startswith(name)}


def prompt(method: str, case: Case) -> tuple[Any, dict[str, Tensor]]:
    """The model and what it takes in a case."""
    made, mine, start = model(method, case["model"]), of(method, case), case["start"]
    with torch.no_grad():
        words = made.get_input_embeddings()(mine["text_ids"])
    embeds = torch.cat([words[:start], mine["vision"], words[start:]])
    place = torch.arange(len(embeds))
    is_vision = (place >= start) & (place < start + len(mine["vision"]))
    return made, official.given_prompt(made, embeds[None], is_vision[None], used=[mine["decode_ids"]])


def run(method: str, case: Case, policy: Any) -> Ran:
    made, inputs = prompt(method, case)
    seen: list[Tensor] = []
    hook = made.get_decoder().layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        cache = made(**inputs, policy=policy, use_cache=True).past_key_values
        hook.remove()
        row, text = vtr.report(made).rows[0], case["start"] + case["text"]
        kept = [[slot - case["start"] for slot in row.kept(layer)] for layer in range(len(row.vision_tokens))]
        said = official.dictate(made, inputs, policy, of(method, case)["decode_ids"])
    return Ran(
        [n + text for n in row.vision_tokens], [layer.lengths()[0] for layer in cache.layers], kept,
        torch.cat(said.logits), seen[0][0],
    )  # fmt: skip


def agrees(method: str, case: Case, policy: Any) -> Ran:
    """Run a case, and compare lengths, caches and logits with those of the official code."""
    ran, mine = run(method, case, policy), of(method, case)
    assert ran.entering == case["entering_lengths"]
    assert ran.cached == case["kv_lengths_after_prefill"]
    name = "Llast" if "Llast.hidden" in mine else f"L{len(ran.kept) - 1}"
    close(ran.last, mine[f"{name}.hidden"].reshape(ran.last.shape))
    close(ran.logits, mine["logits"])
    return ran
