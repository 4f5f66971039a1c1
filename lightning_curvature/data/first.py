"""The first batch of a loader, as the first step of training receives it."""

import contextlib
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_unflatten

from lightning_curvature.data.copies import DataRandomness, fresh_copy
from lightning_curvature.data.loaders import leaves
from lightning_curvature.data.probe_set import moved
from lightning_curvature.replay.batches import copied


@contextlib.contextmanager
def first_batch(trainer: pl.Trainer, dataloader: Any) -> Generator[Any, None, None]:
    """Yield the first batch of a fresh copy of a loader, moved to the device with all hooks.

    Inside the block random generators go on from where the reading has left them, as in training; at its end they and
    what was read are as before.

    Raises:
        MisconfigurationException: for a loader that cannot be copied, or gives no batch.
    """
    (loader,), form = leaves(dataloader, nested=False)
    fresh = fresh_copy(loader)
    with DataRandomness(trainer.strategy.root_device, fresh).kept():
        batch = next(iter(fresh), None)
        if batch is None:
            raise MisconfigurationException("dataloader must give at least one batch, got none: give more data.")
        # A copy, as a step may write into its batch.
        yield moved(trainer, trainer.lightning_module, copied(tree_unflatten([batch], form)))
