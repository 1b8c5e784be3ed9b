"""Loading, anatomy (what the pruner sees of a model), and block-wise weights on disk."""

from secateur.models.anatomy import Block, Matrix, ModelView, capture_inputs

__all__ = ["Block", "Matrix", "ModelView", "capture_inputs"]
