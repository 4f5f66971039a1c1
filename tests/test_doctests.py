"""The examples in the docstrings run and print what they say; every public formula and metric has one."""

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
from torchmetrics import Metric

import lightning_curvature
from lightning_curvature import functional, metrics
from lightning_curvature.functional import noise

MODULES = [m.name for m in pkgutil.walk_packages(lightning_curvature.__path__, "lightning_curvature.")]


def _is_documented(thing: Any) -> bool:
    # Aliases of types and plain records of results have nothing to run.
    return inspect.isfunction(thing) or (inspect.isclass(thing) and issubclass(thing, Metric))


PUBLIC = [getattr(functional, name) for name in functional.__all__]
PUBLIC += [getattr(noise, name) for name in noise.__all__]
PUBLIC += [getattr(metrics, name) for name in metrics.__all__]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("thing", filter(_is_documented, PUBLIC), ids=lambda thing: thing.__name__)
def test_every_public_formula_and_metric_has_an_example(thing: Any) -> None:
    assert doctest.DocTestFinder(recurse=False).find(thing)[0].examples
