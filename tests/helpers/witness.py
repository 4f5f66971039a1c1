"""An eye on everything a run consists of, to compare a run that is watched with one that is not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature.reporting.names import full_name
from tests.helpers.runs import Capture, make_trainer

ALL = ("hvp", "gauss_newton", "kl", "finite_difference", "critical")
FORWARD_ONLY = ("kl", "finite_difference", "critical")
LAMBDAS = dict(zip(ALL, ("lambda_dir", "lambda_gn", "lambda_kl", "lambda_fd", "critical_sharpness"), strict=True))

# Links to the run, not state of it; the last but one is keyed by memory addresses, the last counts what a process has
# compiled.
_LINKS = {"_trainer", "_parameters", "_buffers", "_modules", "_metric_attributes", "_torchdynamo_wrapper_id"}
# What stands on the module while a step is awaited or under way, and at no other time.
_AWAITED = {"attribute .training_step"}
_UNDER_WAY = {"attribute .forward", "attribute .manual_backward"}
_PLAIN = {bool, int, str, bytes, type(None)}
# Asked once: each time takes longer than to note all random states.
_CUDA = torch.cuda.is_available()


class Rows(Capture):
    """A logger that keeps every call in order, and what a step writes to its ``experiment``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []
        self.written: list[float] = []

    @property
    def experiment(self) -> list[float]:
        return self.written

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        own = without_curvature(metrics)
        if own:
            self.calls.append((step, own))


def without_curvature(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the monitor itself adds."""
    return {key: value for key, value in metrics.items() if not key.startswith("curvature")}


def frozen(value: Any) -> Any:
    """Copy a value into plain containers, with tensors as (type, shape, bytes): equal means equal bit for bit."""
    if type(value) in _PLAIN:  # most values; half the time of a small run goes into this function
        return value
    if isinstance(value, Tensor):
        plain = (value if value.layout is torch.strided else value.to_dense()).detach().reshape(-1).contiguous()
        return ("tensor", str(value.dtype), tuple(value.shape), plain.view(torch.uint8).cpu().clone().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, (bool, int, str, bytes, type(None))):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
        return [frozen(item) for item in value]
    if isinstance(value, torch.Generator):
        return frozen(value.get_state())
    if type(value) is random.Random:
        return frozen(value.getstate())
    if isinstance(value, np.random.Generator):
        return frozen(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return frozen(value.get_state())
    if isinstance(value, nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return type(value).__name__
    return frozen(vars(value))


def random_states() -> Any:
    devices = torch.cuda.get_rng_state_all() if _CUDA else []
    # Python's is a tuple of 625 numbers, which need no freezing one by one.
    return [random.getstate(), *frozen([np.random.get_state(), torch.get_rng_state(), devices])]  # noqa: NPY002


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, their gradients and flags, buffers, modes, and every plain attribute of every submodule."""
    state: dict[str, Any] = {}
    for name, p in module.named_parameters():
        state[f"parameter {name}"] = frozen([p, p.grad, p.requires_grad])
    for name, b in module.named_buffers():
        state[f"buffer {name}"] = frozen(b)
    for name, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if key not in _LINKS and "_hooks" not in key:
                state[f"attribute {name}.{key}"] = frozen(value)
    return state


class Witness(pl.Callback):
    """Notes the state of the run at every hook of a batch.

    Two of them stand around the monitor: what it hides from itself, it might still show to the others.
    """

    def __init__(self) -> None:
        self.trail: list[tuple[str, dict[str, Any]]] = []

    def note(self, moment: str, trainer: pl.Trainer, module: pl.LightningModule, **more: Any) -> None:
        state = module_state(module)
        inside = not module.automatic_optimization and moment in ("after backward", "before optimizer step")
        for name in _AWAITED if moment == "batch start" else _UNDER_WAY if inside else ():
            state.pop(name, None)
        state["random states"] = random_states()
        state["optimizers"] = frozen([o.state_dict() for o in trainer.optimizers])
        state["schedulers"] = frozen([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs])
        # The attribute: the public property brings it up to date, for whoever asks first. Lightning asks after the
        # batch's end; until then it matters to nobody how far it is.
        if moment != "batch end":
            state["callback_metrics"] = frozen(without_curvature(trainer._logger_connector._callback_metrics))
        state["logged_metrics"] = frozen(without_curvature(trainer._logger_connector._logged_metrics))
        state["should_stop"] = trainer.should_stop
        for key, value in more.items():
            state[key] = frozen(value)
        self.trail.append((moment, state))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.note("batch start", trainer, pl_module, batch=batch)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.note("after backward", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("before optimizer step", trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note("batch end", trainer, pl_module, batch=batch, outputs=outputs)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.note("validation end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.note("epoch end", trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note("train end", trainer, pl_module)


@dataclass
class Record:
    """A run and all that was noted of it."""

    module: Any
    trainer: pl.Trainer
    logger: Rows
    witnesses: tuple[Witness, Witness]
    more: dict[str, Any] = field(default_factory=dict)

    def curve(self, key: str) -> list[float]:
        return self.logger.curve(full_name("curvature", key))


def watch(
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any],
    monitor: pl.Callback | None,
    make_callbacks: Callable[[], list[pl.Callback]] = list,
    seed: int = 3,
    loggers: Sequence[Logger] = (),
    **options: Any,
) -> Record:
    """Run once from a seed, with the monitor between two witnesses, or with the witnesses alone."""
    pl.seed_everything(seed, verbose=False)
    module, data, logger = make_module(), make_data(), Rows()
    first, second = Witness(), Witness()
    between = [monitor] if monitor is not None else []
    trainer = make_trainer(*make_callbacks(), first, *between, second, logger=[logger, *loggers], **options)
    trainer.fit(module, *data if isinstance(data, tuple) else (data,))
    # Whoever draws next must get the same numbers.
    more = {"random states": random_states(), "metrics": frozen(without_curvature(trainer.callback_metrics))}
    return Record(module, trainer, logger, (first, second), more)


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two noted values differ first, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"{path}: {sorted(set(a) ^ set(b)) or 'order of keys'}"
        return next((d for key in a if (d := difference(a[key], b[key], f"{path}/{key}"))), None)
    return None if a == b else path or "value"


def assert_same(plain: Record, watched: Record) -> None:
    """Everything noted of the two runs is the same, bit for bit, at every moment."""
    for index, (a, b) in enumerate(zip(plain.witnesses, watched.witnesses, strict=True)):
        assert [moment for moment, _ in a.trail] == [moment for moment, _ in b.trail]
        for number, ((moment, left), (_, right)) in enumerate(zip(a.trail, b.trail, strict=True)):
            differs = difference(left, right)
            assert differs is None, f"{differs} at {moment} (entry {number} of witness {index})"
    assert plain.logger.calls == watched.logger.calls
    assert plain.logger.written == watched.logger.written
    assert plain.more == watched.more
    assert plain.trainer.global_step == watched.trainer.global_step


def copies(batches: list[Any]) -> DataLoader:
    """Loader over copies of its own, so that a step may write into a batch."""
    return DataLoader(copy.deepcopy(batches), batch_size=None, shuffle=False)  # type: ignore[arg-type]
