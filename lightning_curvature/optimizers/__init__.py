"""The update of an optimizer, made or tried, and the thresholds of its stability."""
