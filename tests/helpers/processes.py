"""Two processes that stay: they run named jobs one after the other and return what each job gave, by rank."""

from __future__ import annotations

import atexit
import datetime
import functools
import importlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = 2

# A collective that one process never enters becomes an error after this time. One rank starts no more than a few
# seconds after the other on a busy machine.
COLLECTIVE_SECONDS = 60
# The jobs of one test file take 5 to 40 s on two free cores; whatever takes this long hangs.
JOBS_SECONDS = 300

# FSDP2 runs on CPUs since their streams have events; before that only accelerators could.
needs_fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream(), "record_event"), reason="torch without FSDP2 on CPUs")


class Pair:
    """Two processes, each with a folder for what it writes. To start them takes seconds, so that they are kept."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.folder = Path(self._folder.name)
        self.groups = 0
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(RANKS):
            connection, far = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.folder, far), daemon=True)
            process.start()
            far.close()
            self._connections.append(connection)
            self._processes.append(process)

    def run(self, module: str, jobs: Sequence[str], collective_seconds: int, seconds: float) -> list[dict[str, Any]]:
        """Return the results of the jobs, or ``{"error": traceback}``, by rank.

        Raises:
            AssertionError: a process has ended or hangs after ``seconds``; both are then stopped.
        """
        self.groups += 1
        deadline, found = time.monotonic() + seconds, []
        for connection in self._connections:
            connection.send((self.groups, collective_seconds, module, list(jobs)))
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"rank {rank} hangs after {seconds} s.\n{self.outputs()}")
                found.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
            except (AssertionError, EOFError) as error:
                self.stop()
                raise AssertionError(str(error) or f"rank {rank} has ended.\n{self.outputs()}") from None
        return found

    def outputs(self) -> str:
        """What the processes wrote, the end of it."""
        return "\n".join((self.folder / f"output_{r}").read_text(errors="replace")[-4000:] for r in range(RANKS))

    def stop(self) -> None:
        pair.cache_clear()
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


@functools.cache
def pair() -> Pair:
    """The two processes of this test process, started when the first job comes."""
    started = Pair()
    atexit.register(started.stop)
    return started


def outcomes(
    module: str, jobs: Sequence[str], collective_seconds: int = COLLECTIVE_SECONDS, seconds: float = JOBS_SECONDS
) -> list[dict[str, Any]]:
    """Results of each rank, or ``{"error": traceback}`` of a rank in which a job raised."""
    return pair().run(module, jobs, collective_seconds, seconds)


def run_on_ranks(module: str, jobs: Sequence[str]) -> dict[str, list[Any]]:
    """Run jobs of a module on two processes that form a group; return what each gave, by rank.

    Args:
        module: name of the module with the jobs; each is called as job(rank, world_size).
        jobs: names in it.

    Raises:
        AssertionError: a job raised, a process ended, or both hang; with what the processes wrote.
    """
    found = outcomes(module, jobs)
    errors = [by_name["error"] for by_name in found if "error" in by_name]
    assert not errors, "\n".join([*errors, pair().outputs()])
    return {name: [by_name[name] for by_name in found] for name in found[0]}


def serve(rank: int, folder: Path, connection: Connection) -> None:
    """Run jobs as one of the two processes until the other end of the connection closes."""
    output = os.open(folder / f"output_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    # It tells Lightning that processes are started from outside.
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            results = run_jobs(rank, folder, *request)
        except Exception:
            results = {"error": traceback.format_exc()}
        # As bytes: tensors themselves would be sent as handles of shared memory.
        torch.save(results, found := io.BytesIO())
        connection.send_bytes(found.getvalue())


def run_jobs(
    rank: int, folder: Path, group: int, collective_seconds: int, module: str, jobs: Sequence[str]
) -> dict[str, Any]:
    """Run the jobs of one request within a process group of their own, which Lightning joins."""
    # A seed left by an earlier test: Lightning would set it in these processes, and not in the test's own.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)
    # A file needs no port that another process could take meanwhile.
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / f"rendezvous_{group}").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=collective_seconds),
    )
    try:
        source = importlib.import_module(module)
        results = {}
        for name in jobs:
            print(f"job {name}", flush=True)
            results[name] = getattr(source, name)(rank, RANKS)
        return results
    finally:
        # Also after an error: a thread of the group that needs Python while Python ends aborts the process.
        torch.distributed.destroy_process_group()
