"""Loading, anatomy (what the pruner sees of a model), and block-wise weights on disk."""
