"""How much to take from each matrix."""
