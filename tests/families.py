"""Every model family as the support tests see it: a tiny random model, batches of rows, one row for the slow reference.

Which policy works on which family is said by the adapters (``unsupported``); the tests are drawn from that, and
``python -m tests.support`` runs them and writes the table of docs/families.md from their outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from vtr.integrations import (
    Idefics3,
    InternVL,
    InternVLChat,
    Llava,
    LlavaNext,
    LlavaOnevision,
    Qwen3VL,
    Qwen25VL,
)

from tests import internvl_chat, oracle
from tests.tiny import IMAGE, IMAGE_ID, PAD, PATCH, SIDE, VIDEO_ID
from vtr.engine.adapters import Adapter
from vtr.testing import tiny

Inputs = dict[str, Tensor]
SQUARES = "scales are those of each picture's own grid, which a list names: `tokens=[64, 16]`"
OPEN, CLOSE = 6, 7
"""Text tokens around a tile."""


class Family:
    """A family in tests; this base is that of the four whose tiny models ``tests.tiny`` makes."""

    def __init__(self, adapter: Adapter, kind: str) -> None:
        self.adapter, self.kind, self.name = adapter, kind, adapter.family
        self.limits: dict[str, str] = {}
        """Policies that work with some settings only, and which."""

    def make(self, attn: str = "sdpa") -> Any:
        lm = {"llava": "llama", "llava_next": "mistral", "llava_onevision": "qwen2", "internvl": "qwen3"}[self.kind]
        return getattr(tiny, self.kind)(attn, lm=lm)

    def twin(self, model: Any) -> Any:
        """The model whose weights the slow reference reads."""
        return model

    def batch(self, model: Any, rows: Sequence[Sequence[str]], padding: str = "left") -> Inputs:
        return tiny.batch(model, rows, padding)

    def single(self, model: Any, inputs: Inputs, b: int) -> Inputs:
        """Row b by itself, without padding."""
        return tiny.single(inputs, b, model)

    def row(self, twin: Any, inputs: Inputs) -> oracle.Row:
        """The one row of ``inputs`` as the text model gets it."""
        return oracle.row(twin, inputs)

    def grids(self, inputs: Inputs) -> list[tuple[int, int]] | None:
        """Rows and columns of each image of the one row, where every image is one whole grid; else None."""
        return None

    def logits(self, model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return model(**inputs, **kwargs).logits

    def generate(self, model: Any, inputs: Inputs, **kwargs: Any) -> Any:
        """Ids [rows, steps] of new tokens, the logits [steps, rows, vocab] they were chosen from, and the cache."""
        given = {"return_dict_in_generate": True, "output_logits": True, **kwargs}
        out = tiny.generate(model, inputs, **given)
        return out.sequences[:, -len(out.logits) :], torch.stack(out.logits), out.past_key_values


class Chat(Family):
    """InternVL's remote code, with the weights of transformers' InternVL beside it for the reference."""

    def make(self, attn: str = "sdpa") -> Any:
        native = tiny.internvl(attn, lm="qwen2")
        model = internvl_chat.converted(native)
        model.__dict__["native"] = native  # not a submodule
        return model

    def twin(self, model: Any) -> Any:
        return model.__dict__["native"]

    def batch(self, model: Any, rows: Sequence[Sequence[str]], padding: str = "left") -> Inputs:
        return tiny.batch(self.twin(model), rows, padding)

    def single(self, model: Any, inputs: Inputs, b: int) -> Inputs:
        return tiny.single(inputs, b, self.twin(model))

    def logits(self, model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
        pixels = inputs.get("pixel_values")
        flags = torch.ones(1 if pixels is None else len(pixels), 1).long()
        if pixels is None:  # its forward cannot do without: a tile of zeros that belongs to no placeholder
            inputs, flags = {**inputs, "pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, flags * 0
        return super().logits(model, {**inputs, "image_flags": flags}, **kwargs)


class QwenVL(Family):
    """Pictures of several shapes, 8 pixels a token; rows, columns and time have positions of their own."""

    GRIDS = ((8, 12), (12, 8), (4, 8), (12, 12))

    def __init__(self, adapter: Adapter, kind: str) -> None:
        super().__init__(adapter, kind)
        kept = 'with `positions="keep"`: positions have three axes'
        self.limits = {**dict.fromkeys(("mustdrop", "pyramid", "tops"), kept), "m3": SQUARES}

    def make(self, attn: str = "sdpa") -> Any:
        torch.manual_seed(0)
        text = dict(
            vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=1,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]},
        )  # fmt: skip
        vision = dict(depth=3, num_heads=2, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)
        wide = dict(hidden_size=32, intermediate_size=64, out_hidden_size=48)
        name, more = {
            "qwen2_vl": ("Qwen2VL", dict(embed_dim=32, hidden_size=48, mlp_ratio=2)),
            "qwen2_5_vl": ("Qwen2_5_VL", dict(wide, window_size=16, fullatt_block_indexes=[1])),
            "qwen3_vl": ("Qwen3VL", dict(wide, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)),
        }[self.kind]
        config, cls = (getattr(transformers, name + what) for what in ("Config", "ForConditionalGeneration"))
        vision |= more
        made = config(text_config=text, vision_config=vision, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID)
        return tiny._ready(cls(made), attn)

    def batch(self, model: Any, rows: Sequence[Sequence[str]], padding: str = "left") -> Inputs:
        made, count = torch.Generator().manual_seed(0), sum(part == IMAGE for row in rows for part in row)
        grids = [self.GRIDS[i % len(self.GRIDS)] for i in range(count)]
        left, ids = list(grids), []
        for row in rows:
            ids.append([1])
            for part in row:
                if part == IMAGE:
                    h, w = left.pop(0)
                    ids[-1] += [OPEN, *[IMAGE_ID] * (h * w // 4), CLOSE]
                else:
                    ids[-1] += _letters(part)
        out = _padded(ids, padding)
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE_ID).int()
        if grids:
            patches = sum(h * w for h, w in grids)
            out["pixel_values"] = torch.randn(patches, 3 * 2 * PATCH**2, generator=made)
            out["image_grid_thw"] = torch.tensor([(1, h, w) for h, w in grids])
        return out

    def single(self, model: Any, inputs: Inputs, b: int) -> Inputs:
        out = _unpadded(inputs, b)
        grids = inputs.get("image_grid_thw", torch.zeros(0, 3).long())
        tokens = (grids.prod(1) // 4).tolist()
        mine = tiny._of_row(inputs["input_ids"] == IMAGE_ID, b, tokens)
        if mine:
            parts = inputs["pixel_values"].split(grids.prod(1).tolist())
            out |= {"pixel_values": torch.cat([parts[i] for i in mine]), "image_grid_thw": grids[mine]}
        return out

    def row(self, twin: Any, inputs: Inputs) -> oracle.Row:
        ids = inputs["input_ids"][0]
        embeds, vision = twin.get_input_embeddings().weight[ids].detach().clone(), ids == IMAGE_ID
        if not bool(vision.any()):
            return oracle.Row(embeds, vision, torch.arange(len(ids)).expand(3, -1))
        with torch.no_grad():
            seen = twin.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        embeds[vision] = torch.cat(seen.pooler_output)
        kinds = inputs["mm_token_type_ids"]
        positions, _ = twin.model.get_rope_index(inputs["input_ids"], kinds, inputs["image_grid_thw"])
        behind = tuple(torch.cat(level) for level in getattr(seen, "deepstack_features", None) or [])
        return oracle.Row(embeds, vision, positions[:, 0], behind)

    def grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        return [(int(h) // 2, int(w) // 2) for _, h, w in inputs.get("image_grid_thw", torch.zeros(0, 3)).tolist()]


class Idefics(Family):
    """Tiles of 3 × 3 tokens, each between text tokens; pixel_values [rows, most tiles, …], padded with zeros."""

    def make(self, attn: str = "sdpa") -> Any:
        torch.manual_seed(0)
        name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[self.kind]
        vision = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
            patch_size=PATCH,
        )  # fmt: skip
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision, text_config=tiny._text("llama", 5).to_dict(), image_token_id=IMAGE_ID,
            scale_factor=2, pad_token_id=PAD,
        )  # fmt: skip
        return tiny._ready(getattr(transformers, f"{name}ForConditionalGeneration")(config), attn)

    def batch(self, model: Any, rows: Sequence[Sequence[str]], padding: str = "left") -> Inputs:
        made, ids, left, tiles = torch.Generator().manual_seed(0), [], list(tiny.TILES * 3), []
        for row in rows:
            ids.append([1])
            tiles.append(0)
            for part in row:
                if part == IMAGE:
                    count = left.pop(0)
                    tiles[-1] += count
                    ids[-1] += [OPEN, *[IMAGE_ID] * 9] * count + [CLOSE]
                else:
                    ids[-1] += _letters(part)
        out = _padded(ids, padding)
        if sum(tiles):
            pixels = torch.zeros(len(rows), max(tiles), 3, SIDE, SIDE)
            for b, count in enumerate(tiles):
                pixels[b, :count] = torch.randn(count, 3, SIDE, SIDE, generator=made)
            out["pixel_values"] = pixels
        return out

    def single(self, model: Any, inputs: Inputs, b: int) -> Inputs:
        out = _unpadded(inputs, b)
        if count := int((out["input_ids"] == IMAGE_ID).sum()) // 9:
            out["pixel_values"] = inputs["pixel_values"][b : b + 1, :count]
        return out

    def grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        return [(3, 3)] * (int((inputs["input_ids"] == IMAGE_ID).sum()) // 9)


def _letters(text: str) -> list[int]:
    return [8 + (ord(c) - 97) % 50 for c in text]


def _padded(ids: list[list[int]], padding: str) -> Inputs:
    width, out = max(map(len, ids)), {}
    for name, rows in (("input_ids", ids), ("attention_mask", [[1] * len(row) for row in ids])):
        pads = [[PAD] * (width - len(row)) for row in rows]
        out[name] = torch.tensor([p + r if padding == "left" else r + p for p, r in zip(pads, rows, strict=True)])
    return out


def _unpadded(inputs: Inputs, b: int) -> Inputs:
    real = inputs["attention_mask"][b].bool()
    names = [name for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs]
    return {name: inputs[name][b : b + 1, real] for name in names}


FAMILIES = [
    Family(Llava(), "llava"),
    Family(LlavaNext(), "llava_next"),
    Family(LlavaOnevision(), "llava_onevision"),
    Family(InternVL(), "internvl"),
    Chat(InternVLChat(), "internvl_chat"),
    QwenVL(Qwen25VL(), "qwen2_vl"),
    QwenVL(Qwen25VL(), "qwen2_5_vl"),
    QwenVL(Qwen3VL(), "qwen3_vl"),
    Idefics(Idefics3(), "idefics3"),
    Idefics(Idefics3(), "smolvlm"),
]
