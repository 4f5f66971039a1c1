"""Runs in which one of two processes fails outside of products and evaluations, while the other one does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from lightning_curvature.linalg.basis import Basis
from lightning_curvature.monitors import step_calls
from lightning_curvature.optimizers.trial_steps import TrialSteps
from lightning_curvature.replay import isolation, objective
from lightning_curvature.spectrum import problem as spectrum_problem
from tests.distributed.cases import Case
from tests.distributed.failing_jobs import MESSAGE, Failing, Unrecorded
from tests.distributed.sharpness_cases import SharpnessCase
from tests.distributed.spectrum_cases import Measuring, SpectrumCase, dataset
from tests.distributed.spectrum_jobs import adam, classifier
from tests.helpers.runs import Batch, Classifier, mlp

FAILING_RANK, FAILING_STEP = 1, 1


def here(step: int = FAILING_STEP) -> bool:
    """Whether this process measures the step that fails on it."""
    return Measuring.step == step and dist.is_initialized() and dist.get_rank() == FAILING_RANK


@contextmanager
def breaking(
    owner: Any, name: str, error: Exception, step: int = FAILING_STEP, when: Callable[..., bool] = lambda *args: True
) -> Iterator[None]:
    """Let a function raise on the failing rank while the failing step is measured."""
    inner = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if here(step) and when(*args):
            raise error
        return inner(*args, **kwargs)

    with patch.object(owner, name, broken):
        yield


def job(case: Any, *broken: Any, **options: Any) -> Callable[[int, int], Any]:
    """A run during which something is broken; gives its outcome, or how it ended."""

    def run(rank: int, world_size: int) -> Any:
        try:
            if not broken:
                return case(rank, world_size)
            with breaking(*broken, **options):
                return case(rank, world_size)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            dist.barrier()  # which the processes come to in step

    return run


def short() -> Exception:
    return torch.OutOfMemoryError(MESSAGE)


spectrum = SpectrumCase(
    partial(classifier, adam, kind=Classifier),
    monitor={"quantities": ("lambda_max", "hessian_trace", "gauss_newton_lambda_max"), "k": 2},
)
preconditioned = replace(spectrum, monitor={"quantities": ("preconditioned_lambda_max", "lambda_min")})
# Groups that ranks share: a product takes several reductions, and a rank that fails takes part in all of them.
spread = replace(spectrum, step=22, monitor={"quantities": ("second_moment_contraction", "lambda_max")})
sharpness = SharpnessCase(
    partial(classifier, adam),
    steps=3,
    monitor={"quantities": ("step_sharpness", "batch_sharpness", "gni", "lambda_gen"), "batches_at_once": 1},
)
FIRST_TWO = {"when": lambda basis, *args: len(basis) == 2}

SPECTRUM = {
    "in_saving": job(spectrum, isolation, "Snapshot", short()),
    "in_saving_before_the_reading": job(spectrum, isolation, "Snapshot", short(), step=0),
    "in_making_the_loss": job(spectrum, objective, "Snapshot", short()),
    "in_the_basis": job(spectrum, Basis, "append", short(), **FIRST_TWO),
    "after_the_last_product": job(spectrum, Basis, "combine", short()),
    "in_the_basis_of_shared_groups": job(spread, Basis, "append", short(), **FIRST_TWO),
    "in_the_preconditioner": job(preconditioned, spectrum_problem, "preconditioner", TypeError(MESSAGE)),
}


class Failed:
    """Jobs that have. Not in the data, where it would be put back."""

    jobs: ClassVar[set[str]] = set()


def collating(job: str) -> Callable[[list[Any]], Any]:
    """Fails once on one rank: in the first batch of a measurement, which is one of all samples."""

    def collate(samples: list[Any]) -> Any:
        if here() and job not in Failed.jobs:
            Failed.jobs.add(job)
            raise OSError(MESSAGE)
        return default_collate(samples)

    return collate


exact_options = sharpness.monitor | {"quantities": ("step_sharpness", "ias"), "full_hessian": "exact"}
SHARPNESS = {
    "in_saving_for_batches": job(sharpness, isolation, "Snapshot", short()),
    "in_collation": job(replace(sharpness, collate=collating("pairs"))),
    "in_collation_for_exact_products": job(replace(sharpness, collate=collating("exact"), monitor=exact_options)),
    "in_keeping_the_batch": job(sharpness, step_calls, "copied", short()),
}
unbroken = {"spectrum": job(spectrum), "sharpness": job(sharpness)}
unwatched = {"spectrum_unwatched": job(spectrum.unwatched()), "sharpness_unwatched": job(sharpness.unwatched())}


class Unreadable(TensorDataset):
    """Is a mistake, on one rank."""

    def __getitem__(self, index: int) -> Any:
        if here(0):
            raise MisconfigurationException(MESSAGE)
        return super().__getitem__(index)


def unreadable() -> Unreadable:
    return Unreadable(*dataset().tensors)


class Mistaken(Failing):
    """Finds a mistake in a repetition of a step, on one rank."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fails_now():
            raise MisconfigurationException(MESSAGE)
        return Classifier.forward(self, x)


class MistakenInProducts(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if here(0):
            raise MisconfigurationException(MESSAGE)
        return super().training_step(batch, batch_idx)


class OutputsOnOneRank(Classifier):
    """Calls itself twice on one rank, in one step: which of both gives the outputs cannot be told."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if dist.is_initialized() and dist.get_rank() == FAILING_RANK and self.global_step == 0:
            self(batch[0])
        return super().training_step(batch, batch_idx)


pair, with_exact = {"estimators": ("kl", "finite_difference")}, {"estimators": ("hvp", "kl")}
mistaken = MisconfigurationException(MESSAGE)
# By name: how the failing rank ends, and what the other one says.
MISTAKEN = {
    "mistaken_reading": (job(replace(spectrum, data=unreadable)), "reading the probe set"),
    "mistaken_preparing": (job(spectrum, objective, "Snapshot", mistaken, step=0), "preparing the measurement"),
    "mistaken_product": (job(replace(spectrum, module=lambda: MistakenInProducts(mlp(4, 5, 3), adam))), "a product"),
    "mistaken_batch_data": (job(replace(sharpness, data=unreadable)), "reading the probe set"),
    "mistaken_update": (job(sharpness, TrialSteps, "update_for", mistaken, step=0), "a mini-batch"),
    "mistaken_evaluation": (job(Case(partial(Mistaken, 1), **pair)), "an evaluation along the step"),
    "mistaken_evaluation_before_exact": (job(Case(partial(Mistaken, 1), **with_exact)), "an evaluation along the step"),
    "mistaken_exact_product": (job(Case(partial(Mistaken, 2), **with_exact)), "an exact product"),
}
DIRECTIONAL = {
    "raised_in_recording": job(Case(Unrecorded, monitor={"on_error": "raise"}, **pair)),
    "outputs_on_one_rank": job(Case(lambda: OutputsOnOneRank(mlp(4, 6, 3), adam), **pair)),
}

globals().update(SPECTRUM | SHARPNESS | unbroken | unwatched | DIRECTIONAL)
globals().update({name: ended for name, (ended, _) in MISTAKEN.items()})
JOBS = [*SPECTRUM, *SHARPNESS, *unbroken, *unwatched, *DIRECTIONAL, *MISTAKEN]
