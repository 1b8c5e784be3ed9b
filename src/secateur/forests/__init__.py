"""Forests on a feature budget: BudgetPrune, solved exactly, and its baselines.

>>> from secateur.forests import BudgetPruner
"""

from secateur.forests.baselines import (
    CostComplexityPruner,
    DepthLimitPruner,
    GreedyPruner,
    Unpruned,
)
from secateur.forests.boosting import BoostingPruner
from secateur.forests.budgetrf import BudgetRF
from secateur.forests.checks import FeatureCosts, ForestInputError
from secateur.forests.lazy import LazyPrediction
from secateur.forests.pruner import BudgetPruner, PathPoint, PrunePath
from secateur.forests.store import load_forest, save_forest

__all__ = [
    "BoostingPruner",
    "BudgetPruner",
    "BudgetRF",
    "CostComplexityPruner",
    "DepthLimitPruner",
    "FeatureCosts",
    "ForestInputError",
    "GreedyPruner",
    "LazyPrediction",
    "PathPoint",
    "PrunePath",
    "Unpruned",
    "load_forest",
    "save_forest",
]
