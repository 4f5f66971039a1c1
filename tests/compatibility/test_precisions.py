"""Every monitor in every precision: the run is what it was, and values are those of float64 at the same parameters.

Gradient descent on one batch of all samples: the step, each mini-batch and the probe set have the same gradient and the
same matrices, so that all quantities follow from these and from the step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.batch_sharpness.options import OF_UPDATES
from lightning_curvature.monitors.base import Monitor
from tests.compatibility.monitors import MONITORS
from tests.helpers.directional import SINGLE
from tests.helpers.runs import Classifier, Step, StepRecorder, classification, mlp
from tests.helpers.witness import Record, assert_same, watch
from tests.oracles.along_step import DIFFERENCE
from tests.oracles.matrices import Matrices
from tests.oracles.noise import samples_of
from tests.oracles.sample_growth import order_of

# Near the edge, where gradients lie along large eigenvalues and what is measured along them stands out of rounding.
LR, STEPS = 4.0, 4
U64, U32, U16, UB16 = 2.0**-53, 2.0**-24, 2.0**-11, 2.0**-8  # unit roundoffs

# A number that comes out of this network's derivatives has been rounded some ten times: two layers forward, two
# backward, the derivatives of both, the loss. Each is off by u at most and by 0.4 u in the mean; independent, they add
# up to √10 · 0.4 u = 1.3 u, and four times that is not exceeded.
ROUNDED = 5.0


@dataclass(frozen=True)
class Precision:
    """A precision of the Trainer.

    Attributes:
        run: unit roundoff of the step.
        probe: unit roundoff of what is measured under probe_precision="32-true", where that is another.
        network: type of the parameters that Lightning is given.
        options: of the Trainer.
    """

    run: float
    probe: float | None = None
    network: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


def scaled(scale: float = 2.0**16) -> Precision:
    """What precision="16-mixed" is on a GPU, in this process: autocast to float16 and a gradient scaler."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    return Precision(U16, U32, options={"precision": None, "plugins": [plugin]})


PRECISIONS: dict[str, Callable[[], Precision]] = {
    "64-true": lambda: Precision(U64, network=torch.float64, options={"precision": "64-true"}),
    "32-true": lambda: Precision(U32, options={"precision": "32-true"}),
    "bf16-true": lambda: Precision(UB16, options={"precision": "bf16-true"}),
    "bf16-mixed": lambda: Precision(UB16, U32, options={"precision": "bf16-mixed"}),
    "16-true": lambda: Precision(U16, options={"precision": "16-true"}),
    "16-mixed by a scaler": scaled,
    "16-true on a GPU": lambda: Precision(U16, options={"precision": "16-true", "accelerator": "gpu"}),
    "16-mixed on a GPU": lambda: Precision(U16, U32, options={"precision": "16-mixed", "accelerator": "gpu"}),
}
# Under the mixed ones a probe can leave autocast.
RUNS = [
    pytest.param(name, probe, marks=pytest.mark.gpu if name.endswith("GPU") else (), id=f"{name}, probes {probe}")
    for name in PRECISIONS
    for probe in ((None, "32-true") if "mixed" in name else (None,))
]


def samples() -> tuple[Tensor, Tensor]:
    """Twelve samples that every type holds as they are."""
    x, y = classification(1, size=12)[0]
    return x.bfloat16().float(), y


def fit(precision: Precision, monitor: Monitor | None) -> tuple[Record, list[Step]]:
    recorder = StepRecorder()

    def module() -> Classifier:
        return Classifier(mlp(4, 6, 3).to(precision.network), lambda m: torch.optim.SGD(m.parameters(), lr=LR))

    def data() -> DataLoader[Any]:
        return DataLoader(TensorDataset(*samples()), batch_size=12)

    record = watch(module, data, monitor, lambda: [recorder], max_epochs=STEPS, **precision.options)
    return record, recorder.steps


@functools.cache
def plain(name: str) -> tuple[Record, list[Step]]:
    return fit(PRECISIONS[name](), None)


class Truth:
    """What a step's values are in float64, and how far a run may be off.

    Args:
        network: only its structure is used.
        step: θ_t and θ_{t+1}.
        run: unit roundoff of the run.
        probe: unit roundoff of the measurement.
    """

    def __init__(self, network: nn.Module, step: Step, run: float, probe: float) -> None:
        at = copy.deepcopy(network).cpu().double()
        at.load_state_dict({name: p.cpu() for name, p in step.before.items()})
        self.dense = Matrices(at, F.cross_entropy)
        dense, batches = self.dense, [samples()]
        self.gradient = dense.gradient(batches)
        self.hessian, self.gauss_newton = dense.hessian(batches), dense.gauss_newton(batches)
        moved = [step.before[name].double() - step.after[name].double() for name in step.before]
        self.d = torch.cat([part.cpu().reshape(-1) for part in moved])
        self.run, self.probe = ROUNDED * run, ROUNDED * probe

    def of(self, key: str, row: Mapping[str, float]) -> tuple[float, float]:
        """Value and relative tolerance."""
        if key.startswith("delta"):
            return self._growth(key)
        if key == "noise_commutativity":
            return self._commutativity()
        if key.endswith("lambda_max"):
            matrix = self.gauss_newton if key == "gauss_newton_lambda_max" else self.hessian
            return self._largest(matrix, row[f"curvature_diagnostics/{key}_error"])
        if key in ("lambda_gn", "lambda_kl"):
            value, tolerance = self._along_step(self.gauss_newton)
        elif key in ("lambda_dir", "lambda_fd"):
            value, tolerance = self._along_step(self.hessian)
        elif key in OF_UPDATES:
            # The update of a trial is that of this step, but for the rounding of both their gradients.
            value, tolerance = self._along_step(self.hessian)
            tolerance += 2.0 * max(self.run, self.probe) * _size(self.hessian) / abs(value)
        else:
            # gᵀHg/‖g‖²: H is off by its rounding, and g, on both sides, by its own.
            g = self.gradient
            value = float(g @ self.hessian @ g / (g @ g))
            tolerance = 3.0 * self.probe * _size(self.hessian) / abs(value)
        return value, tolerance + self._of_differences(key, row.get(f"curvature_diagnostics/{key}_error", 0.0))

    def _along_step(self, matrix: Tensor) -> tuple[float, float]:
        """dᵀAd/(η gᵀd): A is off by its rounding, and g by that of the run's backward."""
        quadratic, descent = float(self.d @ matrix @ self.d), float(self.gradient @ self.d)
        lengths = float(self.gradient.norm() * self.d.norm())
        own = self.probe * _size(matrix) * float(self.d @ self.d) / abs(quadratic)
        return quadratic / descent / LR, own + self.run * lengths / descent

    def _largest(self, matrix: Tensor, error: float) -> tuple[float, float]:
        """λ_max: Weyl's bound for the rounding, and what the search says that it leaves."""
        value = float(torch.linalg.eigvalsh(matrix)[-1])
        return value, self.probe * _size(matrix) / value + error

    def _growth(self, key: str) -> tuple[float, float]:
        """Δ of three samples and each of two more, at σ = 1e-3: losses are off by their rounding.

        What σ adds to the square, at most σ²(|a| N ‖A‖ + ‖c‖²), is left to the tolerance: most of it is sampled.
        """
        x, y = samples()
        drawn = [[(x[i : i + 1], y[i : i + 1])] for i in order_of(12)[:5]]
        before = [one for (one,) in drawn[:3]]
        losses = [float(F.cross_entropy(self.dense.outputs(self.dense.theta, x), y)) for ((x, y),) in drawn]
        mean, off = sum(losses[:3]) / 3, 2.0 * self.probe * max(losses) / 4
        steps = [abs(loss - mean) / 4 for loss in losses[3:]]
        value = sum(steps) / 2
        if key == "delta_1":
            return value, off / value
        value, more = sum(step**2 for step in steps) / 2, 0.0
        for step, new in zip(steps, drawn[3:], strict=True):
            c = (self.dense.gradient(new) - self.dense.gradient(before)) / 4
            matrix = (self.dense.hessian(new) - self.dense.hessian(before)) / 4
            more += 0.5e-6 * float(step * len(c) * _size(matrix) + c @ c)
        return value, (2.0 * off * max(steps) + off**2 + more) / value

    def _commutativity(self) -> tuple[float, float]:
        """‖CH − HC‖/(‖C‖‖H‖): each factor, twice above and once below, is off by the rounding of its terms."""
        one = samples_of(self.dense.network, F.cross_entropy, "0.weight", *samples())
        c, h = one.covariance(), one.hessian()
        value = float((c @ h - h @ c).norm() / c.norm() / h.norm())
        of_c = 2.0 * self.probe * float(one.gradients.square().sum(1).mean() / c.norm())
        of_h = self.probe * float(one.hessians.flatten(1).norm(dim=1).mean() / h.norm())
        return value, 3.0 * (of_c + of_h) / value

    def _of_differences(self, key: str, reported: float) -> float:
        """What a difference at the best ε leaves, by the type it is taken in; in half precision the row tells."""
        if key not in ("lambda_fd", "lambda_kl"):
            return 0.0
        single = SINGLE["finite_difference" if key == "lambda_fd" else "kl"]
        # Nine in ten true errors are within three reported ones, as test_precision has it; these few all are.
        return {U64: DIFFERENCE, U32: single}.get(self.probe / ROUNDED, 3.0 * reported)


def _size(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@functools.cache
def truths(name: str, probe: str | None) -> list[Truth]:
    """Those of all steps of the unwatched run, of which the watched ones are bit for bit the same, made once."""
    (record, steps), precision = plain(name), PRECISIONS[name]()
    unit = precision.probe if probe is not None and precision.probe is not None else precision.run
    return [Truth(record.module.network, step, precision.run, unit) for step in steps]


# Of the directional monitor what follows from matrices; an eigenvalue that can be compared.
OPTIONS: dict[str, dict[str, Any]] = {
    "directional": {"estimators": ("hvp", "gauss_newton", "kl", "finite_difference")},
    "spectrum": {"tolerance": 1e-4, "max_products": 40},
    "sharpness": {},
    "stabilization": {},
    "noise": {"probe_samples": 12},
}
KEYS = {name: kind.keys for name, kind in MONITORS.items()} | {
    "directional": ("lambda_dir", "lambda_gn", "lambda_kl", "lambda_fd"),
    # What does not look through eigenvectors, some of which are anything in half precision.
    "noise": ("noise_commutativity",),
}


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize(("name", "probe"), RUNS)
# Products of half-precision parameters miss the tolerance, and say so.
@pytest.mark.filterwarnings("ignore:products for .* are not symmetric:lightning_curvature.CurvatureWarning")
@pytest.mark.thinned(10)
def test_values_and_run(name: str, probe: Any, monitor: str) -> None:
    follow = MONITORS[monitor].make(every_n_train_steps=1, probe_precision=probe, **OPTIONS[monitor])
    watched, steps = fit(PRECISIONS[name](), follow)
    assert_same(plain(name)[0], watched)
    assert len(steps) == len(truths(name, probe)) == STEPS
    for number, truth in enumerate(truths(name, probe)):
        row = watched.logger.rows[number]
        for key in KEYS[monitor]:
            value, (expected, tolerance) = row[f"curvature/{key}"], truth.of(key, row)
            if math.isnan(value):
                # A difference that cannot be told from rounding.
                assert key in ("lambda_kl", "lambda_fd"), key
                assert truth.probe > ROUNDED * U32, key
            else:
                assert value == pytest.approx(expected, rel=tolerance), key


overflowing = functools.cache(lambda: fit(scaled(2.0**20), None)[0])


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.filterwarnings("ignore:the loss or its gradient:lightning_curvature.CurvatureWarning")
def test_scaler_that_overflows(monitor: str) -> None:
    """A step that is skipped has nothing along it to measure; what is measured before it has its value."""
    kind = MONITORS[monitor]
    watched, steps = fit(scaled(2.0**20), kind.make(every_n_train_steps=1))
    assert_same(overflowing(), watched)
    moved = [any(bool((step.after[name] != p).any()) for name, p in step.before.items()) for step in steps]
    assert moved == [False, False, True, True]
    for number, made in enumerate(moved):
        row = watched.logger.rows[number]
        finite = [math.isfinite(row[f"curvature/{key}"]) for key in KEYS[monitor]]
        assert all(finite) if made or monitor != "directional" else not any(finite), number
