"""``python -m lightning_curvature``: the command ``lightning-curvature``."""

from lightning_curvature.command import main

if __name__ == "__main__":
    main()
