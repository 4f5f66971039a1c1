"""Modules of other packages: the run is what it was, values are those of double backward, and what has none says why.

Skipped where the packages are missing: ``pip install -e ".[integrations]"``.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature import CurvatureWarning
from lightning_curvature.data.copies import DataRandomness, mixed
from tests.compatibility.integrations import INTEGRATIONS, Integration
from tests.compatibility.integrations.sizes import BATCH, SAMPLES
from tests.compatibility.monitors import MONITORS
from tests.helpers.runs import make_trainer, rows
from tests.helpers.witness import Record, assert_same, watch
from tests.oracles.along_step import DIFFERENCE, EXACT

pytestmark = [pytest.mark.soak, pytest.mark.integrations]

ESTIMATORS = ("hvp", "kl", "finite_difference", "gauss_newton")
LAMBDAS = ("lambda_dir", "lambda_kl", "lambda_fd", "lambda_gn")
OPTIONS: dict[str, dict[str, Any]] = {
    "directional": {"estimators": ESTIMATORS, "every_n_train_steps": 1},
    "spectrum": {"quantities": ("lambda_max",), "micro_batch_size": None, "every_n_train_steps": 2},
    "sharpness": {"quantities": ("batch_sharpness",), "every_n_train_steps": 2},
    "stabilization": {"at_end": True, "every_n_train_steps": None},
    "noise": {"at_end": True, "every_n_train_steps": None},
}
KEYS = {name: kind.keys for name, kind in MONITORS.items()} | {
    "directional": LAMBDAS,
    "spectrum": ("lambda_max",),
    "sharpness": ("batch_sharpness",),
}

# Their loss is computed in float32 also where parameters are in float64.
COARSE = {"transformers, GPT-2"}


def case(name: str) -> Integration:
    for package in INTEGRATIONS[name].packages:
        pytest.importorskip(package)
    return INTEGRATIONS[name]


def fit(one: Integration, monitor: pl.Callback | None, precision: str, *others: pl.Callback) -> Record:
    """One epoch of four steps."""
    return watch(one.make, one.data, monitor, lambda: list(others), precision=precision)


@functools.cache
def plain(name: str) -> Record:
    # Some packages keep what the first module of a process has looked up.
    fit(case(name), None, "32-true")
    return fit(case(name), None, "32-true")


RUNS = [pytest.param(name, monitor, id=f"{name}-{monitor}") for name in INTEGRATIONS for monitor in MONITORS]


@pytest.mark.parametrize(("name", "monitor"), RUNS)
def test_same_run_and_finite_values_in_float32(
    name: str, monitor: str, record_property: Callable[[str, object], None]
) -> None:
    """Bit for bit in float32, as users run it; each key has its value, or none and a sentence that is known."""
    one = case(name)
    options = OPTIONS[monitor] | ({"parameter": one.parameter} if monitor == "noise" else {})
    before = plain(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = fit(one, MONITORS[monitor].make(on_error="warn", **options), "32-true")
    assert_same(before, watched)
    told = {str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)}
    measured = rows(watched.logger)
    assert measured
    # Where η is 0 there is no step to measure along.
    moved = [row for row in measured.values() if math.isfinite(row.get("two_over_lr", 0.0)) or monitor == "sharpness"]
    missing = {key: one.without.get(key, one.without.get(monitor)) for key in KEYS[monitor]}
    for key, why in missing.items():
        finite = [math.isfinite(row[key]) for row in moved]
        if why is not None:
            assert not any(finite), key
            assert any(why in sentence for sentence in told), (key, told)
        else:
            # A difference may at some steps be hidden by rounding.
            assert any(finite) if key in ("lambda_kl", "lambda_fd") else all(finite), key
    known = (*one.told, *filter(None, missing.values()))
    assert [sentence for sentence in told if not any(words in sentence for words in known)] == []
    if absent := [key for key, why in missing.items() if why is not None]:
        record_property("mark", "NaN" if len(absent) == len(missing) else f"✓, {', '.join(absent)} NaN")


def randomness(*seed: int) -> tuple[Any, ...]:
    """All random states as they are, or as the monitor sets them by a seed."""
    now = DataRandomness(torch.device("cpu"))
    with now.kept():
        if seed:
            now.seed(*seed)
        return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def put(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@dataclass
class Moment:
    """What a step found, and where it led."""

    state: dict[str, Any]
    batch: Any
    index: int
    randomness: tuple[Any, ...]
    lr: float = 0.0
    after: dict[str, Tensor] = field(default_factory=dict)


class Moments(pl.Callback):
    """Notes each step, before the monitor."""

    def __init__(self) -> None:
        self.all: list[Moment] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = copy.deepcopy(pl_module.state_dict())
        self.all.append(Moment(state, copy.deepcopy(batch), batch_idx, randomness()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.all[-1].lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.all[-1].after = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


class Oracle:
    """Derivatives of a training step of a new module, by double backward, in float64."""

    def __init__(self, one: Integration, state: dict[str, Any]) -> None:
        self.module = one.make().double()
        self.module.load_state_dict(state)
        self.module.train().trainer = make_trainer()
        self.module.trainer.training = True  # some ask
        self.module.log = self.module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.names, self.parameters = zip(
            *[(name, p) for name, p in self.module.named_parameters() if p.requires_grad], strict=True
        )

    def gradient(self, batch: Any, index: int, randomness: tuple[Any, ...]) -> list[Tensor]:
        """∇L with its graph, from given random states."""
        put(randomness)
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
                loss = self.module.training_step(copy.deepcopy(batch), index)
        finally:
            torch.set_default_dtype(kept)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        return self._by_parameters(loss, create_graph=True)

    def product(self, gradient: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """Hv."""
        along = sum((g * v).sum() for g, v in zip(gradient, vectors, strict=True))
        return self._by_parameters(along, retain_graph=True)

    def _by_parameters(self, value: Any, **options: bool) -> list[Tensor]:
        return list(torch.autograd.grad(value, self.parameters, materialize_grads=True, allow_unused=True, **options))


def dot(one: Any, other: Any) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


@functools.cache
def along_steps(name: str) -> list[tuple[dict[str, float], float]]:
    """Rows of the steps that were made, and dᵀHd/(η gᵀd) of each, NaN where the step goes uphill."""
    one, moments = case(name), Moments()
    monitor = MONITORS["directional"].make(estimators=("hvp", "finite_difference"), every_n_train_steps=1)
    record, found = fit(one, monitor, "64-true", moments), []
    for row, moment in zip(rows(record.logger).values(), moments.all, strict=True):
        if moment.lr == 0.0:
            continue
        oracle = Oracle(one, moment.state)
        d = [moment.state[key] - moment.after[key] for key in oracle.names]
        gradient = oracle.gradient(moment.batch, moment.index, moment.randomness)
        descent, quadratic = dot(gradient, d), dot(oracle.product(gradient, d), d)
        found.append((row, quadratic / descent / moment.lr if descent > 0.0 else math.nan))
    assert sum(math.isfinite(value) for _, value in found) >= 2
    return found


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_directional_values_in_float64(name: str) -> None:
    """λ_dir of each step that was made."""
    for row, value in along_steps(name):
        assert row["lambda_dir"] == pytest.approx(value, rel=EXACT, nan_ok=True)


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_directional_differences_in_float64(name: str, record_property: Callable[[str, object], None]) -> None:
    """λ_FD of each step, to three of its reported errors, as test_precisions has it; and these are small but once."""
    found = along_steps(name)
    for row, value in found:
        if name in COARSE and math.isnan(row["lambda_fd"]):
            record_property("mark", "✓, some NaN")
            continue
        assert row["lambda_fd"] == pytest.approx(value, rel=3.0 * row["lambda_fd_error"], nan_ok=True)
    # The first ε is a guess; later ones meet DIFFERENCE, or ten times that where dᵀHd is small.
    assert name in COARSE or all(row["lambda_fd_error"] < 100.0 * DIFFERENCE for row, _ in found[1:])


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_spectrum_values_in_float64(name: str) -> None:
    """λ_max of all training samples is that of scipy's Lanczos, with masks drawn from the monitor's seeds."""
    one, moments, tolerance = case(name), Moments(), 1e-6
    options = OPTIONS["spectrum"] | {"every_n_train_steps": 99, "tolerance": tolerance, "max_products": 200}
    record = fit(one, MONITORS["spectrum"].make(**options), "64-true", moments)
    (row,) = rows(record.logger).values()
    oracle, loader = Oracle(one, moments.all[0].state), record.trainer.train_dataloader
    parts = []
    for number, first in enumerate(range(0, SAMPLES, BATCH)):
        samples = []
        for index in range(first, first + BATCH):
            put(randomness(0, index))
            samples.append(loader.dataset[index])
        batch = DoublePrecision().convert_input(loader.collate_fn(samples))
        parts.append(oracle.gradient(batch, number, randomness(mixed(0, first, 1))))
    gradient = [sum(together) / len(parts) for together in zip(*parts, strict=True)]
    sizes = [p.numel() for p in oracle.parameters]

    def product(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        flat = torch.from_numpy(vector).reshape(-1).split(sizes)
        vectors = [v.view_as(p) for v, p in zip(flat, oracle.parameters, strict=True)]
        return torch.cat([part.reshape(-1) for part in oracle.product(gradient, vectors)]).numpy()  # type: ignore[arg-type]

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    (expected,) = eigsh(operator, k=1, which="LA", tol=1e-8, return_eigenvectors=False)
    assert row["lambda_max_converged"] == 1.0
    # Each is within its residual of an eigenvalue, and neither exceeds the largest by more than rounding.
    assert row["lambda_max"] == pytest.approx(expected, rel=tolerance + 1e-8)
