"""Forests on a feature budget: BudgetPrune, solved exactly, and its baselines.

>>> from secateur.forests import BudgetPruner
"""

from secateur.forests.checks import FeatureCosts, ForestInputError
from secateur.forests.pruner import BudgetPruner, PathPoint, PrunePath

__all__ = ["BudgetPruner", "FeatureCosts", "ForestInputError", "PathPoint", "PrunePath"]
