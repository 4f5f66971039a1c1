"""Runs under DDP in which the noise covariance is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.functional import noise as formulas
from lightning_curvature.noise import monitor as noise_monitor
from lightning_curvature.noise import routes as noise_block
from lightning_curvature.noise import sums as noise_sums
from lightning_curvature.noise.options import QUANTITIES
from lightning_curvature.noise.result import NoiseCurvature
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.noise_cases import NoiseCase
from tests.distributed.occasional_cases import Outcome
from tests.distributed.spectrum_cases import Measuring, dataset
from tests.distributed.stabilization_cases import Stream
from tests.distributed.stabilization_jobs import Gathering, _end, local
from tests.helpers.noise import Plain
from tests.helpers.runs import Classifier, mlp

Results = dict[str, list[Outcome]]


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


def classifier() -> Classifier:
    return Classifier(mlp(4, 5, 3), momentum)


# Of 22 samples four micro-batches, the last of them ragged.
kronecker = NoiseCase(classifier)
last_layer = NoiseCase(classifier, monitor={"parameter": "network.2.weight"})
general = NoiseCase(classifier, monitor={"parameter": "network.0.bias", "quantities": QUANTITIES[:-1]})


def plain() -> Classifier:
    """The same weight in a layer that is no ``nn.Linear``."""
    module = classifier()
    module.network[0] = Plain(module.network[0])
    return module


forced = NoiseCase(plain, monitor={"quantities": QUANTITIES[:-1]})
accumulated = replace(kronecker, step=4, trainer={"accumulate_grad_batches": 2})
# Three for two ranks, two for two, and one for two.
three = replace(kronecker, monitor={"micro_batch_size": 8})
two = replace(kronecker, monitor={"micro_batch_size": 11})
one = replace(kronecker, monitor={"micro_batch_size": 22})
one_general = replace(general, monitor=general.monitor | {"micro_batch_size": 22})
# One sample for each rank.
least = replace(kronecker, monitor={"probe_samples": 2, "micro_batch_size": 1, "quantities": QUANTITIES[:-1], "top": 3})
streamed = replace(kronecker, data=Stream)


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, weight=torch.tensor([1.0, 2.0, 5.0], dtype=outputs.dtype))


def sorted_data() -> Any:
    x, y = dataset(16).tensors
    return torch.utils.data.TensorDataset(x[y.argsort()], y[y.argsort()].clamp(max=1))


# The last micro-batch alone holds two classes: one rank takes the other route, and the other with it.
late = NoiseCase(
    # Ranks that weight their own samples train otherwise than one that weights all: this module stands still.
    lambda: Classifier(mlp(4, 5, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.0), weighted),
    monitor={"micro_batch_size": 2, "quantities": QUANTITIES[:-1]},
    data=sorted_data,
)

quick = {"haar_draws": 1}
disturbed = replace(kronecker, monitor=quick | {"every_n_train_steps": 2}, steps=4)
undisturbed = disturbed.unwatched()


def failing(target: Any, name: str, rank: int, parameter: str = "network.0.weight") -> NoiseCase:
    """On one rank a function of the package fails while step 1 is measured."""
    quantities = QUANTITIES if parameter.endswith("weight") else QUANTITIES[:-1]
    options = {"parameter": parameter, "quantities": quantities}
    case = FailingCase(classifier, monitor=quick | options, steps=3)
    case.target, case.name, case.rank = target, name, rank
    return case


class FailingCase(NoiseCase):
    target: Any
    name: str
    rank: int

    def __call__(self, rank: int = 0, world_size: int = 1) -> Outcome:
        own: Callable[..., Any] = getattr(self.target, self.name)

        def fail(*args: Any, **kwargs: Any) -> Any:
            if Measuring.step == 1 and dist.get_rank() == self.rank:
                raise RuntimeError(MESSAGE)
            return own(*args, **kwargs)

        setattr(self.target, self.name, fail)
        try:
            return super().__call__(rank, world_size)
        finally:
            setattr(self.target, self.name, own)


in_check = failing(noise_block, "linear_statistics", 1)
in_sums = failing(noise_sums, "linear_statistics", 0)
in_blocks = failing(formulas, "linear_blocks", 1)
in_pairs = failing(formulas, "matched_pairs", 1)
in_hessian = failing(noise_sums, "_block_hessian", 1, "network.0.bias")
in_squares = failing(noise_sums, "_squares", 0, "network.0.bias")
in_reporting_device = failing(noise_monitor, "sum_device", 1)
FAILING = [name for name in list(globals()) if name.startswith("in_")]
unbroken = replace(kronecker, monitor=quick, steps=3).unwatched()

JOBS = [name for name, value in list(globals().items()) if isinstance(value, NoiseCase)]


def raised(rank: int, world_size: int) -> list[str]:
    """How runs end where errors are to be raised, and that the processes are in step afterwards."""
    ends = []
    for name in FAILING:
        case = globals()[name]
        own = case.monitor
        case.monitor = own | {"on_error": "raise"}
        try:
            ends.append(_end(case, rank, world_size))
        finally:
            case.monitor = own
    return ends


def communication(rank: int, world_size: int) -> tuple[str, Outcome]:
    """A loss that is made of what all ranks have, and an objective that does without."""
    case = NoiseCase(Gathering)
    return _end(case, rank, world_size), replace(case, monitor={"objective": local})(rank, world_size)


def unequal(rank: int, world_size: int) -> Outcome:
    """``torch.vmap`` can follow the step on one rank alone."""
    own = noise_block.BlockSamples.graphs_can_be_batched
    noise_block.BlockSamples.graphs_can_be_batched = lambda self, p: rank == 0 and own(self, p)  # type: ignore[method-assign]
    try:
        return general(rank, world_size)
    finally:
        noise_block.BlockSamples.graphs_can_be_batched = own  # type: ignore[method-assign]


def by_hand(rank: int, world_size: int) -> NoiseCurvature:
    """After a fit, by its Trainer."""
    module, trainer = kronecker.module(), kronecker.make_trainer(world_size)
    loader = kronecker.loader(rank, world_size)
    trainer.fit(module, loader)
    return NoiseCovarianceMonitor(**kronecker.options()).evaluate(module, loader, trainer=trainer).result
