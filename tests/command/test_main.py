"""The command ``lightning-curvature``: its subcommands, and a user's mistakes in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_curvature
from lightning_curvature.command import main
from lightning_curvature.command.main import COMMANDS
from tests.helpers.runs import Classifier, batched_samples, mlp


class Learner(Classifier):
    """A module with data of its own that the command line can make."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(mlp(4, width, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))

    def train_dataloader(self) -> DataLoader[Any]:
        return batched_samples(32, dtype=torch.float32)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": {"class_path": f"{__name__}.Learner", "init_args": {"width": 5}}}))
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the last line of errors."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0), capsys.readouterr().err.strip().splitlines()[-1]


def test_without_arguments_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert set(COMMANDS) == {"report", "measure", "cost"}
    assert all(f"\n    {name} " in printed for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert lightning_curvature.__version__ in capsys.readouterr().out


def test_cost_of_a_configuration(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "--config", config, "--monitor", "spectrum", "--options", '{"quantities": ["lambda_max"]}'])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Monitor: " in line]
    assert line.startswith("HessianSpectrumMonitor: a measurement takes ")
    assert line.endswith(" adds 10 %")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--options", '{"quantity": 1}'], "options must be arguments of HessianSpectrumMonitor, got "),
        (["--options", '{"k": 0}'], "k must be a whole number of at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, last = said(capsys, "cost", "--config", config, *arguments)
    assert code == 2
    assert last.startswith(f"lightning-curvature: {sentence}")


def test_a_missing_argument_and_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, last = said(capsys, "measure", "--config", "config.yaml")
    assert (code, "ckpt" in last) == (2, True)
    assert said(capsys, "mesure")[0] == 2


@pytest.mark.slow
def test_the_package_is_a_command_and_loads_no_extra_without_it() -> None:
    run = [sys.executable, "-m", "lightning_curvature", "--help"]
    assert "measure" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
    # torchmetrics loads matplotlib where it is there.
    loads = "import sys, lightning_curvature.callbacks; print('jsonargparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
