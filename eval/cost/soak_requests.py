"""What a soak asks of a server with the pocket model: good requests of all kinds, and what is no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from vtr.eval.cost.serve import data_url

import vtr

FALLING = "gsearch:schedule=[1.0,1.0,0.8,0.8,0.5,0.4,0.3,0.2,0.2,0.1]"
FASTV = "fastv:keep=0.25,layer=2"
EXACT = 'globalcom2:retention=0.4,budget="exact"'
POLICIES: dict[str, list[str | None]] = {
    "none": [None, "none"],
    "before": ["m3:tokens=36", "m3:tokens=9", EXACT, "cls:keep=0.4", "pool:grid=4", "downsample:scale=0.5"],
    "inside": [
        FASTV, "fastv:keep=0.1,layer=1", FALLING, f"{FALLING},queries=last-max", "pyramid:positions=keep", "pyramid",
        "pmod:weights=pocket", "dynamic-llava:weights=pocket", "uniform:keep=0.3,layer=3",
    ],
    "chain": [
        "pool:grid=8+fastv:keep=0.5,layer=2", f"{EXACT}+{FALLING}", "m3:tokens=36+pyramid:positions=keep",
        f"downsample:scale=0.7+{FASTV}",
    ],
}  # fmt: skip
"""Kind → policies of it. Text alone is a kind as well."""
EACH = ["m3:tokens=36", "m3:tokens=9"]
"""A policy for each of two pictures."""
SIZES = [(96, 96), (192, 130), (100, 190), (192, 192), (50, 200), (140, 110)]
PICTURES = 64
"""Different ones, so that a server's caches of pictures are full soon, and its memory can be judged."""
WORDS = [
    "what", "which", "how", "many", "color", "shape", "letter", "is", "are", "the", "on", "in", "of", "there",
    "picture", "circle", "square", "red", "blue", "pink", "green", "top", "left",
]  # fmt: skip
IMAGE = 4
"""The image token, which the random words of long answers would hit now and then: never said."""


@dataclass(frozen=True)
class Asked:
    """One request. pictures: their seeds; policy: for all of them, or one each; tokens: of the answer, exactly."""

    kind: str
    question: str
    pictures: tuple[int, ...]
    policy: str | list[str] | None
    tokens: int


def draw(dice: Random) -> Asked:
    """A request of any kind."""
    kind = dice.choice([*POLICIES, "inside", "inside", "text", "two"])
    question = " ".join(dice.choice(WORDS) for _ in range(dice.randint(2, 9)))
    tokens = dice.choice([1, 4, 8, 16, 24, 48])
    if kind == "text":
        return Asked(kind, question, (), dice.choice([None, FASTV]), tokens)
    first = dice.randrange(PICTURES)
    if kind == "two":
        policy: Any = dice.choice([EACH, FASTV, FALLING, "m3:tokens=36"])
        return Asked(kind, question, (first, dice.randrange(PICTURES)), policy, tokens)
    return Asked(kind, question, (first,), dice.choice(POLICIES[kind]), tokens)


@lru_cache(maxsize=PICTURES)
def picture(seed: int) -> Any:
    """Coloured rectangles, no two alike."""
    from PIL import Image

    width, height = SIZES[seed % len(SIZES)]
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.NEAREST)


@lru_cache(maxsize=PICTURES)
def _url(seed: int) -> str:
    return data_url(picture(seed))


def body(model: str, asked: Asked) -> dict[str, Any]:
    """The request for exactly so many tokens, with their ids in the answer."""
    pictures = [{"type": "image_url", "image_url": {"url": _url(seed)}} for seed in asked.pictures]
    content = [*pictures, {"type": "text", "text": asked.question}]
    made = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": asked.tokens,
        "min_tokens": asked.tokens, "ignore_eos": True, "temperature": 0, "logit_bias": {str(IMAGE): -100},
        "add_special_tokens": True,  # the pocket model's template leaves BOS to the tokenizer
        "return_token_ids": True,
    }  # fmt: skip
    return made if asked.policy is None else {**made, "vtr": asked.policy}


def malformed(model: str) -> list[dict[str, Any] | bytes]:
    """What gets HTTP 400, all of it."""
    good = body(model, Asked("before", "what is there", (0,), None, 4))
    changes: list[Mapping[str, Any]] = [
        {"vtr": "nonsense:keep=3"}, {"vtr": 36}, {"vtr": {"keep": 1}}, {"vtr": "m3:tokens=-1"}, {"vtr": "m3:tokens=7"},
        {"vtr": EACH}, {"vtr": [FASTV]}, {"vtr": "fastv:keep=1.7,layer=2"}, {"vtr": "fastv:keep=0.5,layer=99"},
        {"vtr": "gsearch:schedule=[1.0,0.5]"}, {"vtr": "pmod:weights=/etc"}, {"vtr": "pmod"},
        {"vtr": "globalcom2:retention=0.25"}, {"vtr": "autoscale"}, {"vtr": f"{FASTV}+"}, {"vtr": "zipvl"},
        {"vtr": "x" * 600}, {"vtr": "m3:9", "mm_processor_kwargs": {"vtr": "m3:9"}},
        {"mm_processor_kwargs": {"do_resize": False}}, {"media_io_kwargs": {"image": {"mode": "L"}}},
        {"vllm_xargs": {"vtr": "fastv:keep=-1"}}, {"max_tokens": -1}, {"temperature": "warm"}, {"messages": "hello"},
        {"max_tokens": 100_000}, {"vtr": FASTV, "prompt_logprobs": 2},
    ]  # fmt: skip
    return [b"{no json", b"[1, 2]", *({**good, **change} for change in changes)]


class Reference:
    """vtr on transformers: what is right."""

    def __init__(self) -> None:
        self.model, self.processor = vtr.pocket.load()
        vtr.patch(self.model)

    def says(self, asked: Asked) -> tuple[list[int], list[float]]:
        """(greedy tokens, by how much each was more probable than the next best, as a difference of logarithms)."""
        import torch

        policy: Any = asked.policy if asked.policy != EACH else "m3:tokens=[36,9]"
        before, inside = (None, None) if policy in (None, "none") or not asked.pictures else vtr.split(policy)
        content = [{"type": "image"}] * len(asked.pictures) + [{"type": "text", "text": asked.question}]
        turn = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        images = [picture(seed) for seed in asked.pictures]
        inputs = vtr.processor(self.processor, before)(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad():
            out = self.model.generate(
                **inputs, policy=inside, max_new_tokens=asked.tokens, min_new_tokens=asked.tokens, do_sample=False,
                suppress_tokens=[IMAGE], return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        best = torch.stack(out.scores)[:, 0].float().log_softmax(-1).topk(2).values
        return tokens, (best[:, 0] - best[:, 1]).tolist()


CLOSE = 1e-3
"""Two words so near in log-probability may change places where the same sum is made in another order."""


def verdict(said: Sequence[int], right: Sequence[int], margins: Sequence[float]) -> str:
    """``same``, ``close`` (they part where two words are equally probable but for rounding) or ``wrong``."""
    if list(said) == list(right):
        return "same"
    at = next((i for i, (a, b) in enumerate(zip(said, right, strict=False)) if a != b), None)
    return "wrong" if at is None or margins[at] > CLOSE else "close"
