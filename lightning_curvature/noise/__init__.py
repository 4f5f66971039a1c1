"""Covariance of the gradient noise against the curvature."""
