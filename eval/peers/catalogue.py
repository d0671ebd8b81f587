"""Which public implementations are run, in which versions, and what each is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One method of a peer beside one policy of ours.

    Attributes:
        name: as the peer's worker knows it.
        ours: spec of the policy it is compared with; ``{keep}`` and ``{layer}`` are filled in.
        note: what the comparison means.
        batch: rows a call; above 1 each row's tokens are compared with those of the row alone.
    """

    name: str
    ours: str
    note: str
    batch: int = 1


@dataclass(frozen=True)
class Peer:
    """A package, and how to run it.

    Attributes:
        name: as the table shows it. requirements: what its environment gets, as it pins them.
        bare: packages installed without what they pin, to see them beside current transformers.
        worker: a script that answers start, answer and time (see ``channel.serve``).
        alone: its environment sees none of our packages, torch neither: what it pins does not go with them.
    """

    name: str
    worker: Path
    methods: tuple[Method, ...]
    requirements: tuple[str, ...] = ()
    bare: tuple[str, ...] = field(default=())
    alone: bool = False


FASTV = "fastv:keep={keep},layer={layer}"
DIVERSE = "diverse:keep={keep},layer={layer}"
RANDOM = "random:keep={keep},layer={layer}"
CACHE_ONLY = (
    "kvpress reads the whole picture and then shortens every layer's cache: decoding gets cheaper, prefill does not; "
    "it sees no question. Same number of cached tokens on both sides, mean over layers."
)
ALL_PEERS = (
    Peer(
        "kvpress 0.5.5",
        HERE / "kvpress_worker.py",
        (
            Method("SnapKVPress()", FASTV, CACHE_ONLY),
            Method("SnapKVPress(window_size=8)", FASTV, CACHE_ONLY),
            Method("ExpectedAttentionPress()", DIVERSE, CACHE_ONLY),
            Method("RandomPress()", RANDOM, CACHE_ONLY),
            Method(
                "SnapKVPress()",
                FASTV,
                "Eight left-padded prompts in one generate, picture and question under the press together, one ratio "
                "for all: the first token comes before the cache is shortened, so accuracy says nothing; same_as_alone "
                "does (share of rows that decode what they decode alone, pictures of several shapes).",
                batch=8,
            ),
        ),
        ("kvpress==0.5.5",),
    ),
    Peer(
        "kvpress 0.5.5 on current transformers",
        HERE / "kvpress_worker.py",
        (Method("SnapKVPress()", FASTV, "kvpress pins transformers <5.3; here it is installed beside vtr's."),),
        ("cachetools", "fire", "pandas", "datasets", "peft", "accelerate", "requests"),
        ("kvpress==0.5.5",),
    ),
    Peer(
        "sparsevlm 0.1.3",
        HERE / "image_worker.py",
        (
            Method("sparsevlm_generate", FASTV, "Written for Qwen2-VL: needs its rope_deltas."),
            Method("apply_sparsevlm", FASTV, "The package's hook interface."),
        ),
        ("sparsevlm==0.1.3",),
    ),
    Peer(
        "visionzip 0.1.3",
        HERE / "image_worker.py",
        (Method("visionzip", DIVERSE, "The wheels on PyPI (0.1, 0.1.1, 0.1.3) hold no code."),),
        ("visionzip==0.1.3",),
    ),
    Peer(
        "tomesd 0.1.3",
        HERE / "image_worker.py",
        (Method("tomesd", DIVERSE, "Token merging for Stable Diffusion's U-Net; the only ToMe on PyPI."),),
        ("tomesd==0.1.3",),
    ),
)
OPENVINO = Peer(
    "openvino-genai 2026.4.1",
    HERE / "openvino_worker.py",
    (),
    ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "transformers==4.57.6"),
    alone=True,  # its huggingface_hub is older than that of the packages beside our torch
)
"""CDPruner per call, on a model of its own: ``python -m vtr.eval.peers.cdpruner``."""
