"""Numbers and failures that ranks share."""
