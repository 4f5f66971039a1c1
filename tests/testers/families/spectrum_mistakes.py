"""Bad arguments of HessianSpectrumMonitor, and fits that it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.modules import FromIterator, NoOptimizer, Plain, TwoOptimizers, unending
from tests.helpers.runs import batched_samples, classification, loader
from tests.testers.family import Misfit


class Adamlike(torch.optim.Adam):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"quantities": "lambda_max"}, r"quantities must be a non-empty sequence of names, got 'lambda_max' \(did you"),
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
        ({"tolerance": value}, rf"tolerance must lie between 0 and 1, got {value!r}: 1e-3 gives eigenvalues to three")
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
    (
        {"optimizer_index": -1},
        r"optimizer_index must be a whole number of at least 0, got -1: 0 is the first optimizer",
    ),
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
