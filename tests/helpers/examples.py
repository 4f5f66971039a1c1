"""What the examples print and log."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Everything TensorBoard would show of the one run in ``folder``."""
    events = EventAccumulator(str(folder / "version_0")).Reload()
    return {key: {e.step: e.value for e in events.Scalars(key)} for key in events.Tags()["scalars"]}


def rows(printed: str, first: str) -> list[list[str]]:
    """Words of the printed lines that start with ``first``."""
    return [line.split() for line in printed.splitlines() if line.startswith(first)]
