"""A stock InternVL with the pocket LLaVA-NeXT's knowledge: language model and words as they are, tower nearly.

InternViT's blocks are CLIP's, with a scale on what each adds (1 here). It has no norm in front of the first block; the
embeddings are set so that they come out as that norm makes them in the mean. The projector gets four patches at once.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from vtr.image import scales
from vtr.policies.blind.matryoshka import pool

from .. import scenes as S
from ..language import Batch, keep_random
from ..model import IMAGE, MEAN, STD, VOCAB, pixels_of, see, tower_of, up_to_features
from ..nest import Showing

CONTEXT, OPEN, CLOSE = "<IMG_CONTEXT>", "<img>", "</img>"
WORDS = [CONTEXT if i == IMAGE else word for i, word in enumerate(VOCAB)] + [OPEN, CLOSE]
IDS = {word: i for i, word in enumerate(WORDS)}
SHUFFLE = 2  # patches along a side of a token
SIDE = S.GRID // SHUFFLE  # tokens along a side of a tile
SCALES = scales((SIDE, SIDE))  # tokens per tile → side of a pooled cell
CROPS = 4  # at most, beside the thumbnail


def build(teacher: Any, seed: int = 0) -> Any:
    """The model at its starting point, made from a pocket LLaVA-NeXT.

    Args:
        teacher: the pocket LLaVA-NeXT. seed: of the pictures that norms are measured on.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    clip = teacher.config.vision_config
    vision = InternVLVisionConfig(
        hidden_size=clip.hidden_size,
        intermediate_size=clip.intermediate_size,
        num_hidden_layers=clip.num_hidden_layers,
        num_attention_heads=clip.num_attention_heads,
        image_size=[S.TILE, S.TILE],
        patch_size=[S.PATCH, S.PATCH],
        hidden_act=clip.hidden_act,
        layer_norm_eps=clip.layer_norm_eps,
        attention_bias=True,
        layer_scale_init_value=1.0,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config={**teacher.config.text_config.to_dict(), "vocab_size": len(WORDS)},
        image_token_id=IMAGE,
        image_seq_length=SIDE**2,
        downsample_ratio=1 / SHUFFLE,
        vision_feature_layer=teacher.config.vision_feature_layer,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    stream = S.scene_stream("train", f"internvl-{seed}")
    with torch.no_grad():
        _take_words(model, teacher)
        _take_tower(model, teacher, pixels_of_scenes(stream, 4))
    return model


def pixels_of_scenes(stream: Any, count: int) -> torch.Tensor:
    """Pixels of the tiles of the next ``count`` scenes, (tiles, 3, 96, 96)."""
    return torch.cat([pixels_of(torch.from_numpy(S.tiles_of(next(stream)[0].image))) for _ in range(count)])


def _take_words(model: Any, teacher: Any) -> None:
    """Language model and words; ``<img>`` and ``</img>`` begin as LLaVA-NeXT's newline, which means nothing."""
    ours, theirs = model.model.language_model, teacher.model.language_model
    words = {"embed_tokens.weight": ours.embed_tokens.weight.clone()}
    words["embed_tokens.weight"][: len(VOCAB)] = theirs.embed_tokens.weight
    words["embed_tokens.weight"][len(VOCAB) :] = teacher.model.image_newline
    ours.load_state_dict({**theirs.state_dict(), **words})


def _take_tower(model: Any, teacher: Any, pixels: torch.Tensor) -> None:
    """Tower and projector, so that they do about the same; ``pixels`` (tiles, 3, 96, 96) say how large things are."""
    ours, theirs = tower_of(model), tower_of(teacher)
    norm, first = theirs.pre_layrnorm, theirs.embeddings
    spread = first(pixels).std(-1, correction=0).mean(0)
    cls, patch = spread[:1], spread[1:].mean()

    def normed(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:  # as the norm does, but for its shift
        return (x - x.mean(-1, keepdim=True)) / size * norm.weight

    position = first.position_embedding.weight
    ours.embeddings.cls_token.copy_(normed(first.class_embedding, cls))
    kernel = first.patch_embedding.weight.movedim(0, -1)
    ours.embeddings.patch_embeddings.projection.weight.copy_(normed(kernel, patch).movedim(-1, 0))
    ours.embeddings.patch_embeddings.projection.bias.zero_()
    size = torch.cat([cls, patch.expand(len(position) - 1)])[:, None]
    ours.embeddings.position_embeddings.copy_(normed(position, size) + norm.bias)
    names = {
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.projection_layer": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
    }
    for mine, other in zip(ours.encoder.layer, theirs.encoder.layers, strict=True):
        for to, of in names.items():
            mine.get_submodule(to).load_state_dict(other.get_submodule(of).state_dict())
    patches = see(teacher, pixels)[:, 1:]
    projector, old = model.model.multi_modal_projector, teacher.model.multi_modal_projector
    projector.layer_norm.weight.fill_(patches.std(-1).mean())  # undoes the norm, in the mean
    projector.layer_norm.bias.fill_(patches.mean())
    projector.linear_1.weight.copy_(old.linear_1.weight.repeat(1, SHUFFLE**2) / SHUFFLE**2)
    projector.linear_1.bias.copy_(old.linear_1.bias)
    projector.linear_2.load_state_dict(old.linear_2.state_dict())


# -- training forwards -------------------------------------------------------------------------------------------------
def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector reads of, the CLS token first: (tiles, 145, width)."""
    hidden = pixels
    for module in up_to_features(model):
        hidden = module(hidden)
    return hidden


def tokens_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Features as the language model gets them: (tiles, 36, width)."""
    maps = hidden[:, 1:].unflatten(1, (S.GRID, S.GRID))
    return model.model.multi_modal_projector(model.model.pixel_shuffle(maps, 1 / SHUFFLE).flatten(1, 2))


def project(model: Any, pixels: torch.Tensor, train_tower: bool = True) -> torch.Tensor:
    """Every tile's tokens, the thumbnail first as in a :class:`Batch`: (pictures, tiles, 36, width)."""
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        hidden = features(model, pixels.flatten(0, 1))
    return tokens_of(model, hidden).unflatten(0, pixels.shape[:2])


def frame(model: Any, vision: torch.Tensor) -> torch.Tensor:
    """``<img>`` in front of a picture's tokens and ``</img>`` behind: (pictures, 2 + tokens, width)."""
    words = model.get_input_embeddings().weight
    before, after = (words[IDS[word]].expand(len(vision), 1, -1) for word in (OPEN, CLOSE))
    return torch.cat([before, vision, after], 1)


def at_scale(model: Any, tiles: torch.Tensor, batch: Batch, tokens: int) -> torch.Tensor:
    """The pictures as Matryoshka(tokens) gives them to the language model, the thumbnail last and framed."""
    small = pool(tiles.flatten(0, 1), (SIDE, SIDE), SCALES[tokens]).unflatten(0, tiles.shape[:2])
    return frame(model, small.roll(-1, 1).flatten(1, 2))


def pruned(
    model: Any, batch: Batch, train_tower: bool, view: tuple[str, float, float], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The pictures with random tokens dropped. Returns tokens, their positions, that of the first question word.

    view: ("keep", kept part of the thumbnail, kept part of the crops). Half of the time the rest keep their positions,
    half of the time they close ranks.
    """
    _, thumb, crops = view
    tiles = project(model, batch.pixels, train_tower)
    vision = tiles.roll(-1, 1).flatten(1, 2)
    count, total, width = vision.shape
    kept = keep_random(count, total, thumb, crops, rng, SIDE**2)  # thumbnail first
    kept = ((kept - SIDE**2) % total).sort(1)[0]
    framed = frame(model, vision.gather(1, kept[..., None].expand(-1, -1, width)))
    if rng.random() < 0.5:  # behind BOS and <img>
        ends = kept.new_full((count, 1), 1), kept.new_full((count, 1), total + 2)
        return framed, torch.cat([ends[0], kept + 2, ends[1]], 1), total + 3
    length = framed.shape[1]
    return framed, torch.arange(1, length + 1).expand(count, -1), length + 1


SHOWING = Showing(SCALES, project, at_scale, pruned)


def make_processor(ids: dict[str, int] = IDS, numbers: bool = False) -> Any:
    """InternVL's prompts and tiles by transformers' QianfanOCRProcessor, which is InternVL's processor without video.

    InternVL's own cannot be loaded without torchvision, which only videos need. Image processor: InternVL's, in Pillow.
    ids, numbers: see :func:`vtr.pocket.processing.make_tokenizer`.
    """
    from transformers import QianfanOCRProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from ..processing import CHAT_TEMPLATE, make_tokenizer

    pictures = GotOcr2ImageProcessorPil(
        size={"height": S.TILE, "width": S.TILE}, crop_to_patches=True, min_patches=1, max_patches=CROPS,
        image_mean=list(MEAN), image_std=list(STD),
    )  # fmt: skip
    named = {"start_image_token": OPEN, "end_image_token": CLOSE, "context_image_token": CONTEXT}
    return QianfanOCRProcessor(
        image_processor=pictures,
        tokenizer=make_tokenizer(ids, named, numbers),
        image_seq_length=SIDE**2,
        image_placeholder_token=CONTEXT,
        chat_template=CHAT_TEMPLATE.replace("<image>", CONTEXT),
    )
