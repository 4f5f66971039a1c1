"""README's code runs as it stands."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from tests.runs import Classifier, classification, loader, mlp

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_trainer_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks()[0]
    assert len(code.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    network = mlp(4, 6, 3, dtype=torch.float32)
    module = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    batches = classification(20, dtype=torch.float32)
    scope: dict[str, object] = {"model": module, "train_dataloader": loader(batches)}
    exec(code, scope)
    trainer = scope["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert trainer.callback_metrics["curvature/two_over_lr"] == pytest.approx(20.0)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


def test_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """On a quadratic with one eigenvalue the curvature along any step is that eigenvalue."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    eigenvalue = 1.5
    data = [(eigenvalue**0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))] * 4
    scope: dict[str, object] = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_function": lambda z, y: 0.5 * (z - y).square().sum(),
        "train_dataloader": data,
    }
    exec(blocks()[1], scope)
    # Exact for a quadratic, printed with three digits.
    assert capsys.readouterr().out == "λ = 1.5, edge 20\n"


def test_links_lead_somewhere() -> None:
    for page in (README, *sorted((README.parent / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
