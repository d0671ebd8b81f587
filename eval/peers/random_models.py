"""Small random LLaVA-1.5 and Qwen2.5-VL, the same in any transformers. Needs torch, transformers and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAVA, QWEN = "llava", "qwen2_5_vl"
IMAGE, START, END, VIDEO = 5, 6, 7, 8
"""Ids of a vision token's placeholder and of Qwen-VL's other marks."""
FIRST_WORD, VOCABULARY = 16, 512
SIDE = 8
"""A picture is SIDE × SIDE vision tokens."""
BEFORE = {LLAVA: 35, QWEN: 15}
"""Slots in front of the picture: LightCompress takes these for granted."""
BEHIND = 20
DEPTH = 6
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=DEPTH, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
TOWERS = {LLAVA: 12, QWEN: 18}
"""Layers: as many as the settings that packages ship with count on."""


def config(kind: str) -> Any:
    """The model's configuration."""
    import transformers

    if kind == LLAVA:
        vision = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=TOWERS[kind], num_attention_heads=2,
            projection_dim=32, image_size=14 * SIDE, patch_size=14,
        )  # fmt: skip
        text = transformers.LlamaConfig(**TEXT)
        return transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=SIDE**2
        )
    looks: dict[str, Any] = dict(
        depth=TOWERS[kind], hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[5, 11, 17],
    )  # fmt: skip
    says: dict[str, Any] = dict(TEXT, rope_theta=10_000.0, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    marks: dict[str, Any] = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    if transformers.__version__ < "5":  # the text model's settings stand at the top there
        return transformers.Qwen2_5_VLConfig(vision_config=looks, **(says | marks))
    return transformers.Qwen2_5_VLConfig(text_config=says, vision_config=looks, **marks)


def build(kind: str, weights: dict[str, torch.Tensor] | None = None, seed: int = 0) -> Any:
    """The model, float32, with random weights or those of another transformers.

    Raises:
        KeyError: ``weights`` lack one.
    """
    import transformers

    name = {LLAVA: "Llava", QWEN: "Qwen2_5_VL"}[kind] + "ForConditionalGeneration"
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config(kind), attn_implementation="sdpa")
    if weights is None:
        _draw(model)
    else:
        found = {bare(key): value for key, value in weights.items()}
        model.load_state_dict({key: found[bare(key)] for key in model.state_dict()})
    model.generation_config.eos_token_id = None
    return model.eval()


def _draw(model: Any) -> None:
    """Weights far enough from zero that what is kept decides what is said."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3 if "q_proj" in name or "k_proj" in name else 0.12)


def bare(key: str) -> str:
    """A parameter's name without what transformers' versions nest models in."""
    return ".".join(part for part in key.split(".") if part not in ("model", "vision_model", "language_model"))


def inputs(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """A prompt of one random picture; no two words are the same."""
    dice = torch.Generator().manual_seed(seed)
    count = BEFORE[kind] + BEHIND
    words = FIRST_WORD + torch.randperm(VOCABULARY - FIRST_WORD, generator=dice)[:count]
    if kind == QWEN:
        words[BEFORE[kind] - 1], words[BEFORE[kind]] = START, END
    picture = torch.full((SIDE**2,), IMAGE)
    ids = torch.cat([words[: BEFORE[kind]], picture, words[BEFORE[kind] :]])[None]
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == LLAVA:
        return out | {"pixel_values": torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=dice)}
    out["pixel_values"] = torch.randn(4 * SIDE**2, 3 * 2 * 14 * 14, generator=dice)
    return out | {"image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]]), "mm_token_type_ids": (ids == IMAGE).int()}


def answer(seed: int, steps: int) -> list[int]:
    """The words that are to be decoded, whatever the model would say."""
    dice = torch.Generator().manual_seed(1000 + seed)
    return (FIRST_WORD + torch.randperm(VOCABULARY - FIRST_WORD, generator=dice)[:steps]).tolist()


def load(folder: Path, kind: str) -> Any:
    """The model whose weights are in ``folder``."""
    from safetensors.torch import load_file

    return build(kind, load_file(folder / f"{kind}.safetensors"))


def save(folder: Path) -> None:
    """Write the weights of both models."""
    from safetensors.torch import save_file

    for kind in TOWERS:
        save_file(build(kind).state_dict(), folder / f"{kind}.safetensors")
