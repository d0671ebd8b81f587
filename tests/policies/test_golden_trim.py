"""TRIM against the numbers of the official code (FreedomIntelligence/TRIM)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.families import FAMILIES
from tests.official import close
from tests.seen import GivenTower, seen
from tests.support import ROWS, Models
from tests.tiny import real
from vtr.image import Image, Layout
from vtr.policies.picture._merge import outliers
from vtr.policies.question._clip_text import TextTower
from vtr.policies.question.trim import Trim, kept_and_rest, probabilities

META = official.meta("trim")
UNIT = official.tensors("trim", "unit")
units = pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["case"])


class Clip:
    """A CLIP text tower whose answer is given."""

    def __init__(self, projection: Tensor, text: Tensor) -> None:
        self.projection, self.text, self.flops = projection, text, 0

    def question(self, image: Image, given: str | None) -> str:
        return given or ""

    def embed(self, text: str, segments: str, device: Any) -> Tensor:
        assert segments == "cut"
        return self.text

    def project(self, states: Tensor) -> Tensor:
        return states.float() @ self.projection.T


def frames(count: int, n: int) -> Layout:
    tile, x = torch.arange(count).repeat_interleave(n), torch.arange(n).repeat(count)
    return Layout(tile, torch.zeros_like(x), x, torch.zeros_like(x), (1, n))


def asked(keep: Any, placement: Any, projection: Tensor, text: Tensor) -> Trim:
    policy = Trim(keep, placement)
    policy._clip = Clip(projection, text)  # type: ignore[assignment]
    return policy


def given(case: dict[str, Any]) -> tuple[Trim, Image]:
    """All pictures of a case as tiles of one: they count outliers together."""
    x, weight, bias, projection, text = (
        UNIT[f"{case['case']}.{name}"]
        for name in ("features", "ln_weight", "ln_bias", "visual_projection", "text_embeds")
    )
    tower = GivenTower(
        states={None: x}, projector=lambda states: states,
        norm=lambda s: layer_norm(s.float(), s.shape[-1:], weight, bias, META["text_tower_eps"]),
    )  # fmt: skip
    keep = None if case["k"] == -1 else case["kept"] + 1
    return asked(keep, "official", projection, text), seen(x, frames(*x.shape[:2]), tower)


@units
def test_who_stays(case: dict[str, Any]) -> None:
    policy, image = given(case)
    there = torch.ones(image.layout.tiles, case["N"]).bool()
    shares = policy.shares(image, there)
    close(shares, UNIT[f"{case['case']}.probabilities"])
    if case["k"] == -1:
        assert outliers(shares) / shares.numel() == pytest.approx(case["ratio"])
    counts, _ = policy.counts(shares, there)
    stays, _ = kept_and_rest(shares, counts, there)
    assert counts == [case["kept"]] * len(counts)
    assert torch.equal(stays, UNIT[f"{case['case']}.mask"])


@units
def test_tokens(case: dict[str, Any]) -> None:
    """Those that stay in the picture's order, then the mean of the rest; rounded to float16 as the fixtures are."""
    policy, image = given(case)
    made, want = policy.compress(image), UNIT[f"{case['case']}.output_fp16"]
    assert [want.shape[1]] * len(want) == case["out_tokens"]
    off = (made.features.half().float() - want.flatten(0, 1).float()).abs()
    assert (off <= torch.finfo(torch.float16).eps * want.flatten(0, 1).float().abs() + 1e-6).all()
    assert made.layout is not None and len(made.layout) == len(made.sources) == sum(case["out_tokens"])


@units
def test_true_places(case: dict[str, Any]) -> None:
    """The same tokens in the picture's order, where tiles do not count together; each patch goes into one token."""
    policy, image = given(case)
    theirs = policy.compress(image)
    policy.placement = "true"
    ours = policy.compress(image)
    assert sorted(i for some in ours.sources for i in some) == list(range(len(image)))
    firsts = [s[0] for s in ours.sources]
    assert firsts == sorted(firsts)
    alone = case["B"] == 1 and int(case["N"] * case["ratio"]) == round(case["N"] * case["ratio"])
    if case["k"] != -1 or alone:
        assert sorted(map(sorted, ours.sources)) == sorted(map(sorted, theirs.sources))


def picture(layout: Layout, seed: int = 0) -> Image:
    draw = torch.Generator().manual_seed(seed)
    tiles = torch.randn(layout.tiles, layout.grid[0] * layout.grid[1], 8, generator=draw)
    return seen(tiles, layout, GivenTower(states={None: tiles}, norm=_same, projector=_same))


def _same(states: Tensor) -> Tensor:
    return states


@pytest.mark.parametrize("placement", ["true", "official"])
@pytest.mark.parametrize("keep", [None, 0, 1, 2, 8, 9, 500, 0.0, 0.01, 0.5, 1.0])
def test_budgets(keep: Any, placement: Any) -> None:
    for layout in (tile_layout(3, 3), tile_layout(2, 20), anyres_layout((60, 100), ((96, 96),), 48, 3)):
        image, policy = picture(layout), asked(keep, placement, torch.eye(8)[:4], torch.ones(1, 4))
        made = policy.compress(image)
        assert len(made.sources) == len(made.features) and made.features.isfinite().all()
        if keep is None:
            with pytest.raises(ValueError, match="not known before it is encoded"):
                policy.kept_of(layout)
        else:
            assert len(made.sources) == policy.kept_of(layout)
        if placement == "true":
            firsts = [s[0] for s in made.sources]
            assert firsts == sorted(set(firsts))
            for feature, some in zip(made.features, made.sources, strict=True):
                close(feature, image.features[torch.tensor(some)].mean(0))


def test_padding_takes_no_part() -> None:
    there = torch.tensor([[True, False, True], [False, False, False]])
    got = probabilities(torch.ones(2, 3, 4), torch.ones(1, 4), there)
    assert got.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_without_a_text_tower_it_says_so() -> None:
    """And compares with the question's words as the language model embeds them; or refuses, if CLIP was asked for."""
    image = picture(tile_layout(3, 3))
    image.question = image.tiles[0, 4:5]
    with pytest.warns(UserWarning, match="trim has no CLIP text tower.*load_text_tower"):
        found = vtr.policy("trim:2").compress(image)
    assert found.sources[0] == [4] and len(found.sources) == 2
    assert found.sources == vtr.policy("trim:2,relevance=embeddings").compress(image).sources
    with pytest.raises(vtr.UnsupportedError, match="load_text_tower"):
        vtr.policy("trim:2,relevance=clip").compress(image)
    assert Trim.question_guided and vtr.policy(vtr.policy("trim").spec) == Trim()


# -------------------------------------------------------------------------------------------------------- whole model
class Words:
    """A language model's tokenizer, and CLIP's: ids are letters, and letters ids."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [30, *(ord(letter) - 97 for letter in text), 31]}


def text_tower(width: int) -> TextTower:
    """Of a tiny CLIP whose patches have so many channels."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=32, max_position_embeddings=12, eos_token_id=31, **small)
    vision = CLIPVisionConfig(**(small | {"hidden_size": width}), image_size=8, patch_size=4)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return TextTower(clip.eval(), Words(), Words())


@pytest.mark.parametrize("keep", [None, 0.4, 5])
def test_a_batch_is_its_rows(keep: Any) -> None:
    """Every row by its own question, whatever its batch mates; another question keeps other tokens."""
    models = Models.from_family(next(f for f in FAMILIES if f.kind == "llava_next"))
    tower = text_tower(models.stock.config.vision_config.hidden_size)
    policies = [Trim(keep) if keep is not None or b != 1 else None for b in range(len(ROWS))]
    for policy in policies:
        if policy is not None:
            policy._clip = tower
    inputs = models.inputs()
    logits = models.family.logits(models.patched, inputs, policy=policies)
    rows = vtr.report(models.patched).rows
    assert all(row.vision_tokens[0] < row.total for row in rows if row.total)
    for b, policy in enumerate(policies):
        single = models.family.single(models.stock, inputs, b)
        alone = models.family.logits(models.patched, single, policy=policy)[0]
        close(logits[b, real(inputs, b)], alone)
    kept = set()
    for question in ("ab", "xyz", "mnopq"):
        asked_ = Trim(0.4).asking(question)
        asked_._clip = tower
        models.family.logits(models.patched, models.family.single(models.stock, inputs, 0), policy=asked_)
        kept.add(tuple(some[0] for some in vtr.report(models.patched).rows[0].sources(0)))
    assert len(kept) > 1
