"""Evaluations by hand in each of two processes: each by itself, or together by a Trainer of both."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    StabilizationMonitor,
)
from tests.distributed.cases import collectives
from tests.helpers.nested import everything
from tests.helpers.runs import Classifier, classification, make_trainer, mlp
from tests.helpers.witness import difference

Found = tuple[dict[str, float], int]


def monitors() -> list[Any]:
    return [
        HessianSpectrumMonitor(tolerance=1e-8),
        BatchSharpnessMonitor(num_batches=16, batch_size=8),
        DirectionalCurvatureMonitor(),
        StabilizationMonitor(sample_sizes=(4,), subspace_dim=2, candidates=4, quantities=("delta_2_subspace",)),
    ]


def module() -> Classifier:
    return Classifier(mlp(4, 5, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*classification(1, 32)[0]), batch_size=8)


def evaluated(one: Classifier, trainer: Any) -> Found:
    """All values, and how many collectives they took."""
    before, count = everything(one), collectives()
    values: dict[str, float] = {}
    for monitor in monitors():
        values |= monitor.evaluate(one, data(), trainer=trainer).values
    assert difference(before, everything(one)) is None
    return values, collectives() - count


def by_itself(rank: int = 0, world_size: int = 1) -> Found:
    """With the variables that torchrun sets, and a group that others wait in."""
    names = {"RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": world_size}
    names |= {"TORCHELASTIC_RUN_ID": "one"} if world_size > 1 else {}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        return evaluated(module(), None)
    finally:
        os.environ.clear()
        os.environ.update(before)


def together(rank: int = 0, world_size: int = 1) -> Found:
    """By the Trainer of a fit that both have made."""
    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    one, trainer = module(), make_trainer(max_steps=2, use_distributed_sampler=False, **parallel)
    trainer.fit(one, data())
    return evaluated(one, trainer)
