"""Losses of fixed data as functions of the parameters."""
