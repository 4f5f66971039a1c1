"""Figures without pyplot, whose figures and backend belong to the user; matplotlib is optional."""

from typing import Any

import numpy


def new_figure(**options: Any) -> Any | None:
    """Return an empty matplotlib figure, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def picture_of(figure: Any) -> Any:
    """Return a figure as an image, (H, W, 3) uint8."""
    figure.canvas.draw()
    return numpy.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
