"""What HessianSpectrumMonitor writes, to whom, and that training can act on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.linalg import VectorSpace, eigenpairs, spectral_density
from lightning_curvature.reporting import loggers as reporting
from lightning_curvature.reporting.names import full_name
from lightning_curvature.spectrum.result import _density_figure
from tests.helpers.runs import Capture, make_trainer, rows, warned
from tests.helpers.spectrum import TOLERANCE, monitor, whole
from tests.helpers.spectrum_setups import loader, module
from tests.helpers.tensorboard import charts, layouts, read
from tests.oracles.hessian_spectrum import Curvature, Moments, check_eigenvalue


def fit(*callbacks: Any, logger: Any = None, learner: Any = None, **options: Any) -> Any:
    trainer = make_trainer(*callbacks, logger=logger, **({"max_epochs": 2} | options))
    trainer.fit(learner or module(), loader())
    return trainer


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    logger, capture = TensorBoardLogger(tmp_path, name="run"), Capture()
    follow = monitor("lambda_max", "spectral_density", "preconditioned_lambda_max", k=2)
    make = lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)  # noqa: E731
    learner = module(make)
    moments = Moments()
    fit(moments, follow, logger=[logger, capture], learner=learner)
    logger.experiment.flush()
    events = read(logger.log_dir)
    for key in ("lambda_max", "lambda_2", "lambda_max_error", "preconditioned_lambda_max"):
        written = {event.step: event.value for event in events.Scalars(full_name("curvature", key))}
        for step, row in rows(capture).items():
            # Event files hold float32.
            assert written[step] == pytest.approx(row[key], rel=1e-6, nan_ok=True)
        assert list(written) == [0, 2, 4, 6]
    histograms = events.Histograms("curvature/spectral_density")
    assert [event.step for event in histograms] == [0, 2, 4, 6]
    for event in histograms:
        curvature = Curvature(learner.network, learner.loss, moments.all[event.step])
        values = torch.linalg.eigvalsh(curvature.hessian(whole()))
        found = event.histogram_value
        assert found.num == len(values) == 51
        assert sum(found.bucket) == pytest.approx(51.0, rel=1e-6)
        # All 51 directions are found by two starts of 40 steps: the extremes are the eigenvalues themselves, to 1e-4.
        assert found.max == pytest.approx(float(values[-1]), rel=1e-4)
        assert found.min == pytest.approx(float(values[0]), rel=1e-4)
        # Two samples of the trace of what is left beside λ_max and λ_2, of m numbers: four standard deviations.
        rest = values[:-2]
        deviation = len(rest) * (2.0 / (len(rest) + 2) * float(rest.var(unbiased=False)) / 2.0) ** 0.5
        assert abs(found.sum - float(values.sum())) <= 4.0 * deviation
    pictures = events.Images("curvature/spectral_density_picture")
    assert [event.step for event in pictures] == [0, 2, 4, 6]
    for picture in pictures:
        assert (picture.width, picture.height) == (640, 360)
        assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert len({picture.encoded_image_string for picture in pictures}) == 4
    (layout,) = layouts(logger.log_dir)
    assert charts(layout) == {
        "curvature: λ_max and its threshold": [
            "curvature/lambda_max",
            "curvature/lambda_2",
            "curvature/lambda_max_threshold",
        ],
        "curvature: preconditioned λ_max": [
            "curvature/preconditioned_lambda_max",
            "curvature/preconditioned_lambda_max_threshold",
        ],
    }


@pytest.mark.parametrize("known", [True, False])
def test_ends_of_the_density_are_marked_within_the_picture(known: bool) -> None:
    """Also those whose weight is so small that the axis cuts them off; the histogram ends there."""
    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.tensor([40.0, -6.0]), torch.randn(998, generator=g)]).double()
    space = VectorSpace([values])
    pairs = eigenpairs(values.mul, space, largest=1, smallest=1) if known else None
    density = spectral_density(values.mul, space, starts=1, steps=40, deflation=pairs)
    (axes,) = _density_figure("curvature/spectral_density at step 3", density).axes
    curve, *marks = axes.lines
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # Isolated ends converge within the 40 products, and are known to the search's tolerance.
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([-6.0, 40.0], rel=1e-3)
    assert left < -6.0 < 40.0 < right
    assert bottom < max(curve.get_ydata()) < top
    assert axes.get_title() == "curvature/spectral_density at step 3: from -6 to 40"
    edges, _ = density.histogram()
    assert edges[[0, -1]].tolist() == pytest.approx([-6.0, 40.0], rel=1e-3)


def test_density_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    logger = TensorBoardLogger(tmp_path, name="run")
    said = warned(lambda: fit(monitor("spectral_density"), logger=logger))
    assert said == [
        "the spectral density comes without a picture: install matplotlib to have one beside the histogram."
    ]
    logger.experiment.flush()
    events = read(logger.log_dir)
    assert len(events.Histograms("curvature/spectral_density")) == 4
    assert events.Tags()["images"] == []


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.thinned(2)
def test_density_without_tensorboard_is_said(shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    fit(monitor("spectral_density"), logger=TensorBoardLogger(tmp_path) if shown else CSVLogger(tmp_path))
    sentence = (
        "'spectral_density' is written to TensorBoard alone, and this Trainer has no TensorBoardLogger: give it one."
    )
    assert [one for one in said if "Monitor: " not in one] == ([] if shown else [sentence])


def test_beside_the_directional_monitor() -> None:
    """One prefix for both: neither sees the other."""

    def run(*callbacks: Any) -> tuple[dict[int, dict[str, float]], Any, Any]:
        capture, moments, learner = Capture(), Moments(), module()
        fit(moments, *callbacks, logger=capture, learner=learner)
        return rows(capture), moments, learner

    def directional() -> DirectionalCurvatureMonitor:
        return DirectionalCurvatureMonitor(estimators=("hvp", "kl"), every_n_train_steps=2, on_error="raise")

    alone, _, _ = run(directional())
    spectrum_alone, _, _ = run(monitor("lambda_max", "gauss_newton_lambda_max"))
    for first_is_spectrum in (True, False):
        pair = [monitor("lambda_max", "gauss_newton_lambda_max"), directional()]
        both, moments, learner = run(*(pair if first_is_spectrum else pair[::-1]))
        assert list(both) == [0, 2, 4, 6]
        for step, row in both.items():
            assert row == alone[step] | spectrum_alone[step]  # bit for bit
            hessian = Curvature(learner.network, learner.loss, moments.all[step]).hessian(whole())
            check_eigenvalue(row, "lambda_max", hessian, 0, TOLERANCE)
