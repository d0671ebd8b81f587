"""vtr: vision-token reduction for multimodal LLMs, patched into a running model, chosen per request."""

from typing import TYPE_CHECKING, Any

import vtr._checkout  # (finds the families where vtr is not installed)
import vtr.integrations  # noqa: F401  (makes the model families known)
from vtr import (
    _moved,  # noqa: F401  (old names of modules)
    pocket,
)
from vtr.accounting import Report, report
from vtr.auto_policy import AutoPolicy
from vtr.base import Attend, Attention, Best, KeyNorms, Merged, Policy, Route, Token, Tokens, UnsupportedError
from vtr.budget import at_budget
from vtr.by_image import ByImage
from vtr.chain import Chain, policy
from vtr.engine.install import describe, patch, unpatch, use
from vtr.engine.resolve import shared_features
from vtr.engine.turns import fork
from vtr.image import Image, Pooled
from vtr.inputs import InputPolicy, split
from vtr.keep import keep_count, top
from vtr.policies import (
    AVTP,
    DART,
    EEMLLM,
    EVS,
    MMR,
    MSAC,
    SCM,
    TOPS,
    VTW,
    AutoScale,
    CDPruner,
    ClsTop,
    DeFT,
    DivPrune,
    Downsample,
    DyCoke,
    DynamicLLaVA,
    FasterVLM,
    FastV,
    FewerCrops,
    FitPrune,
    GlobalCom2,
    GSearch,
    HiPrune,
    HiRED,
    HoloV,
    Matryoshka,
    MMTok,
    MustDrop,
    OccamToken,
    PMoD,
    Pool,
    PruMerge,
    PruMergePlus,
    PruneSID,
    Pyramid,
    Random,
    Reroute,
    Scope,
    SparseVLM,
    SparseVLMPlus,
    ToMe,
    Trim,
    UniformGrid,
    VidCom2,
    VisionZip,
    VisPruner,
    VScan,
    ZipVL,
)
from vtr.processing import processor
from vtr.schedule import Schedule
from vtr.score import ScorePolicy
from vtr.settings import list_policies, policy_class, register_policy
from vtr.showing import display

__all__ = [
    "AVTP",
    "DART",
    "EEMLLM",
    "EVS",
    "MMR",
    "MSAC",
    "SCM",
    "TOPS",
    "VTW",
    "Attend",
    "Attention",
    "AutoPolicy",
    "AutoScale",
    "Best",
    "ByImage",
    "CDPruner",
    "Chain",
    "ClsTop",
    "DeFT",
    "DivPrune",
    "Downsample",
    "DyCoke",
    "DynamicLLaVA",
    "FastV",
    "FasterVLM",
    "FewerCrops",
    "FitPrune",
    "GSearch",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "HoloV",
    "Image",
    "InputPolicy",
    "KeyNorms",
    "MMTok",
    "Matryoshka",
    "Merged",
    "MustDrop",
    "OccamToken",
    "PMoD",
    "Policy",
    "Pool",
    "Pooled",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "Pyramid",
    "Random",
    "Report",
    "Reroute",
    "Route",
    "Schedule",
    "Scope",
    "ScorePolicy",
    "SparseVLM",
    "SparseVLMPlus",
    "ToMe",
    "Token",
    "Tokens",
    "Trim",
    "UniformGrid",
    "UnsupportedError",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "ZipVL",
    "at_budget",
    "chat",
    "describe",
    "display",
    "fork",
    "keep_count",
    "list_policies",
    "patch",
    "pocket",
    "policy",
    "processor",
    "register_policy",
    "report",
    "search",
    "shared_features",
    "split",
    "testing",
    "top",
    "unpatch",
    "use",
    "visualize",
]
__version__ = "0.2.0"

if TYPE_CHECKING:
    from vtr import chat, search, testing, visualize
else:

    def __getattr__(name: str) -> Any:
        """Modules that are loaded when they are first asked for, and policies of ``vtr.policies`` not named above."""
        if name in ("chat", "search", "testing", "visualize"):
            import importlib

            return importlib.import_module(f"vtr.{name}")
        for policy_name in list_policies():
            cls = policy_class(policy_name)
            if cls.__name__ == name and cls.__module__.startswith("vtr.policies."):
                return cls
        raise AttributeError(f"module 'vtr' has no attribute {name!r}")
