"""DSA: sparsity of a block as a searched function of its scores (Li, Dong et al. 2024)."""
