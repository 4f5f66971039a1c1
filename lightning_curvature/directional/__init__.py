"""Curvature along the update that the optimizer really made."""
