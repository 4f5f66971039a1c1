"""Processes that measure together in turns with others, and their clocks."""

from __future__ import annotations

import datetime
import itertools
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = datetime.timedelta(minutes=5)
# Wall time, and processor time from one collective to the next.
Time = tuple[float, list[float]]


@dataclass(frozen=True)
class Timing:
    """One repetition.

    Attributes:
        times: of its first measurement and of its later one.
        values: what the monitor wrote last.
    """

    times: list[Time]
    values: dict[str, float] = field(default_factory=dict)


# Called with the name of what is to be measured, rank and number of ranks.
Work = Callable[[str, int, int], Timing]


class Stopwatch:
    """Wall time from a common start of all processes, and processor time of each part that a collective ends."""

    def __init__(self) -> None:
        self.times: list[Time] = []
        self._all_reduce = dist.all_reduce
        self._wall, self._marks = 0.0, list[float]()

    def start(self) -> None:
        """Wait for the other process, and begin."""
        dist.all_reduce = self._noted
        if dist.is_initialized():
            dist.barrier()
        self._wall, self._marks = time.perf_counter(), [time.process_time()]

    def stop(self) -> None:
        """Keep the times."""
        wall, self._marks = time.perf_counter() - self._wall, [*self._marks, time.process_time()]
        self.times.append((wall, [end - begin for begin, end in itertools.pairwise(self._marks)]))
        dist.all_reduce = self._all_reduce

    def _noted(self, *args: Any, **kwargs: Any) -> Any:
        self._marks.append(time.process_time())
        return self._all_reduce(*args, **kwargs)


def serve(rank: int, ranks: int, meeting: Path, work: Work, connection: Connection) -> None:
    """Measure what the connection asks for, until it closes."""
    os.environ |= {"LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}  # the rank tells Lightning not to start others
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if ranks > 1:
        dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=ranks, timeout=_PATIENCE)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            break
        connection.send(work(name, rank, ranks))
    if ranks > 1:
        dist.destroy_process_group()


class Team:
    """Processes that measure together; they stay from one repetition to the next."""

    def __init__(self, ranks: int, folder: Path, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(ranks):
            connection, far = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, folder / "meeting", work, far))
            process.start()
            far.close()
            self._connections.append(connection)
            self._processes.append(process)

    def measure(self, name: str) -> Timing:
        """Return the times of the slowest process, and the values of the first."""
        for connection in self._connections:
            connection.send(name)
        every = [connection.recv() for connection in self._connections]
        times = []
        for of in zip(*(one.times for one in every), strict=True):
            parts = zip(*(processor for _, processor in of), strict=True)
            times.append((max(wall for wall, _ in of), [max(part) for part in parts]))
        return Timing(times, every[0].values)

    def end(self) -> None:
        """Let the processes end."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.join()
