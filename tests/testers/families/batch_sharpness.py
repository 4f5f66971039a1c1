"""BatchSharpnessMonitor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_curvature import BatchSharpnessMonitor
from lightning_curvature.batch_sharpness.options import OF_UPDATES, PLATEAUS, QUANTITIES, SETTLING
from tests.helpers.batch_sharpness import DRAWN, Stream, loader, plain_run, sgd, whole_batches
from tests.helpers.modules import Plain, sharded
from tests.helpers.runs import classification, mlp
from tests.helpers.setups import Measured
from tests.helpers.traps import Hooked, Trapped
from tests.helpers.witness import copies
from tests.testers.family import Family, Misfit, Trap

WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"quantities": "ias"},
        r"quantities must be a non-empty sequence of names, got 'ias' \(did you mean \('ias',",
    ),
    ({"quantities": []}, r"quantities must be a non-empty sequence of names, got \[\]: choose from"),
    (
        {"quantities": ["gni", "lambda_max"]},
        r"quantities must be names from .*, got 'lambda_max' \(did you mean HessianSpectrumMonitor\(",
    ),
    ({"min_batches": 3}, rf"min_batches {WHOLE} 4, got 3: 8 make a standard error that can be used"),
    ({"average_over": 0}, rf"average_over {WHOLE} 1, got 0: 1 takes each measurement by itself"),
    ({"min_batches": 16.0}, rf"min_batches {WHOLE} 4, got 16\.0"),
    (
        {"num_batches": 8, "min_batches": 16},
        rf"num_batches {WHOLE} 16, got 8: it is the most, min_batches the fewest",
    ),
    ({"num_batches": 20, "min_batches": 24}, rf"num_batches {WHOLE} 24, got 20"),
    ({"batch_size": 0}, rf"batch_size {WHOLE} 1, or None, got 0: None takes the data of one optimizer step"),
    *(
        ({"batches_at_once": value}, r"batches_at_once must be a whole number of at least 1, or 'auto', got .*: 'auto'")
        for value in (0, -2, 2.5, "all")
    ),
    *(
        ({"relative_error": value}, rf"relative_error must lie between 0 and 1, got {value!r}: 0\.05 gives values to 5")
        for value in (0.0, 1.0, -0.1, float("nan"), "0.1")
    ),
    ({"tolerance": 0.0}, r"tolerance must lie between 0 and 1, got 0\.0: 1e-3 gives eigenvalues to three digits"),
    (
        {"curvature": "fisher"},
        r"curvature must be 'hessian' or 'gauss_newton', got 'fisher': 'hessian' is the whole",
    ),
    ({"full_hessian": "whole"}, r"full_hessian must be 'pairs' or 'exact', got 'whole': 'pairs' is the one for large"),
    ({"probe_samples": 0}, rf"probe_samples {WHOLE} 1, or None, got 0: None takes all training data"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0: None takes the batch size of the loader"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test'"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, got 0: 1 measures every optimizer step"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"prefix": ""}, r"prefix must be a name without slashes at its ends, got '': use 'curvature'"),
]


def lbfgs(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.1)


def misfit(make: Any, options: dict[str, Any], data: Any, sentence: str, before_data: bool = False) -> Misfit:
    """Return one of a module with an optimizer; what the data tells is known when it is read."""
    return Misfit(lambda: Plain(mlp(4, 3, 3), make), options, sentence, data, before_data)


MISFITS: dict[str, Misfit] = {
    "closure": misfit(
        lbfgs,
        {"quantities": ("ias", "lambda_gen")},
        loader,
        r"optimizer must step on gradients alone for trial updates, got LBFGS, whose step needs closure: train with "
        r"another optimizer, or leave 'lambda_gen' and 'update_sharpness' out",
        before_data=True,
    ),
    "shards": misfit(
        sharded,
        {},
        loader,
        r"parameters must be whole, or sharded by FSDP2's fully_shard alone, for BatchSharpnessMonitor, got "
        r"'network.2.weight' as a DTensor of another kind",
        before_data=True,
    ),
    "more than there is": misfit(
        sgd,
        {"batch_size": 15},
        loader,
        r"batch_size must be at most the 14 samples that are drawn from without replacement, got 15: lower it, or "
        r"raise probe_samples",
    ),
    "more than the subset": misfit(
        sgd,
        {"probe_samples": 3},
        loader,
        r"at most the 3 samples that are drawn from without replacement, got 4 \(an optimizer step\): lower it",
    ),
    "size of whole batches": misfit(
        sgd,
        {"batch_size": 3},
        whole_batches,
        r"batch_size must be left to a dataloader that hands out whole batches, got 3: leave it out",
    ),
    "stream without end": misfit(
        sgd,
        {"probe_samples": None},
        lambda: DataLoader(Stream(), batch_size=4),
        r"samples must be a number where the dataloader has no length, got None: say how many to measure on",
    ),
}


def keys(*quantities: str) -> set[str]:
    """Those written for some quantities, where SGD has momentum."""
    found = {f"{name}{end}" for name in quantities for end in ("", "_stderr")} | {"two_over_lr"}
    found |= set(PLATEAUS) if set(quantities) & set(SETTLING) else set()
    drawn = set(quantities) & set(DRAWN)
    found |= (
        {f"lambda_max_b_{end}" for end in ("q10", "q50", "q90", "unconverged")} if "lambda_max_b" in drawn else set()
    )
    return found | {f"{name}_batches" for name in drawn} | ({"zero_gradient_batches"} if drawn else set())


def variant(name: str, plain: Any) -> dict[str, Any]:
    """Leave out trial updates where the optimizer needs a closure; manual optimization makes two steps."""
    options: dict[str, Any] = {"quantities": [q for q in QUANTITIES if q not in missing(name)]}
    return options | {"every_n_train_steps": 1 if name == "manual optimization" else 2}


def missing(name: str) -> set[str]:
    """Return those of trial updates where the optimizer needs a closure."""
    return set(OF_UPDATES) if name == "lbfgs" else set()


def trap(call: int, lost: set[str]) -> Trap:
    """Return a failure in a call of the step, counted over a measurement but for its check, batches in turn."""
    return Trap(
        lambda fails: Trapped([call + 1 if fails else 0]),
        frozenset(lost),
        {"batches_at_once": 1},
        lambda: copies(classification(3)),
        later=2,
    )


# Batches of 8, 8, 8: the one of the step, three micro-batches for ∇L, then one call a drawn batch. The step's own batch
# is measured by itself, and so is ∇L; all that is drawn fails together.
TRAPS = {
    "step_sharpness": trap(1, {"step_sharpness"}),
    "full gradient": trap(3, {"gni", "lambda_gen"}),
    "first batch": trap(5, set(DRAWN)),
    "second batch": trap(6, set(DRAWN)),
    "third batch": trap(7, set(DRAWN)),
}


def compared() -> Iterable[tuple[str, float, float, float]]:
    """Compare with dense matrices of the very mini-batches that are drawn, many at once and in turn, in float64."""
    for at_once in ("auto", 1):
        run = plain_run(at_once=at_once)
        assert list(run.rows) == [0, 2]
        yield from run.compared()


COMMAND: dict[str, Any] = {
    "quantities": list(QUANTITIES),
    "every_n_train_steps": 2,
    "num_batches": 8,
    "min_batches": 4,
    "relative_error": 0.1,
    "batch_size": 5,
    "curvature": "gauss_newton",
    "full_hessian": "pairs",
    "batches_at_once": "auto",
    "probe_samples": 9,
    "probe_dataloader": None,
    "micro_batch_size": 2,
    "tolerance": 0.1,
    "outputs": "network",
    "objective": None,
    "optimizer_index": 0,
    "probe_mode": "eval",
    "probe_precision": "32-true",
    "seed": 3,
    "progress_bar": True,
    "on_error": "raise",
}
COMMANDS = [
    COMMAND,
    COMMAND | {"batch_size": None, "curvature": "hessian", "probe_samples": None, "probe_precision": None},
]

DRAWS = 4
# Micro-batches of all samples: 8 and 8, or 3, 3, 3, 3, 3, 1; those of a mini-batch of 8: itself, or 3, 3, 2.
WHOLE_SET, CUT_SET, CUT = 2, 6, 3
COUNTED: list[tuple[tuple[str, ...], int | None, int]] = [
    (("batch_sharpness",), None, DRAWS),
    (("batch_sharpness", "modified_batch_sharpness", "ias"), None, DRAWS),  # of one graph
    (("ias",), 3, CUT * DRAWS),
    (("lambda_max_b",), None, DRAWS),
    (("gni",), None, DRAWS + WHOLE_SET),
    (("lambda_gen",), None, DRAWS + WHOLE_SET),
    (("update_sharpness",), 3, CUT * DRAWS),
    (("step_sharpness",), None, 1),
    (QUANTITIES, None, 1 + DRAWS + WHOLE_SET),
    (QUANTITIES, 3, 1 + CUT * DRAWS + CUT_SET),
]

BATCH_SHARPNESS = Family(
    monitor=BatchSharpnessMonitor,
    # What one mini-batch leaves behind, the next would too.
    quick={
        "quantities": QUANTITIES,
        "num_batches": 4,
        "min_batches": 4,
        "tolerance": 0.9,  # products and what they leave behind are watched, no eigenvalue
        "every_n_train_steps": 2,
    },
    few={
        "quantities": ("batch_sharpness", "step_sharpness"),
        "num_batches": DRAWS,
        "min_batches": DRAWS,
        "batches_at_once": 1,
        "tolerance": 0.1,
    },
    numbers=QUANTITIES,
    always=False,
    # The updates of a handful of batches go uphill together now and then.
    uncertain=frozenset(OF_UPDATES),
    watched="batch_sharpness",
    shown=("batch_sharpness", "step_sharpness"),
    selections=[
        ({"quantities": quantities}, keys(*quantities))
        for quantities in [*((name,) for name in QUANTITIES), QUANTITIES, ("ias", "ias")]
    ],
    # One draw has no standard error.
    undefined=frozenset({"step_sharpness_stderr"}),
    charts=[
        (
            {"quantities": ("batch_sharpness", "step_sharpness")},
            {"mini-batch sharpness and 2/η": ["batch_sharpness", "step_sharpness", "two_over_lr", *PLATEAUS]},
            [],  # of momentum, whose edge is another
        ),
        (
            {"quantities": ("gni", "lambda_gen")},
            {"mini-batch sharpness and 2/η": ["gni", "lambda_gen", "two_over_lr"]},
            ["lambda_gen"],
        ),
    ],
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[(command, keys(*QUANTITIES)) for command in COMMANDS],
    variants={"": variant},
    # Twice, in either epoch.
    habits={"": lambda name: {"every_n_train_steps": 4}},
    missing=missing,
    reads={
        # Eleven samples do not make up the two batches of eight of a step.
        "Hooked": (Hooked, lambda: {"probe_samples": 11, "batch_size": 8}),
        "Measured": (Measured, lambda: {"probe_samples": 2048}),
    },
    read_trainer={"accumulate_grad_batches": 2, "max_epochs": 2},
    traps=TRAPS,
    compared=compared,
    accumulations=(1, 2),
    # However many products there are, one forward of each micro-batch.
    counted=[
        ({"quantities": quantities, "micro_batch_size": size}, [forwards, 0, forwards, 0])
        for quantities, size, forwards in COUNTED
    ],
    # That all are ready, a pair on each rank, gradient and product of the step's own batch; first the reading.
    collectives=[5, 4, 4],
)
