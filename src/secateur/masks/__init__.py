"""Targets, exact selection, and the bit-packed record of what is gone."""
