"""The recipe executed step by step in one folder: the checkpoint, the log and the result."""
