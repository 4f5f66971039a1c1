"""The training step, recorded and repeated without a trace."""
