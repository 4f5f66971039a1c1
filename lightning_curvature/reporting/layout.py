"""TensorBoard's layout of custom charts."""

import re
import weakref
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger

from lightning_curvature.reporting.loggers import forget, tensorboards

LAYOUT_TITLE = "Curvature"
# End of the title of the chart that all monitors of a prefix share, which stands first.
SHARES = "share of the edge"

# TensorBoard keeps one layout a run: it is written once for all monitors of a Trainer.
_laid_out: "weakref.WeakSet[Logger]" = weakref.WeakSet()


def begin(trainer: pl.Trainer) -> None:
    """Begin a fit: forget the values of an earlier one, and write the layout where a logger has none.

    The layout is that of all monitors of this Trainer, their ``charts()``.
    """
    forget(trainer)
    charts: dict[str, dict[str, None]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callable(of_monitor := getattr(callback, "charts", None)):
            for title, keys in of_monitor(trainer).items():
                charts.setdefault(title, {}).update(dict.fromkeys(keys))
    first = sorted(charts, key=lambda title: not title.endswith(SHARES))
    for logger in tensorboards(trainer):
        if logger not in _laid_out:
            _laid_out.add(logger)
            logger.experiment.add_custom_scalars({LAYOUT_TITLE: {title: _lines(charts[title]) for title in first}})


def _lines(keys: Mapping[str, None]) -> list[object]:
    # TensorBoard takes tags for regular expressions, and matches their beginnings. What ends in a slash is a group: the
    # chart of all its series is the same in every run, and TensorBoard shows equal charts of several runs once.
    return ["Multiline", [f"^{re.escape(key)}{'' if key.endswith('/') else '$'}" for key in keys]]
