"""What cannot be measured is NaN and said once; the rest is measured and training goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.linalg import NonFiniteProductError
from tests.helpers.once import Square
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows, warned
from tests.helpers.spectrum import monitor, samples, whole
from tests.helpers.spectrum_setups import loader, sgd
from tests.oracles.hessian_spectrum import Curvature, Moments

EXACT = ("lambda_max", "hessian_trace", "gauss_newton_lambda_max", "second_moment_contraction")


def fitted(module: Any, *monitors: Any, data: Any = None, **options: Any) -> tuple[Capture, Moments, list[str]]:
    """Rows, moments and what was said."""
    capture, moments = Capture(), Moments()
    trainer = make_trainer(moments, *monitors, logger=capture, **options)
    said = warned(lambda: trainer.fit(module, data if data is not None else loader()))
    assert trainer.global_step == 4  # training went on to its end
    return capture, moments, said


def finite(row: dict[str, float]) -> dict[str, bool]:
    return {key: math.isfinite(value) for key, value in row.items()}


def test_outputs_that_are_missing_stop_gauss_newton_alone() -> None:
    class Hidden(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(self.network(batch[0]), batch[1])

    capture, _, said = fitted(Hidden(mlp(4, 6, 3), sgd), monitor(*EXACT, on_error="warn"))
    for step, row in rows(capture).items():
        lost = {"gauss_newton_lambda_max", "gauss_newton_lambda_max_error", "gauss_newton_lambda_max_converged"}
        # After the first search the others go on from it.
        assert {key for key, good in finite(row).items() if not good} == lost | (
            {"lambda_max_upper"} if step else set()
        )
    assert said == [
        "HessianSpectrumMonitor logs NaN: ValueError: outputs must come with the loss, in its graph, got none: compute "
        "them by calling self(…) exactly once, or name the submodule that makes them, outputs='head'."
    ]


class Poisoned(torch.autograd.Function):
    """The identity, whose second derivative is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Poison.apply(gradient)


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def poisoned_loss(z: Tensor, y: Tensor) -> Tensor:
    # Behind the outputs: products with H and with G pass through it.
    return F.cross_entropy(Poisoned.apply(z), y)


SENTENCE = (
    "a product with the operator must be finite, got NaN or infinity in product 1: look at the loss and its gradient "
    "there."
)


def test_nan_in_every_product() -> None:
    module = Classifier(mlp(4, 6, 3), sgd, poisoned_loss)
    capture, _, said = fitted(module, monitor(*EXACT, "spectral_density", on_error="warn"))
    found = rows(capture)
    assert len(found) == 2
    for row in found.values():
        assert not any(good for key, good in finite(row).items() if key != "lambda_max_threshold")
        assert row["lambda_max_threshold"] == 2.0 * 1.5 / 0.3
    # The same of each of the three operators, at each step: Python shows it once.
    assert said == [
        f"HessianSpectrumMonitor logs NaN: NonFiniteProductError: {SENTENCE}",
        "HessianSpectrumMonitor must make the measurements that are due, got 0 of 2: NonFiniteProductError: "
        f"{SENTENCE.rstrip('.')}.",
    ]


def test_nan_in_one_operator_stops_that_one() -> None:
    """Adam's √v̂ that is NaN in one coordinate spoils the preconditioned product, not the Hessian's."""

    class Spoiled(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            weight = self.network[2].weight
            self.optimizers().state[weight]["exp_avg_sq"][0, 0] = math.nan

    module = Spoiled(mlp(4, 6, 3), lambda m: torch.optim.Adam([*m.network[0].parameters(), m.network[2].weight]))
    follow = monitor("preconditioned_lambda_max", "lambda_max", on_error="warn", every_n_train_steps=1)
    capture, _, said = fitted(module, follow)
    # From the second step on θ itself is NaN, and so is H.
    row = rows(capture)[1]
    assert math.isnan(row["preconditioned_lambda_max"])
    assert math.isfinite(row["lambda_max"])
    assert row["lambda_max_converged"] == 1.0
    assert said[0] == f"HessianSpectrumMonitor logs NaN: NonFiniteProductError: {SENTENCE}"


@pytest.mark.parametrize(("loss", "kind"), [(poisoned_loss, NonFiniteProductError)])
def test_raises_if_asked_to(loss: Any, kind: type[Exception]) -> None:
    module = Classifier(mlp(4, 6, 3), sgd, loss)
    trainer = make_trainer(monitor("lambda_max", on_error="raise"))
    with pytest.raises(kind, match="must be finite, got NaN"):
        trainer.fit(module, loader())
    assert trainer.global_step == 0


def squaring(once: bool, dtype: torch.dtype) -> nn.Module:
    network = mlp(4, 6, 3)
    network[1] = Square(once)
    return network.to(dtype)


# Differences: within 2e-4 of a product in float32, as the operator says of itself; 3e-10 in float64. The eigenvalue is
# as far off as its product at most.
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
@pytest.mark.slow
def test_falls_back_to_differences(dtype: torch.dtype, allowed: float) -> None:
    x, y = samples(dtype=dtype)
    module = Classifier(squaring(once=True, dtype=dtype), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    quantities = ("lambda_max", "lambda_min", "preconditioned_lambda_max")
    follow = monitor(*quantities, "gauss_newton_lambda_max", tolerance=1e-3, on_error="warn")
    precision: Any = "64-true" if dtype == torch.float64 else "32-true"
    capture, moments, said = fitted(module, follow, data=loader(x, y), precision=precision)
    twice = squaring(once=False, dtype=torch.float64)
    assert len(rows(capture)) == 2
    for step, row in rows(capture).items():
        values = torch.linalg.eigvalsh(Curvature(twice, module.loss, moments.all[step]).hessian(whole()))
        size = float(values.abs().max())
        for key, truth, gap in (
            ("lambda_max", values[-1], values[-1] - values[-2]),
            ("lambda_min", values[0], values[1] - values[0]),
            ("preconditioned_lambda_max", values[-1], values[-1] - values[-2]),
        ):
            residual = row[f"{key}_error"] * abs(row[key])
            assert residual <= 2e-3 * size
            bound = min(residual, residual**2 / max(float(gap) - residual, 1e-12))
            assert abs(row[key] - float(truth)) <= bound + allowed * size, key
        # G has no second derivatives of the network in it, but its products differentiate its backward as well.
        assert math.isnan(row["gauss_newton_lambda_max"])
    first, second = said
    assert first.startswith("products with the Hessian are differences of gradients from here on, since second")
    assert "once_differentiable" in first
    assert second.startswith("HessianSpectrumMonitor logs NaN: RuntimeError:")


def test_exact_does_not_fall_back() -> None:
    module = Classifier(squaring(once=True, dtype=torch.float64), sgd)
    capture, _, said = fitted(module, monitor("lambda_max", products="exact", on_error="warn"))
    assert all(math.isnan(row["lambda_max"]) for row in rows(capture).values())
    assert len(said) == 2
    assert all("once_differentiable" in text for text in said)


@pytest.mark.slow
def test_differences_where_they_are_asked_for() -> None:
    """Nothing is said of them, and the values are those of the exact products."""
    module = Classifier(mlp(4, 6, 3), sgd)
    follow = [
        monitor("lambda_max", "hessian_trace", products=name, prefix=name, tolerance=1e-3)
        for name in ("exact", "difference")
    ]
    capture, _, said = fitted(module, *follow)
    assert said == []
    for exact, difference in zip(rows(capture, "exact").values(), rows(capture, "difference").values(), strict=True):
        # Products within 3e-10, from the same start; the trace from the same random vectors, times 51 parameters.
        assert difference["lambda_max"] == pytest.approx(exact["lambda_max"], rel=1e-8)
        assert difference["hessian_trace"] == pytest.approx(exact["hessian_trace"], rel=1e-7)
        assert difference["lambda_max"] != exact["lambda_max"]  # they are not the same products


def test_piecewise_linear_loss() -> None:
    """The second derivative of a linear network under |·| is 0 where there is one."""
    module = Classifier(nn.Linear(4, 1).double(), sgd, lambda z, y: (z.squeeze(1) - y).abs().mean())
    follow = monitor("lambda_max", "lambda_min", "hessian_trace", "spectral_density", on_error="warn")
    capture, _, said = fitted(module, follow)
    for row in rows(capture).values():
        for key in ("lambda_max", "lambda_min", "hessian_trace", "hessian_trace_stderr", "lambda_max_error"):
            assert row[key] == 0.0, key
        assert row["lambda_max_converged"] == 1.0
    assert said == [
        "the Hessian is zero: the loss is flat, or piecewise linear in the parameters, whose second derivative is 0 "
        "where it is defined and undefined at the kinks."
    ]


def test_unfinished_search_says_so_and_its_error_covers_the_truth() -> None:
    module = Classifier(mlp(4, 16, 3), sgd)
    follow = monitor("lambda_max", "lambda_min", k=5, tolerance=1e-9, max_products=20, on_error="warn")
    capture, moments, _ = fitted(module, follow)
    unfinished = 0
    for step, row in rows(capture).items():
        spectrum = torch.linalg.eigvalsh(Curvature(module.network, module.loss, moments.all[step]).hessian(whole()))
        for key in ("lambda_max", "lambda_2", "lambda_3", "lambda_4", "lambda_5", "lambda_min"):
            assert row[f"{key}_converged"] in (0.0, 1.0)
            unfinished += row[f"{key}_converged"] == 0.0
            if row[f"{key}_converged"] == 0.0:
                assert row[f"{key}_error"] > 1e-9
            # What the residual promises: some eigenvalue is that near.
            nearest = float((spectrum - row[key]).abs().min())
            assert nearest <= row[f"{key}_error"] * abs(row[key]) + 1e-13
    assert unfinished > 2


def test_failure_in_reading_is_told_and_tried_again() -> None:
    class Flaky(torch.utils.data.TensorDataset):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Flaky.reads += 1
            if Flaky.reads == 1:
                raise OSError("disk is away")
            return super().__getitem__(index)

    data = torch.utils.data.DataLoader(Flaky(*samples()), batch_size=8)
    follow = monitor("lambda_max", on_error="warn", probe_dataloader=data)
    capture, _, said = fitted(Classifier(mlp(4, 6, 3), sgd), follow)
    assert said == ["HessianSpectrumMonitor logs NaN: OSError: disk is away"]
    # Nothing at the first measured step, a value at the other.
    assert [step for step, row in rows(capture).items() if math.isfinite(row["lambda_max"])] == [2]
    assert [step for step, row in rows(capture).items() if math.isnan(row["lambda_max"])] == [0]
