"""Names that are nearly right, keys in place of names, and names of other monitors get the right one."""

from __future__ import annotations

import typing
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.batch_sharpness import options as sharpness
from lightning_curvature.directional import options as directional
from lightning_curvature.monitors.names import HOMES
from lightning_curvature.noise import options as noise
from lightning_curvature.spectrum import options as spectrum
from lightning_curvature.stabilization import options as stabilization
from tests.helpers.runs import Classifier, batched_samples, make_trainer, mlp

pytestmark = pytest.mark.check


@pytest.mark.parametrize(
    ("monitor", "option", "name", "meant"),
    [
        *(
            (DirectionalCurvatureMonitor, "estimators", name, "'kl'")
            for name in ("lambda_kl", "λ_kl", "lambdakl", "KL", "λKL", "lambda-kl")
        ),
        (DirectionalCurvatureMonitor, "estimators", "lambda_dir", "'hvp'"),
        (DirectionalCurvatureMonitor, "estimators", "critical_sharpness", "'critical'"),
        (DirectionalCurvatureMonitor, "estimators", "finite_diference", "'finite_difference'"),
        (DirectionalCurvatureMonitor, "estimators", "gni", "BatchSharpnessMonitor(quantities=('gni',))"),
        (HessianSpectrumMonitor, "quantities", "λ_max", "'lambda_max'"),
        (HessianSpectrumMonitor, "quantities", "lambda_2", "'lambda_max'"),
        (HessianSpectrumMonitor, "quantities", "trace", "'hessian_trace'"),
        (HessianSpectrumMonitor, "quantities", "lambda_fd", "DirectionalCurvatureMonitor(estimators=('finite_dif"),
        (BatchSharpnessMonitor, "quantities", "GNI", "'gni'"),
        (BatchSharpnessMonitor, "quantities", "batchsharpness", "'batch_sharpness'"),
        (StabilizationMonitor, "quantities", "Δ_2", "'delta_2'"),
        (NoiseCovarianceMonitor, "quantities", "noise_gamma_stderr", "'noise_gamma'"),
        (NoiseCovarianceMonitor, "quantities", "gamma", "'noise_gamma'"),
    ],
)
def test_the_right_name(monitor: type[pl.Callback], option: str, name: str, meant: str) -> None:
    more: dict[str, Any] = {"parameter": "weight"} if monitor is NoiseCovarianceMonitor else {}
    with pytest.raises(ValueError, match=rf"^{option} must be names from .*\.$") as refusal:
        monitor(**{option: (name,)}, **more)
    assert f"got {name!r} (did you mean {meant}" in str(refusal.value)
    if "Monitor" not in meant:
        with pytest.raises(ValueError, match="non-empty sequence of names") as refusal:
            monitor(**{option: name}, **more)
        assert f"got {name!r} (did you mean ({meant},)?): choose from (" in str(refusal.value)


def test_a_name_like_no_other() -> None:
    with pytest.raises(ValueError, match=r"got 'xyz': correct or remove it\.$"):
        BatchSharpnessMonitor(quantities=("xyz",))  # type: ignore[arg-type]


def test_names_are_those_of_the_options() -> None:
    assert [set(names) for names in HOMES.values()] == [
        set(typing.get_args(kind))
        for kind in (
            directional.Estimator,
            spectrum.Quantity,
            sharpness.Quantity,
            stabilization.Quantity,
            noise.Quantity,
        )
    ]


def test_families_share_a_prefix() -> None:
    """Also with an edge, 2/η, that both write."""
    monitors = (DirectionalCurvatureMonitor(), HessianSpectrumMonitor(), BatchSharpnessMonitor(num_batches=16))
    trainer = make_trainer(*monitors)
    trainer.fit(Classifier(mlp(4, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), batched_samples())
    assert {f"curvature/{key}" for key in ("lambda_fd", "lambda_max", "batch_sharpness")} <= set(
        trainer.callback_metrics
    )
