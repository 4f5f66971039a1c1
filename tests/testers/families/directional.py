"""DirectionalCurvatureMonitor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature import DirectionalCurvatureMonitor
from tests.helpers.habits import MOVING
from tests.helpers.modules import FromIterator, NoOptimizer, Plain, TwoOptimizers
from tests.helpers.runs import Classifier, classification, mlp, run
from tests.helpers.stabilization import Complex
from tests.helpers.witness import ALL, FORWARD_ONLY, LAMBDAS
from tests.oracles.along_step import DIFFERENCE, EXACT, norm_of, rows_of
from tests.testers.family import Family, Misfit

EVERY = "every_n_train_steps must be a whole number of at least 1, got"
PREFIX = "prefix must be a name without slashes at its ends, got"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"epsilon": value}, rf"epsilon must be positive and finite, or 'auto', got {value!r}: 1\.0 is as far as")
        for value in (0.0, -1.0, math.nan, math.inf, "0.1", None)
    ),
    ({"estimators": ["kl", "lanczos"]}, r"estimators must be names from .*'kl'.*, got 'lanczos': correct or remove it"),
    ({"estimators": "kl"}, r"estimators must be a non-empty sequence of names, got 'kl' \(did you"),
    ({"estimators": []}, r"estimators must be a non-empty sequence of names, got \[\]: choose from .*'hvp'"),
    *(({"every_n_train_steps": value}, rf"{EVERY} {value!r}: 1 measures every") for value in (0, 2.5, "10", -5)),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"likelihood": "poisson"}, r"likelihood must be 'auto', .*'gaussian'.*, got 'poisson': name the one"),
    ({"kinks": "smooth"}, r"kinks must be 'frozen' or 'crossed', got 'smooth': 'frozen' measures the curvature at θ_t"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64': None computes in the run's"),
    *(({"prefix": value}, f"{PREFIX} {value!r}: use 'curvature'") for value in ("", "train/")),
    (
        {"optimizer_index": -1},
        r"optimizer_index must be a whole number of at least 0, got -1: 0 is the first optimizer",
    ),
    (
        {"critical_max_forwards": 2},
        r"critical_max_forwards must be a whole number of at least 3, got 2: a bracket alone takes two",
    ),
]
MISFITS: dict[str, Misfit] = {
    "several optimizers": Misfit(
        TwoOptimizers,
        {},
        r"needs objective= where several optimizers .*, got 2 optimizers: give a callable \(module, batch\) -> loss",
        error=MisconfigurationException,
    ),
    "optimizer that is not there": Misfit(
        Plain,
        {"optimizer_index": 1},
        r"optimizer_index must be below the number of optimizers, got 1 of 1: count from 0",
        error=MisconfigurationException,
    ),
    "complex parameters": Misfit(
        Complex,
        {},
        r"DirectionalCurvatureMonitor must find real parameters, got complex ones: train their real and imaginary",
        error=MisconfigurationException,
    ),
    "step that fetches its own batch": Misfit(
        FromIterator,
        {},
        r"must see the batch of a step, got training_step\(dataloader_iter\): take \(batch, batch_idx\) instead",
        error=MisconfigurationException,
    ),
    "no optimizer": Misfit(NoOptimizer, {}, "must find trainable parameters in the optimizer, got none: return it"),
    "outputs that name nothing": Misfit(
        Plain,
        {"outputs": "head"},
        r"outputs must name a submodule of Plain, got 'head': choose one of \['network', 'network.0'",
        error=ValueError,
    ),
    "float32 evaluations of half-precision parameters": Misfit(
        Plain,
        {"probe_precision": "32-true"},
        r"probe_precision='32-true' needs float32 parameters, got half-precision ones: train with a '-mixed' precision",
        trainer={"precision": "bf16-true"},
        error=MisconfigurationException,
    ),
}
BESIDE = {"two_over_lr", "headroom", "descent", "update_norm"}


def keys(*estimators: str) -> set[str]:
    """Return the keys that some estimators log."""
    epsilon = {"epsilon"} if {"kl", "finite_difference"} & set(estimators) else set()
    return BESIDE | epsilon | {f"{LAMBDAS[name]}{end}" for name in estimators for end in ("", "_error")}


OSCILLATION = {f"oscillation_{name}" for name in ("ratio", "edge", "cosine", "growth")} | {
    "lambda_osc",
    "lambda_osc_error",
}


def every_step(name: str, plain: Any = None) -> dict[str, Any]:
    """All estimators: the exact ones come last and repeat the step at θ_t, which may leave things as the step did."""
    return {"on_error": "warn"}


def forward_only(name: str, plain: Any = None) -> dict[str, Any]:
    """Those that end elsewhere; manual optimization makes two steps."""
    return {"estimators": FORWARD_ONLY, "every_n_train_steps": 1 if name == "manual optimization" else 2}


# A part of the loss that has no gradient follows the weights: at other weights the loss is another function.
ELSEWHERE = {"moves_a_teacher", "moves_a_teacher_past_autograd", "gives_a_teacher_new_memory", "grows_buffers"}


def missing(name: str) -> set[str]:
    """Return what rounding may hide in all steps, and what a step has not that moves trained weights itself."""
    if name in MOVING:
        return {*LAMBDAS.values(), "headroom"}
    if name in ELSEWHERE:
        return {"lambda_fd"}
    return {"lambda_fd", "lambda_kl"} if name == "bf16-mixed" else set()


def compared() -> Iterable[tuple[str, float, float, float]]:
    """Compare with dense derivatives at the θ_t and the batch of each step, in float64."""
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.Adam(m.parameters(), lr=0.05))
    estimators: Any = ("hvp", "gauss_newton", "kl", "finite_difference")
    follow = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=1, on_error="raise")
    outcome = run(module, classification(3), follow)
    assert len(outcome.steps) == 3
    for index, (row, step) in enumerate(zip(rows_of(outcome), outcome.steps, strict=True)):
        truth = outcome.reference(index)
        for key, quadratic, tolerance in (
            ("lambda_dir", truth.hessian, EXACT),
            ("lambda_gn", truth.gauss_newton, EXACT),
            ("lambda_fd", truth.hessian, DIFFERENCE),
            ("lambda_kl", truth.gauss_newton, DIFFERENCE),
        ):
            yield key, row[key], quadratic / truth.descent / step.lr, tolerance
        yield "headroom", row["headroom"], 2.0 * truth.descent / truth.hessian, EXACT
        # float64 sums of 45 parameters; d is the difference of numbers ten times its size.
        yield "descent", row["descent"], truth.descent / step.lr, 1e-12
        yield "update_norm", row["update_norm"], norm_of(step) / step.lr, 1e-12
        yield "2/η", row["headroom"] * row["lambda_dir"], 2.0 / step.lr, 1e-12
        assert row["two_over_lr"] == 2.0 / step.lr


COMMAND = {
    "estimators": ["kl", "finite_difference", "hvp", "gauss_newton", "critical", "oscillation"],
    "every_n_train_steps": 1,
    "epsilon": 0.5,
    "likelihood": "categorical",
    "outputs": "network",
    "optimizer_index": 0,
    "probe_precision": "32-true",
    "critical_max_forwards": 12,
    "progress_bar": True,
    "on_error": "raise",
}

DIRECTIONAL = Family(
    monitor=DirectionalCurvatureMonitor,
    follows_steps=True,
    quick={"estimators": ALL, "every_n_train_steps": 1},
    few={},
    numbers=tuple(LAMBDAS.values()),
    always=False,
    measured=lambda monitor: {LAMBDAS[name] for name in monitor.estimators},
    watched="headroom",
    undefined=frozenset(OSCILLATION),
    shown=("lambda_kl", "lambda_fd", "headroom"),
    selections=[
        ({}, keys("kl", "finite_difference")),
        *(({"estimators": (name,)}, keys(name)) for name in ALL),
        ({"estimators": ALL}, keys(*ALL)),
        ({"estimators": ("oscillation",)}, (BESIDE | OSCILLATION) - {"headroom"}),
    ],
    charts=[
        (
            {"estimators": ("hvp", "kl")},
            {"λ and 2/η": ["lambda_dir", "lambda_kl", "two_over_lr"]},
            ["lambda_dir", "lambda_kl"],
        ),
        (
            {"estimators": ("oscillation",)},
            {"λ_osc and its threshold": ["lambda_osc", "oscillation_edge"]},
            ["lambda_osc"],
        ),
        ({"estimators": ("critical",)}, {"λ and 2/η": ["critical_sharpness", "two_over_lr"]}, ["critical_sharpness"]),
    ],
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[
        (COMMAND, keys(*ALL) | OSCILLATION),
        (COMMAND | {"epsilon": "auto", "probe_precision": None}, keys(*ALL) | OSCILLATION),
    ],
    variants={"all": every_step, "forward-only": forward_only},
    habits={
        "all": lambda name: {"every_n_train_steps": 2, "on_error": "warn" if name in MOVING else "raise"},
        "forward-only": lambda name: forward_only(name) | {"on_error": "warn" if name in MOVING else "raise"},
    },
    missing=missing,
    compared=compared,
    # ε adapts where rounding and truncation are of one size, which takes float32.
    precision="32-true",
    learned="epsilon",
    counted=[
        ({"estimators": estimators}, [forwards, 0, forwards, 0])
        for estimators, forwards in {
            ("kl",): 1,
            ("finite_difference",): 2,
            ("kl", "finite_difference"): 2,
            ("hvp",): 1,
            ("gauss_newton",): 1,
            ("kl", "finite_difference", "hvp", "gauss_newton"): 4,
        }.items()
    ],
    # At the best ε second differences have seven digits; half a step from θ_t they have all, on one rank as on two.
    rank_options={"estimators": ALL, "epsilon": 0.5},
)
