"""Base classes of the callbacks."""
