"""Solving a closure problem at one price: exactly by minimum cut, or with a certified gap."""

from secateur.forests.solvers.interface import SOLVERS, Cut, resolve_solver, solve

__all__ = ["SOLVERS", "Cut", "resolve_solver", "solve"]
