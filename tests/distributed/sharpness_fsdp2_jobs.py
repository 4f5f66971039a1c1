"""Runs under FSDP2 in which mini-batch sharpness is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import TensorDataset, default_collate

from tests.distributed.failing_jobs import MESSAGE
from tests.distributed.fsdp2_jobs import Sharded, ShardedAsOne, strategy
from tests.distributed.sharpness_cases import SharpnessCase
from tests.distributed.sharpness_jobs import momentum
from tests.distributed.spectrum_cases import STEP, Measuring, dataset
from tests.distributed.spectrum_jobs import adam, classifier, noisy, with_one_output
from tests.helpers.runs import Batch, classification, loader, make_trainer, mlp
from tests.helpers.trial_steps import Foretelling

# Products are two forwards and backwards with their gatherings of a batch and the other: few draws do.
FEW = {"num_batches": 4, "tolerance": 0.01}


def sharded(module: Any, **options: Any) -> SharpnessCase:
    """A run with parameters in shards; one process makes it with exact products."""
    # The strategy refuses "64-true", but leaves a float64 module as it is under "32-true".
    trainer = {"precision": "32-true"} | options.pop("trainer", {})
    return SharpnessCase(
        module, strategy=strategy, trainer=trainer, monitor=FEW | options.pop("monitor", {}), **options
    )


def learner(*hidden: int, kind: Any = Sharded, **options: Any) -> Any:
    return partial(classifier, momentum, *hidden, kind=kind, **options)


def dropping(kind: Any = Sharded) -> Any:
    torch.manual_seed(0)
    return kind(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double(), adam)


# First dimensions of 5 and 3 over two processes.
uneven = sharded(learner(), monitor={"by_module": True})
one_output = sharded(with_one_output, monitor={"quantities": ("batch_sharpness", "lambda_gen")})
sharded_32 = sharded(learner(dtype=torch.float32), data=partial(dataset, dtype=torch.float32), steps=1)
as_one = sharded(learner(kind=ShardedAsOne), monitor={"quantities": ("batch_sharpness", "step_sharpness")})
accumulated = sharded(
    learner(), step=4, trainer={"accumulate_grad_batches": 2}, monitor={"quantities": ("ias", "step_sharpness")}
)
clipped = sharded(learner(), trainer={"gradient_clip_val": 0.1}, monitor={"quantities": ("lambda_gen",)})
exact = sharded(learner(), steps=1, monitor={"quantities": ("ias", "lambda_gen"), "full_hessian": "exact"})
# Three micro-batches for two processes, and one.
CHEAP = ("batch_sharpness", "gni")
ragged = sharded(
    learner(), steps=1, monitor={"quantities": CHEAP, "batch_size": 5, "micro_batch_size": 2, "probe_samples": 9}
)
single = sharded(learner(), steps=1, monitor={"quantities": CHEAP, "batch_size": 3, "micro_batch_size": 4})
# Training draws its masks on each rank for itself; those of a draw belong to its micro-batches.
dropout = sharded(dropping, steps=1, monitor={"quantities": CHEAP, "micro_batch_size": 4})


def twice() -> TensorDataset:
    """Each rank holds the same batch twice: a mini-batch with one of each rank's is always the whole."""
    return TensorDataset(*(torch.cat([t, t]) for t in dataset(STEP).tensors))


by_rank = sharded(
    learner(),
    data=twice,
    batches=True,
    trainer={"use_distributed_sampler": False},
    monitor={"quantities": ("batch_sharpness", "ias", "gni", "step_sharpness")},
)
COMPARED = [name for name, value in list(globals().items()) if isinstance(value, SharpnessCase)]

disturbed = sharded(
    partial(noisy, Sharded),
    steps=4,
    monitor={"every_n_train_steps": 2, "quantities": ("batch_sharpness", "step_sharpness", "lambda_gen")},
)
undisturbed = disturbed.unwatched()
uneven_unwatched = uneven.unwatched()
as_one_unwatched = as_one.unwatched()

counted = {
    f"counted_{name}{depth}": sharded(learner(*hidden), steps=1, monitor={"quantities": names, "relative_error": 1e-9})
    for name, names in {
        "own": ("batch_sharpness",),
        "crossed": ("ias",),
        "full": ("gni", "lambda_gen"),
        "step": ("step_sharpness",),
    }.items()
    for depth, hidden in {"": (5,), "_deep": (5, 5, 5, 5)}.items()
}
globals().update(counted)


class Failing(Sharded):
    """Raises in the midst of a forward on all ranks while step 1 is measured."""

    def __init__(self, call: int) -> None:
        super().__init__(mlp(4, 5, 3), momentum)
        self.call = call
        self.network[1].register_forward_pre_hook(self.fail)  # between two units

    def fail(self, layer: nn.Module, inputs: Any) -> None:
        if Measuring.step == 1 and Measuring.calls == self.call:
            raise RuntimeError(MESSAGE)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        Measuring.calls += Measuring.step is not None
        if isinstance(self.network, FSDPModule) and hasattr(FSDPModule, "reset_iter_state"):
            # One that was left open would take this one for a part of it.
            assert self.network._get_fsdp_state()._state_ctx.iter_forward_root is None
        return super().training_step(batch, batch_idx)


def collate_on_one_rank(call: int, samples: list[Any]) -> Any:
    """Raise on rank 1 where a batch is collated before step 1."""
    Measuring.calls += Measuring.step is not None
    if Measuring.step == 1 and Measuring.calls == call and dist.is_initialized() and dist.get_rank() == 1:
        raise RuntimeError(MESSAGE)
    return default_collate(samples)


# Of 22 samples each rank collates three batches, and goes through them for ∇L; for a pair of mini-batches it collates
# four, and goes through one for the gradient of the first, then twice for its product.
in_collating_all, in_drawing = (
    sharded(partial(Failing, -1), steps=3, monitor={"quantities": CHEAP}, collate=partial(collate_on_one_rank, call))
    for call in (2, 8)
)
in_full_gradient, in_gradient, in_product, unbroken = (
    sharded(partial(Failing, call), steps=3, monitor={"quantities": CHEAP}) for call in (2, 4, 5, -1)
)

FAILING = ("in_collating_all", "in_drawing", "in_full_gradient", "in_gradient", "in_product")
JOBS = [name for name, value in list(globals().items()) if isinstance(value, SharpnessCase)]


def nesterov(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


def fused(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)


def muon(module: nn.Module) -> torch.optim.Optimizer:
    # Not elementwise: its matrices are those of all ranks together. Older versions do not have it.
    kind: Any = getattr(torch.optim, "Muon", torch.optim.SGD)
    return kind([p for p in module.parameters() if p.ndim == 2], lr=0.1)


def foretold(rank: int, world_size: int) -> list[list[bool]]:
    """Whether the update that each step was going to make is the one that it made, in this rank's shards."""
    found = []
    for make, algorithm in ((nesterov, "norm"), (fused, "value"), (muon, "norm")):
        foretelling = Foretelling()
        clipped_run = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
        trainer = make_trainer(foretelling, devices=world_size, strategy=strategy(), precision="32-true", **clipped_run)
        trainer.fit(classifier(make, kind=Sharded), loader(classification(4)))
        pairs = zip(foretelling.foretold, foretelling.made, strict=True)
        found.append([torch.equal(told, made) and bool(made.any()) for told, made in pairs])
    return found


def refused(rank: int, world_size: int) -> list[str]:
    """What is said of that which needs more than differences of gradients, or cannot be shared out."""
    said = []
    for options in (
        {"curvature": "gauss_newton"},
        {"batches_at_once": 8},
        {"probe_dataloader": [dataset()[:4]] * 4},
    ):
        try:
            replace(uneven, monitor=FEW | options)(rank, world_size)
        except MisconfigurationException as error:
            said.append(str(error))
    return said
