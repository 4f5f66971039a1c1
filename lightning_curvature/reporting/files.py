"""Names of files beside those of earlier runs."""

import itertools
from collections.abc import Sequence
from typing import Any

from lightning_curvature.reporting.loggers import warn


def free_name(files: Any, name: str, endings: Sequence[str]) -> str:
    """Return a name that no file with these endings has: ``name``, or ``name-v1``, …, with a warning.

    Lightning's checkpoints are named in this way, too.
    """
    for version in itertools.count():
        free = f"{name}-v{version}" if version else name
        if not any(files.exists(f"{free}{ending}") for ending in endings):
            break
    if free != name:
        warn(
            f"the logger's folder must not hold results of an earlier measurement under the same name, got {name!r}: "
            f"they are kept, and the new ones are written to {free!r}; give each run a folder of its own."
        )
    return free
