"""Evaluate the checkpoints of a run."""

import glob
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.arguments import Rule, checked, sentence
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.by_hand import Optimizers, check_by_hand, quiet_trainer, set_progress
from lightning_curvature.monitors.evaluation import Evaluation
from lightning_curvature.monitors.trajectory import Trajectory
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import restored


@checked(
    checkpoints=Rule("give 'run/*.ckpt'", holds=bool, single=True, phrase="be paths, or a pattern of some"),
    monitors=Rule("give HessianSpectrumMonitor()", single=True, phrase="be one monitor, or several"),
    module=Rule("give the module as it was trained"),
    trainer=Rule("give one of lightning.pytorch, or None"),
    weights_only=Rule("True loads tensors and plain containers alone"),
)
def evaluate_checkpoints(
    checkpoints: str | Path | Sequence[str | Path],
    monitors: Monitor | Sequence[Monitor],
    module: pl.LightningModule,
    dataloader: Any = None,
    optimizer: Any = None,
    *,
    trainer: pl.Trainer | None = None,
    weights_only: bool = True,
) -> Trajectory:
    """Measure the checkpoints of a run by monitors, in the order of their optimizer steps.

    Each is loaded into the module, with the optimizer's state and learning rate where it holds them, so that edges are
    those of its step, and evaluated by :meth:`evaluate`, which see. Module, optimizer and random states come back.

    Args:
        checkpoints: a pattern such as ``"run/*.ckpt"``, a folder, a path, or several of them.
        monitors: one, or several that give different values.
        module: a module as it was trained.
        dataloader: a DataLoader, or batches that can be read repeatedly; default: ``probe_dataloader`` of each monitor.
        optimizer: the optimizer that takes up the states; default: a new one by ``configure_optimizers``.
        trainer: gives device, precision and clipping; default: as of ``evaluate``.
        weights_only: load no other objects than tensors and plain containers; False runs what the file says, and is for
            files that you trust.

    Returns:
        A :class:`~lightning_curvature.Trajectory`.

    Raises:
        ValueError: for an argument outside its rule, and if there is no checkpoint.
        MisconfigurationException: for a file that is no checkpoint, or does not fit module or optimizer, and whatever
            ``evaluate`` raises.
    """
    each = [monitors] if isinstance(monitors, Monitor) else list(monitors)
    given: dict[int, Any] = {}
    for monitor in each:
        monitor.check_at_a_point()
        own = getattr(monitor.options, "probe_dataloader", None)
        given[id(monitor)] = own if dataloader is None else dataloader
        check_by_hand(type(monitor).__name__, module, given[id(monitor)])
    paths, optimizers, random = _paths(checkpoints), Optimizers.of(module, optimizer), RandomState(module.device)
    found: list[tuple[int, str, Evaluation]] = []
    try:
        with restored([module, *optimizers.all, *(config.scheduler for config in optimizers.schedulers)]):
            for path in paths:
                checkpoint = _load(path, weights_only)
                _take_up(checkpoint, path, module, optimizers, each[0].options.optimizer_index)
                holder = quiet_trainer(module, trainer)
                step = int(checkpoint["global_step"])
                set_progress(holder, step, _epoch(checkpoint))
                evaluations = [one.evaluate_with(module, given[id(one)], optimizers, holder) for one in each]
                found.append((step, path, Evaluation.joined(evaluations)))
    finally:
        random.restore()
    found.sort(key=lambda one: one[:2])
    steps, names, measured = zip(*found, strict=True)
    return Trajectory(steps, names, measured)


def _paths(checkpoints: str | Path | Sequence[str | Path]) -> list[str]:
    given = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else checkpoints
    found: dict[str, None] = {}
    for pattern in map(str, given):
        folder = os.path.join(glob.escape(pattern), "*.ckpt") if os.path.isdir(pattern) else pattern
        paths = (
            [pattern] if os.path.isfile(pattern) else list(filter(os.path.isfile, glob.glob(folder, recursive=True)))
        )
        if not paths:
            got = f"{folder!r}, which is none and matches none"
            raise sentence("checkpoints", "be files, or patterns that match some", got, "give 'run/*.ckpt'")
        found |= dict.fromkeys(paths)
    return list(found)


def _load(path: str, weights_only: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise MisconfigurationException(
            f"{path!r} must hold tensors and plain containers alone under weights_only=True, got other objects, or no "
            f"checkpoint ({first}): if you trust the file, give weights_only=False."
        ) from error
    except Exception as error:
        raise MisconfigurationException(
            f"{path!r} must be a checkpoint of Lightning, got a file that cannot be read ({type(error).__name__}: "
            f"{error}): leave it out."
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= checkpoint.keys():
        raise MisconfigurationException(
            f"{path!r} must be a checkpoint of Lightning with 'state_dict' and 'global_step', got a "
            f"{type(checkpoint).__name__} without: save it by ModelCheckpoint or trainer.save_checkpoint."
        )
    return checkpoint


def _epoch(checkpoint: dict[str, Any]) -> int:
    """Return the epoch of the step that comes next."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return int(checkpoint.get("epoch", 0)) + bool(progress.get("is_last_batch", False))


def _take_up(
    checkpoint: dict[str, Any], path: str, module: pl.LightningModule, optimizers: Optimizers, index: int
) -> None:
    """Load a checkpoint into the module, and into the optimizers where it has their states."""
    try:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise MisconfigurationException(
            f"{path!r} must hold the parameters of the module, got others ({said[:300]}): make the module as it was "
            "trained."
        ) from error
    states = checkpoint.get("optimizer_states") or []
    if optimizers.given and len(states) > 1:
        states = states[index : index + 1]
    for optimizer, state in zip(optimizers.all, states, strict=False):
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise MisconfigurationException(
                f"{path!r} must hold the state of the optimizer, got one that does not fit {type(optimizer).__name__} "
                f"({error}): give the optimizer of the run."
            ) from error
