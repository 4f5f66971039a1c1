"""The page of a report: one HTML file that holds all it shows, with its pictures beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment

from lightning_curvature.report.reading import read_runs
from lightning_curvature.report.sections import SECTIONS
from lightning_curvature.report.series import Series, all_series, in_order, prefixes, symbol
from lightning_curvature.report.style import colour
from lightning_curvature.report.words import measured, number, three_sentences

PAGE = "report.html"
_REGIME = ("regime", "regime_alarm")


class Figure(NamedTuple):
    """A section of the page with its pictures as data URIs."""

    id: str
    title: str
    says: str
    pictures: list[str]


class Row(NamedTuple):
    """A row of a table: a name, its key, one cell for each run, and whether the cells differ."""

    name: str
    key: str
    cells: list[str]
    differs: bool


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, prefix: str = "curvature") -> Path:
    """Write the report of all runs in folders, and return the path of its page.

    Args:
        folders: of runs, or above them.
        out: folder of the page and its pictures; default: ``report`` in the first of the folders.
        prefix: of the monitors.

    Raises:
        ValueError: for a folder without runs, or runs without values of the prefix.
    """
    runs = read_runs(folders)
    series = all_series(runs, prefix)
    target = Path(folders[0]) / "report" if out is None else Path(out)
    target.mkdir(parents=True, exist_ok=True)
    figures, missing = [], []
    for section in SECTIONS:
        pictures = [_png(figure) for figure in section.draw(series)]
        for place, picture in enumerate(pictures, start=1):
            ending = f"_{place}" if len(pictures) > 1 else ""
            (target / f"{section.id}{ending}.png").write_bytes(picture)
        if pictures:
            figures.append(Figure(section.id, section.title, section.says, list(map(_uri, pictures))))
        else:
            missing.append(f"{section.title.lower()}: {section.monitor}")
    settings = settings_table(series)
    if not settings:
        missing.append("configuration: self.save_hyperparameters()")
    text = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    html = page.render(
        runs=[(one.run.name, colour(i), three_sentences(one), _steps(one)) for i, one in enumerate(series)],
        figures=figures,
        values=values_table(series),
        settings=settings,
        missing=missing,
        prefix=prefix,
        others=[other for other in prefixes(runs) if other != prefix],
    )
    (target / PAGE).write_text(html, encoding="utf-8")
    return target / PAGE


def _png(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _steps(one: Series) -> str:
    """Return how many steps a run has logged."""
    last = max((int(points.steps[-1]) for points in (*one.values.values(), *one.losses.values())), default=0)
    return f"steps 0 to {last:,}"


def values_table(series: Sequence[Series]) -> list[Row]:
    """Return a row for each key: the last value of each run with error, share of the edge and step."""
    keys = in_order({key for one in series for key in one.values if key not in _REGIME})
    names = {key: symbol(key) if symbol(key) != key else key.replace("_", " ") for key in keys}
    return [Row(names[key], key, [_last(one, key) for one in series], False) for key in keys]


def _last(one: Series, key: str) -> str:
    if key not in one.values:
        return ""
    points, share = one.values[key], one.shares.get(key)
    said = measured(points)
    if share is not None and share is not points and np.isfinite(share.values[-1]):
        said += f" ({number(share.values[-1])} of the edge)"
    if np.isnan(points.values[-1]) and points.finite.steps.size:
        return f"NaN; {measured(points.finite)} at step {points.finite.steps[-1]:,}"
    return f"{said} at step {points.steps[-1]:,}"


def settings_table(series: Sequence[Series]) -> list[Row]:
    """Return a row for each hyperparameter, nested ones by dotted names; those that differ between runs are marked."""
    by_run = [dict(_flat(one.run.hparams)) for one in series]
    keys = dict.fromkeys(key for found in by_run for key in found)
    rows = [(key, [found.get(key, "") for found in by_run]) for key in keys]
    return [Row(key, key, cells, len(set(cells)) > 1) for key, cells in rows]


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{above}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, str(value))]
    return found
