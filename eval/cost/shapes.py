"""Models of published shapes with random weights, and prompts for them: times depend on shapes, not on weights.

A model is built on the meta device, so that nothing is allocated twice, and its weights are drawn where it is to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from vtr.eval.cost.midsize import IMAGE_ID, PAD, PATCH, Size, padded, twin


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its prompts.

    Attributes:
        family: "llava", "llava_next" or "internvl".
        text: settings of its ``LlamaConfig``. vision: of its tower's config; ``image_size`` is that of a tile.
        crops: (rows, columns) of tiles beside the thumbnail; (0, 0) where an image is one tile.
        text_tokens: stand behind the image.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    crops: tuple[int, int] = (0, 0)
    text_tokens: int = 64

    @property
    def side(self) -> int:
        """Vision tokens per side of a tile."""
        patches = self.vision["image_size"] // self.vision["patch_size"]
        return patches // 2 if self.family == "internvl" else patches

    @property
    def vision_tokens(self) -> int:
        """Of one image: every tile's, and a newline token for each row of LLaVA-NeXT's canvas."""
        rows, columns = self.crops
        newlines = rows * self.side if self.family == "llava_next" else 0
        return (rows * columns + 1) * self.side**2 + newlines

    def downsampled(self, side: int) -> Shape:
        """The same with side × side tokens a tile: pictures of fewer pixels."""
        patches = 2 * side if self.family == "internvl" else side
        return replace(self, vision={**self.vision, "image_size": patches * self.vision["patch_size"]})

    def facts(self) -> dict[str, Any]:
        """For a result file."""
        return {**asdict(self), "crops": [*self.crops], "vision_tokens": self.vision_tokens}


LLAMA_7B = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
INTERNLM2_7B = {**LLAMA_7B, "vocab_size": 92553, "intermediate_size": 14336, "num_key_value_heads": 8}
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
INTERNVIT_300M = {**CLIP_L_336, "image_size": 448}
MID = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
SHAPES = {
    "llava-next-mid": Shape("llava_next", MID, {**CLIP_L_336, "num_hidden_layers": 3}, crops=(2, 2)),
    "llava-1.5-7b": Shape("llava", LLAMA_7B, CLIP_L_336),
    "llava-next-7b": Shape("llava_next", LLAMA_7B, CLIP_L_336, crops=(2, 2)),
    "internvl2-8b": Shape("internvl", INTERNLM2_7B, INTERNVIT_300M, crops=(2, 3)),
}
FITS_CPU = ("llava-next-mid",)
"""Shapes that a CPU runs as they are: a text model of middle size, CLIP-L's width in few layers, AnyRes of 5 tiles."""


def of_size(size: Size) -> Shape:
    """The shape of a mid-size LLaVA-1.5."""
    text = {
        "vocab_size": size.vocab_size, "hidden_size": size.hidden_size, "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.heads,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": size.side * PATCH, "patch_size": PATCH,
    }  # fmt: skip
    return Shape("llava", text, vision, text_tokens=size.text_tokens)


def scaled_down(shape: Shape) -> Shape:
    """A model of the same family small enough for a CPU: narrow, shallow, 6 × 6 patches a tile."""
    kv_heads = max(4 * shape.text["num_key_value_heads"] // shape.text["num_attention_heads"], 1)
    text = {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 6 * 14, "patch_size": 14,
    }  # fmt: skip
    return replace(shape, text=text, vision=vision, text_tokens=16)


def config_of(shape: Shape) -> Any:
    """The transformers configuration of a shape."""
    import transformers

    text = transformers.LlamaConfig(
        **shape.text, max_position_embeddings=65536, pad_token_id=PAD, bos_token_id=1, eos_token_id=None
    )
    if shape.family == "internvl":
        square = {name: [shape.vision[name]] * 2 for name in ("image_size", "patch_size")}
        tower = transformers.InternVLVisionConfig(**{**shape.vision, **square})
        return transformers.InternVLConfig(
            vision_config=tower, text_config=text, image_token_id=IMAGE_ID, tie_word_embeddings=False
        )
    vision = transformers.CLIPVisionConfig(**shape.vision, projection_dim=shape.vision["hidden_size"])
    if shape.family == "llava":
        return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    return transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_grid_pinpoints=pinpoints(shape)
    )


def pinpoints(shape: Shape) -> list[list[int]]:
    """LLaVA-NeXT's canvases, in pixels (height, width)."""
    tile = shape.vision["image_size"]
    return [[rows * tile, columns * tile] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def build(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of this shape; its weights are drawn on ``device``, as transformers initialises them."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(shape), dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    torch.manual_seed(seed)
    model.initialize_weights()
    model.tie_weights()  # weights that were shared on meta are two of their own now
    model.generation_config.eos_token_id = None
    return model.eval()


def sharing(model: Any, shape: Shape, seed: int = 0) -> Any:
    """A model of ``shape`` on the weights of another family's with the same text model, tower and projector.

    Only what that one lacks is drawn (LLaVA-NeXT's newline), so that both need the memory of one.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config_of(shape), dtype=model.dtype, attn_implementation="sdpa")
    own = twin(model)
    for name, child in own.model.named_children():
        setattr(made.model, name, child)
    made.lm_head = own.lm_head
    draw = torch.Generator().manual_seed(seed)
    for name, weight in list(made.named_parameters()):
        if weight.is_meta:
            drawn = torch.randn(weight.shape, generator=draw) / shape.text["hidden_size"] ** 0.5
            module = made.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], torch.nn.Parameter(drawn.to(model.device, model.dtype)))
    made.generation_config.eos_token_id = None
    return made.eval()


def with_side(model: Any, shape: Shape, side: int, seed: int = 0) -> Any:
    """The unpatched model with a tower for pictures of side × side tokens a tile; the rest is on the same weights."""
    from transformers import AutoModel

    narrow, config = twin(model), config_of(shape.downsampled(side))
    narrow.config.vision_config = config.vision_config
    if shape.family == "llava_next":
        narrow.config.image_grid_pinpoints = config.image_grid_pinpoints
    torch.manual_seed(seed)
    with torch.device(model.device):
        tower = AutoModel.from_config(config.vision_config, dtype=model.dtype, attn_implementation="sdpa")
    narrow.model.vision_tower = tower.eval()
    return narrow


def prompts(model: Any, shape: Shape, rows: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch. Each row: how many images it begins with, and how many text tokens follow.

    Raises:
        ValueError: a row of several InternVL images, which need text between them.
    """
    if shape.family == "internvl" and any(images > 1 for images, _ in rows):
        raise ValueError("InternVL tells images by the text between them: give each row one image at most")
    draw = torch.Generator().manual_seed(seed)
    out = padded(rows, shape.vision_tokens, shape.text["vocab_size"], draw)
    if count := sum(images for images, _ in rows):
        out |= pictures(shape, count, draw)
        out["pixel_values"] = out["pixel_values"].to(model.dtype)
    return {name: value.to(model.device) for name, value in out.items()}


def pictures(shape: Shape, count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Random pixels of ``count`` images, as the family's processor gives them."""
    (rows, columns), tile = shape.crops, shape.vision["image_size"]
    tiles = rows * columns + 1
    pixels = torch.randn(count, tiles, 3, tile, tile, generator=draw)
    if shape.family != "llava_next":
        return {"pixel_values": pixels.flatten(0, 1)}
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[rows * tile, columns * tile]] * count)}
