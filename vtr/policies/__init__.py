"""The policies: one file a method, one class a method."""

from vtr.policies.fastv import FastV
from vtr.policies.gsearch import GSearch
from vtr.policies.pool import Pool
from vtr.policies.pyramid import Pyramid
from vtr.policies.random_keep import Random
from vtr.policies.uniform_grid import UniformGrid

__all__ = ["FastV", "GSearch", "Pool", "Pyramid", "Random", "UniformGrid"]
