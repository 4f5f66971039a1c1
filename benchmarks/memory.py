"""Measures the peak memory of single steps: every allocation of PyTorch, on the CPU through its profiler."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from timing import fit
from torch.profiler import ProfilerActivity, profile, record_function
from workloads import Workload

# Steps 0 and 2 of a short run are measured where a monitor measures every second one. Optimizers make their state at
# step 0, so the last two are looked at.
_STEPS = 3
MEASURED, PLAIN = 2, 1

_STEP, _PROBE = "benchmark_step", "benchmark_probe"


@dataclass(frozen=True)
class Memory:
    """Bytes of one step.

    Attributes:
        peak: most bytes alive at any moment of the step: parameters, gradients, optimizer state, activations, copies.
        probe: most bytes alive while the callbacks end the batch, above what is alive after them.
        rest: bytes alive after the step.
    """

    peak: int
    probe: int
    rest: int


class _Windows(pl.Callback):
    """Marks the step from its start, and its part from the end of the batch on. Made in pairs, first and last."""

    def __init__(self) -> None:
        self._step: Any = None
        self._probe: Any = None
        self.cuda: list[Memory] = []
        self._before_probe = 0

    def open_step(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._step = record_function(_STEP)
        self._step.__enter__()

    def open_probe(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._before_probe = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._probe = record_function(_PROBE)
        self._probe.__enter__()

    def close(self, device: torch.device) -> None:
        if device.type == "cuda":
            peak, rest = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
            self.cuda.append(Memory(max(peak, self._before_probe), peak - rest, rest))
            return
        self._probe.__exit__(None, None, None)
        self._step.__exit__(None, None, None)


class _First(pl.Callback):
    def __init__(self, windows: _Windows) -> None:
        self.windows = windows

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.windows.open_step(pl_module.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.windows.open_probe(pl_module.device)


class _Last(pl.Callback):
    def __init__(self, windows: _Windows) -> None:
        self.windows = windows

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.windows.close(pl_module.device)


def memory_of_steps(workload: Workload, device: torch.device, callbacks: Sequence[pl.Callback]) -> list[Memory]:
    """Memory of each step of a short run."""
    windows = _Windows()
    every = [_First(windows), *callbacks, _Last(windows)]
    if device.type == "cuda":
        fit(workload, device, _STEPS, every)
        return windows.cuda
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(workload, device, _STEPS, every)
        # Trainer and module refer to each other: collected later, their memory would be freed inside another profile.
        gc.collect()
    return _read(profiler)


def _read(profiler: Any) -> list[Memory]:
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    windows = {name: [(e.start_ns(), e.end_ns()) for e in events if e.name() == name] for name in (_STEP, _PROBE)}
    levels, alive = [], 0
    for moment, change in changes:
        alive += change
        levels.append((moment, alive))

    def at(moment: int) -> int:
        return next((level for when, level in reversed(levels) if when <= moment), 0)

    def peak(start: int, end: int) -> int:
        return max([at(start), *(level for when, level in levels if start <= when <= end)])

    found = []
    for step, probe in zip(sorted(windows[_STEP]), sorted(windows[_PROBE]), strict=True):
        rest = at(step[1])
        found.append(Memory(peak(*step), peak(*probe) - rest, rest))
    return found
