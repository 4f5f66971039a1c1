"""Runs, as Lightning's loggers have left them in folders: CSV or TensorBoard's event files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_curvature.arguments import sentence

METRICS, EVENTS, HPARAMS = "metrics.csv", "events.out.tfevents.*", "hparams.yaml"
# Lightning's loggers write the epoch beside each value, and TensorBoard's hyperparameters a value that means nothing.
_NO_VALUES = ("epoch", "step", "hp_metric")
_REMEDY = f"give a folder that CSVLogger ({METRICS}) or TensorBoardLogger ({EVENTS}) has written, or one above"
_TEXT_ENDING = "/text_summary"


@dataclass(frozen=True)
class Curve:
    """Logged values of one name.

    Attributes:
        steps: increasing, (points,) int.
        values: NaN and infinity as they were logged, (points,) float.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: the part of its path in which it differs from the other runs.
        folder: of its files.
        curves: by logged name.
        texts: of TensorBoard, by logged name: the step and the text of each.
        hparams: what ``save_hyperparameters`` has kept.
    """

    name: str
    folder: Path
    curves: Mapping[str, Curve]
    texts: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)
    hparams: Mapping[str, Any] = field(default_factory=dict)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return all runs in folders and below them, in the order of the folders.

    Raises:
        ValueError: if a folder does not exist, or there is no run in it.
    """
    found = list(dict.fromkeys(run for folder in folders for run in _folders_of_runs(Path(folder))))
    return [_read(folder, name) for folder, name in zip(found, names_of(found), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return short names of folders: the parts of their paths without those that begin or end all of them."""
    parts = [folder.resolve().parts for folder in folders]
    if len(parts) == 1:
        last = parts[0][-1]
        return ["/".join(parts[0][-2:]) if last.startswith("version_") else last]
    start = _common(parts)
    inner = [one[start:] for one in parts]
    end = _common([one[::-1] for one in inner]) if min(map(len, inner)) > 1 else 0
    return ["/".join(one[: len(one) - end]) or "." for one in inner]


def _common(parts: Sequence[Sequence[str]]) -> int:
    """Return with how many equal parts all begin."""
    count = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _folders_of_runs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise sentence("DIR", "be a folder", f"{str(folder)!r}, where there is none", _REMEDY)
    files = [*folder.rglob(METRICS), *folder.rglob(EVENTS)]
    if not files:
        raise sentence("DIR", "hold a logged run", f"{str(folder)!r} without one", _REMEDY)
    return sorted({file.parent for file in files})


def _read(folder: Path, name: str) -> Run:
    points: dict[str, dict[int, float]] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    if any(folder.glob(EVENTS)):
        _read_events(folder, points, texts)
    if (folder / METRICS).is_file():
        _read_csv(folder / METRICS, points)  # of both the ones with all digits
    curves = {key: _curve(by_step) for key, by_step in points.items() if key not in _NO_VALUES}
    return Run(name, folder, curves, texts, _read_hparams(folder / HPARAMS))


def _curve(by_step: Mapping[int, float]) -> Curve:
    steps = sorted(by_step)
    return Curve(np.array(steps, dtype=np.int64), np.array([by_step[step] for step in steps], dtype=np.float64))


def _read_csv(file: Path, points: dict[str, dict[int, float]]) -> None:
    """Read what CSVLogger has written: a row for each call, with empty fields; of equal steps the last one counts."""
    with file.open(newline="", encoding="utf-8") as opened:
        for number, row in enumerate(csv.DictReader(opened), start=2):
            try:
                step = int(float(row["step"]))
                for key, value in row.items():
                    if value:
                        points.setdefault(key, {})[step] = float(value)
            except (KeyError, TypeError, ValueError):
                got = f"{str(file)!r}, whose line {number} is another"
                raise sentence("DIR", "hold numbers by steps, as CSVLogger writes them", got, _REMEDY) from None


def _read_events(folder: Path, points: dict[str, dict[int, float]], texts: dict[str, list[tuple[int, str]]]) -> None:
    """Read scalars and texts of all event files of a folder; nothing is thinned."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = {"scalars": 0, "tensors": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(folder), size_guidance=kept)
    events.Reload()
    for tag in events.Tags()["scalars"]:
        points.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    for tag in events.Tags()["tensors"]:
        if tag.endswith(_TEXT_ENDING):
            texts[tag.removesuffix(_TEXT_ENDING)] = list(_texts(events.Tensors(tag)))


def _texts(events: Iterable[Any]) -> Iterable[tuple[int, str]]:
    for event in events:
        yield event.step, b"\n".join(event.tensor_proto.string_val).decode(errors="replace")


class _Loader(yaml.SafeLoader):
    """Takes objects of Python for what they hold, or for their names."""


def _plain(loader: _Loader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) or tag.partition(":")[2]  # type: ignore[arg-type]


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _read_hparams(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise sentence(HPARAMS, "be YAML", f"{str(file)!r} ({str(error).splitlines()[0]})", "remove it") from None
    return found if isinstance(found, dict) else {}
