"""Values of the spectrum by module, and of the blocks of some parameters, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_curvature import CurvatureWarning
from lightning_curvature.monitors.modules import ModuleTable
from tests.helpers.counting import Passes
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.helpers.spectrum import TOLERANCE, monitor
from tests.helpers.spectrum_runs import assert_same_training, batches, fitted, hessian, parts, sgd
from tests.helpers.spectrum_setups import loader
from tests.helpers.tensorboard import charts, layouts, read
from tests.oracles.hessian_spectrum import ROUNDING, Curvature, Moments, check_eigenvalue

NAMES = ("network.0", "network.2")


def learner() -> Classifier:
    return Classifier(mlp(4, 6, 3), sgd)


def by_block(values: Tensor) -> list[float]:
    """Sums over the parameters of the first layer, and over those of the second."""
    return [float(part.sum()) for part in values.split([4 * 6 + 6, 6 * 3 + 3])]


def assert_shares(row: dict[str, float], key: str, matrix: Tensor, place: int) -> None:
    """Compare the shares in an eigenvector; its angle to the true one is at most r/gap.

    The error is the geometric mean of the residual r and of r²/gap, and at most the tolerance τ|λ|: so r is at most
    (τ²λ²·gap)^⅓. The shares move by twice the angle.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    others = torch.cat([values[:place], values[place + 1 :]]) if place >= 0 else values[:-1]
    gap = float((others - values[place]).abs().min())
    residual = (TOLERANCE**2 * float(values[place]) ** 2 * gap) ** (1 / 3)
    bound = 2.0 * residual / gap + ROUNDING / gap
    found = [row[f"{key}_share/{name}"] for name in NAMES]
    assert found == pytest.approx(by_block(vectors[:, place].square()), rel=0.0, abs=bound)
    assert sum(found) == pytest.approx(1.0, rel=1e-12)


def test_shares_in_eigenvectors() -> None:
    follow = monitor("lambda_max", "lambda_min", "gauss_newton_lambda_max", k=2, by_module=True)
    module, capture, moments = learner(), Capture(), Moments()
    trainer = make_trainer(moments, follow, logger=capture)
    trainer.fit(module, batches())
    found = rows(capture, "curvature_by_module")
    assert list(found) == [0, 2, 4]
    for step, row in found.items():
        matrix = hessian(module, moments, step)
        for key, place in (("lambda_max", 0), ("lambda_2", 1), ("lambda_min", -1)):
            assert_shares(row, key, matrix, place)
        gauss_newton = Curvature(module.network, module.loss, moments.all[step]).gauss_newton(parts())
        assert_shares(row, "gauss_newton_lambda_max", gauss_newton, 0)
        assert len(row) == 4 * len(NAMES)
    # Two columns are not two views of one.
    last = found[4]
    assert abs(last["lambda_max_share/network.0"] - last["lambda_min_share/network.0"]) > 0.01
    assert follow.result is not None
    table = follow.result.modules
    assert isinstance(table, ModuleTable)
    assert table.names == NAMES
    assert table.values() == last
    assert trainer.callback_metrics["curvature_by_module/lambda_2_share/network.2"] == pytest.approx(
        last["lambda_2_share/network.2"], rel=1e-6
    )


def test_block_of_some_parameters() -> None:
    """Products restricted to a block: its own eigenvalues and trace, which are not those of the whole."""
    module, capture, moments = learner(), Capture(), Moments()
    quantities = ("lambda_max", "lambda_min", "hessian_trace", "gauss_newton_lambda_max")
    first = monitor(*quantities, parameters="network.0.*", prefix="first")
    weights = monitor(*quantities, parameters=["*.0.weight", "network.2.weight"], prefix="weights", by_module=1)
    make_trainer(moments, first, weights, logger=capture).fit(module, batches())
    for prefix, names in (("first", ["0.weight", "0.bias"]), ("weights", ["0.weight", "2.weight"])):
        for step, row in rows(capture, prefix).items():
            curvature = Curvature(module.network, module.loss, moments.all[step], names)
            matrix = curvature.hessian(parts())
            check_eigenvalue(row, "lambda_max", matrix, 0, TOLERANCE)
            check_eigenvalue(row, "lambda_min", matrix, -1, TOLERANCE)
            check_eigenvalue(row, "gauss_newton_lambda_max", curvature.gauss_newton(parts()), 0, TOLERANCE)
            whole_matrix = hessian(module, moments, step)
            assert row["lambda_max"] < float(torch.linalg.eigvalsh(whole_matrix)[-1])  # a block's is no larger
            trace = float(matrix.trace())
            assert abs(row["hessian_trace"] - trace) <= 3.0 * row["hessian_trace_stderr"] + 1e-13 * abs(trace)
            assert row["lambda_max_threshold"] == 2.0 / 0.1
    assert rows(capture, "weights_by_module")[0]["lambda_max_share/network"] == pytest.approx(1.0, rel=1e-12)


def test_no_pass_more() -> None:
    counts, values = [], []
    for options in ({}, {"by_module": True}):
        module = learner()
        passes = Passes(module.network)
        found, _, _ = fitted(module, passes, monitor("lambda_max", "hessian_trace", **options))
        counts.append((passes.forwards, passes.backwards))
        values.append(found)
    assert counts[0] == counts[1]
    assert values[0] == values[1]


def test_training_is_the_same_to_the_bit() -> None:
    assert_same_training(learner, monitor("lambda_max", "hessian_trace", by_module=True))
    assert_same_training(learner, monitor("lambda_max", parameters="network.2.*"))


def test_an_operator_that_fails_leaves_the_columns_of_others() -> None:
    module = learner()
    follow = monitor("lambda_max", "gauss_newton_lambda_max", by_module=True, on_error="warn")
    module.forward = lambda x: module.network(x)  # type: ignore[method-assign]
    module.training_step = lambda batch, batch_idx: module.loss(  # type: ignore[method-assign]
        module.network(batch[0]), batch[1]
    )
    with pytest.warns(CurvatureWarning, match="outputs must come with the loss"):
        make_trainer(follow).fit(module, batches())
    assert follow.result is not None
    assert follow.result.modules is not None
    assert list(follow.result.modules.columns) == ["lambda_max_share"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"by_module": "netwerk"}, r"by_module must be names out of named_modules\(\), got 'netwerk': the nearest are"),
        ({"parameters": "netwerk.*"}, "parameters must match names of parameters that the optimizer moves, got 'netw"),
    ],
)
def test_names_that_fit_nothing_end_the_fit_at_its_start(options: Any, sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        make_trainer(monitor("lambda_max", **options)).fit(learner(), batches())


def test_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    follow = monitor("lambda_max", "hessian_trace", by_module=True)
    make_trainer(follow, logger=logger).fit(learner(), loader())
    logger.experiment.flush()
    events, (layout,) = read(logger.log_dir), layouts(logger.log_dir)
    assert charts(layout)["curvature: lambda_max_share by module"] == [
        f"curvature_by_module/lambda_max_share/{name}" for name in NAMES
    ]
    pictures = events.Images("curvature_by_module/picture")
    assert [picture.step for picture in pictures] == [0, 2]


def test_traces_of_modules() -> None:
    """Their sum is the trace; each is that of its diagonal block, to its standard error."""
    module, capture, moments = learner(), Capture(), Moments()
    follow = monitor("lambda_max", "hessian_trace", k=2, by_module=True, trace_error=0.3)
    make_trainer(moments, follow, logger=capture).fit(module, batches())
    found, wholes = rows(capture, "curvature_by_module"), rows(capture)
    assert list(found) == [0, 2, 4]
    for step, row in found.items():
        truth = by_block(hessian(module, moments, step).diagonal())
        values = [row[f"hessian_trace/{name}"] for name in NAMES]
        errors = [row[f"hessian_trace_stderr/{name}"] for name in NAMES]
        assert sum(values) == pytest.approx(wholes[step]["hessian_trace"], rel=1e-12)
        # Three standard errors, of three measurements of two modules, drawn once for all by the seed.
        assert all(abs(v - t) <= 3.0 * e for v, t, e in zip(values, truth, errors, strict=True))
        assert all(0.0 < e < abs(t) for e, t in zip(errors, truth, strict=True))
