"""Figures this project reports, each with the command that makes it."""
