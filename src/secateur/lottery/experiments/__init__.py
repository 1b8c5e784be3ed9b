"""The experiments behind docs/lottery.md; each is one command, one record and one chart.

``experiments[name](quick, seed, progress)`` returns an ``Experiment``.
"""

from secateur.lottery.experiments.base import Experiment, Run
from secateur.registry import Registry

experiments: Registry[Run] = Registry(
    "experiment",
    {
        "growth": "secateur.lottery.experiments.growth:run",
        "pools": "secateur.lottery.experiments.pools:run",
        "success": "secateur.lottery.experiments.success:run",
        "sizes": "secateur.lottery.experiments.sizes:run",
        "popup": "secateur.lottery.experiments.popup:run",
    },
)

__all__ = ["Experiment", "Run", "experiments"]
