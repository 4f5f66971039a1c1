"""HessianSpectrumMonitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.modules import FromIterator, NoOptimizer, Plain, TwoOptimizers, unending
from tests.helpers.runs import Capture, Classifier, batched_samples, classification, loader, make_trainer, mlp, rows
from tests.helpers.setups import Measured
from tests.helpers.spectrum import TOLERANCE, samples, whole
from tests.helpers.traps import Hooked, Trapped
from tests.helpers.witness import copies
from tests.oracles.hessian_spectrum import Curvature, Moments
from tests.testers.family import Family, Misfit, Trap

QUANTITIES = (
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "spectral_density",
    "gauss_newton_lambda_max",
    "preconditioned_lambda_max",
    "second_moment_contraction",
)
WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"quantities": "lambda_max"}, r"quantities must be a non-empty sequence of names, got 'lambda_max': choose from"),
    ({"quantities": []}, r"quantities must be a non-empty sequence of names, got \[\]: choose from \('lambda_max'"),
    (
        {"quantities": ["lambda_max", "lanczos"]},
        r"quantities must be names from .*'spectral_density'.*, got 'lanczos': correct or remove it",
    ),
    ({"k": 0}, rf"k {WHOLE} 1, got 0: 1 is the largest eigenvalue alone"),
    ({"k": 1.5}, rf"k {WHOLE} 1, got 1\.5"),
    ({"max_products": 5}, rf"max_products {WHOLE} 20, got 5: a search for one eigenvalue takes about ten"),
    ({"max_products": 30, "k": 30}, rf"max_products {WHOLE} 31, got 30"),
    ({"density_starts": 0}, rf"density_starts {WHOLE} 1, got 0: 2 tell the error"),
    ({"density_steps": 1}, rf"density_steps {WHOLE} 2, got 1: 40 make a good picture"),
    *(
        ({"tolerance": value}, rf"tolerance must lie between 0 and 1, got {value!r}: 1e-3 gives eigenvalues to five")
        for value in (0.0, 1.0, -0.1, float("nan"), "1e-3")
    ),
    ({"trace_error": 2.0}, r"trace_error must lie between 0 and 1, got 2\.0: 0\.05 gives the trace to 5 %"),
    ({"products": "hvp"}, r"products must be 'auto', 'exact' or 'difference', got 'hvp': 'auto' is exact where it can"),
    ({"keep_graph": "yes"}, r"keep_graph must be True, False or 'auto', got 'yes': 'auto' keeps what fits"),
    ({"probe_samples": 0}, rf"probe_samples {WHOLE} 1, or None, got 0: None takes all training data"),
    ({"probe_samples": 0.5}, rf"probe_samples {WHOLE} 1, or None, got 0\.5"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0: None takes the batch size of the loader"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test': 'train' leaves the module as it"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64': None computes in the run's"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, got 0: 1 measures every optimizer step"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"prefix": "train/"}, r"prefix must be a name without slashes at its ends, got 'train/': use 'curvature'"),
    ({"optimizer_index": -1}, r"optimizer_index must not be negative, got -1: 0 is the first optimizer"),
]
EXACT = "must not need exact products where parameters are sharded or products='difference', got"
KNOWN = "must not hold 'preconditioned_lambda_max' where the preconditioner is not known, got"
MISFITS: dict[str, Misfit] = {
    "several optimizers": Misfit(
        TwoOptimizers,
        {},
        r"needs objective= where several optimizers .*, got 2 optimizers: give a callable \(module, batch\) -> loss",
    ),
    "optimizer that is not there": Misfit(
        Plain,
        {"optimizer_index": 1},
        r"optimizer_index must be below the number of optimizers, got 1 of 1: count from 0",
    ),
    "no optimizer": Misfit(
        NoOptimizer,
        {},
        r"must find trainable parameters in the optimizer, got none: return it from configure_optimizers",
    ),
    "step that fetches its own batch": Misfit(
        FromIterator,
        {},
        r"must see the batch of a step, got training_step\(dataloader_iter\): take \(batch, batch_idx\) instead",
    ),
    "outputs that name nothing": Misfit(
        Plain,
        {"outputs": "head"},
        r"outputs must name a submodule of Plain, got 'head': choose one of \['network', 'network.0'",
    ),
    "as many eigenvalues as parameters": Misfit(
        lambda: Plain(nn.Linear(4, 3, bias=False).double()),
        {"k": 12},
        r"k must be below the number of parameters, got 12 for 12: ask for fewer",
    ),
    "as many eigenvalues at both ends": Misfit(
        lambda: Plain(nn.Linear(4, 3, bias=False).double()),
        {
            "quantities": (
                "lambda_max",
                "lambda_min",
            ),
            "k": 11,
        },
        r"k must be below the number of parameters, got 11 for 12: ask for fewer",
    ),
    "Gauss-Newton by differences": Misfit(
        Plain,
        {
            "quantities": (
                "lambda_max",
                "gauss_newton_lambda_max",
            ),
            "products": "difference",
        },
        rf"quantities {EXACT} \['gauss_newton_lambda_max'\]: leave them out",
    ),
    "second moment by differences": Misfit(
        Plain,
        {"quantities": ("second_moment_contraction",), "products": "difference"},
        rf"quantities {EXACT} \['second_moment_contraction'\]: leave them out",
    ),
    "unknown preconditioner": Misfit(
        lambda: Plain(make_optimizer=lambda m: torch.optim.Adadelta(m.parameters())),
        {"quantities": ("preconditioned_lambda_max",)},
        rf"quantities {KNOWN} Adadelta: leave it out",
    ),
    "preconditioner of a changed step": Misfit(
        lambda: Plain(make_optimizer=lambda m: Adamlike(m.parameters())),
        {"quantities": ("preconditioned_lambda_max",)},
        rf"quantities {KNOWN} Adamlike: leave it out",
    ),
    "several dataloaders": Misfit(
        Plain,
        {},
        r"the probe set must come from one dataloader, got a list of 2: give probe_dataloader= batches of the form",
        lambda: [batched_samples(), batched_samples()],
    ),
    "several named dataloaders": Misfit(
        Plain,
        {},
        r"the probe set must come from one dataloader, got a dict of 2: give probe_dataloader= batches of the form",
        lambda: {"a": batched_samples(), "b": batched_samples()},
    ),
    "empty probe set": Misfit(
        Plain,
        {"probe_dataloader": []},
        r"the probe set must hold at least one sample for each rank, got 0: give more data, or other data by probe_dat",
    ),
    "stream without end": Misfit(
        Plain,
        {"probe_samples": None},
        r"samples must be a number where the dataloader has no length, got None: say how many to measure on",
        unending,
    ),
    "micro-batches of whole batches": Misfit(
        Plain,
        {"micro_batch_size": 3},
        r"batch_size must be left to a dataloader that hands out whole batches, got 3: leave it out",
        lambda: loader(classification(2)),
    ),
}


class Adamlike(torch.optim.Adam):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def with_error(*keys: str) -> set[str]:
    """Keys of eigenvalues."""
    return {f"{key}{suffix}" for key in keys for suffix in ("", "_error", "_converged")}


KEYS: dict[str, set[str]] = {
    "lambda_max": with_error("lambda_max") | {"lambda_max_upper", "lambda_max_threshold"},
    "lambda_min": with_error("lambda_min"),
    "hessian_trace": {"hessian_trace", "hessian_trace_stderr"},
    "spectral_density": set(),
    "gauss_newton_lambda_max": with_error("gauss_newton_lambda_max"),
    "preconditioned_lambda_max": with_error("preconditioned_lambda_max") | {"preconditioned_lambda_max_threshold"},
    "second_moment_contraction": with_error("second_moment_contraction") | {"second_moment_excess"},
}
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
    """Return a failure in a call of the step, counted over all of a measurement."""
    names = ("lambda_max", "hessian_trace", "spectral_density", "gauss_newton_lambda_max")
    options = {"quantities": names, "products": "exact", "keep_graph": keep_graph}
    # With kept graphs calls 4 and 5 come from the next operator, G; without, from the second product with H.
    lost = {"gauss_newton_lambda_max"} if keep_graph and call > 3 else {"lambda_max", "hessian_trace"}
    return Trap(
        lambda fails: Trapped([call if fails else 0]), frozenset(lost), options, lambda: copies(classification(3))
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
    few={"quantities": ("lambda_max",)},
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
