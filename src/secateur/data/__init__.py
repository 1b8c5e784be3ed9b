"""Texts for calibration and evaluation: files, and named corpora with hash and licence."""
