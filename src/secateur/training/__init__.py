"""Training after (or while) cutting: one loop, and one file for each published procedure."""
