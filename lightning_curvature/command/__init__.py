"""The command ``lightning-curvature``: one file for each of its subcommands."""

from lightning_curvature.command.main import main

__all__ = ["main"]
