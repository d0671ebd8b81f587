"""What policies ask of a layer's attention, beside the whole matrix that transformers makes of a row alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.testing import tiny as models

LAYER = 2
ROWS = [["ab", IMAGE, "what"], [IMAGE, "cde"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"]]
KINDS = ["last", "text", "behind", "vision", "raters"]


@dataclass
class Asks(vtr.Policy):
    """Asks for one thing and notes it; keeps everything."""

    question_guided: ClassVar[bool] = True
    wish: ClassVar[Any] = None

    def __post_init__(self) -> None:
        self.seen: list[Any] = []

    def needs(self, layer: int) -> Any:
        return self.wish if layer == LAYER + 1 else None

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        if layer == 0:
            tokens.memo["raters"] = tokens.behind.nonzero().squeeze(1)[1:]
        if layer == LAYER + 1:
            self.seen.append((tokens.scores, tokens.text_scores, tokens.place, tokens.text_place, tokens.behind))
        return None


def asking(wish: Any) -> Asks:
    """A request is no setting, so it is put onto the policy."""
    made = Asks()
    made.wish = wish  # type: ignore[misc]
    return made


def patched(family: str, lm: str = "llama") -> Any:
    return vtr.patch(getattr(models, family)(lm=lm))


@torch.no_grad()
def matrix(model: Any, inputs: Any, b: int) -> torch.Tensor:
    """[heads, n, n]: attention of the layer, of row b alone, without vtr."""
    single = tiny.single(inputs, b, model)
    model.set_attn_implementation("eager")
    try:
        return model(**single, output_attentions=True, policy=None).attentions[LAYER][0]
    finally:
        model.set_attn_implementation("sdpa")


def wanted(
    whole: torch.Tensor, wish: vtr.Attention, vision: torch.Tensor, text: torch.Tensor, behind: torch.Tensor
) -> Any:
    """The definition, from the whole matrix."""
    last = text[behind][-1:]
    rows = {
        "last": last, "text": text[text > vision[0]], "behind": text[behind], "vision": vision,
        "raters": text[behind][1:],
    }[wish.rows]  # fmt: skip
    paid = whole[:, rows][:, :, vision]
    seen = (paid.sum(0) > 0).sum(0).clamp(min=1)
    if wish.heads != "each":
        paid = paid.mean(0) if wish.heads == "mean" else paid.amax(0)
    if wish.over == "each":
        return paid
    return paid.amax(-2) if wish.over == "max" else paid.sum(-2) / (seen if wish.over == "mean" else 1)


@pytest.mark.parametrize(("family", "lm"), [("llava", "llama"), ("llava_next", "mistral"), ("internvl", "qwen3")])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_request_is_what_the_whole_matrix_says(family: str, lm: str, padding: str) -> None:
    model = patched(family, lm)
    inputs = tiny.batch(model, ROWS, padding)
    wishes = [
        vtr.Attention(*three)
        for three in itertools.product(KINDS, ("mean", "max", "each"), ("mean", "sum", "max", "each"))
    ]
    asks = [asking(tuple(wishes)) for _ in ROWS]
    with torch.no_grad():
        model(**inputs, policy=asks, use_cache=False)
    whole = [matrix(model, inputs, b) for b in range(len(ROWS) - 1)]
    for b, policy in enumerate(asks[:-1]):
        ((scores, _, vision, text, behind),) = policy.seen
        for wish, found in zip(wishes, scores, strict=True):
            want = wanted(whole[b], wish, vision, text, behind)
            assert found.shape == want.shape and found.dtype == torch.float32
            torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
    assert not asks[-1].seen  # a row without an image has nothing to rank


def test_a_turn_on_a_cache_sees_what_was_cached() -> None:
    model = patched("llava")
    first, wish = tiny.batch(model, [["abc"], ["abcdefgh"]]), vtr.Attention("behind", "each", "sum")
    both = tiny.batch(model, [["abc", "de", IMAGE, "what"], ["abcdefgh", "de", IMAGE, "what"]])
    length = first["input_ids"].shape[1]
    together, apart = asking((wish, "text")), asking((wish, "text"))
    with torch.no_grad():
        model(**both, policy=together)
        cache = model(**first, policy=vtr.Random(0.5)).past_key_values
        rest = {**both, "input_ids": both["input_ids"][:, length:]}
        model(**rest, policy=apart, past_key_values=cache)
    for (a, *_), (b, *_) in zip(together.seen, apart.seen, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_norms_of_keys(padding: str) -> None:
    model = patched("llava")
    inputs = tiny.batch(model, ROWS, padding)
    policy = [asking(vtr.KeyNorms()) for _ in ROWS]
    keys: list[torch.Tensor] = []
    with torch.no_grad():
        model(**inputs, policy=policy, use_cache=False)
        for b in range(len(ROWS) - 1):
            out = model(**tiny.single(inputs, b, model), use_cache=True, policy=None)
            keys.append(out.past_key_values.layers[LAYER].keys[0])  # after rope
    groups = model.config.text_config.num_attention_heads // keys[0].shape[0]
    for one, key in zip(policy, keys, strict=False):
        ((found, of_text, vision, text, _),) = one.seen
        norms = key.abs().sum((0, 2)) * groups
        torch.testing.assert_close(found, norms[vision])
        torch.testing.assert_close(of_text, norms[text])


def test_what_is_no_request_is_refused_before_anything_runs() -> None:
    model = patched("llava")
    inputs = tiny.batch(model, ROWS)
    for wish in ("first", ("text", "first"), (), 7):
        with pytest.raises(ValueError, match="which are no scores"):
            model(**inputs, policy=asking(wish))
    for bad in ({"heads": "all"}, {"over": "none"}, {"rows": ""}):
        with pytest.raises(ValueError, match="choose"):
            vtr.Attention(**bad)


def test_the_memo_is_one_for_compress_and_all_layers() -> None:
    @dataclass
    class Notes(vtr.Policy):
        def compress(self, image: vtr.Image) -> Any:
            image.memo.setdefault("images", []).append(image.index)

        def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
            tokens.memo.setdefault("layers", []).append(layer)
            found.append((list(tokens.memo["images"]), list(tokens.memo["layers"])))

    found: list[Any] = []
    model = patched("llava")
    with torch.no_grad():
        model(**tiny.batch(model, ROWS), policy=[Notes(), None, Notes(), None])
    layers = model.config.text_config.num_hidden_layers
    assert [one for one in found if len(one[1]) == layers] == [
        ([0], list(range(layers))),
        ([0, 1], list(range(layers))),
    ]


def test_states_rope_and_norm_are_those_of_the_tokens() -> None:
    @dataclass
    class Looks(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
            if layer == 1:
                seen.append(tokens)
                assert (tokens.rope[0].shape, tokens.text_rope[1].shape) == ((len(tokens), 12), (len(tokens.text), 12))
                ids = torch.acos(tokens.text_rope[0][:, 0].double().clamp(-1, 1))  # the first angle is the position
                places.append((tokens.text_place, ids))
                normed.append((tokens.norm(tokens.hidden), tokens.hidden))

    seen: list[Any] = []
    places: list[Any] = []
    normed: list[Any] = []
    model = patched("llava")
    with torch.no_grad():
        model(**tiny.batch(model, [["a", IMAGE], ["", IMAGE, "b"]]), policy=Looks())
    for at, ids in places:
        torch.testing.assert_close(torch.cos(at.double()), torch.cos(ids), atol=1e-5, rtol=0)
    for states, hidden in normed:
        torch.testing.assert_close(states, model.get_decoder().norm(hidden))
