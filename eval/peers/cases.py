"""Which reductions of whole models are run from checkouts of other packages, and what each is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtr.eval.peers.catalogue import HERE, Peer
from vtr.eval.peers.random_models import LLAVA, QWEN


@dataclass(frozen=True)
class Case:
    """One reduction of one model: a quarter of its vision tokens stays.

    Attributes:
        kind: of the model. method: as the peer's worker knows it. ours: spec of the policy beside it.
        settings: what the worker is told. drawn: at random, so that both need not keep the same tokens.
    """

    kind: str
    method: str
    ours: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False


def _angelslim(kind: str) -> tuple[Case, ...]:
    """By the files that it ships, whose ratio is what is dropped; a cut "0" comes after the first layer."""
    object_layer = 9 if kind == LLAVA else 16
    return tuple(
        Case(kind, f"{name}_r0.75", ours, drawn=name == "random")
        for name, ours in (
            ("baseline", "none"),
            ("random", "random:keep=0.25,before_decoder=true"),
            ("divprune", "divprune:0.25"),
            ("hiprune", f"hiprune:0.25,object_layer={object_layer}"),
            ("scope", "scope:0.25,features=projected"),
            ("vispruner", "vispruner:0.25"),
            ("visionzip", "visionzip:0.25"),
            ("idpruner", "mmr:0.25"),
            ("fastv", "fastv:keep=0.25,layer=1"),
            ("dart", "dart:keep=0.25,layer=1"),
        )
    )


FASTV = Case(QWEN, "FastV", "fastv:keep=0.25,layer=2", {"pruning_loc": 2, "rate": 0.75})
DART = Case(
    QWEN, "DART", "dart:keep=0.25,layer=2,placement=official",
    {"pruning_loc": 2, "reduction_ratio": 0.75, "pivot_image_token": 4, "pivot_text_token": 4},
)  # fmt: skip
DIVPRUNE = Case(QWEN, "DivPrune", "divprune:0.25", {"reduction_ratio": 0.75})
SPARSE = Case(
    QWEN, "SparseVLM", "sparsevlm:keeps=[0.5,0.33,0.25],layers=[2,3,4],positions=keep",
    {"pruning_loc": [2, 3, 4], "reduction_ratio": 0.6667, "merge_flag": True, "prune_flag": True},
)  # fmt: skip
WHOLE = {"prune_only": False, "merge_only": False}
LIGHT = (
    FASTV,
    DART,
    DIVPRUNE,
    Case(QWEN, "VisPruner", "vispruner:0.25", {"prune_ratio": 0.75, "important_ratio": 0.5}),
    Case(QWEN, "VisionZip", "visionzip:0.25", {"dominant": 0.21875, "contextual": 0.03125, **WHOLE}),
    SPARSE,
    Case(
        QWEN, "RandomPrune", "random:keep=0.25,layer=2",
        {"pruning_loc": 2, "prune_ratio": 0.75, "metric": "random"}, drawn=True,
    ),
    Case(LLAVA, "FasterVLM", "fastervlm:0.25", {"rate": 0.75}),
    Case(LLAVA, "VisionZip", "visionzip:0.25", {"dominant": 14, "contextual": 2, **WHOLE}),
    Case(
        LLAVA, "PyramidDrop", "pyramid:keeps=[0.5,0.25,0.125],layers=[1,3,4],positions=keep",
        {"image_token_ratio_list": [0.5, 0.25, 0.125], "layer_list": [1, 3, 4]},
    ),
    *(Case(LLAVA, case.method, case.ours, case.settings) for case in (FASTV, DART, DIVPRUNE, SPARSE)),
)  # fmt: skip

ANGELSLIM = Peer("AngelSlim", HERE / "angelslim_worker.py", (), ("transformers==5.6.2",))
"""The oldest that it asks for: >= 5.6."""
ANGELSLIM_NOW = Peer("AngelSlim on current transformers", HERE / "angelslim_worker.py", ())
LIGHTCOMPRESS = Peer(
    "LightCompress", HERE / "lightcompress_worker.py", (), ("transformers==4.51.3", "loguru", "einops")
)
"""The transformers that its Qwen2.5-VL names."""
CASES: dict[str, tuple[tuple[Peer, tuple[Case, ...]], ...]] = {
    "angelslim": (
        (ANGELSLIM, (*_angelslim(LLAVA), *_angelslim(QWEN))),
        (ANGELSLIM_NOW, tuple(case for kind in (LLAVA, QWEN) for case in _angelslim(kind)[2:3])),
    ),
    "lightcompress": ((LIGHTCOMPRESS, LIGHT),),
}
"""Checkout → who is run from it, and what."""
