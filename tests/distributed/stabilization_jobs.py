"""Runs under DDP that StabilizationMonitor watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_curvature import StabilizationMonitor
from lightning_curvature.stabilization import monitor as stabilization
from lightning_curvature.stabilization.result import SampleGrowth
from tests.distributed.ddp_jobs import Unused
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.spectrum_cases import Measuring, dataset
from tests.distributed.spectrum_jobs import classifier, noisy, squaring
from tests.distributed.stabilization_cases import Outcome, StabilizationCase, Stage, Stream
from tests.helpers.runs import Batch, Classifier, mlp


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


once = StabilizationCase(partial(classifier, momentum))
whole = replace(once, monitor={"every_n_train_steps": 1})
# Two batches of four make the step that one process makes of one of eight.
accumulated = replace(once, step=4, trainer={"accumulate_grad_batches": 2})
uneven = replace(once, data=partial(dataset, 21))
# Two samples, one on each rank: of one k, and of the one that follows.
least = replace(once, monitor={"sample_sizes": (1,), "candidates": 1})
streamed = replace(once, data=Stream)
unused = replace(once, module=partial(Unused, momentum), strategy="ddp_find_unused_parameters_true")
bottom = replace(once, monitor={"law": "bottom"})
random = replace(once, monitor={"law": "random"})
gradients = replace(once, monitor={"law": "gradients", "sample_sizes": (2, 5)})


def first_weights(module: Any) -> Tensor:
    """Directions of the user's."""
    return torch.eye(2, sum(p.numel() for p in module.parameters()))


by_differences = replace(once, module=partial(squaring, momentum))
given = replace(once, monitor={"directions": first_weights})

# As few products as may be.
quick = {"sample_sizes": (2, 3), "subspace_dim": 1, "sigma": 1e-3, "candidates": 2, "draws": 2, "tolerance": 0.1}
disturbed = StabilizationCase(noisy, steps=4, monitor=quick | {"every_n_train_steps": 2})
undisturbed = disturbed.unwatched()


class Split(Classifier):
    """The same function of more parameter tensors: each row of the first layer is one of its own."""

    def __init__(self) -> None:
        network = mlp(4, 5, 3)
        super().__init__(network, momentum)
        self.rows = nn.ParameterList(row.clone() for row in network[0].weight.detach())
        network[0].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, torch.stack(list(self.rows)), self.network[0].bias)
        return self.network[2](hidden.tanh())


few = {"sample_sizes": (2, 5), "every_n_train_steps": None, "tolerance": 0.1}
counted = StabilizationCase(lambda: Classifier(mlp(4, 5, 3), momentum), monitor=few)
counted_tensors = replace(counted, module=Split)
counted_draws = replace(counted, monitor=few | {"draws": 7, "candidates": 5, "micro_batch_size": 1})
counted_validation = replace(counted, monitor=few | {"estimators": ("gaussian_moment",), "validation_draws": 9})
counted_point = replace(counted, monitor=few | {"quantities": ("delta_1",)})


class Failing(Classifier):
    """Raises on one rank while step 1 is measured, in one stage of it."""

    def __init__(self, stage: str, rank: int) -> None:
        super().__init__(mlp(4, 5, 3), momentum)
        self.stage, self.rank = stage, rank

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if Measuring.step == 1 and Stage.now == self.stage and self.rank == dist.get_rank():
            raise RuntimeError(MESSAGE)
        return super().training_step(batch, batch_idx)


def failing(stage: str, rank: int = 1, **options: Any) -> StabilizationCase:
    return StabilizationCase(
        partial(Failing, stage, rank), steps=3, monitor=quick | {"every_n_train_steps": 1} | options
    )


def on_one_rank(module: Any) -> Tensor:
    if Measuring.step == 1 and dist.get_rank() == 1:
        raise RuntimeError(MESSAGE)
    return first_weights(module)


in_full_space = failing("direct, full space")
in_traces = failing("traces, full space", rank=0)
in_search = failing("subspace")
in_search_of_rank_0 = failing("subspace", rank=0)
in_given_directions = failing("subspace", law="random")
in_gradients = failing("subspace", law="gradients")
in_coefficients = failing("coefficients", rank=0)
in_direct = failing("direct")
in_validation = failing("validation", estimators=("gaussian_moment",))
in_preparing = failing("never", directions=on_one_rank, subspace_dim=2)
FAILING = [name for name in list(globals()) if name.startswith("in_")]
unbroken = failing("never")
unbroken_unwatched = unbroken.unwatched()

JOBS = [name for name, value in list(globals().items()) if isinstance(value, StabilizationCase)]


def raised(rank: int, world_size: int) -> list[str]:
    """How runs end where errors are to be raised, and that the processes are in step afterwards."""
    ends = []
    for name in FAILING:
        case = globals()[name]
        ends.append(_end(replace(case, monitor=case.monitor | {"on_error": "raise"}), rank, world_size))
    return ends


def _end(case: StabilizationCase, rank: int, world_size: int) -> str:
    try:
        case(rank, world_size)
        return "none"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.barrier()


class Gathering(Classifier):
    """A loss that is made of what all ranks have."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 5, 3), momentum)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.0 * self.all_gather(batch[0].sum()).sum()


def local(module: Any, batch: Batch) -> Tensor:
    return module.loss(module(batch[0]), batch[1])


communicating = StabilizationCase(Gathering, monitor={"every_n_train_steps": 1})


def communication(rank: int, world_size: int) -> tuple[str, Outcome, Outcome]:
    """Before a step, after all of them, and where an objective is given that does without."""
    late = replace(communicating, monitor={})
    return (
        _end(communicating, rank, world_size),
        late(rank, world_size),
        replace(communicating, monitor={"objective": local, "every_n_train_steps": 1})(rank, world_size),
    )


def unequal_memory(rank: int, world_size: int) -> Outcome:
    """Ranks of which one has room for two vectors at once, the other for one."""
    own: Callable[..., int] = stabilization.products_at_once
    stabilization.products_at_once = lambda *args: 1 + rank
    try:
        return whole(rank, world_size)
    finally:
        stabilization.products_at_once = own


def by_hand(rank: int, world_size: int) -> SampleGrowth:
    """After a fit, by its Trainer."""
    module, trainer = whole.module(), whole.make_trainer(world_size)
    loader = whole.loader(rank, world_size)
    trainer.fit(module, loader)
    return StabilizationMonitor(**whole.options()).evaluate(module, loader, trainer=trainer).result


Results = dict[str, list[Outcome]]
