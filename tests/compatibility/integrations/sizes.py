"""Sizes of all data here."""

SAMPLES, BATCH = 16, 4
