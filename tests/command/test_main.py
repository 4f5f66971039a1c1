"""The command as it is typed: what it prints, writes and refuses."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_curvature.command import main
from lightning_curvature.command.main import COMMANDS, run
from tests.helpers.logged import write_csv
from tests.helpers.runs import Classifier, batched_samples, mlp

ROOT = Path(__file__).parent.parent.parent


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


def logged(folder: Path) -> Path:
    return write_csv(folder, {"train_loss": [2.0, 1.0], "curvature/stability_index": [0.5, 0.6]})


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said where the command ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_folders_as_they_are_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = logged(tmp_path / "a"), logged(tmp_path / "b")
    main(["report", str(one), str(two), "--out", str(tmp_path / "out")])
    written = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out == f"{written}\n"
    assert "Curvature of 2 runs" in written.read_text(encoding="utf-8")
    main(["report", "--prefix", "curvature", str(one)])
    assert (one / "report" / "edge.png").is_file()


def test_mistakes_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "report", str(tmp_path / "none")).startswith(
        "lightning-curvature: DIR must be a folder, got"
    )
    folder = str(logged(tmp_path / "a"))
    said = refused(capsys, "report", folder, "--prefix", "left")
    assert said == "lightning-curvature: --prefix must be one of the logged values, got 'left': try curvature.\n"
    assert "required: report.dirs" in refused(capsys, "report")
    assert "invalid choice: 'repeat'" in refused(capsys, "repeat")


def test_without_arguments_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert said.startswith("usage: lightning-curvature")
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("missing", ["jsonargparse", "matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_remedy(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "lightning_curvature.report.page", raising=False)
    said = refused(capsys, "report", str(logged(tmp_path)))
    remedy = "pip install 'lightning-curvature[report]'"
    assert said == f"lightning-curvature: {missing} must be installed for this command: {remedy}.\n"


def test_other_missing_modules_are_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(dirs: Sequence[str]) -> None:
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setitem(COMMANDS, "report", broken)
    with pytest.raises(ModuleNotFoundError, match="mine"):
        main(["report", str(tmp_path)])


def test_a_function_is_a_subcommand_by_its_signature(capsys: pytest.CaptureFixture[str]) -> None:
    def double(value: float, names: Sequence[int], *, times: int = 2, kind: str | None = None) -> tuple[object, ...]:
        """Return all arguments.

        Args:
            value: a number
            names: some numbers
            times: a factor
        """
        return value, list(names), times, kind

    assert run({"double": double}, ["double", "2", "3", "--value", "1.5", "--times", "4"]) == (1.5, [2, 3], 4, None)
    with pytest.raises(SystemExit):
        run({"double": double}, ["double", "--help"])
    said = capsys.readouterr().out
    assert "Return all arguments." in said
    assert "some numbers" in said
    assert "a factor (type: int, default: 2)" in said


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
    said = refused(capsys, "cost", "--config", config, *arguments)
    assert said.startswith(f"lightning-curvature: {sentence}")
    assert len(said.splitlines()) == 1


def test_checkpoints_are_asked_for(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: measure.ckpt" in refused(capsys, "measure", "--config", config)


def script(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_as_a_module_of_python(tmp_path: Path) -> None:
    ended = script("-m", "lightning_curvature", "report", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.startswith("lightning-curvature: DIR must hold a logged run, got")
    assert len(ended.stderr.splitlines()) == 1
    version = script("-m", "lightning_curvature", "--version")
    assert version.returncode == 0
    assert version.stdout.startswith("lightning-curvature ")


def test_the_package_loads_none_of_the_extra() -> None:
    loaded = "print({'matplotlib', 'jinja2', 'jsonargparse', 'torch'} & set(sys.modules))"
    ended = script("-c", f"import sys, lightning_curvature, lightning_curvature.command; {loaded}")
    assert ended.stdout == "set()\n"
