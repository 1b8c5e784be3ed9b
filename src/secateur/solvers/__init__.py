"""Pure tensor algebra: OBS sweeps, masked least squares. Knows nothing of models."""
