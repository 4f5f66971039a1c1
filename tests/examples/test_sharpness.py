"""The example of the edge of stochastic stability, in its short form: what it prints, draws and logs."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.examples import curves, rows

pytestmark = pytest.mark.slow

# Fixtures: the one that imports modules of the examples, and a file of images.

LEARNING_RATE, STEPS, INTERVAL = 0.5, 2000, 100
EDGE = 2 / LEARNING_RATE
FOLDER = "lr0.5_b16"
DRAWN = ("batch_sharpness", "gni")


@pytest.fixture(scope="module")
def demo(load: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The short form, with one more quantity."""
    out = tmp_path_factory.mktemp("sharpness")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        load("edge_of_stochastic_stability").main(
            ["--fast", "--quantities", "gni", "--out", str(out), "--accelerator", "cpu"]
        )
    return SimpleNamespace(out=out, printed="\n".join(lines), logged=curves(out / FOLDER))


def late(curve: dict[int, float]) -> float:
    """Mean over the second half of the run."""
    return float(np.mean([value for step, value in curve.items() if step >= STEPS // 2]))


def test_batch_sharpness_rises_to_the_edge_and_hovers_there(demo: SimpleNamespace) -> None:
    found = demo.logged["curvature/batch_sharpness"]
    # It falls to 0.41, 0.30 and 0.28 of the edge before it rises, with seeds 0, 1 and 2.
    assert min(found[step] for step in range(INTERVAL, 4 * INTERVAL, INTERVAL)) < 0.5 * EDGE
    # Means of 1.00, 0.98 and 0.99 of it, of ten values that scatter by 8 %: four times the error of their mean.
    assert late(found) == pytest.approx(EDGE, rel=0.12)
    # The mean of 100 single batches, which scatter by 21 %, against that of ten values at other steps: 3.4 % between
    # them, three and a half times. It is 3 % less, as batches drawn at random share samples with those just trained on,
    # which are sharper.
    assert late(demo.logged["step/step_sharpness"]) == pytest.approx(late(found), rel=0.15)
    # So few samples together are 0.72 to 0.78 of the edge.
    assert late(demo.logged["curvature/lambda_max"]) < 0.9 * late(found)
    assert demo.logged["train_loss_epoch"][max(demo.logged["train_loss_epoch"])] < 1e-2  # 0.45 of a constant answer


def test_tensorboard_holds_all_that_was_measured(demo: SimpleNamespace) -> None:
    for key in ("lambda_max", "two_over_lr", *DRAWN):
        assert set(demo.logged[f"curvature/{key}"]) == set(range(0, STEPS, INTERVAL))
    for key in DRAWN:
        assert set(demo.logged[f"curvature_diagnostics/{key}_stderr"]) == set(range(0, STEPS, INTERVAL))
    assert set(demo.logged["step/step_sharpness"]) == set(range(0, STEPS, INTERVAL // 10))
    assert set(demo.logged["curvature/two_over_lr"].values()) == {EDGE}


def test_the_table_is_that_of_the_curves(demo: SimpleNamespace) -> None:
    found = {words[4]: words[5:] for words in rows(demo.printed, f"0–{STEPS} ")}
    assert set(found) == {*DRAWN, "lambda_max", "step_sharpness"}
    shares = {step: value / EDGE for step, value in demo.logged["curvature/batch_sharpness"].items()}
    tenth = STEPS // 10
    start = min(
        step
        for step in shares
        if step + tenth <= max(shares) and np.median([shares[n] for n in shares if step <= n <= step + tenth]) > 0.9
    )
    for key, words in found.items():
        curve = demo.logged[f"step/{key}" if key == "step_sharpness" else f"curvature/{key}"]
        plateau = [value / EDGE for step, value in curve.items() if step >= start]
        expected = [np.mean(plateau), min(plateau), max(plateau), plateau[-1]]
        assert [float(word) for word in words[:4]] == pytest.approx(expected, abs=6e-4)  # three places are printed
        assert int(words[4]) == start


def test_the_picture_shows_every_quantity(demo: SimpleNamespace, load: Any) -> None:
    path = demo.out / "edge_of_stochastic_stability.png"
    picture = load("matplotlib.image").imread(path)[..., :3]
    plotting, colours = load("plotting_sharpness"), load("matplotlib.colors")
    for key in (*DRAWN, "lambda_max"):
        # A legend entry has some thirty pixels of a thin line's own colour, and about eighty of a broad one's.
        colour = np.array(colours.to_rgb(plotting.STYLES[key]["color"]))
        assert (np.abs(picture - colour).max(-1) < 0.02).sum() > 150, key
    # 200 points, half transparent.
    red = np.array(colours.to_rgb(plotting.POINTS["color"]))
    pale = 1 - plotting.POINT_OPACITY * (1 - red)
    assert (np.abs(picture - pale).max(-1) < 0.02).sum() > 400
    assert demo.printed.splitlines()[-2:] == [f"picture: {path}", load("showing").tensorboard(demo.out)]


def test_the_first_values_are_those_of_the_full_batch(load: Any, tmp_path: Path) -> None:
    """With as many samples in a mini-batch as there are, every mini-batch is the whole data."""
    samples, scale, seed = 48, 0.7, 3
    arguments = ["--samples", str(samples), "--batch-size", str(samples), "--weight-scale", str(scale)]
    short = ["--max-steps", "1", "--seed", str(seed), "--out", str(tmp_path), "--accelerator", "cpu"]
    example = load("edge_of_stochastic_stability")
    example.main([*arguments, *short])
    data = load("data").FullBatchData(samples=samples, one_hot=True, label_noise=0.5)
    data.setup()
    x, y = (tensor.double() for tensor in data.batches[0])
    pl.seed_everything(seed, verbose=False)
    network = load("models").MLP(in_features=64, width=192, depth=2, activation=nn.ReLU)
    example.initialize(network, scale)
    parameters = list(network.double().parameters())
    loss = 0.5 * (network(x) - y).square().sum() / samples
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    product = torch.autograd.grad(gradient @ gradient.detach(), parameters)
    curvature = torch.cat([p.flatten() for p in product]) @ gradient / (gradient @ gradient)
    logged = curves(tmp_path / f"lr0.5_b{samples}")
    # A float32 forward pass and two backwards.
    for key in ("curvature/batch_sharpness", "step/step_sharpness"):
        assert logged[key][0] == pytest.approx(curvature.item(), rel=1e-3)
    assert logged["train_loss_step"][0] == pytest.approx(loss.item(), rel=1e-5)


def test_weights_are_a_share_of_kaimings(load: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 500)
    load("edge_of_stochastic_stability").initialize(nn.Sequential(layer), 0.3)
    # 100,000 normal numbers have their standard deviation to 0.2 %.
    assert layer.weight.std().item() == pytest.approx(0.3 * math.sqrt(2 / 200), rel=0.01)
    assert not layer.bias.any()


@pytest.fixture
def changed(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run twelve steps, four an epoch as six of the samples do not fill a batch, and see what each is made with."""
    example = load("edge_of_stochastic_stability")

    def run(*changes: str) -> SimpleNamespace:
        made: list[tuple[int, float]] = []

        def seen(module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
            made.append((len(batch[0]), module.trainer.optimizers[0].param_groups[0]["lr"]))

        monkeypatch.setattr(example.MiniBatchClassifier, "on_train_batch_end", seen)
        short = ["--samples", "70", "--max-steps", "12", "--every-n-train-steps", "1", "--out", str(tmp_path)]
        changing = [argument for change in changes for argument in ("--change", change)]
        example.main([*short, *changing, "--accelerator", "cpu"])
        return SimpleNamespace(made=made, logged=curves(tmp_path / FOLDER))

    return run


def test_a_change_of_the_learning_rate_counts_from_its_step_on(
    changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed("lr=0.1@5", "lr=0.2@7")
    assert run.made == [(16, 0.5)] * 5 + [(16, 0.1)] * 2 + [(16, 0.2)] * 5
    # The monitors measure with the learning rate of the step that follows.
    edges = [run.logged["curvature/two_over_lr"][step] for step in range(12)]
    assert edges == pytest.approx([4.0] * 5 + [20.0] * 2 + [10.0] * 5, rel=1e-6)
    printed = capsys.readouterr().out
    assert {"step 5: η 0.5 → 0.1", "step 7: η 0.1 → 0.2"} <= set(printed.splitlines())
    assert [row[:4] for step in ("0–5 ", "5–7 ", "7–12 ") for row in rows(printed, step)[:1]] == [
        ["0–5", "0.5", "16", "4"],
        ["5–7", "0.1", "16", "20"],
        ["7–12", "0.2", "16", "10"],
    ]


def test_a_change_of_the_batch_size_counts_from_the_next_epoch_on(
    changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed("batch_size=32@5", "lr=0.25@8")
    assert run.made == [(16, 0.5)] * 8 + [(32, 0.25)] * 4
    printed = capsys.readouterr().out
    assert {"step 8: b 16 → 32", "step 8: η 0.5 → 0.25"} <= set(printed.splitlines())
    assert len(rows(printed, "0–8 ")) == len(rows(printed, "8–12 ")) == 3
    assert rows(printed, "8–12 ")[0][1:4] == ["0.25", "32", "8"]
    assert "η 0.5 → 0.25, b 16 → 32 at step 8: training loss " in printed


def test_a_change_for_which_no_epoch_begins_any_more_is_named(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = changed("batch_size=32@9")
    assert run.made == [(16, 0.5)] * 12
    assert "batch_size=32@9: not made, no epoch began from then on" in capsys.readouterr().out.splitlines()


def test_an_epoch_cut_short_is_left_out(load: Any) -> None:
    whole_epochs = load("edge_of_stochastic_stability").whole_epochs
    losses = np.array([4.0, 3.0, 2.0, 9.0])
    for last, kept in ((15, 4), (13, 3)):
        steps, values = whole_epochs((np.array([3, 7, 11, last]), losses))
        assert len(steps) == kept
        assert values.tolist() == losses[:kept].tolist()


def test_a_phase_is_judged_by_its_own_edge(load: Any) -> None:
    plotting = load("plotting_sharpness")
    steps = np.arange(100)
    # Half the edge, then at it; η twice as large: half of the new edge is the same value.
    sharpness = np.where(steps < 20, 5.0, np.where(steps < 50, 10.0, 5.0))
    loss = np.array([30, 45, 52, 55, 70]), np.array([4.0, 2.0, 7.0, 9.0, 20.0])
    run = plotting.Run(
        steps=100,
        phases=[plotting.Phase(0, 0.2, 16), plotting.Phase(50, 0.4, 16)],
        curvature={"batch_sharpness": (steps, sharpness), "lambda_max": (steps, 0 * sharpness + 2.5)},
        errors={},
        loss=loss,
        step_loss=loss,
    )
    # The median of eleven values is at the edge when six of them are.
    assert [run.edge_step(phase) for phase in run.phases] == [15, 50]
    assert run.plateau("lambda_max", run.phases[0]).tolist() == [0.25] * 35
    assert run.plateau("batch_sharpness", run.phases[1]).tolist() == [1.0] * 50
    # The last epoch before step 50, and the highest of the tenth of the run after it.
    assert run.spike(1) == (2.0, 9.0)
    assert plotting.table(run).splitlines()[-1] == (
        "η 0.2 → 0.4 at step 50: training loss 2 in the epoch before, up to 9 in the 10 steps after."
    )
    loss[1][3] = math.nan
    assert plotting.table(run).splitlines()[-1].endswith("training loss 2 in the epoch before, not finite any more.")


def test_cifar10_has_the_network_of_the_paper(
    load: Any, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("edge_of_stochastic_stability")
    sizes: list[list[int]] = []
    whole = example.initialize

    def initialize(network: nn.Module, scale: float) -> None:
        whole(network, scale)
        sizes.append([layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)])
        assert scale == 0.2

    monkeypatch.setattr(example, "initialize", initialize)
    setting = ["--dataset", "cifar10", "--npz", str(cifar), "--samples", "12", "--batch-size", "4"]
    short = ["--max-steps", "3", "--every-n-train-steps", "1", "--out", str(tmp_path), "--accelerator", "cpu"]
    example.main([*setting, *short])
    assert sizes == [[512, 512, 10]]
    assert "MLP on 12 CIFAR-10 images, squared error, η = 0.02, b = 4" in capsys.readouterr().out
    logged = curves(tmp_path / "lr0.02_b4")
    assert logged["curvature/two_over_lr"] == pytest.approx({0: 100.0, 1: 100.0, 2: 100.0})
    assert all(
        0 < logged[key][step] < 100 for key in ("curvature/lambda_max", "step/step_sharpness") for step in (0, 2)
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "cifar10", "--fast"], "use --max-steps"),
        (["--change", "lr=0.1"], "must be lr=VALUE@STEP or batch_size=VALUE@STEP, got 'lr=0.1'"),
        (["--change", "momentum=0.9@10"], "must be lr=VALUE@STEP or batch_size=VALUE@STEP, got 'momentum=0.9@10'"),
        (["--change", "batch_size=8.5@10"], "must be lr=VALUE@STEP or batch_size=VALUE@STEP"),
        (["--change", "lr=-1@10"], "must have a value above 0, got 'lr=-1@10'"),
        (["--change", "lr=0.1@8000"], "a step between 0 and --max-steps 8000, got 8000"),
        (["--change", "lr=0.1@0"], "a step between 0 and --max-steps 8000, got 0"),
        (["--change", "batch_size=1001@10"], "from 1 to the 1000 samples, got 1001"),
        (["--fast", "--batch-size", "301"], "from 1 to the 300 samples, got 301"),
        (["--samples", "5000", "--batch-size", "1798"], "from 1 to the 1797 samples, got 1798"),
    ],
)
def test_arguments_of_sharpness_that_do_not_go_together(
    load: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit):
        load("edge_of_stochastic_stability").main(arguments)
    assert sentence in capsys.readouterr().err
