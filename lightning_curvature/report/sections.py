"""The sections of a report that have figures, in the order of the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_curvature.report.figures import ONE, Panel, draw_losses, draw_regimes, panels
from lightning_curvature.report.modules import draw_modules
from lightning_curvature.report.series import EDGES, Points, Series, in_order


@dataclass(frozen=True)
class Section:
    """One section of the page that has figures.

    Attributes:
        id: in the page, and name of the PNG.
        title: heading.
        says: how to read the figure.
        monitor: which monitor logs its values.
        draw: returns figures by name, none where there is nothing to draw.
    """

    id: str
    title: str
    says: str
    monitor: str
    draw: Callable[[Sequence[Series]], list[Any]]


def _chosen(*keys: str) -> Callable[[Series], dict[str, Points]]:
    return lambda one: {key: one.values[key] for key in keys if key in one.values}


def _eigenvalues(one: Series) -> dict[str, Points]:
    keys = [key for key in in_order(one.values) if key[:7] == "lambda_" and key[7:].isdigit()]
    return _chosen("lambda_max", *keys, "gauss_newton_lambda_max", "lambda_min")(one)


def _shares(one: Series) -> dict[str, Points]:
    return dict(one.shares)


DIRECTIONAL = ("lambda_dir", "lambda_fd", "lambda_kl", "lambda_gn", "critical_sharpness")
SHARPNESS = ("batch_sharpness", "step_sharpness", "modified_batch_sharpness", "update_sharpness", "ias", "gni")
AVERAGES = tuple(f"{key}_average" for key in SHARPNESS)
_PLATEAUS = ("plateau_small_batch", "plateau_large_batch")


SECTIONS: tuple[Section, ...] = (
    Section(
        "regime",
        "Regimes",
        "Each stretch of the run in the colour of its regime; red triangles are alarms.",
        "RegimeMonitor()",
        draw_regimes,
    ),
    Section(
        "edge",
        "Share of the edge",
        "Each curvature over the value at which the optimizer turns unstable; the dashed line at 1 is the edge of "
        "stability.",
        "HessianSpectrumMonitor(), StabilityMonitor() or DirectionalCurvatureMonitor()",
        panels(Panel("value / edge", _shares, (ONE,))),
    ),
    Section(
        "curvature",
        "Curvature along the step",
        "λ along the update that the optimizer made. Where it reaches 2/η, the step just stops lowering the loss of "
        "its batch, to second order.",
        "DirectionalCurvatureMonitor()",
        panels(
            Panel("λ along the update, and 2/η", _chosen(*DIRECTIONAL), ("two_over_lr",)),
            Panel("λ_osc along the oscillation, and its edge", _chosen("lambda_osc"), (EDGES["lambda_osc"],)),
        ),
    ),
    Section("loss", "Loss", "Every logged value with “loss” in its name.", "self.log('train_loss', loss)", draw_losses),
    Section(
        "sharpness",
        "Sharpness of mini-batches",
        "The curvature of mini-batches along their own gradients. Plain SGD hovers where batch sharpness is 2/η; "
        "with momentum it settles between the two plateaus.",
        "BatchSharpnessMonitor()",
        panels(
            Panel("sharpness, and 2/η", _chosen(*SHARPNESS, *AVERAGES), ("two_over_lr", *_PLATEAUS)),
            Panel("λ_max of mini-batches, λ_gen", _chosen("lambda_max_b", "lambda_gen"), ("two_over_lr",)),
        ),
    ),
    Section(
        "spectrum",
        "Spectrum of the Hessian",
        "The extreme eigenvalues on the probe set with the threshold of the optimizer, and the sum of all eigenvalues.",
        "HessianSpectrumMonitor()",
        panels(
            Panel("eigenvalues of H", _eigenvalues, ("lambda_max_threshold",)),
            Panel(
                "λ_max of the preconditioned Hessian",
                _chosen("preconditioned_lambda_max"),
                (EDGES["preconditioned_lambda_max"],),
            ),
            Panel("trace of H", _chosen("hessian_trace")),
        ),
    ),
    Section(
        "stability",
        "Stability index",
        "How near training with mini-batches is to instability in the mean square: 1 is the edge.",
        "StabilityMonitor()",
        panels(
            Panel(
                "stability index",
                _chosen("stability_index", "stability_index_drift", "stability_index_noise"),
                (ONE,),
            ),
            Panel("second-moment contraction", _chosen("second_moment_contraction"), (ONE,)),
        ),
    ),
    Section(
        "modules",
        "By module",
        "Rows are modules, columns measured steps; at the right the last measurement with its standard error.",
        "a monitor with by_module=True",
        draw_modules,
    ),
)
