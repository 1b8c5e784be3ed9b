"""How much to take from each matrix. ``allocators[name]`` is the class; see ``secateur allocators``."""

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.plan import Plan
from secateur.registry import Registry

allocators: Registry[type[Allocator]] = Registry(
    "allocator",
    {
        "uniform": "secateur.allocation.uniform:Uniform",
        "global": "secateur.allocation.global_rank:Global",
        "owl": "secateur.allocation.owl:OWL",
        "dlp": "secateur.allocation.dlp:DLP",
        "atp": "secateur.allocation.atp:ATP",
        "dsa": "secateur.allocation.dsa.allocator:DSA",
        "er": "secateur.allocation.erdos_renyi:ER",
        "erk": "secateur.allocation.erdos_renyi:ERK",
        "lamp": "secateur.allocation.lamp:LAMP",
        "alphapruning": "secateur.allocation.alpha_pruning:AlphaPruning",
        "als": "secateur.allocation.als:ALS",
        "incremental": "secateur.allocation.incremental:Incremental",
    },
    group="secateur.allocators",
)

__all__ = ["Allocator", "Plan", "Problem", "allocators"]
