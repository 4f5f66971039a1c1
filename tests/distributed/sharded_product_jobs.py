"""Runs with parameters in shards in which a product with the Hessian fails on one of two processes alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import fsdp2_jobs, sharpness_fsdp2_jobs, spectrum_jobs
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.sharpness_cases import SharpnessCase
from tests.distributed.sharpness_jobs import momentum
from tests.distributed.spectrum_cases import Measuring, SpectrumCase
from tests.helpers.runs import Batch


class _Fails(torch.autograd.Function):
    """Fails in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(MESSAGE)


class Measured(fsdp2_jobs.Sharded):
    """Fails on one process in one call of its step while a step is measured, in the forward or in the backward."""

    def __init__(self, call: int, step: int = 1, backward: bool = False, error: type[Exception] = RuntimeError) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)]
        super().__init__(nn.Sequential(*layers).double(), momentum)
        self.call, self.step, self.backward_fails, self.error = call, step, backward, error
        self.network[3].register_forward_pre_hook(self.fail)

    def fail(self, layer: nn.Module, inputs: Any) -> Any:
        if Measuring.step != self.step or Measuring.calls != self.call or dist.get_rank() != 1:
            return None
        if not self.backward_fails:
            raise self.error(MESSAGE)
        return _Fails.apply(inputs[0])  # type: ignore[no-untyped-call]

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        Measuring.calls += Measuring.step is not None
        return super().training_step(batch, batch_idx)


def spectrum(*arguments: Any) -> SpectrumCase:
    few = {"quantities": ("lambda_max",), "micro_batch_size": 8, "tolerance": 0.1}
    return spectrum_jobs.sharded(partial(Measured, *arguments), monitor=few, steps=3)


def sharpness(*arguments: Any, **monitor: Any) -> SharpnessCase:
    options = {"quantities": ("batch_sharpness", "gni", "step_sharpness"), "num_batches": 4} | monitor
    return sharpness_fsdp2_jobs.sharded(partial(Measured, *arguments), steps=3, monitor=options)


# Each rank has two micro-batches. One call of the step for each looks for kinks, two make each product, of which there
# are seven more where the distance is measured; at the first step one call checks the step.
SPECTRUM = {
    "in_a_look": spectrum(2),
    "in_a_product": spectrum(3),
    "in_a_backward": spectrum(4, 1, True),
    "in_a_later_product": spectrum(14),
    "in_a_later_backward": spectrum(15, 1, True),
    "at_first": spectrum(9, 0),
    "at_first_in_a_backward": spectrum(9, 0, True),
}
DRAWN = ("batch_sharpness", "gni", "zero_gradient_batches")
exact = {"quantities": ("ias",), "full_hessian": "exact"}
# And what is lost. A call for each of a rank's micro-batches: one of the step's, three of the whole set, one of a
# mini-batch. A product is three: a look and two passes.
SHARPNESS = {
    "in_the_step": (sharpness(1), ("step_sharpness",)),
    "in_a_backward_of_the_step": (sharpness(3, 1, True), ("step_sharpness",)),
    "in_the_whole_set": (sharpness(6), ("gni",)),
    "in_a_gradient": (sharpness(8), DRAWN),
    "in_a_look": (sharpness(9), DRAWN),
    "in_a_backward": (sharpness(10, 1, True), DRAWN),
    "in_a_later_pair": (sharpness(24), DRAWN),
    "in_an_eigenvalue": (sharpness(6, quantities=("lambda_max_b",)), ("lambda_max_b", "zero_gradient_batches")),
    "in_an_exact_product": (sharpness(6, **exact), ("ias", "zero_gradient_batches")),
}


class PassesOver(Measured):
    """Has no loss where the other fails, which each rank says for its own micro-batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        passed = Measuring.step == self.step and Measuring.calls == self.call and dist.get_rank() == 1
        return None if passed else loss

    def fail(self, layer: nn.Module, inputs: Any) -> None:
        pass


passed_over = replace(sharpness(8), module=partial(PassesOver, 8))
spectrum_whole, sharpness_whole = spectrum(-1), sharpness(-1)
spectrum_unwatched, sharpness_unwatched = spectrum_whole.unwatched(), sharpness_whole.unwatched()
globals().update({f"spectrum_{name}": case for name, case in SPECTRUM.items()})
globals().update({f"sharpness_{name}": case for name, (case, _) in SHARPNESS.items()})
JOBS = [name for name, value in list(globals().items()) if isinstance(value, (SpectrumCase, SharpnessCase))]
