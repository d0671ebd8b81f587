"""What policies share that compare patches with the question in CLIP's joint space: the text tower and projections."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vtr.base import Policy, UnsupportedError
from vtr.image import Image
from vtr.limits import short

Segments = Literal["whole", "official", "cut"]
"""How a question longer than the text tower takes becomes rows: "whole" sentences of begin and end each; "official" as
CDPruner's code, its ids cut wherever a row is full and the last row filled with 0; "cut" keeps one row, the first."""
MEMO = 32
"""Questions whose embedding is kept."""


class TextTower:
    """A CLIP checkpoint's text tower and both projections, in float32. Copies of a policy share it.

    Attributes:
        clip_tokenizer: CLIP's. tokenizer: the language model's, to read the question's ids; None if nobody gave it.
        flops: of the products made since somebody set it to 0.
    """

    def __init__(self, clip: Any, clip_tokenizer: Any, tokenizer: Any = None) -> None:
        self.clip_tokenizer, self.tokenizer, self.flops = clip_tokenizer, tokenizer, 0
        self.text, self.text_projection = clip.text_model, clip.text_projection
        self.visual_projection = clip.visual_projection
        self._known: dict[Any, torch.Tensor] = {}

    def __deepcopy__(self, memo: Any) -> TextTower:
        return self

    @property
    def length(self) -> int:
        """Tokens that a row may have."""
        return int(self.text.config.max_position_embeddings)

    def with_tokenizer(self, tokenizer: Any, clip_tokenizer: Any = None) -> TextTower:
        """The same modules beside another tokenizer of the language model (or its processor), or of CLIP."""
        made = TextTower.__new__(TextTower)
        made.__dict__.update(self.__dict__, _known={})
        made.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        made.clip_tokenizer = clip_tokenizer or self.clip_tokenizer
        return made

    def question(self, image: Image, given: str | None = None) -> str:
        """The question as text: what is ``given``, or the row's text behind its last image.

        Raises:
            UnsupportedError: neither is known.
        """
        if given is not None:
            return given
        if self.tokenizer is None or image.question_ids is None:
            lacks = (
                "the language model's tokenizer" if self.tokenizer is None else "input_ids (the call gives embeddings)"
            )
            raise UnsupportedError(
                f"CLIP has words of its own, and without {lacks} the question's text is not known: load the text tower "
                "with load_text_tower(name, tokenizer=…), or set question='…' for the request"
            )
        text: str = self.tokenizer.decode(image.question_ids, skip_special_tokens=True)
        return text.strip()

    def embed(self, text: str, segments: Segments = "whole", device: Any = "cpu") -> torch.Tensor:
        """float32 [M, C]: ``text`` in the joint space, one row a segment; not normalised."""
        key = (text, segments, str(device))
        if key not in self._known:
            ids = self.clip_tokenizer(text)["input_ids"]
            made = self.embed_ids(ids, segments, device)
            for old in list(self._known)[: max(len(self._known) - MEMO + 1, 0)]:
                self._known.pop(old, None)
            self._known[key] = made
        return self._known[key]

    @torch.no_grad()
    def embed_ids(self, ids: list[int], segments: Segments = "whole", device: Any = "cpu") -> torch.Tensor:
        """:meth:`embed` of CLIP's token ids, the tokens of begin and end among them."""
        rows = rows_of_ids(list(ids), self.length, segments)
        width = max(len(row) for row in rows)
        filled = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        text, projection = self.text.to(device), self.text_projection.to(device)
        self.flops += sum(2 * filled.numel() * m.weight.numel() for m in text.modules() if isinstance(m, nn.Linear))
        self.flops += 2 * len(rows) * projection.weight.numel()
        out: torch.Tensor = projection(text(input_ids=filled, attention_mask=mask).pooler_output)
        return out

    @torch.no_grad()
    def project(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [..., C]: patches [..., width], behind the tower's last norm, in the joint space.

        Raises:
            UnsupportedError: they are of another tower.
        """
        projection = self.visual_projection.to(states.device)
        if states.shape[-1] != projection.in_features:
            raise UnsupportedError(
                f"this CLIP checkpoint's patches have {projection.in_features} channels, the model's vision tower "
                f"{states.shape[-1]}: load the text tower of the checkpoint that the tower is from"
            )
        self.flops += 2 * states.numel() * projection.out_features
        out: torch.Tensor = projection(states.float())
        return out


def rows_of_ids(ids: list[int], length: int, segments: Segments) -> list[list[int]]:
    """Ids of a text, begin and end among them, as rows of at most ``length``: see :data:`Segments`."""
    if len(ids) <= length:
        return [ids]
    if segments == "official":
        return [ids[a : a + length] for a in range(0, len(ids), length)]
    begin, words, end = ids[0], ids[1:-1], ids[-1]
    cut = [words[a : a + length - 2] for a in range(0, len(words), length - 2)]
    return [[begin, *some, end] for some in cut[: 1 if segments == "cut" else None]]


def load(name: str) -> TextTower:
    """The text tower of the CLIP checkpoint ``name``, a folder or a name on the hub; read again if a folder changed.

    Raises:
        OSError, ValueError: there is none.
    """
    folder = Path(name)
    stamps = [file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return _load(name, max(stamps, default=0))


@lru_cache(maxsize=2)
def _load(name: str, stamp: int) -> TextTower:
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    kind = AutoConfig.from_pretrained(name).model_type
    if kind != "clip":
        raise ValueError(f"{name} is a checkpoint of {kind!r}, not of CLIP: name one with a text tower, such as "
                         "openai/clip-vit-large-patch14-336")  # fmt: skip
    kinds: Any = CLIPModel
    clip, told = kinds.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if lacks := sorted(k for k in told["missing_keys"] if not k.startswith(("vision_model.", "logit_scale"))):
        raise ValueError(f"{name} lacks the weights {', '.join(lacks[:3])}…: name a whole CLIP checkpoint")
    return TextTower(clip.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(name))


class ClipGuided(Policy):
    """Base of policies that may have a CLIP text tower. A subclass has the settings ``relevance``, ``text_tower: str |
    None`` and ``question: str | None``, and calls ``super().__post_init__()``."""

    relevance: Literal["auto", "clip", "embeddings"]
    text_tower: str | None
    question: str | None

    def __post_init__(self) -> None:
        if self.relevance not in ("auto", "clip", "embeddings"):
            raise ValueError(f"relevance={self.relevance!r}: choose 'auto', 'clip' or 'embeddings'")
        self._told = False
        for name in ("text_tower", "question"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        self._loaded: TextTower | None = None
        folder = self.text_tower
        if folder is not None and folder.startswith((".", "/", "~")) and not Path(folder).is_dir():
            raise OSError(f"text_tower={short(folder)!r}: there is no such folder")

    @property
    def _clip(self) -> TextTower | None:
        """The text tower, if there is one. That which the settings name is loaded when it is first asked for: making a
        policy reads no checkpoint."""
        if self._loaded is None and self.text_tower is not None:
            self._loaded = load(self.text_tower)
        return self._loaded

    @_clip.setter
    def _clip(self, tower: TextTower | None) -> None:
        self._loaded = tower

    def check_model(self, model: Any) -> None:
        """Before anything runs: the text tower that the settings name is there.

        Raises:
            OSError, ValueError: it is not, or is no CLIP checkpoint.
        """
        super().check_model(model)
        if self.asks_clip:
            _ = self._clip

    @property
    def asks_clip(self) -> bool:
        """Whether CLIP says what is relevant; else the language model's own embeddings do."""
        has_one = self._loaded is not None or self.text_tower is not None
        return self.relevance == "clip" or (self.relevance == "auto" and has_one)

    @torch.no_grad()
    def in_joint_space(self, image: Image, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's patches [tiles, n, C] and the question's segments [M, C], not normalised; what they cost is counted.

        Raises:
            UnsupportedError: there is no text tower, or the question's text is not known.
        """
        tower, clip = image.tower, self._clip
        if clip is None:
            raise UnsupportedError(
                "relevance='clip' wants a CLIP text tower: policy.load_text_tower('openai/clip-vit-large-patch14-336', "
                "tokenizer=…), or text_tower='…'; without one use relevance='embeddings'"
            )
        assert tower is not None
        before = clip.flops
        patches = clip.project(tower.final_norm(tower.hidden_states()))
        text = clip.embed(clip.question(image, self.question), segments, patches.device)
        image.flops += clip.flops - before
        return patches, text

    def tell(self) -> None:
        """Say once which variant runs, if nobody has asked for it."""
        if self.relevance == "auto" and not self._told:
            self._told = True
            warnings.warn(
                f"{self.name} has no CLIP text tower, so the language model's embeddings of the question say what is "
                "relevant. Say relevance='embeddings' if that is meant; for LLaVA's CLIP towers, "
                "policy.load_text_tower('openai/clip-vit-large-patch14-336', tokenizer=…)",
                UserWarning,
                stacklevel=2,
            )

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        return super().names_file(settings) or settings.get("text_tower") is not None

    def save_pretrained(self, folder: str | Path) -> None:
        """As for any policy.

        Raises:
            ValueError: ``text_tower`` is set: a policy file may not name another file.
        """
        if self.text_tower is not None:
            raise ValueError(
                f"text_tower={self.text_tower!r} names another file, which a policy file may not: save the policy "
                "without it, and call load_text_tower after loading"
            )
        super().save_pretrained(folder)

    def load_text_tower(self, name: str | Path, tokenizer: Any = None, clip_tokenizer: Any = None) -> Any:
        """Take the text tower of a CLIP checkpoint, the one that the model's vision tower is from.

        It is no setting: an equal policy may have none, and what is saved does not name it. Copies share it.

        Args:
            name: a folder, or a name on the hub. tokenizer: of the language model (or its processor), to read the
                question; not needed where ``question`` is set. clip_tokenizer: instead of the checkpoint's own.

        Returns:
            The policy itself.

        Raises:
            OSError, ValueError: it is no CLIP checkpoint.
        """
        self._clip = load(str(name)).with_tokenizer(tokenizer, clip_tokenizer)
        return self

    def asking(self, question: str) -> Any:
        """A copy for one request, with its text tower, whose question is this text."""
        import copy

        made = copy.copy(self)
        made.question = question
        return made
