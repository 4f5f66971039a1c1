"""Regimes of training, from what the other monitors log, and what is done on an alarm."""
