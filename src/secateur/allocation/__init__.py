"""How much to take from each matrix. ``allocators[name]`` is the class; see ``secateur allocators``."""

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.plan import Plan
from secateur.registry import Registry

allocators: Registry[type[Allocator]] = Registry(
    "allocator",
    {
        "uniform": "secateur.allocation.uniform:Uniform",
        "global": "secateur.allocation.global_rank:Global",
        "incremental": "secateur.allocation.incremental:Incremental",
    },
    group="secateur.allocators",
)

__all__ = ["Allocator", "Plan", "Problem", "allocators"]
