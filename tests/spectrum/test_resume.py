"""A run that goes on from a checkpoint logs what the unbroken run does."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows, warned
from tests.helpers.spectrum import samples

QUANTITIES = ("lambda_max", "lambda_min", "preconditioned_lambda_max", "gauss_newton_lambda_max", "hessian_trace")
QUANTITIES += ("second_moment_contraction",)


def monitor(**options: Any) -> HessianSpectrumMonitor:
    defaults: dict[str, Any] = {"quantities": QUANTITIES, "k": 2, "every_n_train_steps": 2, "on_error": "raise"}
    return HessianSpectrumMonitor(**(defaults | options))


def fit(
    epochs: int, follow: HessianSpectrumMonitor, resume: str | None = None, hidden: int = 6, **options: Any
) -> tuple[pl.Trainer, dict[int, dict[str, float]]]:
    capture = Capture()
    trainer = make_trainer(follow, logger=capture, max_epochs=epochs)
    learner = Classifier(mlp(4, hidden, 3), lambda m: torch.optim.Adam(m.parameters(), lr=0.03))
    # In order: which samples come next is then no matter of random states, which a checkpoint does not hold.
    trainer.fit(learner, DataLoader(TensorDataset(*samples()), batch_size=8), ckpt_path=resume, **options)
    return trainer, rows(capture)


@functools.cache
def unbroken() -> dict[int, dict[str, float]]:
    """Two epochs."""
    return fit(2, monitor())[1]


@functools.cache
def cold() -> dict[int, dict[str, float]]:
    """One epoch that begins anew."""
    return fit(1, monitor())[1]


# Lightning has the argument from 2.6 on.
SAFE = pytest.mark.skipif(
    "weights_only" not in inspect.signature(pl.Trainer.fit).parameters, reason="Lightning loads as torch does"
)


@pytest.mark.parametrize("weights_only", [None, pytest.param(True, marks=SAFE)])
@pytest.mark.slow
def test_same_bits_with_the_eigenvectors(weights_only: bool | None, tmp_path: Path) -> None:
    trainer, head = fit(1, monitor())
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    options = {} if weights_only is None else {"weights_only": weights_only}
    _, tail = fit(2, monitor(), path, **options)
    assert list(unbroken()) == [0, 2, 4, 6]
    assert list(tail) == [4, 6]
    assert str(head | tail) == str(unbroken())  # NaN of Adam's first step equals itself as a string


@pytest.mark.slow
def test_same_values_without_them(tmp_path: Path) -> None:
    """Each search begins anew after the break: the same eigenvalues, to what the residuals allow."""
    tolerance = 1e-6
    _, whole = fit(2, monitor(tolerance=tolerance))
    trainer, _ = fit(1, monitor(tolerance=tolerance, save_eigenvectors=False))
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert not any(isinstance(value, Tensor) for state in saved.values() for value in state.values())
    assert all(not state for key, state in saved.items() if "HessianSpectrum" in key)
    _, tail = fit(2, monitor(tolerance=tolerance, save_eigenvectors=False), path)
    assert list(tail) == [4, 6]
    differs = 0
    for step, row in tail.items():
        for key in ("lambda_max", "lambda_2", "lambda_min", "preconditioned_lambda_max", "gauss_newton_lambda_max"):
            # Residuals of 1e-6 at gaps of a hundredth: 1e-10 of λ.
            assert row[key] == pytest.approx(whole[step][key], rel=1e-9), key
            differs += row[key] != whole[step][key]
        assert abs(row["hessian_trace"] - whole[step]["hessian_trace"]) <= 3 * (
            row["hessian_trace_stderr"] + whole[step]["hessian_trace_stderr"]
        )
    assert differs  # another search it was


def test_state_is_plain_tensors(tmp_path: Path) -> None:
    follow = monitor()
    fit(1, follow)
    state = follow.state_dict()
    path = tmp_path / "state.pt"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=True)
    # λ_max, λ_2 and λ_min of H; one vector of each other.
    pairs = {kind: tracker["pairs"] for kind, tracker in loaded["eigenpairs"].items()}
    assert {kind: len(found["vectors"]) for kind, found in pairs.items()} == {
        "hessian": 3,
        "preconditioned": 1,
        "gauss_newton": 1,
        "second_moment": 1,
    }
    for kind, found in pairs.items():
        for vector, kept in zip(found["vectors"], state["eigenpairs"][kind]["pairs"]["vectors"], strict=True):
            assert type(vector) is Tensor
            assert torch.equal(vector, kept)
            assert vector.shape == (51,)
            assert vector.device.type == "cpu"
            assert not vector.requires_grad
            # No more than its own 51 numbers go into the file.
            assert vector.untyped_storage().nbytes() == 51 * vector.element_size()


@pytest.mark.slow
def test_eigenvectors_of_another_model_are_of_no_use() -> None:
    """A monitor that comes from a wider model begins anew, and finds what a fresh one finds."""
    used, fresh = monitor(), monitor()
    fit(1, used, hidden=9)
    fresh.load_state_dict(used.state_dict())
    found: list[Any] = []
    assert warned(lambda: found.append(fit(1, fresh)[1])) == []
    # The random vectors depend on the seed and the step alone.
    assert str(found[0]) == str(cold())


@pytest.mark.slow
def test_state_of_an_older_or_emptier_monitor() -> None:
    for state in ({}, {"eigenpairs": {}}):
        follow = monitor()
        follow.load_state_dict(state)
        assert str(fit(1, follow)[1]) == str(cold())


@pytest.mark.slow
def test_monitor_of_other_quantities_takes_what_there_is() -> None:
    """Vectors by operator: a monitor that asks for fewer goes on with more vectors than it needs, to the same value."""
    many, one = monitor(tolerance=1e-6), monitor(quantities=("lambda_max",), k=1, tolerance=1e-6)
    _, rich = fit(1, many)
    one.load_state_dict(many.state_dict())
    _, row = fit(1, one)
    assert row[0]["lambda_max"] == pytest.approx(rich[0]["lambda_max"], rel=1e-9)  # as above
    more = monitor(k=4, tolerance=1e-6)
    more.load_state_dict(one.state_dict())
    _, row = fit(1, more)
    assert row[0]["lambda_2"] == pytest.approx(rich[0]["lambda_2"], rel=1e-9)
