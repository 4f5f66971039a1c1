"""StabilizationMonitor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization.options import ESTIMATORS, QUANTITIES
from tests.helpers.habits import MOVING
from tests.helpers.modules import FromIterator, NoOptimizer, Plain, TwoOptimizers, sharded
from tests.helpers.runs import Capture, classification, loader, make_trainer, rows
from tests.helpers.setups import Measured
from tests.helpers.stabilization import QUICK, STAGES, Complex, Trapped, failing_in, samples
from tests.helpers.stabilization_values import TIGHT, classifier_case, dense_moment, mean_and_error
from tests.helpers.traps import Hooked, Stream
from tests.oracles.sample_growth import dense_increment, mean_hessian, top_eigenvectors
from tests.testers.family import Family, Misfit, Trap

WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"quantities": "delta_1"},
        r"quantities must be a non-empty sequence of names, got 'delta_1' \(did you mean \('de",
    ),
    ({"quantities": ()}, r"quantities must be a non-empty sequence of names, got \(\): choose from \('delta_1'"),
    (
        {"quantities": ["delta_3"]},
        r"quantities must be names from .*'delta_2_subspace'\), got 'delta_3' \(did you mean 'delta_2'\?\): correct or",
    ),
    ({"estimators": ["gm"]}, r"estimators must be names from \('gaussian_moment', .*, got 'gm': correct or remove it"),
    (
        {"law": "isotropic"},
        r"law must be 'top', 'bottom', 'random' or 'gradients', got 'isotropic': 'top' takes the sharpest",
    ),
    ({"sample_sizes": ()}, rf"sample_sizes {WHOLE} 1, got \(\): \(8, 64\) measures at both"),
    ({"sample_sizes": (4, 0)}, rf"sample_sizes {WHOLE} 1, got 0"),
    ({"sample_sizes": (4, 2.5)}, rf"sample_sizes {WHOLE} 1, got 2\.5"),
    ({"sample_sizes": "48"}, rf"sample_sizes {WHOLE} 1, got '48'"),
    ({"sample_sizes": True}, rf"sample_sizes {WHOLE} 1, got True"),
    ({"subspace_dim": 0}, rf"subspace_dim {WHOLE} 1, got 0: 16 holds what matters of many networks"),
    ({"subspace_dim": [4, -1]}, rf"subspace_dim {WHOLE} 1, got -1"),
    ({"subspace_dim": (2, 1.5)}, rf"subspace_dim {WHOLE} 1, got 1.5: 16 holds what"),
    *(
        (
            {"sigma": value},
            r"sigma must be positive and finite, got .*: 1e-3 is a usual width in units of the parameters",
        )
        for value in (0.0, -1e-3, math.inf, math.nan, (), (1e-3, 0.0), None)
    ),
    (
        {"sigma": "1e-3"},
        r"sigma must be positive and finite, got '1e-3': 1e-3 is a usual width in units of the parameters",
    ),
    ({"sigma": True}, r"sigma must be positive and finite, got True"),
    ({"candidates": 0}, rf"candidates {WHOLE} 1, got 0: 8 show how much samples differ"),
    ({"draws": 1}, rf"draws {WHOLE} 2, got 1: 64 make a standard error that can be trusted"),
    ({"trace_vectors": 2}, rf"trace_vectors {WHOLE} 3, got 2: 16 give the traces to a few per cent"),
    ({"validation_draws": -1}, rf"validation_draws {WHOLE} 0, got -1: 0 leaves the model unchecked"),
    (
        {"max_products": 8, "subspace_dim": 8},
        rf"max_products {WHOLE} 9, or None, got 8: None allows 20 for each direction",
    ),
    ({"tolerance": 0.0}, r"tolerance must lie between 0 and 1, got 0\.0: 1e-3 gives eigenvectors to three digits"),
    (
        {"model_tolerance": 1.0},
        r"model_tolerance must lie between 0 and 1, got 1\.0: 0\.1 accepts a model that is right",
    ),
    *(
        ({"order": value, "estimators": ["direct"]}, r"order must be positive and finite, got .*: 2 is the mean square")
        for value in (0.0, -2, math.inf, math.nan, "2")
    ),
    (
        {"order": 4.0},
        r"estimators must not hold 'gaussian_moment' where order is not 2, got 4\.0, for which there is no closed "
        r"form: use 'quadratic' or 'direct'",
    ),
    (
        {"law": "gradients", "sample_sizes": (64, 4), "subspace_dim": 8},
        r"sample_sizes must not be below subspace_dim where law is 'gradients', got 4 for 8 directions, each the gradi",
    ),
    (
        {"directions": torch.eye(3)},
        r"directions must be a callable, or None, got a Tensor: give one that returns \(D, N\) vect",
    ),
    ({"at_steps": (3, -1)}, rf"at_steps {WHOLE} 0, got -1: \(0, 100\) measures before the first step and before step"),
    ({"at_steps": "end"}, rf"at_steps {WHOLE} 0, got 'end'"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, or None, got 0: 1 measures every optimizer step"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test'"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64'"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore'"),
    ({"prefix": "/"}, r"prefix must be a name without slashes at its ends, got '/'"),
    ({"optimizer_index": -1}, r"optimizer_index must be a whole number of at least 0, got -1"),
]


def misfit(make: Any, options: dict[str, Any], sentence: str, data: Any = samples) -> Misfit:
    """Return one of a monitor of everything that measures at the end alone: the data is read before, all the same."""
    return Misfit(
        make, {"quantities": QUANTITIES, "at_end": True, "every_n_train_steps": None} | options, sentence, data
    )


SINGLE = r"the dataloader must make batches of single samples, got a {} that hands out whole ones: give probe_dataload"
MISFITS: dict[str, Misfit] = {
    "no time to measure": misfit(
        Plain,
        {"at_end": False},
        r"at_end, at_steps or every_n_train_steps must say when to measure, got none of them: set at_end=True, or call",
    ),
    "several optimizers": misfit(TwoOptimizers, {}, r"needs objective= where several optimizers .*, got 2"),
    "optimizer that is not there": misfit(Plain, {"optimizer_index": 1}, r"optimizer_index must be below the numb"),
    "no optimizer": misfit(NoOptimizer, {}, r"must find trainable parameters in the optimizer, got none: return it"),
    "complex parameters": misfit(Complex, {}, r"must find real parameters, got complex ones: train their real and"),
    "step that fetches its own batch": misfit(FromIterator, {}, r"got training_step\(dataloader_iter\): take"),
    # Cut by hand; those of FSDP2 have a sentence of their own.
    "shards": misfit(
        lambda: Plain(make_optimizer=sharded),
        {},
        "^parameters must be whole, or sharded by FSDP2's fully_shard alone, for StabilizationMonitor, got",
    ),
    "as many directions as parameters": misfit(
        lambda: Plain(nn.Linear(4, 3, bias=False).double()),
        {"subspace_dim": (1, 12)},
        r"subspace_dim must be below the number of parameters, got 12 of 12: ask for fewer",
    ),
    "fewer samples than needed": misfit(
        Plain,
        {"sample_sizes": (4, 15)},
        r"sample_sizes must leave a sample to be added, got 17 samples for the largest and its candidates where the "
        r"data has 16: lower sample_sizes or candidates",
    ),
    "fewer samples of a stream": misfit(
        Plain,
        {"sample_sizes": (31,), "probe_dataloader": DataLoader(Stream(), batch_size=8)},
        r"sample_sizes must leave a sample to be added, got 33 samples .* has 32: lower",
    ),
    "whole batches": misfit(Plain, {}, SINGLE.format("DataLoader"), lambda: loader(classification(2))),
    "a list of batches": misfit(Plain, {"probe_dataloader": classification(2)}, SINGLE.format("list")),
    "several dataloaders": misfit(
        Plain,
        {},
        r"the probe set must come from one dataloader, got a list of 2: give",
        lambda: [samples(), samples()],
    ),
}


def keys(*quantities: str, validated: tuple[str, ...] = ("", "_full_space")) -> set[str]:
    """Return those written for some quantities, of a model that is compared in the spaces of these endings."""
    found = {f"{name}{suffix}" for name in quantities for suffix in ("", "_stderr")}
    return found | {f"validated_sigma{space}" for space in validated}


DIRECT: dict[str, Any] = {"quantities": QUANTITIES, "estimators": ("direct",), "draws": 2}
SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"quantities": QUANTITIES}, keys(*QUANTITIES)),
    ({"quantities": ("delta_1",)}, keys("delta_1", validated=())),
    ({"quantities": ("delta_2",)}, keys("delta_2", validated=("_full_space",))),
    ({"quantities": ("delta_2_subspace",)}, keys("delta_2_subspace", validated=("",))),
    ({"quantities": QUANTITIES, "validation_draws": 0}, keys(*QUANTITIES, validated=())),
    (DIRECT | {"validation_draws": 0}, keys(*QUANTITIES, validated=("",))),
    (DIRECT | {"order": 4}, keys("delta_1", "delta_4", "delta_4_subspace", validated=("",))),
    # Beside the increment of the point.
    (DIRECT | {"order": 1}, keys("delta_1", "delta_1_mean", "delta_1_mean_subspace", validated=("",))),
]


class Named(Dataset[Any]):
    """Samples of the set-up whose batches are dictionaries."""

    def __init__(self) -> None:
        self.x, self.y = classification(1, 8)[0]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": (self.x[index], "name"), "label": self.y[index]}


OWN_SAMPLES: dict[str, Callable[[], DataLoader[Any]]] = {
    "dict batch": lambda: DataLoader(Named(), batch_size=4),
    "float32": lambda: samples(dtype=torch.float32),
    "bf16-mixed": lambda: samples(dtype=torch.float32),
}


def variant(name: str, plain: Any) -> dict[str, Any]:
    """Measure before some steps, at times of its own, and after the last one."""
    # A second k would leave behind what the first does.
    return {
        "sample_sizes": (2,),
        "at_steps": (1,),
        "probe_dataloader": OWN_SAMPLES.get(name, samples)(),
        "on_error": "raise",
    }


NUMBERS = tuple(f"{name}{suffix}" for name in QUANTITIES for suffix in ("", "_stderr"))


def trap(stage: str) -> Trap:
    """Return a failure in a stage; measured before both steps and at the end."""
    return Trap(lambda fails: Trapped(), data=samples, around=functools.partial(failing_in, stage), later=2)


def compared() -> Iterable[tuple[str, float, float, float]]:
    """Compare with dense derivatives of the losses of single samples, in float64: what is logged, and the table."""
    module, data, losses, w = classifier_case()
    capture = Capture()
    follow = StabilizationMonitor(
        sample_sizes=(3, 9), subspace_dim=(1, 4), sigma=(1e-3, 0.3), candidates=4, tolerance=1e-10, at_steps=(0,),
        at_end=False, quantities=("delta_1", "delta_2_subspace"), on_error="raise",
    )  # fmt: skip
    make_trainer(follow, logger=capture, max_steps=1).fit(module, DataLoader(data, batch_size=7))
    assert follow.result is not None
    assert [(row.k, row.dimension, row.sigma) for row in follow.result.rows if row.dimension] == [
        (k, d, s) for k in (3, 9) for d in (4, 1) for s in (1e-3, 0.3)
    ]
    for row in follow.result.rows:
        if row.criterion == "delta_1":
            # A difference of two means of losses of order one, of some 1e-2: a hundred roundings of 1e-16.
            terms, tolerance = [abs(float(dense_increment(losses, w, row.k, row.k + j).a)) for j in range(4)], 1e-12
        else:
            basis = top_eigenvectors(mean_hessian(losses, w, row.k), row.dimension)
            terms, tolerance = dense_moment(losses, w, row.k, basis, row.sigma), TIGHT
        value, error = mean_and_error(terms)
        yield row.criterion, row.value, value, tolerance
        # Deviations lose digits to differences.
        yield f"{row.criterion}_stderr", row.stderr_samples, error, 1e-6
        if row.k == 9 and row.dimension in (0, 4) and row.sigma in (0.0, 1e-3):
            (logged,) = rows(capture).values()
            yield row.criterion, logged[row.criterion], value, tolerance


COMMAND: dict[str, Any] = {
    "sample_sizes": [2, 4],
    "subspace_dim": 2,
    "sigma": 1.0e-3,
    "quantities": list(QUANTITIES),
    "estimators": list(ESTIMATORS),
    "candidates": 2,
    "draws": 2,
    "trace_vectors": 3,
    "validation_draws": 2,
    "model_tolerance": 0.2,
    "order": 2.0,
    "law": "top",
    "directions": None,
    "at_end": True,
    "at_steps": [],
    "every_n_train_steps": None,
    "probe_dataloader": None,
    "micro_batch_size": 7,
    "tolerance": 1.0e-2,
    "max_products": None,
    "optimizer_index": 0,
    "probe_mode": "eval",
    "probe_precision": "32-true",
    "seed": 3,
    "on_error": "raise",
}
SEVERAL = {
    "subspace_dim": [1, 2],
    "sigma": [0.001, 0.1],
    "at_steps": [1],
    "every_n_train_steps": 2,
    "probe_precision": None,
}

STABILIZATION = Family(
    monitor=StabilizationMonitor,
    quick=QUICK,
    few={"sample_sizes": (2, 5), "candidates": 2, "subspace_dim": 1, "trace_vectors": 3, "tolerance": 0.1}
    | {"quantities": ("delta_1",), "at_end": False},
    numbers=NUMBERS,
    always=True,
    # A parameter that the repeated step takes the gradient from cannot be measured.
    exceptions=frozenset({"changes_modes_and_flags"}),
    watched="delta_1",
    shown=(),
    selections=SELECTIONS,
    pictures=(
        {},
        ("sample_growth",),
        "the stabilization table comes without a picture: install matplotlib to have one.",
    ),
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[(command, keys(*QUANTITIES)) for command in (COMMAND, COMMAND | SEVERAL)],
    variants={"": variant},
    # Before the first step and after the last.
    missing=lambda name: set(NUMBERS) if name in MOVING else set(),
    habits={"": lambda name: {"sample_sizes": (2,), "every_n_train_steps": 99, "probe_dataloader": samples()}},
    reads={"Hooked": (Hooked, lambda: {"sample_sizes": (2,)}), "Measured": (Measured, lambda: {"sample_sizes": (2,)})},
    traps={stage: trap(stage) for stage in STAGES},
    compared=compared,
    # For each k: the first k samples in a micro-batch, and three times more to see that its loss is the mean of theirs
    # and that these can be stacked; the two new ones stacked, and one of them alone. Or five samples in 3 + 2.
    counted=[({}, [2 * (4 + 2), 0, 2 * (4 + 2), 0]), ({"micro_batch_size": 3}, [4 + 2 + 2 * 4 + 2, 0, 16, 0])],
)
