"""The policies: one file a method, one class a method, in rooms by what they look at.

Every file of a room is imported here, so a new policy is registered by being there.
"""

import importlib
import pkgutil

from vtr.policies.blind.matryoshka import Matryoshka
from vtr.policies.blind.pool import Pool
from vtr.policies.blind.random_keep import Random
from vtr.policies.blind.uniform_grid import UniformGrid
from vtr.policies.decoder.avtp import AVTP
from vtr.policies.decoder.dart import DART
from vtr.policies.decoder.deft import DeFT
from vtr.policies.decoder.ee_mllm import EEMLLM
from vtr.policies.decoder.fastv import FastV
from vtr.policies.decoder.fitprune import FitPrune
from vtr.policies.decoder.gsearch import GSearch
from vtr.policies.decoder.mustdrop import MustDrop
from vtr.policies.decoder.occamtoken import OccamToken
from vtr.policies.decoder.pyramid import Pyramid
from vtr.policies.decoder.reroute import Reroute
from vtr.policies.decoder.scm import SCM
from vtr.policies.decoder.sparsevlm import SparseVLM
from vtr.policies.decoder.sparsevlm_plus import SparseVLMPlus
from vtr.policies.decoder.tops import TOPS
from vtr.policies.decoder.vtw import VTW
from vtr.policies.decoder.zipvl import ZipVL
from vtr.policies.input.downsample import Downsample
from vtr.policies.input.fewer_crops import FewerCrops
from vtr.policies.input.msac import MSAC
from vtr.policies.picture.cls_top import ClsTop
from vtr.policies.picture.divprune import DivPrune
from vtr.policies.picture.dycoke import DyCoke
from vtr.policies.picture.evs import EVS
from vtr.policies.picture.fastervlm import FasterVLM
from vtr.policies.picture.globalcom2 import GlobalCom2
from vtr.policies.picture.hiprune import HiPrune
from vtr.policies.picture.hired import HiRED
from vtr.policies.picture.holov import HoloV
from vtr.policies.picture.mmr import MMR
from vtr.policies.picture.prumerge import PruMerge, PruMergePlus
from vtr.policies.picture.prunesid import PruneSID
from vtr.policies.picture.scope import Scope
from vtr.policies.picture.tome import ToMe
from vtr.policies.picture.vidcom2 import VidCom2
from vtr.policies.picture.visionzip import VisionZip
from vtr.policies.picture.vispruner import VisPruner
from vtr.policies.picture.vscan import VScan
from vtr.policies.question.cdpruner import CDPruner
from vtr.policies.question.mmtok import MMTok
from vtr.policies.question.trim import Trim
from vtr.policies.trained.autoscale import AutoScale
from vtr.policies.trained.dynamic_llava import DynamicLLaVA
from vtr.policies.trained.pmod import PMoD

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
    "AutoScale",
    "CDPruner",
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
    "MMTok",
    "Matryoshka",
    "MustDrop",
    "OccamToken",
    "PMoD",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PruneSID",
    "Pyramid",
    "Random",
    "Reroute",
    "Scope",
    "SparseVLM",
    "SparseVLMPlus",
    "ToMe",
    "Trim",
    "UniformGrid",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "ZipVL",
]

for _file in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
