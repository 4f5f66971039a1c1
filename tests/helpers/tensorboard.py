"""What TensorBoard would show of a run."""

from __future__ import annotations

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout


def layouts(directory: str | Path) -> list[Layout]:
    """Every custom layout in the event files of a directory."""
    found = []
    for file in sorted(Path(directory).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload()
        if "custom_scalars__config__" in events.Tags()["tensors"]:
            for event in events.Tensors("custom_scalars__config__"):
                found.append(Layout.FromString(event.tensor_proto.string_val[0]))
    return found


def charts(layout: Layout) -> dict[str, list[str]]:
    """Keys of each chart by its title; each tag is an expression that is true of one key alone, or of one group."""
    return {chart.title: [_key(tag) for tag in chart.multiline.tag] for chart in layout.category[0].chart}


def _key(tag: str) -> str:
    assert tag[0] == "^"
    assert tag[-1] in "$/"
    key = re.sub(r"\\(.)", r"\1", tag[1:].removesuffix("$"))
    assert re.compile(tag).match(key)  # as TensorBoard does it
    return key


def read(directory: str) -> EventAccumulator:
    # No limits on how many are read back.
    events = EventAccumulator(directory, size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    return events
