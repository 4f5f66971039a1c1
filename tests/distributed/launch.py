"""Two processes, started from a test: they run named jobs one after the other and leave what each gave in files."""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2

# A collective that one process never enters becomes an error after this time. Rank 0 starts no more than a few seconds
# after rank 1 on a busy machine.
COLLECTIVE_SECONDS = 60
# The jobs of one launch take 5 to 40 s on two free cores; whatever takes this long hangs.
LAUNCH_SECONDS = 300


class Launch:
    """Two processes, already running.

    Args:
        module: name of the module with the jobs; each is called as job(rank, world_size).
        jobs: names in it.
        folder: empty folder for the rendezvous and the results.
        collective_seconds: see ``COLLECTIVE_SECONDS``.
    """

    def __init__(
        self, module: str, jobs: Sequence[str], folder: Path, collective_seconds: int = COLLECTIVE_SECONDS
    ) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(RANKS):
            # LOCAL_RANK tells Lightning that processes are started from outside.
            environment = os.environ | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            # A seed left by an earlier test: Lightning would set it in these processes, and not in the test's own.
            environment.pop("PL_GLOBAL_SEED", None)
            arguments = [str(rank), str(folder), str(collective_seconds), module, *jobs]
            command = [sys.executable, "-m", "tests.distributed.launch", *arguments]
            with open(folder / f"output_{rank}", "wb") as output:
                self._processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )

    def wait(self, seconds: float = LAUNCH_SECONDS) -> list[int]:
        """Exit codes. A process still running after that time fails the test; none is left behind."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self._processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process hangs after {seconds} s.\n{self.outputs()}") from None
        finally:
            for p in self._processes:
                p.kill()
                p.wait()

    def outputs(self) -> list[str]:
        """What the processes wrote, the end of it."""
        return [(self.folder / f"output_{rank}").read_text(errors="replace")[-4000:] for rank in range(RANKS)]

    def results(self) -> dict[str, list[Any]]:
        """Wait; return what each job gave, by rank."""
        codes = self.wait()
        assert codes == [0] * RANKS, "\n".join([f"exit codes {codes}", *self.outputs()])
        by_rank = [torch.load(self.folder / f"result_{rank}.pt", weights_only=False) for rank in range(RANKS)]
        return {name: [found[name] for found in by_rank] for name in by_rank[0]}


def main(rank: int, folder: Path, collective_seconds: int, module: str, jobs: Sequence[str]) -> None:
    """Run the jobs as one of the two processes."""
    torch.set_num_threads(1)
    # Lightning joins the group that it finds. A file needs no port that another process could take meanwhile.
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
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
        torch.save(results, folder / f"result_{rank}.pt")
    finally:
        # Also after an error: a thread of the group that needs Python while Python ends aborts the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])


# FSDP2 runs on CPUs since their streams have events; before that only accelerators could.
needs_fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream(), "record_event"), reason="torch without FSDP2 on CPUs")
