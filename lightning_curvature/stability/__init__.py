"""The stability index of mini-batch training: how near the path is to instability in the mean square."""
