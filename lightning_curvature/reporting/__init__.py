"""Loggers, progress bars and pictures."""
