"""Products that leave something out, are wrong or fail once: said once, and measured right where they can be."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.operators import GaussNewtonOperator, MicroBatch
from lightning_curvature.operators.micro_batches import Evaluation
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Classifier, mlp
from tests.helpers.spectrum import TOLERANCE, monitor, samples
from tests.helpers.spectrum_runs import BATCH, fitted, hessian, sgd
from tests.oracles.hessian_spectrum import check_eigenvalue

# Calls until then; put back by no measurement.
failing_call = out_of_reach([None])


class Transient(Classifier):
    """Fails once, in one repetition of its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        calls = failing_call()
        if calls[0] is not None:
            calls[0] -= 1
            if calls[0] < 0:
                calls[0] = None
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return super().training_step(batch, batch_idx)


class Arm(pl.Callback):
    """Lets a call inside the measurement of step 2 fail."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        failing_call()[0] = 7 if trainer.global_step == 2 else None


def test_a_passing_error_costs_one_measurement() -> None:
    module = Transient(mlp(4, 6, 3), sgd)
    # Five micro-batches a product: the eighth call is in the second.
    found, moments, said = fitted(module, Arm(), monitor("lambda_max", keep_graph=False, on_error="warn"))
    assert failing_call() == [None]
    assert math.isnan(found[2]["lambda_max"])
    assert len(said) == 1
    assert said[0].startswith("HessianSpectrumMonitor logs NaN: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    # To 1e-13 beside the residual: no differences, which are off by 1e-9.
    for step in (0, 4):
        check_eigenvalue(found[step], "lambda_max", hessian(module, moments, step), 0, TOLERANCE)


class Headed(Classifier):
    """Its forward gives features; the head is applied in the step."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 5), sgd)
        self.head = nn.Linear(5, 3, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self(batch[0])), batch[1])


GAUSS_NEWTON = "gauss_newton_lambda_max"


@pytest.mark.slow
def test_what_gauss_newton_leaves_out_is_said_once() -> None:
    torch.manual_seed(0)
    found, _, said = fitted(Headed(), monitor(GAUSS_NEWTON))
    assert len(found) == 3
    assert len(said) == 1
    assert said[0].startswith("the Gauss–Newton matrix leaves out ")
    for module, options in (
        (Headed(), {"outputs": "head"}),
        (Classifier(mlp(4, 6, 3), sgd), {}),
    ):
        assert fitted(module, monitor(GAUSS_NEWTON, **options))[2] == []


def test_mismatch_is_the_share_of_the_gradient_beside_the_outputs() -> None:
    torch.manual_seed(0)
    module = Headed()
    x, y = samples(BATCH)
    parameters = list(module.parameters())

    def evaluate(head_inside: bool) -> Evaluation:
        features = module.network(x)
        logits = module.head(features)
        return Evaluation(F.cross_entropy(logits, y), logits if head_inside else features)

    gradient = torch.autograd.grad(evaluate(True).loss, parameters)
    norm = lambda found: math.sqrt(sum(float(g.square().sum()) for g in found))  # noqa: E731
    head = {id(p) for p in module.head.parameters()}
    beside = norm([g for g, p in zip(gradient, parameters, strict=True) if id(p) in head])
    for inside, truth in ((False, beside / norm(gradient)), (True, 0.0)):
        operator = GaussNewtonOperator([MicroBatch(lambda: evaluate(inside), 1.0)], parameters)  # noqa: B023
        assert operator.mismatch is None
        operator(operator.space.random(torch.Generator().manual_seed(0)))
        # Two sums of the same roundings of 1e-16.
        assert operator.mismatch == pytest.approx(truth, rel=1e-12, abs=1e-14)
    assert 0.1 < beside / norm(gradient) < 0.99


class OpaqueTanh(torch.autograd.Function):
    """tanh whose backward is made by numpy: autograd takes its result for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(gradient.detach().numpy() * (1.0 - y.detach().numpy() ** 2))


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OpaqueTanh.apply(x)


@pytest.mark.slow
def test_a_wrong_second_derivative_is_seen() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), Opaque(), nn.Linear(6, 3)).double()
    found, _, said = fitted(Classifier(network, sgd), monitor("lambda_max", tolerance=1e-3))
    assert len(found) == 3
    for row in found.values():
        assert row["lambda_max_converged"] == 0.0
        assert row["lambda_max_error"] > 1e-3
    assert len(said) == 1  # though the number in it is another at each step
    assert said[0].startswith("products for lambda_max are not symmetric (by ")
    # By differences, as the sentence advises, it is that of tanh.
    module = Classifier(network, sgd)
    # Differences are off by 3e-10 of a product, and so asymmetric.
    found, moments, said = fitted(module, monitor("lambda_max", products="difference", tolerance=1e-8))
    assert said == []
    smooth = Classifier(nn.Sequential(network[0], nn.Tanh(), network[2]), sgd)
    for step, row in found.items():
        truth = float(torch.linalg.eigvalsh(hessian(smooth, moments, step))[-1])
        assert row["lambda_max"] == pytest.approx(truth, rel=1e-8)
