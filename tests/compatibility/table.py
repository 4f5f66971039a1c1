"""A pytest plugin that writes the outcomes of the tests: set-ups down, monitors across; in short, and test by test.

python -m pytest -p tests.compatibility.table --table docs/compatibility.md tests/compatibility tests/distributed
A test names another mark than ✓ by ``record_property("mark", …)``. An expected failure is one.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path

import lightning
import pytest
import torch

TITLES = {
    "test_trainer_features": "Trainer features",
    "test_trainer_records": "Loggers, checkpoints, early stopping",
    "test_other_loggers": "Loggers of other packages",
    "test_precisions": "Precisions",
    "test_quantized": "Quantized modules",
    "test_compile": "torch.compile",
    "test_optimizers": "Optimizers",
    "test_several_optimizers": "Several optimizers, steps by hand",
    "test_resume": "Resume",
    "test_integrations": "Modules of other packages",
    "distributed": "Two processes: ddp, FSDP2",
}
MONITORS = {
    "directional": "DirectionalCurvatureMonitor",
    "spectrum": "HessianSpectrumMonitor",
    "sharpness": "BatchSharpnessMonitor",
    "stabilization": "StabilizationMonitor",
    "noise": "NoiseCovarianceMonitor",
}
# Of which the versions stand beside the section.
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "timm",
    "torch-geometric",
    "lightly",
    "segmentation-models-pytorch",
    "diffusers",
    "pytorch-forecasting",
)
MARKS = {"passed": "✓", "failed": "**fails**", "skipped": "not run"}
HEAD = """\
# Where the monitors run

The tests write this page (`make compatibility`): {versions}. Each number is a number of set-ups;
[the evidence](compatibility_evidence.md) names them.

✓ under a monitor: the run is bit for bit the run without it, and its values are those of
an oracle, of one process or of the plain set-up, as the row says. *refused*: the monitor raises one clear sentence at
the start. *NaN*: the run is the same, and the monitor says why there is no value. *not run*: the test needs a GPU or a
missing package. All monitors refuse strategies that no CPU can run (FSDP1, DeepSpeed, XLA) and tensor parallelism;
`StabilizationMonitor` and `NoiseCovarianceMonitor` refuse sharded parameters (FSDP2).
"""
EVIDENCE = """\
---
orphan: true
---

# Where the monitors run: the evidence

The tests write this page; [the summary](compatibility.md) explains the marks. Each row is one or more tests.
"""

# (section, row) → monitor → marks of the tests behind it.
_found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, required=True, help="where to write the table")


def place_of(nodeid: str) -> tuple[str, str, str] | None:
    """Section, row and monitor ("" for all) of a test.

    Example:
        >>> place_of("tests/compatibility/test_precisions.py::test_values_and_run[bf16-true, probes None-directional]")
        ('Precisions', 'values and run: bf16-true, probes None', 'directional')
    """
    path, _, test = nodeid.partition("::")
    file, folder = Path(path).stem, Path(path).parent.name
    title = TITLES.get("distributed" if folder == "distributed" else file)
    if title is None:
        return None
    name, _, ids = test.partition("[")
    words, ids = name.removeprefix("test_").replace("_", " "), ids.removesuffix("]")
    monitor = next((m for m in MONITORS if m in words.split() or m in file or re.search(rf"(^|-){m}(-|$)", ids)), "")
    if not monitor and folder == "distributed":
        if file not in ("test_ddp", "test_fsdp2", "test_failures"):
            return None  # of several monitors, each in cases of its own
        monitor = "directional"
    ids = re.sub(rf"(^|-){monitor}(?=-|$)", "", ids).strip("-") if monitor else ids
    words = " ".join(word for word in words.split() if word not in (monitor, "features"))
    return title, ": ".join(part for part in (words, ids) if part), monitor


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    place = place_of(report.nodeid)
    if place is None or (report.when != "call" and report.passed):
        return
    section, row, monitor = place
    mark = "refused" if report.passed and "refused" in row else MARKS[report.outcome]
    if report.passed:
        mark = dict(report.user_properties).get("mark", mark)
    elif hasattr(report, "wasxfail"):
        mark = MARKS["failed"]
    for name in [monitor] if monitor else MONITORS:
        _found[section, row][name].append(mark)


def installed() -> str:
    """Return the packages that are installed, with their versions."""
    present = {dist.name.lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    return ", ".join(f"{name} {present[name]}" for name in PACKAGES if name in present)


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def head() -> list[str]:
    """Return the first two rows of a table."""
    return [row("", *MONITORS.values()), "|---" * (1 + len(MONITORS)) + "|"]


def sections() -> dict[str, dict[str, dict[str, str]]]:
    """Return the marks by section, row and monitor."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for title in TITLES.values():
        rows = {name: cells for (section, name), cells in _found.items() if section == title}
        if rows:
            found[title] = {
                name: {monitor: " ".join(sorted(set(cells.get(monitor, [])))) for monitor in MONITORS}
                for name, cells in rows.items()
            }
    return found


def summary(found: dict[str, dict[str, dict[str, str]]]) -> Generator[str, None, None]:
    """The page in short: how many set-ups of a section have which mark."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    yield from (HEAD.format(versions=versions), *head())
    for title, rows in found.items():
        counts = (Counter(cells[monitor] for cells in rows.values() if cells[monitor]) for monitor in MONITORS)
        words = [", ".join(f"{mark} {count}" for mark, count in counted.most_common()) for counted in counts]
        # As GitHub and the site make anchors of titles.
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        yield row(f"[{title}](compatibility_evidence.md#{anchor})", *words)


def evidence(found: dict[str, dict[str, dict[str, str]]]) -> Generator[str, None, None]:
    """The page of all set-ups."""
    yield EVIDENCE
    for title, rows in found.items():
        yield from (f"## {title}", "")
        if title == TITLES["test_integrations"]:
            yield from (f"{installed()}.", "")
        yield from head()
        yield from (row(name, *cells.values()) for name, cells in rows.items())
        yield ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, found = session.config.getoption("--table"), sections()
    for name, lines in ((path, summary(found)), (path.with_stem(f"{path.stem}_evidence"), evidence(found))):
        name.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
