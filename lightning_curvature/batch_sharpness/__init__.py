"""Sharpness of mini-batches along their own gradients, and its relatives."""
