"""The five questions, each asked of a small policy of our own: the seams that methods build on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtr
from tests import tiny

KEEP = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}


@vtr.register_policy("every-other-for-test")
@dataclass
class EveryOther(vtr.Policy):
    """compress by selection: every ``step``-th token of an image."""

    step: int = 2

    def compress(self, image: vtr.Image) -> torch.Tensor:
        return torch.arange(0, len(image), self.step)


@vtr.register_policy("pairs-for-test")
@dataclass
class Pairs(vtr.Policy):
    """compress by pooling: the mean of each two neighbours."""

    def compress(self, image: vtr.Image) -> vtr.Pooled:
        m = len(image) // 2
        return vtr.Pooled(image.features[: 2 * m].view(m, 2, -1).mean(1), [[2 * i, 2 * i + 1] for i in range(m)])


@vtr.register_policy("mod-for-test")
@dataclass
class Mod(vtr.Policy):
    """route: at odd layers the first half of the tokens passes, weighted by how far down they stand."""

    weighted: bool = True

    def route(self, layer: int, tokens: vtr.Tokens) -> vtr.Route | None:
        if layer % 2 == 0:
            return None
        weights = 0.8 + 0.4 * torch.sigmoid(tokens.hidden.mean(1)) if self.weighted else None
        return vtr.Route(torch.arange(0, len(tokens), 2), weights)


@vtr.register_policy("forgetful-for-test")
@dataclass
class Forgetful(vtr.Policy):
    """remember: from layer 2 on, decided once there from the token's hidden state."""

    on_device: bool = True

    def remember(self, layer: int, token: vtr.Token) -> Any:
        if layer < 2:
            return True
        if layer == 2:
            token.memo["stays"] = token.hidden.sum() > 0
        stays = token.memo["stays"]
        return stays if self.on_device else bool(stays)


ROWS = [["ab", tiny.IMAGE, "cde"], ["a", tiny.IMAGE, "b", tiny.IMAGE, "cd"], ["abcdef"], ["abcd", tiny.IMAGE, "efg"]]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def model(request: pytest.FixtureRequest) -> Any:
    return vtr.patch(getattr(tiny, request.param)())


@pytest.mark.parametrize(
    "policies",
    [
        [EveryOther(3), None, None, Pairs()],
        [Pairs(), EveryOther(), Pairs(), vtr.FastV(0.5)],
        [Mod(), None, Mod(), Mod(weighted=False)],
        [Mod(), vtr.Random(0.3), None, Forgetful()],
        [Forgetful(), Forgetful(on_device=False), None, EveryOther(4)],
        [
            Pairs() + vtr.GSearch([1.0, 0.8, 0.5, 0.5, 0.2]),
            EveryOther() + Forgetful(),
            None,
            vtr.FastV(0.2) + Forgetful(),
        ],
    ],
    ids=lambda ps: "+".join(type(p).__name__ for p in ps),
)
def test_rows_are_independent(model: Any, policies: list[Any]) -> None:
    """Row b of a mixed batch equals its batch-1 run, at the prompt and at every decoded step."""
    inputs = tiny.batch(model, ROWS)
    together = tiny.generate(model, inputs, policy=policies, **KEEP)
    report = vtr.report(model)
    for b, policy in enumerate(policies):
        alone = tiny.generate(model, tiny.single(inputs, b, model), policy=policy, **KEEP)
        for mixed, single in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(mixed[b], single[0], atol=2e-5)
        if policy is not None:
            assert vtr.report(model).rows[0].vision_tokens == report.rows[b].vision_tokens


def test_compression_equals_a_shorter_prompt(model: Any) -> None:
    """Dropping tokens before the decoder is the same as never having had them: positions close up."""
    inputs = tiny.batch(model, ROWS[:1])
    got = tiny.generate(model, inputs, policy=EveryOther(2), **KEEP)
    report = vtr.report(model)
    row = inputs["input_ids"][0] == model.config.image_token_id
    slots = row.nonzero().squeeze(1)
    assert report.rows[0].kept(0) == slots[::2].tolist()
    assert report.rows[0].kept(4) == slots[::2].tolist()
    stay = torch.ones_like(row)
    stay[slots] = False
    stay[slots[::2]] = True
    embeds = merged(model, inputs)[:, stay]
    want = tiny.generate(model, {"inputs_embeds": embeds}, policy=None, **KEEP)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def merged(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Text and image embeddings as the text model gets them."""
    caught: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
    )
    with torch.no_grad():
        model(**inputs, policy=None)
    hook.remove()
    return caught[0]


def test_pooled_tokens_name_their_sources(model: Any) -> None:
    inputs = tiny.batch(model, ROWS[:1])
    with torch.no_grad():
        model(**inputs, policy=Pairs())
    row = vtr.report(model).rows[0]
    slots = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1).tolist()
    assert row.kept(0) == []
    assert row.sources(0) == [slots[i : i + 2] for i in range(0, len(slots) - 1, 2)]
    assert row.total == len(slots) and row.vision_tokens[0] == len(slots) // 2


def test_routing_equals_a_layer_by_layer_reference(model: Any) -> None:
    """p-MoD's arithmetic, by hand: kept vision h = r + w·MLP(r), skipped vision h = w·h, text untouched."""
    inputs = tiny.batch(model, ROWS[:1])
    policy = Mod()
    with torch.no_grad():
        got = model(**inputs, policy=policy).logits
        row = vtr.report(model).rows[0]
        want = routed_by_hand(model, merged(model, inputs), inputs["input_ids"][0] == model.config.image_token_id)
    assert torch.allclose(got, want, atol=2e-5)
    n = row.total
    assert row.vision_tokens == [n, (n + 1) // 2, n, (n + 1) // 2, n]


def test_an_interrupted_routed_layer_leaves_nothing_behind(model: Any) -> None:
    inputs = tiny.batch(model, ROWS[:1])

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        before = model(**inputs).logits
        hook = model.get_decoder().layers[1].self_attn.o_proj.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, policy=Mod())
        hook.remove()
        assert torch.equal(model(**inputs).logits, before)


def routed_by_hand(model: Any, hidden: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    text = model.get_decoder()
    slots, length = vision.nonzero().squeeze(1), hidden.shape[1]
    positions = torch.arange(length)[None]
    for index, layer in enumerate(text.layers):
        weights = torch.ones(length)
        through = torch.arange(length)
        if index % 2:
            weights[slots] = 0.8 + 0.4 * torch.sigmoid(hidden[0, slots].mean(1))
            through = torch.cat([(~vision).nonzero().squeeze(1), slots[::2]]).sort().values
        x = hidden[:, through]
        rope = text.rotary_emb(x, positions[:, through])
        mask = torch.full((len(through), len(through)), float("-inf")).triu(1)[None, None]
        out, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=rope, attention_mask=mask)
        r = x + out
        h = r + weights[None, through, None] * layer.mlp(layer.post_attention_layernorm(r))
        skipped = hidden * weights[None, :, None]
        hidden = skipped.index_copy(1, through, h)
    return model.lm_head(text.norm(hidden))


@pytest.mark.parametrize("on_device", [True, False])
def test_forgotten_tokens_are_not_attended_to_again(model: Any, on_device: bool) -> None:
    """Against recomputation: at layers ≥ 2 a decoded token sees the prompt, remembered tokens and itself."""
    inputs = tiny.batch(model, ROWS[:1])
    out = tiny.generate(model, inputs, policy=Forgetful(on_device), **{**KEEP, "max_new_tokens": 9})
    kv_bytes = vtr.report(model).kv_bytes
    ids = out.sequences[:, :-1]
    prompt = inputs["input_ids"].shape[1]
    embeds = torch.cat([merged(model, inputs), model.get_input_embeddings()(ids[:, prompt:])], 1)
    want, forgotten = forgetting_by_hand(model, embeds, prompt)
    assert 0 < forgotten < len(out.logits) - 1
    for t, logits in enumerate(out.logits):
        assert torch.allclose(logits, want[:, prompt - 1 + t], atol=2e-5)
    cache = out.past_key_values
    total = ids.shape[1]
    assert [layer.lengths()[0] for layer in cache.layers] == [total] * 2 + [total - forgotten] * 3
    g = model.config.text_config
    per_token = 2 * g.num_key_value_heads * (g.hidden_size // g.num_attention_heads) * 4
    assert kv_bytes == (2 * total + 3 * (total - forgotten)) * per_token


def forgetting_by_hand(model: Any, hidden: torch.Tensor, prompt: int) -> tuple[torch.Tensor, int]:
    text, length = model.get_decoder(), hidden.shape[1]
    rope = text.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
    forgotten = 0
    with torch.no_grad():
        for index, layer in enumerate(text.layers):
            if index == 2:
                for slot in range(prompt, length):
                    if not bool(hidden[0, slot].sum() > 0):
                        mask[:, :, slot + 1 :, slot] = float("-inf")
                        forgotten += 1
            out, _ = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rope, attention_mask=mask)
            hidden = hidden + out
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(text.norm(hidden)), forgotten


def test_tokens_know_where_they_are() -> None:
    """The adapter's layout: image, tile, (y, x), newline of every token, against transformers' own packing."""
    seen: dict[int, dict[str, list[int]]] = {}

    @vtr.register_policy("looking-for-test")
    @dataclass
    class Looking(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> None:
            if layer == 1:
                names = ("image", "tile", "y", "x", "newline")
                seen[len(seen)] = {name: getattr(tokens, name).tolist() for name in names}
                assert tokens.hidden.shape[0] == len(tokens) and tokens.scores is None

    model = vtr.patch(tiny.llava_next())
    inputs = tiny.batch(model, ROWS)
    with torch.no_grad():
        model(**inputs, policy=Looking())
    assert len(seen) == 3  # the row without image is not asked
    assert set(seen[1]["image"]) == {0, 1}
    first = seen[0]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    thumbnail = [i for i, tile in enumerate(first["tile"]) if tile == 0]
    assert [(first["y"][i], first["x"][i]) for i in thumbnail] == [(y, x) for y in range(side) for x in range(side)]
    ends = [i for i, newline in enumerate(first["newline"]) if newline]
    assert ends and all(first["x"][i] == first["x"][i - 1] + 1 for i in ends)
    assert ends[-1] == len(first["newline"]) - 1


def test_a_question_needing_scores_gets_them_only_then(model: Any) -> None:
    asked: list[tuple[int, bool]] = []

    @vtr.register_policy("curious-for-test")
    @dataclass
    class Curious(vtr.Policy):
        def needs(self, layer: int) -> Any:
            return "text" if layer == 3 else None

        def prune(self, layer: int, tokens: vtr.Tokens) -> None:
            asked.append((layer, tokens.scores is not None))

    with torch.no_grad():
        model(**tiny.batch(model, ROWS[:1]), policy=Curious())
    assert asked == [(0, False), (1, False), (2, False), (3, True), (4, False)]
