"""HessianSpectrumMonitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.runs import Capture, Classifier, classification, make_trainer, mlp, rows
from tests.helpers.setups import Measured
from tests.helpers.spectrum import TOLERANCE, samples, whole
from tests.helpers.traps import Hooked, Trapped
from tests.helpers.witness import copies
from tests.oracles.hessian_spectrum import Curvature, Moments
from tests.testers.families.spectrum_mistakes import BAD_ARGUMENTS, MISFITS
from tests.testers.family import Family, Trap


def with_error(*keys: str) -> set[str]:
    """Keys of eigenvalues."""
    return {f"{key}{suffix}" for key in keys for suffix in ("", "_error", "_converged")}


KEYS: dict[str, set[str]] = {
    "lambda_max": with_error("lambda_max") | {"lambda_max_upper", "lambda_max_threshold", "stability_headroom"},
    "lambda_min": with_error("lambda_min"),
    "hessian_trace": {"hessian_trace", "hessian_trace_stderr"},
    "spectral_density": set(),
    "gauss_newton_lambda_max": with_error("gauss_newton_lambda_max"),
    "preconditioned_lambda_max": with_error("preconditioned_lambda_max")
    | {"preconditioned_lambda_max_threshold", "stability_headroom"},
    "second_moment_contraction": with_error("second_moment_contraction") | {"second_moment_excess"},
}
QUANTITIES = tuple(KEYS)
EVERY_KEY = set().union(*KEYS.values())


def variant(name: str, plain: Any) -> dict[str, Any]:
    """Leave out the preconditioner where it is not known; manual optimization makes two steps of four batches."""
    unknown = name in ("noisy optimizer", "lbfgs")
    options: dict[str, Any] = {"quantities": [q for q in QUANTITIES if not (unknown and q.startswith("precond"))]}
    # At the start and later, after state of every kind has come about; runs of several epochs have twelve steps.
    seldom = dict.fromkeys(("metrics and validation", "early stopping", "weight averaging"), 6)
    return options | {"every_n_train_steps": ({"manual optimization": 1} | seldom).get(name, 2)}


def missing(name: str) -> set[str]:
    """Return the preconditioned eigenvalue where the preconditioner is not known."""
    return {"preconditioned_lambda_max"} if name in ("noisy optimizer", "lbfgs") else set()


# In the first or second of three micro-batches, in the first product or, without kept graphs, in the second. λ_max and
# the density fail together, since they share products; the others have operators of their own.
def trap(call: int, keep_graph: bool) -> Trap:
    """Return a failure in a call of the step, counted over all of a measurement but the check of the first."""
    names = ("lambda_max", "hessian_trace", "spectral_density", "gauss_newton_lambda_max")
    options = {"quantities": names, "products": "exact", "keep_graph": keep_graph}
    # With kept graphs calls 4 and 5 come from the next operator, G; without, from the second product with H.
    lost = {"gauss_newton_lambda_max"} if keep_graph and call > 3 else {"lambda_max", "hessian_trace"}
    return Trap(
        lambda fails: Trapped([call + 1 if fails else 0]), frozenset(lost), options, lambda: copies(classification(3))
    )


def compared() -> Iterable[tuple[str, float, float, float]]:
    """Compare with the dense matrices at the weights of each measured step, in float64."""
    capture, moments = Capture(), Moments()
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.Adam(m.parameters(), lr=0.03))
    quantities: Any = ("lambda_max", "lambda_min", "gauss_newton_lambda_max")
    follow = HessianSpectrumMonitor(quantities=quantities, every_n_train_steps=2, tolerance=TOLERANCE, on_error="raise")
    data = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    make_trainer(moments, follow, logger=capture).fit(module, data)
    assert list(rows(capture)) == [0, 2]
    for step, row in rows(capture).items():
        curvature = Curvature(module.network, module.loss, moments.all[step])
        values = torch.linalg.eigvalsh(curvature.hessian(whole()))
        # Residuals of 1e-6 at gaps of a hundredth: 1e-10 of λ.
        yield "lambda_max", row["lambda_max"], float(values[-1]), 1e-9
        yield "lambda_min", row["lambda_min"], float(values[0]), 1e-9
        gauss_newton = torch.linalg.eigvalsh(curvature.gauss_newton(whole()))
        yield "gauss_newton_lambda_max", row["gauss_newton_lambda_max"], float(gauss_newton[-1]), 1e-9


COMMAND = {
    "quantities": list(QUANTITIES),
    "k": 2,
    "every_n_train_steps": 2,
    "probe_samples": 20,
    "probe_dataloader": None,
    "micro_batch_size": 7,
    "tolerance": 1.0e-2,
    "max_products": 30,
    "trace_error": 0.1,
    "density_starts": 1,
    "density_steps": 10,
    "products": "auto",
    "keep_graph": True,
    "save_eigenvectors": False,
    "outputs": "network",
    "optimizer_index": 0,
    "probe_mode": "eval",
    "probe_precision": "32-true",
    "seed": 3,
    "progress_bar": True,
    "on_error": "raise",
}
COMMANDS = [
    COMMAND,
    COMMAND | {"probe_samples": None, "keep_graph": "auto", "probe_precision": None},
    COMMAND | {"keep_graph": False, "probe_precision": None},
]

SPECTRUM = Family(
    monitor=HessianSpectrumMonitor,
    quick={
        "quantities": QUANTITIES,
        "max_products": 20,
        "density_starts": 1,
        "density_steps": 3,
        "tolerance": 0.9,
        "every_n_train_steps": 2,
    },
    few={"quantities": ("lambda_max",), "recheck_every": 1},  # what is overlooked is known each time
    numbers=tuple(name for name in QUANTITIES if name != "spectral_density"),
    always=False,
    watched="lambda_max",
    shown=("lambda_max",),
    selections=[
        *(({"quantities": (name,)}, keys) for name, keys in KEYS.items()),
        ({"quantities": QUANTITIES}, EVERY_KEY),
        ({"k": 3}, KEYS["lambda_max"] | with_error("lambda_2", "lambda_3")),
    ],
    charts=[
        (
            {"quantities": ("lambda_max", "spectral_density", "preconditioned_lambda_max"), "k": 2},
            {
                "λ_max and its threshold": ["lambda_max", "lambda_2", "lambda_max_threshold"],
                "preconditioned λ_max": ["preconditioned_lambda_max", "preconditioned_lambda_max_threshold"],
            },
            ["lambda_max", "preconditioned_lambda_max"],
        )
    ],
    pictures=(
        {"quantities": ("spectral_density",)},
        ("spectral_density_picture",),
        "the spectral density comes without a picture: install matplotlib to have one beside the histogram.",
    ),
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[(command, EVERY_KEY | with_error("lambda_2")) for command in COMMANDS],
    variants={"": variant},
    habits={"": lambda name: {"every_n_train_steps": 4}},
    missing=missing,
    reads={
        "Hooked": (Hooked, lambda: {"probe_samples": 11, "every_n_train_steps": 4}),
        "Measured": (Measured, lambda: {"probe_samples": 2048, "every_n_train_steps": 4}),
    },
    read_trainer={"max_epochs": 2},
    traps={
        **{f"{call}, keep_graph={keep}": trap(call, keep) for call in (1, 2, 4, 5) for keep in (True, False)},
        # Three calls of the gradient at θ, six of the first product: in the middle of it, at θ + εv.
        "8, differences": Trap(
            lambda fails: Trapped([8 if fails else 0]),
            options={"quantities": ("lambda_max",), "products": "difference"},
            data=lambda: copies(classification(3)),
        ),
    },
    compared=compared,
    # The two batches of the data, once; with graphs that are not kept, once more for each product.
    counted=[({"keep_graph": True}, [2, 0, 2, 0])],
)
