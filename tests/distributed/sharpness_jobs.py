"""Runs under DDP in which mini-batch sharpness is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_curvature.batch_sharpness.options import QUANTITIES
from tests.distributed.ddp_jobs import Rare, Unused
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.sharpness_cases import Outcome, SharpnessCase
from tests.distributed.spectrum_cases import Measuring, dataset
from tests.distributed.spectrum_jobs import adam, classifier, dropping, noisy, squaring
from tests.helpers.runs import Batch, Classifier, mlp

DRAWN = tuple(name for name in QUANTITIES if name != "step_sharpness")


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


whole = SharpnessCase(partial(classifier, momentum), monitor={"by_module": True})
preconditioned = SharpnessCase(partial(classifier, adam), monitor={"curvature": "gauss_newton"})
# Two batches of four make the step that one process makes of one of eight.
accumulated = replace(whole, step=4, trainer={"accumulate_grad_batches": 2})
uneven = replace(whole, data=partial(dataset, 21))
unused = replace(uneven, module=partial(Unused, momentum), strategy="ddp_find_unused_parameters_true")
rare = replace(unused, module=partial(Rare, adam))
sized = replace(whole, monitor={"batch_size": 5, "micro_batch_size": 2, "probe_samples": 9})
# Three pairs of batches: one process draws three, two draw four and look at three.
odd = replace(whole, monitor={"num_batches": 6, "relative_error": 1e-9})
# Training draws its masks on each rank for itself: only θ_0 is that of one process, and only of what is drawn; a mask
# belongs to a micro-batch, which is by default a batch of the loader's.
dropout = SharpnessCase(dropping, steps=1, monitor={"quantities": DRAWN, "micro_batch_size": 4})

disturbed = SharpnessCase(noisy, steps=4, monitor={"every_n_train_steps": 2})
undisturbed = disturbed.unwatched()
exact = replace(whole, monitor={"full_hessian": "exact", "micro_batch_size": 2})
# Each rank draws of its own batches; the values are of all of them.
by_rank = replace(
    whole, batches=True, trainer={"use_distributed_sampler": False}, monitor={"quantities": ("batch_sharpness", "gni")}
)

ENDLESS = {"num_batches": 8, "relative_error": 1e-9, "batches_at_once": 1}
counted = {
    name: replace(whole, monitor=ENDLESS | {"quantities": names, "by_module": "batch_sharpness" in names})
    for name, names in {
        "counted_alone": ("batch_sharpness", "ias", "lambda_max_b"),
        "counted_full": ("gni", "lambda_gen"),
        "counted_step": ("step_sharpness",),
    }.items()
}
counted["counted_exact"] = replace(
    counted["counted_full"], monitor=counted["counted_full"].monitor | {"full_hessian": "exact"}
)
counted["counted_at_once"] = replace(
    counted["counted_alone"], monitor=counted["counted_alone"].monitor | {"batches_at_once": 4}
)
counted["counted_fewest"] = replace(
    counted["counted_alone"], monitor=counted["counted_alone"].monitor | {"num_batches": 16, "min_batches": 12}
)
globals().update(counted)


class OnOneRank(Classifier):
    """One rank reads a number off its loss, which ``torch.vmap`` does not know."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 5, 3), momentum)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if dist.is_initialized() and dist.get_rank() == 1:
            assert loss.item() > 0.0
        return loss


in_turn_on_one_rank = SharpnessCase(OnOneRank)
by_differences = replace(whole, module=partial(squaring, momentum), steps=1)


class Failing(Classifier):
    """Raises on one rank while step 1 is measured, in one call of training_step."""

    def __init__(self, call: int, rank: int) -> None:
        super().__init__(mlp(4, 5, 3), momentum)
        self.call, self.rank = call, rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if Measuring.step is not None:
            call, Measuring.calls = Measuring.calls, Measuring.calls + 1
            if Measuring.step == 1 and call == self.call and self.rank == dist.get_rank():
                raise RuntimeError(MESSAGE)
        return super().training_step(batch, batch_idx)


def failing(call: int, rank: int = 1, **options: str | int) -> SharpnessCase:
    return SharpnessCase(partial(Failing, call, rank), steps=3, monitor={"batches_at_once": 1, **options})


# Calls before one step: its own batch; eleven samples in three micro-batches of four; then two batches of two
# micro-batches a pair.
in_step = failing(0)
in_full_gradient = failing(2)
in_full_gradient_of_rank_0 = failing(1, rank=0)
in_first_pair = failing(4)
in_second_pair = failing(10, rank=0)
# With exact products graphs are kept: the calls are the same ones.
in_exact_gradient = failing(2, full_hessian="exact")
in_exact_pair = failing(4, full_hessian="exact")
# After its own batch and three micro-batches of all samples: the first call is that of four mini-batches.
in_many_at_once = failing(4, batches_at_once=4)
unbroken = failing(-1)
unbroken_exact = failing(-1, full_hessian="exact")
unbroken_unwatched = unbroken.unwatched()

JOBS = [name for name, value in list(globals().items()) if isinstance(value, SharpnessCase)]
FAILING = (
    "in_step",
    "in_full_gradient",
    "in_full_gradient_of_rank_0",
    "in_first_pair",
    "in_second_pair",
    "in_exact_gradient",
    "in_exact_pair",
)


def raised(rank: int, world_size: int) -> list[str]:
    """How runs end where errors are to be raised, and that the processes are in step afterwards."""
    ends = []
    for name in FAILING:
        try:
            case = globals()[name]
            replace(case, monitor=case.monitor | {"on_error": "raise"})(rank, world_size)
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return ends


Results = dict[str, list[Outcome]]
