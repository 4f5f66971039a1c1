"""What modules hold and steps do that a measurement could trip over: measured right, or refused in a sentence."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor
from tests.helpers.runs import Classifier, mlp
from tests.helpers.spectrum import TOLERANCE, monitor
from tests.helpers.spectrum_runs import assert_same_training, fitted, hessian, sgd
from tests.oracles.hessian_spectrum import check_eigenvalue


class Drawing(Classifier):
    """Scales its loss by numbers from an iterator that it holds."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.scales = iter(range(1, 100))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * next(self.scales)


def test_iterator_on_the_module_is_refused_and_not_consumed() -> None:
    module = Drawing()
    found, _, said = fitted(module, monitor("lambda_max", on_error="warn"))
    assert list(found) == [0, 2, 4]
    assert all(math.isnan(row["lambda_max"]) for row in found.values())
    sentence = (
        "ValueError: training_step must not depend on what cannot be put back, got ['scales'] on the module, iterators "
        "or open files: keep them elsewhere, or give objective=."
    )
    assert set(said) == {
        f"HessianSpectrumMonitor logs NaN: {sentence}",
        f"HessianSpectrumMonitor must make the measurements that are due, got 0 of 3: {sentence}",
    }
    assert next(module.scales) == 6  # one for each step
    assert_same_training(Drawing, monitor("lambda_max", on_error="warn"))


def test_iterator_beside_an_objective() -> None:
    module = Drawing()
    found, moments, said = fitted(
        module, monitor("lambda_max", objective=lambda m, b: F.cross_entropy(m(b[0]), b[1]), every_n_train_steps=4)
    )
    assert said == []
    for step, row in found.items():
        check_eigenvalue(row, "lambda_max", hessian(module, moments, step), 0, TOLERANCE)
    assert next(module.scales) == 6


class Codebook(Classifier):
    """Writes in each step to a parameter that no optimizer holds, of a shape that no other has."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.code = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64), requires_grad=False)
        self.write = write

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.write(self.code)
        return super().training_step(batch, batch_idx) * (1.0 + 0.01 * self.code.mean())


@pytest.mark.parametrize("products", ["exact", "difference"])
@pytest.mark.parametrize("write", [lambda p: p.add_(1.0), lambda p: p.data.add_(1.0)], ids=["write", "data"])
@pytest.mark.slow
def test_parameter_of_another_shape_is_left_as_it_was(write: Callable[[Tensor], Any], products: Any) -> None:
    make = lambda: Codebook(write)  # noqa: E731
    module = make()
    # Differences are off by 3e-10 of a product, and so asymmetric.
    found, moments, said = fitted(module, monitor("lambda_max", products=products, tolerance=1e-8))
    assert said == []
    assert torch.equal(module.code, torch.full((5, 7), 5.0, dtype=torch.float64))
    # At step t the repeated step makes t + 1 of t: the loss is that which the step will have.
    for step, row in found.items():
        matrix = hessian(module, moments, step) * (1.0 + 0.01 * (step + 1))
        truth = float(torch.linalg.eigvalsh(matrix)[-1])
        # Differences are within 3e-10 of a product as they say of themselves; exact ones to 1e-12.
        assert row["lambda_max"] == pytest.approx(truth, rel=1e-8 if products == "difference" else 1e-11)
    assert_same_training(make, monitor("lambda_max", products=products))


class Counted(Classifier):
    """Halves gradients by hooks on parameters, and counts their calls outside of the module."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.handles = [p.register_hook(self.hook(calls)) for p in self.network.parameters()]

    @staticmethod
    def hook(calls: list[int]) -> Callable[[Tensor], Tensor]:
        def halve(gradient: Tensor) -> Tensor:
            calls.append(1)
            return 0.5 * gradient

        return halve


@pytest.mark.parametrize("options", [{}, {"keep_graph": False}, {"products": "difference"}], ids=str)
@pytest.mark.slow
def test_gradient_hooks_are_for_the_gradients_of_the_run(options: dict[str, Any]) -> None:
    calls: list[int] = []
    module = Counted(calls)
    hooks = [dict(p._backward_hooks or {}) for p in module.network.parameters()]
    tolerance = 1e-8 if options.get("products") else TOLERANCE  # as above
    found, moments, said = fitted(module, monitor("lambda_max", "lambda_min", tolerance=tolerance, **options))
    assert said == []
    assert len(calls) == 5 * 4  # once a step for each of four parameters
    assert [dict(p._backward_hooks or {}) for p in module.network.parameters()] == hooks
    for step, row in found.items():
        values = torch.linalg.eigvalsh(hessian(module, moments, step))
        # H of the loss, not half of it. As above.
        for key, truth in (("lambda_max", values[-1]), ("lambda_min", values[0])):
            assert row[key] == pytest.approx(float(truth), rel=1e-8 if options.get("products") else 1e-10), key
    assert_same_training(lambda: Counted([]), monitor("lambda_max", **options))


class Toggling(Classifier):
    """Freezes all its parameters between two steps."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.network.requires_grad_(self.trainer.global_step != 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.network.requires_grad_(True)
        return super().training_step(batch, batch_idx)


def test_all_parameters_frozen_for_a_while() -> None:
    module = Toggling()
    found, moments, said = fitted(module, monitor("lambda_max", on_error="warn"))
    assert list(found) == [0, 2, 4]
    assert math.isnan(found[2]["lambda_max"])
    assert len(said) == 1
    assert said[0].startswith("HessianSpectrumMonitor logs NaN: ValueError: ")
    for step in (0, 4):
        check_eigenvalue(found[step], "lambda_max", hessian(module, moments, step), 0, TOLERANCE)
    assert_same_training(Toggling, monitor("lambda_max", on_error="warn"))


@pytest.mark.parametrize("error", [None, RuntimeError("ends training")])
@pytest.mark.slow
def test_the_module_is_let_go_of_after_fit(error: Exception | None) -> None:
    quantities = ("lambda_max", "hessian_trace", "gauss_newton_lambda_max", "second_moment_contraction")
    watch = [monitor(*quantities), DirectionalCurvatureMonitor(every_n_train_steps=2)]

    class Ending(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if error is not None and batch_idx == 3:
                raise error

    module = Ending(mlp(4, 6, 3), sgd)
    if error is None:
        fitted(module, *watch)
    else:
        with pytest.raises(RuntimeError, match="ends training"):
            fitted(module, *watch)
        error.__traceback__ = None
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None
    assert isinstance(watch[0], HessianSpectrumMonitor)  # which are there still
