"""The pocket model: a stock LLaVA-NeXT of about 3.7 M parameters, its starting point, and fast training forwards.

The weights live in transformers' own classes. The forwards here compute what those classes compute, but skip what
training does not need and let many questions share one picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .scenes import COLOR_NAMES, DIGITS, GRID, LETTERS, NUMBERS, PATCH, REGIONS, SHAPES, TILE, WORDS

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)
FUNCTION_WORDS = [
    "what", "which", "where", "how", "many", "color", "shape", "shapes", "digit", "letter", "word", "is", "are",
    "the", "on", "in", "a", "of", "there", "picture", "image",
]  # fmt: skip
VOCAB = SPECIAL + FUNCTION_WORDS + SHAPES + COLOR_NAMES + LETTERS + WORDS + REGIONS + NUMBERS + DIGITS
IDS = {word: i for i, word in enumerate(VOCAB)}

PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]  # height, width
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 128, 4, 5  # features leave after layer 4 (vision_feature_layer -2)
LM_WIDTH, LM_LAYERS, HEAD_DIM = 160, 10, 32
POSITION_DIMS = 32
# which neighbour (dx, dy in patches) a tower head looks at when training starts
FIRST_LOOKS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (1, -1), (-1, 1), (1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
    ((0, 0), (0, 0), (-1, 0), (0, -1)),
)


def build(seed: int = 0) -> Any:
    """The untrained model at its starting point."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        image_size=TILE,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=LM_WIDTH,
        intermediate_size=2 * LM_WIDTH,
        num_hidden_layers=LM_LAYERS,
        num_attention_heads=LM_WIDTH // HEAD_DIM,
        num_key_value_heads=LM_WIDTH // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        _start_tower(tower_of(model))
        _start_lm(model.model.language_model)
    return model


def _start_tower(tower: Any) -> None:
    """Tells places apart from the first step: sinusoids in the position table, heads that look at neighbours."""
    freqs = torch.exp(torch.linspace(math.log(math.pi / 12), math.log(math.pi / 2), POSITION_DIMS // 4))
    y, x = torch.meshgrid(torch.arange(float(GRID)), torch.arange(float(GRID)), indexing="ij")
    waves = [f(c[..., None] * freqs) for c in (x, y) for f in (torch.sin, torch.cos)]
    position = tower.embeddings.position_embedding.weight
    position.mul_(0.5)
    position[1:, :POSITION_DIMS] = torch.cat(waves, -1).view(GRID * GRID, POSITION_DIMS)
    tower.embeddings.patch_embedding.weight.mul_(2.0)
    tower.embeddings.patch_embedding.weight[:POSITION_DIMS].mul_(0.1)
    dim, n = VISION_WIDTH // VISION_HEADS, POSITION_DIMS // 4
    for layer, looks in zip(tower.encoder.layers, FIRST_LOOKS, strict=False):
        attention = layer.self_attn
        attention.q_proj.weight.normal_(0, 0.02)
        attention.k_proj.weight.normal_(0, 0.02)
        for head, look in enumerate(looks):
            rows = slice(head * dim, head * dim + POSITION_DIMS)
            attention.k_proj.weight[rows, :POSITION_DIMS] += 1.4 * torch.eye(POSITION_DIMS)
            shift = torch.zeros(POSITION_DIMS, POSITION_DIMS)
            for axis, delta in enumerate(look):
                sin, cos = slice(2 * axis * n, (2 * axis + 1) * n), slice((2 * axis + 1) * n, (2 * axis + 2) * n)
                shift[sin, sin] = shift[cos, cos] = torch.diag(torch.cos(delta * freqs))
                shift[sin, cos], shift[cos, sin] = (torch.diag(s * torch.sin(delta * freqs)) for s in (1, -1))
            attention.q_proj.weight[rows, :POSITION_DIMS] += 1.4 * shift


def _start_lm(lm: Any) -> None:
    """Content matching from the first step: like attends to like (K = Q) and copies what it finds (O = V^T).

    The first two layers copy little, so that pictures are read in deeper layers.
    """
    for i, layer in enumerate(lm.layers):
        a = layer.self_attn
        a.q_proj.weight.normal_(0, 0.07)
        a.k_proj.weight.copy_(a.q_proj.weight)
        a.v_proj.weight.normal_(0, 0.04)
        a.o_proj.weight.copy_(a.v_proj.weight.T * (0.2 if i < 2 else 1.0))


def tower_of(model: Any) -> Any:
    """The vision transformer of a pocket model."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def up_to_features(model: Any) -> list[nn.Module]:
    """What a picture passes in the vision tower up to the features: all but the last layer (CLIP's or InternViT's)."""
    tower = tower_of(model)
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    first = [tower.pre_layrnorm] if hasattr(tower, "pre_layrnorm") else []
    return [tower.embeddings, *first, *blocks[:-1]]


def pixels_of(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 tiles (..., H, W, 3) as normalised pixel values (..., 3, H, W)."""
    x = tiles.movedim(-1, -3).float() / 255
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def see(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Tower features after the next-to-last layer, the CLS token first: (tiles, 145, width)."""
    tower = tower_of(model)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = _first(layer(hidden, attention_mask=None))
    return hidden


def summary(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The CLS token after the last layer, computed for that token only: (tiles, width)."""
    tower = tower_of(model)
    layer = tower.encoder.layers[-1]
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (VISION_HEADS, -1)).transpose(1, 2)

    read = F.scaled_dot_product_attention(
        heads(attention.q_proj(normed[:, :1])), heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    )
    cls = hidden[:, :1] + attention.out_proj(read.transpose(1, 2).flatten(2))
    return tower.post_layernorm(cls + layer.mlp(layer.layer_norm2(cls)))[:, 0]


def pack(model: Any, features: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """LLaVA-NeXT's token order: thumbnail, then the crops as one picture with a newline token after every row.

    features: (pictures, 1 + rows * cols tiles, 144 or a smaller square, width) after the projector.
    """
    n, _, tokens, width = features.shape
    side = math.isqrt(tokens)
    grid = features[:, 1:].reshape(n, rows, cols, side, side, width).permute(0, 1, 3, 2, 4, 5)
    grid = grid.reshape(n, rows * side, cols * side, width)
    newline = model.model.image_newline.expand(n, rows * side, 1, width)
    return torch.cat([features[:, 0], torch.cat([grid, newline], 2).flatten(1, 2)], 1)


def encode(text: str) -> list[int]:
    """Token ids of a plain lower-case text made of known words."""
    return [IDS[word] for word in text.split()]


def answer_states(
    model: Any,
    vision: torch.Tensor,
    vision_pos: torch.Tensor,
    ids: torch.Tensor,
    pos: torch.Tensor,
    block: torch.Tensor,
) -> torch.Tensor:
    """Final hidden states of many questions that share one picture each.

    BOS and picture are run once; then all questions read their keys and values, each blind to the others.
    vision (B, N, D) at positions vision_pos (B, N); ids, pos (B, T); block (B, T): number of the token's question,
    -1 for padding. Equal to running every question on its own.
    """
    from transformers import DynamicCache

    lm = model.model.language_model
    count, length = vision.shape[0], vision.shape[1] + 1
    prefix = torch.cat([lm.embed_tokens(ids.new_full((count, 1), BOS)), vision], 1)
    cache = DynamicCache()
    start = torch.cat([vision_pos.new_zeros(count, 1), vision_pos], 1)
    # by position: transformers 5.24 renamed the cache's argument
    lm(None, None, start, cache, prefix, use_cache=True)
    width = ids.shape[1]
    same = (block[:, :, None] == block[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
    allowed = torch.cat([torch.ones(count, width, length, dtype=torch.bool), same], 2)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]
    return lm(None, mask, pos, cache, lm.embed_tokens(ids), use_cache=True).last_hidden_state


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class DenseHead(nn.Module):
    """Training-only read-out of the tower: per-patch labels, and what a whole tile contains from its CLS token."""

    def __init__(self, classes: list[int], present: int) -> None:
        super().__init__()
        self.classes = classes
        self.patch = nn.Linear(VISION_WIDTH, sum(classes))
        self.tile = nn.Linear(VISION_WIDTH, present)

    def forward(self, hidden: torch.Tensor, cls: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return list(self.patch(hidden[:, 1:]).split(self.classes, -1)), self.tile(cls)
