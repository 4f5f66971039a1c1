"""Values, freshness, order and words of the monitor of regimes, on quadratics whose threshold is known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_curvature import HessianSpectrumMonitor, RegimeChange, RegimeMonitor
from lightning_curvature.functional import REGIMES, catapult_alarm, regime
from tests.helpers.regimes import Oscillation, Quadratic, Raise, fit, monitor, sgd, steps
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp, warned
from tests.helpers.tensorboard import charts, layouts, read


def column(found: dict[int, dict[str, float]], key: str) -> torch.Tensor:
    return torch.tensor([row.get(key, math.nan) for row in found.values()], dtype=torch.float64)


def losses(found: dict[int, dict[str, float]], module: Any) -> torch.Tensor:
    """Of each step, from the path that the witness of the oscillation has noted."""
    path = torch.stack(module)[:-1]
    return 0.5 * (path**2 @ torch.tensor([10.0, 1.0], dtype=torch.float64)) + 1.0


@pytest.mark.parametrize("raised", [1.1, 1.6, 4.0])
def test_values_are_those_of_the_pure_functions(raised: float) -> None:
    """The whole run, of which each step is judged before the next one is made."""
    oscillation, follow = Oscillation(), monitor(on_alarm=(), rearm_after=1)
    _, found = fit(oscillation, follow, Raise(20, raised / 0.95), ratio=0.95)
    assert list(found) == list(range(60))
    loss = losses(found, oscillation.path)
    cosine, growth = column(found, "oscillation_cosine"), column(found, "oscillation_growth")
    # λ_osc where the cosine is below −0.9, over the threshold that the step had; the last one stands otherwise.
    threshold = torch.tensor([10.0 / (0.95 if step < 20 else raised) for step in range(60)], dtype=torch.float64)
    ratios, last = [], math.nan
    for value, cos, edge in zip(column(found, "lambda_osc").tolist(), cosine.tolist(), threshold.tolist(), strict=True):
        last = value if cos < -0.9 else last
        ratios.append(last / edge)
    ratio = torch.tensor(ratios, dtype=torch.float64)
    # A handful of operations of float64 on the same numbers.
    torch.testing.assert_close(column(found, "edge_ratio"), ratio, rtol=1e-13, atol=0.0, equal_nan=True)
    nothing = torch.full_like(ratio, math.nan)
    expected = regime(loss, edge_ratio=ratio, sharpness=nothing, cosine=cosine)
    assert torch.equal(column(found, "regime").long(), expected)
    alarm = catapult_alarm(loss, cosine=cosine, growth=growth)
    assert torch.equal(column(found, "regime_alarm") > 0, alarm)
    assert alarm.any()
    assert (alarm.nonzero()[0] >= 20).all()
    assert loss[alarm.nonzero()[0]].item() < 2.0 * loss[:20].min().item() or raised > 3.0


def test_each_regime_of_a_quadratic() -> None:
    """At 0.98 of the threshold; below it; and beyond it until the loss has risen tenfold."""
    edge = monitor()
    fit(Oscillation(), edge, ratio=0.98)
    assert edge.result.name == "edge of stability"
    assert edge.result.edge.source == "lambda_osc"
    still = monitor()
    fit(Oscillation(), still, ratio=0.3)
    assert still.result.name == "flat"
    lost = monitor()
    fit(Oscillation(), lost, ratio=1.2)
    assert lost.result.name == "diverging"


def test_any_order_among_the_callbacks(tmp_path: Path) -> None:
    """It moves behind those that it hears, and stays before Lightning's checkpoints; the others keep their order."""
    alone: list[Any] = []
    for order in itertools.permutations(range(4)):
        follow, other = monitor(), pl.Callback()
        keep = ModelCheckpoint(tmp_path)
        one = Oscillation()
        given: list[pl.Callback] = [one, follow, other, keep]
        trainer, found = fit(*(given[i] for i in order), ratio=1.02, enable_checkpointing=True)
        alone.append(str(found))
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        assert callbacks.index(one) < callbacks.index(follow) < callbacks.index(keep)
        assert [c for c in callbacks if c in (one, other)] == [given[i] for i in order if given[i] in (one, other)]
    assert set(alone) == {alone[0]}


def test_a_value_counts_at_its_step_and_the_threshold_is_that_of_now() -> None:
    """λ_max is measured at steps 0 and 20 alone; the learning rate is raised at step 10."""
    spectrum = HessianSpectrumMonitor(every_n_train_steps=20, probe_dataloader=steps(1), on_error="raise")
    follow = monitor(every_n_train_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        calls: list[float] = []
        update = follow._tracker.update
        patch.setattr(RegimeMonitor, "_start_afresh", _spied(calls, RegimeMonitor._start_afresh))
        _, found = fit(spectrum, follow, Raise(10, 1.5), ratio=0.6, count=30)
    assert update is not follow._tracker.update
    assert list(found) == [0, 5, 10, 15, 20, 25]
    expected = torch.tensor([0.6, 0.6, 0.9, 0.9, 0.9, 0.9], dtype=torch.float64)
    torch.testing.assert_close(column(found, "edge_ratio"), expected, rtol=1e-6, atol=0.0)  # λ_max to 1e-3 squared
    # As a new value of the sharpness it counts twice.
    assert sum(not math.isnan(one) for one in calls) == 2
    assert len(calls) == 26


def _spied(calls: list[float], start: Any) -> Any:
    def begin(self: RegimeMonitor) -> None:
        start(self)
        update = self._tracker.update

        def noted(loss: float, ratio: float = math.nan, sharpness: float = math.nan, cosine: float = math.nan) -> int:
            calls.append(sharpness)
            return update(loss, ratio, sharpness, cosine)

        self._tracker.update = noted  # type: ignore[method-assign]

    return begin


@pytest.mark.parametrize(("count", "batches"), [(1, "auto"), (2, "auto"), (2, "full"), (1, "mini")])
def test_mini_batches_have_no_edge_at_lambda_max(count: int, batches: str) -> None:
    follow = monitor(batches=batches)
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    spectrum = HessianSpectrumMonitor(every_n_train_steps=1, on_error="raise")
    trainer = make_trainer(spectrum, follow, max_epochs=3)
    trainer.fit(module, loader(classification(count)))
    full = batches == "full" or (batches == "auto" and count == 1)
    assert (follow.result.edge.source == "lambda_max") == full
    if full:
        expected = (
            trainer.callback_metrics["curvature/lambda_max"]
            / trainer.callback_metrics["curvature/lambda_max_threshold"]
        )
        assert follow.result.edge.value == pytest.approx(expected.item(), rel=1e-6)  # callback_metrics hold float32
    else:
        assert follow.result.edge.reason.startswith("mini-batches leave the edge below")


def test_the_loss_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not divided by the batches that it accumulates, and the mean over them."""
    data, seen = classification(6), []
    update = RegimeMonitor._judge

    def judge(self: RegimeMonitor, *args: Any) -> None:
        update(self, *args)
        seen.append(self._tracker.losses[-1])

    monkeypatch.setattr(RegimeMonitor, "_judge", judge)
    for batches in (1, 2, 4):
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
        make_trainer(monitor(), accumulate_grad_batches=batches).fit(module, loader(data))
        with torch.no_grad():
            each = [float(module.loss(module(x), y)) for x, y in data]
        means = [sum(part) / len(part) for part in (each[i : i + batches] for i in range(0, 6, batches))]
        # Means of float64.
        assert seen == pytest.approx(means, rel=1e-14)
        seen.clear()


def test_changes_are_told(tmp_path: Path) -> None:
    told: list[RegimeChange] = []
    logger = TensorBoardLogger(tmp_path, name="run")
    follow = monitor(on_change=told.append, on_alarm=())
    trainer, found = fit(Oscillation(), follow, Raise(5, 2.0), ratio=0.6, logger=logger)
    codes = [int(row["regime"]) for row in found.values()]
    changed = [i for i in range(60) if codes[i] != [0, *codes][i]]
    assert [one.step for one in told] == changed
    assert [one.after for one in told] == [REGIMES[codes[i]] for i in changed]
    assert [one.before for one in told] == ["unknown", *[one.after for one in told[:-1]]]
    assert told[-1].after == "diverging"
    logger.experiment.flush()
    events = read(logger.log_dir)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("curvature/regime/text_summary")]
    assert texts == [str(one) for one in told]
    assert texts[-1].startswith(f"step {changed[-1]}: diverging (1.2 of the threshold by lambda_osc)")
    images = events.Images("curvature/regime_picture")
    assert len(images) == sum(row["regime_alarm"] for row in found.values()) + 1 > 1  # at each alarm, and at the end
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
    (layout,) = layouts(logger.log_dir)
    assert charts(layout) == dict(follow.charts(trainer))


def test_judged_where_due_or_where_something_was_heard() -> None:
    follow = monitor(every_n_train_steps=10)
    _, found = fit(Oscillation(every=7), follow, ratio=0.98, count=30)
    judged = [step for step, row in found.items() if "regime" in row]
    assert judged == sorted({*range(0, 30, 10), *range(0, 30, 7)})
    # Losses of the other steps were taken up all the same.
    every = monitor()
    _, all_found = fit(Oscillation(every=7), every, ratio=0.98, count=30)
    assert [all_found[step]["regime"] for step in judged] == [found[step]["regime"] for step in judged]


@pytest.mark.filterwarnings("error::lightning_curvature.CurvatureWarning")
def test_what_it_misses_is_said() -> None:
    said = warned(lambda: fit(monitor()))
    assert [text.partition(",")[0] for text in said] == [
        "RegimeMonitor must find monitors of the prefix 'curvature' to listen to",
        "RegimeMonitor must hear of an oscillation to give alarms",
    ]
    assert len(warned(lambda: fit(monitor(on_alarm=()), Oscillation(prefix="other")))) == 1
    assert warned(lambda: fit(monitor(), Oscillation())) == []
    assert all(text.endswith(".") for text in said)


class Silent(Quadratic):
    """Manual optimization that returns nothing."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(sgd(0.5))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.x**2).sum())
        optimizer.step()


def test_a_step_without_a_loss() -> None:
    said = warned(lambda: fit(monitor(), Oscillation(), module=Silent(), count=12))
    assert said == ["RegimeMonitor must find a loss in what training_step returns, got none: return it."]


def test_an_error_in_on_change_ends_nothing() -> None:
    def change(one: RegimeChange) -> None:
        raise ZeroDivisionError("of the user")

    follow = monitor(on_change=change, on_error="warn")
    said = warned(lambda: fit(follow, Oscillation(), ratio=0.98))
    # Said once, and the steps are judged all the same.
    assert follow.result.name == "edge of stability"
    assert said[0] == "RegimeMonitor logs NaN: ZeroDivisionError: of the user"
    with pytest.raises(ZeroDivisionError):
        fit(monitor(on_change=change), Oscillation(), ratio=0.98)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"on_alarm": ("checkpoint",)}, "dirpath must come with the action 'checkpoint', got None: name the folder"),
        ({"on_alarm": ("halt",)}, "on_alarm must be 'warn', 'checkpoint', 'lower_lr' or 'stop', got 'halt': an empty"),
        ({"lr_factor": 1.0}, "lr_factor must lie between 0 and 1, got 1.0: 0.5 halves the learning rate"),
        ({"rearm_after": 0}, "rearm_after must be a whole number of at least 1, got 0: 20 steps let one catapult pass"),
        ({"batches": "big"}, "batches must be 'auto', 'full' or 'mini', got 'big': 'auto' takes one step an epoch"),
        ({"on_change": 3}, "on_change must be a callable, or None, got an int: give a function of a RegimeChange"),
        ({"window": 7}, "window must be a whole number of at least 8, got 7"),
        ({"dirpath": ""}, "dirpath must be a folder, or None, got '': name a folder"),
    ],
)
def test_bad_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        RegimeMonitor(**options)
    assert str(caught.value).endswith(".")


def test_an_optimizer_that_is_not_there() -> None:
    sentence = "optimizer_index must be below the number of optimizers, got 1 of 1: count from 0"
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(monitor(optimizer_index=1, on_error="warn"))
