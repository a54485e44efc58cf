"""Sparse pre-training plans: which weights are zero, when that changes, how gradients pass."""
