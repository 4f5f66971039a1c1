"""docs/keys.md lists the keys that the monitors write, each with its group and name, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    RegimeMonitor,
    StabilityMonitor,
    StabilizationMonitor,
)
from tests.helpers.runs import Capture, Classifier, batched_samples, make_trainer, mlp
from tests.testers.families import FAMILIES

PAGE = (Path(__file__).parent.parent / "docs" / "keys.md").read_text(encoding="utf-8")
NAMED = {"DirectionalCurvatureMonitor": "estimators", "StabilityMonitor": "", "RegimeMonitor": ""}


def table() -> list[list[str]]:
    """Cells of the rows of the table of keys."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    return [row for row in rows if len(row) == 6]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`\"?([^`\"]+)\"?`", cell)


def listed() -> dict[str, set[str]]:
    """Full names by monitor, as the page has them; but what is logged only where a step goes uphill."""
    names: dict[str, set[str]] = {}
    for keys, _, monitors, _, edge, diagnostics in table():
        group = "_diagnostics" if "(diagnostic)" in keys else ""
        for monitor in quoted(monitors):
            found = names.setdefault(monitor, set())
            for key in quoted(keys):
                found.add(f"curvature{group}/{key}")
                found |= {f"curvature_diagnostics/{key}{end}" for end in quoted(diagnostics) if end != "_numerator"}
                found |= {"curvature_over_edge/edge", f"curvature_over_edge/{key}"} if edge else set()
    return names


def choices(monitor: type) -> tuple[str, ...]:
    """Names that the monitor takes for quantities or estimators."""
    family = next(family for family in FAMILIES.values() if family.monitor is monitor)
    option = NAMED.get(monitor.__name__, "quantities")
    offered = re.compile(r"must be names from \((.*)\), got")
    with pytest.raises(ValueError, match=option) as refusal:
        monitor(**family.quick | {option: ("?",)})
    match = offered.search(str(refusal.value))
    assert match is not None
    return tuple(re.findall(r"'(\w+)'", match[1]))


def sgd(momentum: float) -> Callable[[nn.Module], Any]:
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.01, momentum=momentum)


def written(monitor: pl.Callback, momentum: float) -> set[str]:
    """Full names of a run of two steps."""
    capture = Capture()
    module = Classifier(mlp(4, 3), sgd(momentum))
    make_trainer(monitor, logger=capture).fit(module, batched_samples())
    return {name for row in capture.rows.values() for name in row if "/" in name}


MONITORS: dict[type, dict[str, Any]] = {
    DirectionalCurvatureMonitor: {"every_n_train_steps": 1},
    HessianSpectrumMonitor: {"k": 2, "density_starts": 1, "density_steps": 3},
    BatchSharpnessMonitor: {"min_batches": 4, "num_batches": 4},
    StabilityMonitor: {},
    RegimeMonitor: {},
    StabilizationMonitor: {"sample_sizes": 2, "subspace_dim": 2, "candidates": 2},
    NoiseCovarianceMonitor: {"parameter": "network.0.weight"},
}


def all_of(monitor: type) -> dict[str, Any]:
    option = NAMED.get(monitor.__name__, "quantities")
    return MONITORS[monitor] | ({option: choices(monitor)} if option else {})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("monitor", MONITORS, ids=lambda monitor: monitor.__name__)
def test_keys_are_those_of_the_page(monitor: type) -> None:
    """Under SGD, whose edges and plateaus differ with momentum."""
    runs: Iterable[float] = (0.0, 0.9) if monitor is BatchSharpnessMonitor else (0.0,)
    found = set().union(*(written(monitor(**all_of(monitor)), momentum) for momentum in runs))
    assert found == listed()[monitor.__name__]


@pytest.mark.parametrize(
    "monitor", [m for m in MONITORS if NAMED.get(m.__name__, "quantities")], ids=lambda monitor: monitor.__name__
)
def test_names_are_those_of_the_page(monitor: type) -> None:
    """Every name of a quantity or estimator stands beside its key; all but those listed here are the keys."""
    names = {}
    for keys, name, monitors, *_ in table():
        if quoted(monitors) == [monitor.__name__] and name and not name.startswith("("):
            names[quoted(name)[0]] = quoted(keys)[0]
    assert set(choices(monitor)) - {"spectral_density"} == names.keys()
    if monitor is not DirectionalCurvatureMonitor:
        assert {name: key for name, key in names.items() if name != key} == (
            {"noise_awd_chain": "noise_gamma_awd_raw"} if monitor is NoiseCovarianceMonitor else {}
        )
