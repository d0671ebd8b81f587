"""The policies: one file a method, one class a method."""

from vtr.policies.autoscale import AutoScale
from vtr.policies.cls_top import ClsTop
from vtr.policies.dynamic_llava import DynamicLLaVA
from vtr.policies.fastv import FastV
from vtr.policies.globalcom2 import GlobalCom2
from vtr.policies.gsearch import GSearch
from vtr.policies.matryoshka import Matryoshka
from vtr.policies.pmod import PMoD
from vtr.policies.pool import Pool
from vtr.policies.pyramid import Pyramid
from vtr.policies.random_keep import Random
from vtr.policies.uniform_grid import UniformGrid

__all__ = [
    "AutoScale",
    "ClsTop",
    "DynamicLLaVA",
    "FastV",
    "GSearch",
    "GlobalCom2",
    "Matryoshka",
    "PMoD",
    "Pool",
    "Pyramid",
    "Random",
    "UniformGrid",
]
