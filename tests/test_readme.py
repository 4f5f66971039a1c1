"""The code of README and of the pages runs as it stands, and their links lead somewhere."""

import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp

Scope = dict[str, Any]
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
URL = re.compile(
    r"https://(?:github|raw\.githubusercontent)\.com/lightning-curvature/lightning-curvature/(?:blob/)?main/"
)


def blocks(page: str) -> list[str]:
    """Python code of a page, by its path."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def diagnostic(trainer: pl.Trainer, key: str) -> float:
    return float(trainer.callback_metrics[f"curvature_diagnostics/{key}"])


def test_the_trainer_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("README.md")
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


def test_the_spectrum_example() -> None:
    scope: dict[str, object] = {}
    exec(blocks("docs/spectrum.md")[0], scope)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    trainer = make_trainer(scope["monitor"], precision="32-true")
    trainer.fit(module, loader(classification(3, dtype=torch.float32)))
    found = [float(trainer.callback_metrics[f"curvature/{name}"]) for name in ("lambda_max", "lambda_2", "lambda_3")]
    assert found == sorted(found, reverse=True)
    assert trainer.callback_metrics["curvature/lambda_max_threshold"] == pytest.approx(20.0)
    assert diagnostic(trainer, "hessian_trace_stderr") >= 0.0


def test_the_sharpness_example() -> None:
    scope: dict[str, object] = {}
    exec(blocks("docs/batch_sharpness.md")[0], scope)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    trainer = make_trainer(scope["monitor"], precision="32-true")
    trainer.fit(module, loader(classification(8, dtype=torch.float32)))
    values = {key: float(trainer.callback_metrics[f"curvature/{key}"]) for key in ("batch_sharpness", "gni")}
    for key, value in values.items():
        known = diagnostic(trainer, f"{key}_stderr") <= 0.05 * value
        assert known or diagnostic(trainer, f"{key}_batches") == 256.0, key
    assert "curvature/step_sharpness" in trainer.callback_metrics


@pytest.mark.slow
def test_the_sample_growth_example(capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of fit, and by hand as the comment says."""
    (code,) = blocks("docs/stabilization.md")
    scope: dict[str, object] = {}
    exec(code, scope)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    x, y = classification(1, size=96, dtype=torch.float32)[0]
    samples = DataLoader(TensorDataset(x, y), batch_size=32)
    trainer = make_trainer(scope["monitor"], precision="32-true")
    trainer.fit(module, samples)
    values = [float(trainer.callback_metrics[f"curvature/{key}"]) for key in ("delta_1", "delta_2", "delta_2_subspace")]
    assert all(value > 0.0 for value in values)
    (by_hand,) = re.findall(r"or by hand: (.*)$", code, flags=re.MULTILINE)
    exec(by_hand, scope | {"module": module, "train_dataloader": samples})
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3 + 3  # heads, curves, two validities and seconds


def test_the_noise_example(capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of fit, and by hand as the comment says."""
    code = blocks("docs/noise.md")[0].replace("classifier.0.weight", "network.0.weight")
    scope: dict[str, object] = {}
    exec(code, scope)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    x, y = classification(1, size=96, dtype=torch.float32)[0]
    samples = DataLoader(TensorDataset(x, y), batch_size=32)
    trainer = make_trainer(scope["monitor"], precision="32-true")
    trainer.fit(module, samples)
    for key in (
        "gamma",
        "gamma_awd",
        "commutativity",
        "alignment",
        "spearman",
        "coupling",
        "coupling_z",
    ):
        assert trainer.callback_metrics[f"curvature/noise_{key}"].isfinite(), key
    assert math.isfinite(diagnostic(trainer, "noise_gamma_stderr"))
    (by_hand,) = re.findall(r"or by hand: (.*)$", code, flags=re.MULTILINE)
    exec(by_hand, scope | {"module": module, "train_dataloader": samples})
    assert "kronecker route" in capsys.readouterr().out


def test_the_page_on_noise(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the page: γ as a number, and the summary; suppression, by which stiff samples are all alike."""
    model, batches = mlp(4, 6, 3, dtype=torch.float64), classification(4)
    scope = {"model": model, "loss_function": torch.nn.functional.cross_entropy, "batches": batches}
    _, suppression, metric = blocks("docs/noise.md")
    exec(metric, scope)
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert second.startswith("0.weight: D = 24, 10 directions")
    assert float(third.split()[1]) == pytest.approx(float(first), abs=1e-3)
    scope |= {"layer": model[0], "result": scope["relation"].relation}  # type: ignore[attr-defined]
    exec(suppression, scope | dict(zip(("inputs", "targets"), batches[0], strict=True)))
    # Samples that are not stiff are there with 1e-3 of their eigenvalue.
    assert float(capsys.readouterr().out) == pytest.approx(1.0, abs=0.02)


def test_the_page_on_sharpness(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the page, on a quadratic whose curvature is 1.5 in every direction."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    data = [(1.5**0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))] * 4
    scope = {"model": model, "loss_function": lambda z, y: 0.5 * (z - y).square().sum(), "train_dataloader": data}
    exec(blocks("docs/batch_sharpness.md")[1], scope)
    assert [float(word[len("tensor(") :]) for word in re.findall(r"tensor\([^,]+", capsys.readouterr().out)] == [
        pytest.approx(1.5),
        pytest.approx(0.0, abs=1e-12),  # equal batches: nothing but a rounding or two
    ]


def test_the_page_on_the_spectrum(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the page, on a model whose Hessian is diag(2, 8, 18) / 3."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    data = [(torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), torch.zeros(3, 1, dtype=torch.float64))]
    scope = {"model": model, "loss_function": torch.nn.functional.mse_loss, "batches": data}
    code = "\n".join(blocks("docs/spectrum.md")).replace("largest=3", "largest=2")
    exec(code, scope)
    torch.testing.assert_close(scope["top"].values, torch.tensor([6.0, 8.0 / 3.0], dtype=torch.float64))  # type: ignore[attr-defined]
    # The third eigenvalue is all that is left outside the two known ones: the first moment is exact.
    assert scope["density"].moment(1) == pytest.approx(28.0 / 9.0, rel=1e-9)  # type: ignore[attr-defined]
    assert "TraceEstimate(value=9.33" in capsys.readouterr().out


def plain_scope(model: torch.nn.Module, data: Any, loss_function: Any = torch.nn.functional.cross_entropy) -> Scope:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "loss_function": loss_function, "train_dataloader": data}


def test_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """On a quadratic with one eigenvalue the curvature along any step is that eigenvalue."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    eigenvalue = 1.5
    data = [(eigenvalue**0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))] * 4
    scope = plain_scope(model, data, lambda z, y: 0.5 * (z - y).square().sum())
    loop, spectrum = blocks("docs/plain_pytorch.md")
    exec(loop, scope)
    # Exact for a quadratic, printed with three digits.
    assert capsys.readouterr().out == "λ = 1.5, edge 20\n"
    # A multiple of the identity: any vector is an eigenvector, and one product finds it out.
    exec(spectrum, scope)
    assert capsys.readouterr().out.startswith("λ_max = 1.5, 1 products, error ")


def test_the_plain_loop_keeps_statistics_and_masks() -> None:
    """The loop of the page leaves BatchNorm's statistics, dropout's masks and the weights as a loop without it does."""

    def trained(code: str) -> tuple[dict[str, Tensor], Scope]:
        model = mlp(4, 6, 3)
        model.insert(1, torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3)).double())
        scope = plain_scope(model, classification(4))
        exec(code, scope)
        return model.state_dict(), scope

    watched, scope = trained(blocks("docs/plain_pytorch.md")[0])
    plain = """
for x, y in train_dataloader:
    optimizer.zero_grad()
    loss_function(model(x), y).backward()
    optimizer.step()
"""
    unwatched, _ = trained(plain)
    assert watched["1.0.num_batches_tracked"] == 4
    assert all(torch.equal(watched[name], value) for name, value in unwatched.items())
    # Of two losses with other masks the difference would be of order 1, and its square of ε 100 times that.
    assert 0.0 < float(scope["curvature"].compute()) < 100.0


def test_links_lead_somewhere() -> None:
    """Those of README are whole, so that they hold on PyPI too; those of the pages begin at the page."""
    links = re.findall(r"^\[\w+\]: (.*)$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(links) > 20
    for link in links:
        assert URL.match(link), link
        assert (ROOT / URL.sub("", link).partition("#")[0]).exists(), link
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_regimes_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(blocks("docs/regimes.md")[0], scope)
    trainer = scope["trainer"]
    assert isinstance(trainer, pl.Trainer)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    trainer.fit(module, loader(classification(1, dtype=torch.float32)))
    assert trainer.global_step == 10
    assert trainer.callback_metrics["curvature/regime"] > 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["curvature-step=1.ckpt"]
