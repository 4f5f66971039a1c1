"""Every estimator against the dense oracle, with the update taken from the run."""

import pytest
import torch

from lightning_curvature import DirectionalCurvatureMonitor
from tests.runs import Classifier, classification, mlp, run

ALL = ("hvp", "gauss_newton", "kl", "finite_difference")


def test_plain_sgd() -> None:
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    monitor = DirectionalCurvatureMonitor(estimators=ALL, every_n_train_steps=1)
    outcome = run(module, classification(4), monitor)
    assert len(outcome.steps) == 4
    for index, step in enumerate(outcome.steps):
        truth, row = outcome.reference(index), outcome.capture.rows[index]
        assert row["curvature/lambda_dir"] == pytest.approx(truth.hessian / truth.descent / step.lr, rel=1e-9)
        assert row["curvature/lambda_gn"] == pytest.approx(truth.gauss_newton / truth.descent / step.lr, rel=1e-9)
        assert row["curvature/lambda_fd"] == pytest.approx(truth.hessian / truth.descent / step.lr, rel=1e-5)
        assert row["curvature/lambda_kl"] == pytest.approx(truth.gauss_newton / truth.descent / step.lr, rel=1e-5)
