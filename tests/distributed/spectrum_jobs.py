"""Runs under DDP and FSDP2 in which the spectrum is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.ddp_jobs import Rare, Unused
from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.fsdp2_jobs import Sharded, ShardedAsOne, strategy
from tests.distributed.spectrum_cases import MICRO, SAMPLES, STEP, Measuring, Outcome, SpectrumCase, dataset
from tests.helpers.once import Square
from tests.helpers.runs import Batch, Classifier, MakeOptimizer, mlp


def adam(module: nn.Module) -> torch.optim.Optimizer:
    # With a larger ε than usual P amplifies no rounding of gradients that are nearly zero.
    return torch.optim.Adam(module.parameters(), lr=0.05, eps=1e-3)


def classifier(
    make_optimizer: MakeOptimizer = adam, *hidden: int, dtype: torch.dtype = torch.float64, kind: Any = Classifier
) -> Any:
    return kind(mlp(4, *(hidden or (5,)), 3, dtype=dtype), make_optimizer)


def squaring(make_optimizer: MakeOptimizer, once: bool = True) -> Any:
    """Without second derivatives, unless they are wanted to compare."""
    module = classifier(make_optimizer)
    module.network[1] = Square(once)
    return module


# Mini-batches of a step lie whole on ranks, three on two of them, the last one smaller.
whole = SpectrumCase(classifier, monitor={"k": 3, "by_module": True})
# Each search goes on from the one before.
followed = replace(whole, monitor={"k": 3, "recheck_every": 10})
whole_32 = replace(whole, module=partial(classifier, dtype=torch.float32), data=partial(dataset, dtype=torch.float32))
whole_32.trainer = {"precision": "32-true"}


class PassesOver(Classifier):
    """Has no loss for a batch with a large number in it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if bool((batch[0] < 2.0).all()) else None


def clamped() -> TensorDataset:
    """Without large numbers: only the probe set has them, since on several processes Lightning passes over no step."""
    x, y = dataset().tensors
    return TensorDataset(x.clamp(max=1.9), y)


passing = SpectrumCase(
    partial(classifier, kind=PassesOver),
    data=clamped,
    monitor={"probe_dataloader": DataLoader(dataset(), MICRO), "quantities": ("lambda_max", "hessian_trace")},
)
# One mini-batch of the whole data: ranks have parts of it in common; shuffled, by the sampler that Lightning puts in.
spread = replace(whole, step=SAMPLES, shuffle=True)
# Fewer micro-batches than ranks: each is cut once more.
cut = replace(spread, monitor={"micro_batch_size": SAMPLES})
# A set drawn from the samples, fewer than a step has.
drawn = replace(whole, monitor={"probe_samples": 7, "micro_batch_size": 2})
# Each rank makes the whole step, from a loader that shuffles as that of one process does.
own_sampler = replace(whole, shuffle=True, shared=False, trainer={"use_distributed_sampler": False})
own_sampler.monitor = {"quantities": ("lambda_max", "lambda_min", "hessian_trace", "preconditioned_lambda_max")}
by_differences = replace(whole, monitor={"products": "difference", "quantities": ("lambda_max", "lambda_min")})


class Gathering(Classifier):
    """Gathers over ranks in each step: one that made a step more than the other would wait for it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.world_size > 1:
            assert self.all_gather(loss.detach()).shape == (self.trainer.world_size,)
        return loss


# Five micro-batches for two ranks: three for one, two for the other.
gathering = SpectrumCase(partial(classifier, kind=Gathering), partial(dataset, 40), step=16)
gathering.monitor = {"quantities": ("lambda_max", "lambda_min"), "micro_batch_size": 8, "keep_graph": False}


def noisy(kind: Any = Classifier) -> Any:
    """Everything that a repeated step could disturb: batch statistics, random numbers, averages."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
    # Statistics as after some training.
    layers[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    layers[1].running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    return kind(nn.Sequential(*layers).double(), adam)


def dropping() -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double(), adam)


# Samples that do not divide by ranks, steps or micro-batches; layers that no sample reaches, or those of one rank only.
anything = {"strategy": "ddp_find_unused_parameters_true", "data": partial(dataset, 21)}
unused = replace(whole, module=partial(Unused, adam), **anything)
rare = replace(whole, module=partial(Rare, adam), **anything)

# Training draws its masks and takes its statistics on each rank for itself: only θ_0 is that of one process.
dropout = replace(whole, module=dropping, steps=1)
batch_norm = replace(whole, module=noisy, steps=1, monitor={"probe_mode": "eval"})

disturbed = replace(whole, module=noisy, shuffle=True, steps=4, monitor={"every_n_train_steps": 2})
undisturbed = disturbed.unwatched()

ONE = ("lambda_max",)
counted = replace(whole, monitor={"quantities": ONE})
counted_deep = replace(counted, module=partial(classifier, adam, 5, 5, 5, 5))
counted_by_module = replace(whole, monitor={"quantities": (*ONE, "hessian_trace"), "by_module": True})
counted_trace = replace(whole, monitor={"quantities": ("hessian_trace",)})
counted_whole = replace(whole, monitor={"quantities": ("second_moment_contraction",)})
counted_spread = replace(counted_whole, step=SAMPLES)

# A step an epoch, so that epochs end where steps do.
resumable = replace(spread, shuffle=False, steps=4)
RESUMED_FROM = 2

DDP_JOBS = [name for name, value in list(globals().items()) if isinstance(value, SpectrumCase)]


def resumed(rank: int, world_size: int) -> Outcome:
    """The second half of a run that was broken off."""
    folders: list[Any] = [mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    try:
        saving = partial(ModelCheckpoint, folders[0], filename="saved", enable_version_counter=False)
        first = replace(resumable, steps=RESUMED_FROM, callbacks=lambda: [saving()])
        replace(first, trainer={"enable_checkpointing": True})(rank, world_size)
        return resumable(rank, world_size, ckpt_path=f"{folders[0]}/saved.ckpt")
    finally:
        dist.barrier()
        rmtree(folders[0], ignore_errors=True)


class Failing(Classifier):
    """Raises while the spectrum is measured before one step: in some of its repetitions of training_step."""

    failing_step = 1

    def __init__(self, calls: range, rank: int, error: type[Exception]) -> None:
        super().__init__(mlp(4, 5, 3), adam)
        self.calls, self.rank, self.error = calls, rank, error

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if Measuring.step is not None:
            call, Measuring.calls = Measuring.calls, Measuring.calls + 1
            if Measuring.step == self.failing_step and call in self.calls and self.rank == dist.get_rank():
                raise self.error(MESSAGE)
        return super().training_step(batch, batch_idx)


SEVERAL = ("lambda_max", "gauss_newton_lambda_max", "second_moment_contraction")


def failing(calls: range, rank: int = 1, error: Any = RuntimeError, step: int = STEP, **monitor: Any) -> SpectrumCase:
    options = {"quantities": SEVERAL, "products": "exact"} | monitor
    return SpectrumCase(partial(Failing, calls, rank, error), step=step, monitor=options)


# With graphs that are kept, each operator calls once a micro-batch: four times on each rank, of which rank 1 has but
# two and repeats the last with weight 0; six times where a step takes all samples, eleven micro-batches of two.
in_hessian = failing(range(1))
in_gauss_newton = failing(range(5, 6), rank=0)
in_second_moment = failing(range(9, 10))
in_third_product = failing(range(8, 9), keep_graph=False)
in_spread_group = failing(range(13, 14), step=SAMPLES)
in_differences = failing(range(3, 4), products="difference", quantities=("lambda_max",))
# Second derivatives that are not to be had on one rank: both go over to differences.
switching = failing(
    range(1), products="auto", quantities=("lambda_max", "preconditioned_lambda_max"), error=NotImplementedError
)
not_switching = failing(
    range(1), products="auto", quantities=("lambda_max", "preconditioned_lambda_max"), error=TypeError
)
lost_after_switching = failing(range(100), products="auto", quantities=("lambda_max",), error=NotImplementedError)


class Unreadable(TensorDataset):
    """Cannot be read by one rank before the first step."""

    def __getitem__(self, index: int) -> Any:
        if Measuring.step == 0 and dist.is_initialized() and dist.get_rank() == 1:
            raise OSError(MESSAGE)
        return super().__getitem__(index)


in_reading = replace(whole, data=lambda: Unreadable(*dataset().tensors))
unbroken = replace(whole, monitor={"quantities": SEVERAL})
unbroken_unwatched = unbroken.unwatched()

FAILING_JOBS = [n for n, value in list(globals().items()) if isinstance(value, SpectrumCase) and n not in DDP_JOBS]


def raised(rank: int, world_size: int) -> list[str]:
    """How runs end where errors are to be raised, and that the processes are in step afterwards."""
    ends = []
    for case in (in_hessian, in_spread_group, lost_after_switching, in_reading):
        try:
            replace(case, monitor=case.monitor | {"on_error": "raise"})(rank, world_size)
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return ends


def sharded(module: Any, **options: Any) -> SpectrumCase:
    """A run with parameters in shards; one process makes it with exact products."""
    quantities = ("lambda_max", "lambda_min", "hessian_trace", "spectral_density", "preconditioned_lambda_max")
    # Each product is two forwards and backwards with their gatherings of a batch and the other: few do. Batches of 8, 8
    # and 6: one process has two, the other one.
    few = {"micro_batch_size": 8, "tolerance": 0.1}
    # The strategy refuses "64-true", but leaves a float64 module as it is under "32-true".
    defaults: dict[str, Any] = {
        "strategy": strategy,
        "trainer": {"precision": "32-true"},
        "monitor": {"quantities": quantities} | few,
        "alone": {"products": "exact"},
        "steps": 2,
    }
    return SpectrumCase(module, **(defaults | options))


def with_one_output(kind: Any = Sharded) -> Any:
    """A first dimension of 1: one process holds nothing of the last layer."""
    return kind(mlp(4, 5, 1), adam, lambda z, y: F.mse_loss(z.squeeze(-1), y.to(z)))


# First dimensions of 5 and 3 over two processes.
uneven = sharded(partial(classifier, kind=Sharded))
uneven.monitor["by_module"] = True
as_one = sharded(partial(classifier, kind=ShardedAsOne), monitor={"quantities": ONE})
# The block of one layer: the gradients of the other come with every backward, and are not looked at.
block = sharded(partial(classifier, kind=Sharded))
block.monitor = {"quantities": ONE, "parameters": "network.2.*", "by_module": 1, "tolerance": 1e-6}
one_output = sharded(with_one_output, monitor={"quantities": ("lambda_min", "hessian_trace"), "tolerance": 0.1})
sharded_32 = sharded(partial(classifier, kind=Sharded, dtype=torch.float32), data=partial(dataset, dtype=torch.float32))


def kinked(kind: Any = Sharded) -> Any:
    """Many units with kinks, in float32: on either side of θ some have changed sides."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 30), nn.Hardtanh(), nn.Linear(30, 3)]
    return kind(nn.Sequential(*layers), lambda module: torch.optim.SGD(module.parameters(), lr=0.05))


sharded_kinked = replace(sharded_32, module=kinked, monitor={"quantities": ("lambda_max", "lambda_min")})
sharded_disturbed = sharded(partial(noisy, Sharded), shuffle=True, monitor={"quantities": ONE}, alone={})
sharded_undisturbed = sharded_disturbed.unwatched()
uneven_unwatched = uneven.unwatched()
as_one_unwatched = as_one.unwatched()

FSDP2_JOBS = [
    name
    for name, value in list(globals().items())
    if isinstance(value, SpectrumCase) and name not in (*DDP_JOBS, *FAILING_JOBS)
]


def refused(rank: int, world_size: int) -> list[str]:
    """What is said where exact products with sharded parameters are asked for."""
    said = []
    for options in (
        {"quantities": ("lambda_max", "gauss_newton_lambda_max")},
        {"quantities": ("second_moment_contraction",)},
        {"quantities": ("lambda_max",), "products": "exact"},
    ):
        try:
            replace(uneven, monitor=options)(rank, world_size)
        except MisconfigurationException as error:
            said.append(str(error))
    return said
