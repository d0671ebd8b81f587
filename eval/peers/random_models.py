"""Random LLaVA-1.5 and Qwen2.5-VL, the same in any transformers. Needs torch, transformers and safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LLAVA, QWEN = "llava", "qwen2_5_vl"
IMAGE, START, END, VIDEO = 5, 6, 7, 8
"""Ids of a vision token's placeholder and of Qwen-VL's other marks."""
FIRST_WORD, VOCABULARY = 16, 512
BEFORE = {LLAVA: 35, QWEN: 15}
"""Slots in front of the picture: LightCompress takes these for granted."""
BEHIND = 20
TOWERS = {LLAVA: 12, QWEN: 18}
"""Layers: as many as the settings that packages ship with count on."""


@dataclass(frozen=True)
class Size:
    """Shapes of a decoder: width, of its MLP too, layers, heads; ``side`` × ``side`` vision tokens a picture."""

    name: str
    side: int
    width: int
    inner: int
    depth: int
    heads: int

    @property
    def text(self) -> dict[str, Any]:
        return dict(
            vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.depth,
            num_attention_heads=self.heads, num_key_value_heads=self.heads // 2, max_position_embeddings=4096,
            bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip

    @property
    def mrope(self) -> list[int]:
        """Pairs of a head's channels for time, height and width."""
        pairs = self.width // self.heads // 2
        return [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]


SMALL = Size("small", side=8, width=64, inner=128, depth=6, heads=4)
"""Of which a dense run says what is right."""
MIDDLE = Size("middle", side=24, width=512, inner=1376, depth=8, heads=8)
"""What costs are measured on."""
DEPTH = SMALL.depth


def config(kind: str, size: Size = SMALL) -> Any:
    """The model's configuration."""
    import transformers

    if kind == LLAVA:
        vision = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=TOWERS[kind], num_attention_heads=2,
            projection_dim=32, image_size=14 * size.side, patch_size=14,
        )  # fmt: skip
        text = transformers.LlamaConfig(**size.text)
        return transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=size.side**2
        )
    looks: dict[str, Any] = dict(
        depth=TOWERS[kind], hidden_size=32, intermediate_size=64, out_hidden_size=size.width, num_heads=2,
        patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[5, 11, 17],
    )  # fmt: skip
    turns = {"type": "mrope", "mrope_section": size.mrope}
    says: dict[str, Any] = dict(size.text, rope_theta=10_000.0, rope_scaling=turns)
    marks: dict[str, Any] = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    if transformers.__version__ < "5":  # the text model's settings stand at the top there
        return transformers.Qwen2_5_VLConfig(vision_config=looks, **(says | marks))
    return transformers.Qwen2_5_VLConfig(text_config=says, vision_config=looks, **marks)


def build(kind: str, weights: dict[str, torch.Tensor] | None = None, size: Size = SMALL, seed: int = 0) -> Any:
    """The model, float32, with random weights or those of another transformers.

    Raises:
        KeyError: ``weights`` lack one.
    """
    import transformers

    name = {LLAVA: "Llava", QWEN: "Qwen2_5_VL"}[kind] + "ForConditionalGeneration"
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config(kind, size), attn_implementation="sdpa")
    if weights is None:
        _draw(model, (SMALL.width / size.width) ** 0.5)
    else:
        found = {bare(key): value for key, value in weights.items()}
        model.load_state_dict({key: found[bare(key)] for key in model.state_dict()})
    model.generation_config.eos_token_id = None
    return model.eval()


def _draw(model: Any, scale: float) -> None:
    """Weights far enough from zero that what is kept decides what is said."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, scale * (0.3 if "q_proj" in name or "k_proj" in name else 0.12))


def bare(key: str) -> str:
    """A parameter's name without what transformers' versions nest models in."""
    return ".".join(part for part in key.split(".") if part not in ("model", "vision_model", "language_model"))


def inputs(kind: str, seed: int, size: Size = SMALL) -> dict[str, torch.Tensor]:
    """A prompt of one random picture; no two words are the same."""
    dice, side = torch.Generator().manual_seed(seed), size.side
    count = BEFORE[kind] + BEHIND
    words = FIRST_WORD + torch.randperm(VOCABULARY - FIRST_WORD, generator=dice)[:count]
    if kind == QWEN:
        words[BEFORE[kind] - 1], words[BEFORE[kind]] = START, END
    picture = torch.full((side**2,), IMAGE)
    ids = torch.cat([words[: BEFORE[kind]], picture, words[BEFORE[kind] :]])[None]
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == LLAVA:
        return out | {"pixel_values": torch.randn(1, 3, 14 * side, 14 * side, generator=dice)}
    out["pixel_values"] = torch.randn(4 * side**2, 3 * 2 * 14 * 14, generator=dice)
    return out | {"image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]), "mm_token_type_ids": (ids == IMAGE).int()}


def tower(model: Any, kind: str) -> Any:
    """The vision tower, where transformers 5 has it."""
    return model.model.vision_tower if kind == LLAVA else model.model.visual


def batch(kind: str, seeds: Sequence[int], size: Size) -> dict[str, torch.Tensor]:
    """Several prompts, all of one length."""
    rows = [inputs(kind, seed, size) for seed in seeds]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def answer(seed: int, steps: int) -> list[int]:
    """The words that are to be decoded, whatever the model would say."""
    dice = torch.Generator().manual_seed(1000 + seed)
    return (FIRST_WORD + torch.randperm(VOCABULARY - FIRST_WORD, generator=dice)[:steps]).tolist()


def load(folder: Path, kind: str, size: Size = SMALL) -> Any:
    """The model whose weights are in ``folder``."""
    from safetensors.torch import load_file

    return build(kind, load_file(folder / f"{kind}-{size.name}.safetensors"), size)


def save(folder: Path, *sizes: Size) -> None:
    """Write the weights of both models in these sizes."""
    from safetensors.torch import save_file

    for size in sizes:
        for kind in TOWERS:
            save_file(build(kind, size=size).state_dict(), folder / f"{kind}-{size.name}.safetensors")
