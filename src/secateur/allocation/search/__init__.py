"""Searching allocations: a population of candidates, evaluated cheaply first, resumable."""
