"""Memory that a container leaves, read off made-up file systems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_curvature.operators import memory
from lightning_curvature.operators.memory import available_memory, container_memory

NO_LIMIT = 2**63
# What version 1 writes where there is no limit: the largest number of bytes in whole pages.
UNLIMITED = 2**63 - 4096


def group(folder: Path, limit: int | str, used: int, inactive: int = 0, version: int = 2) -> None:
    """Write the files of a control group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 900\ninactive_file {inactive}\nactive_file 7\n")


def member(root: Path, *lines: str) -> Path:
    """Write the groups that the process is in; give the place of their file systems."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    return root / "sys/fs/cgroup"


def test_limit_of_the_own_group(tmp_path: Path) -> None:
    base = member(tmp_path, "0::/service/worker")
    group(base / "service/worker", 1000, 600, inactive=50)
    # Files that were read can be dropped: they are free.
    assert container_memory(tmp_path) == 1000 - 600 + 50


def test_limit_of_a_group_above(tmp_path: Path) -> None:
    base = member(tmp_path, "0::/service/worker")
    group(base / "service/worker", "max", 100)
    group(base / "service", 1000, 700, inactive=20)
    assert container_memory(tmp_path) == 320
    # The tighter of two.
    group(base / "service/worker", 250, 100)
    assert container_memory(tmp_path) == 150
    # A group beside them does not count.
    group(base / "other", 10, 9)
    assert container_memory(tmp_path) == 150


def test_limit_at_the_root_seen_from_inside(tmp_path: Path) -> None:
    """The path is that of the machine, which is not there in a container that sees its own group as the root."""
    base = member(tmp_path, "0::/machine/pod/container")
    group(base, 4000, 1000, inactive=300)
    assert container_memory(tmp_path) == 3300


def test_no_limit(tmp_path: Path) -> None:
    base = member(tmp_path, "0::/service")
    group(base / "service", "max", 600)
    assert container_memory(tmp_path) == NO_LIMIT
    assert container_memory(tmp_path / "elsewhere") == NO_LIMIT


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_1(tmp_path: Path, controllers: str) -> None:
    base = member(tmp_path, "12:cpuset:/box", f"5:{controllers}:/box/inner", "1:name=systemd:/box")
    group(base / "memory/box/inner", UNLIMITED, 400, version=1)
    group(base / "cpuset/box", 5, 0, version=1)  # of another controller
    assert container_memory(tmp_path) >= UNLIMITED - 400
    group(base / "memory/box", 2000, 1500, inactive=100, version=1)
    assert container_memory(tmp_path) == 600


def test_processes_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine_memory", lambda: 10_000)
    left = {"container": 6_000}
    monkeypatch.setattr(memory, "container_memory", lambda root: left["container"])
    device = torch.device("cpu")
    assert available_memory(device) == 6_000
    assert available_memory(device, 4) == 1_500
    left["container"] = NO_LIMIT
    assert available_memory(device, processes=4) == 2_500
