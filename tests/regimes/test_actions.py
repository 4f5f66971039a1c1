"""What is done on an alarm: nothing but what is asked for, at the step of the alarm, once a catapult."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.regimes import Oscillation, Quadratic, Raise, Rates, fit, monitor, sgd
from tests.helpers.runs import warned

# Raised to 1.2 of the threshold before this step, a quadratic oscillates and grows by 1.4 a step.
AT = 20


def run(follow: Any, *more: Any, **options: Any) -> tuple[Any, dict[int, dict[str, float]], list[float]]:
    """The run, its rows and the learning rates of its steps."""
    rates = Rates()
    trainer, found = fit(Oscillation(), follow, *more, Raise(AT, 1.2 / 0.95), rates, **({"ratio": 0.95} | options))
    return trainer, found, rates.found


def alarms(found: dict[int, dict[str, float]]) -> list[int]:
    return [step for step, row in found.items() if row["regime_alarm"]]


def test_logged_and_nothing_done() -> None:
    follow = monitor(on_alarm=())
    said = warned(lambda: run(follow))
    _, found, rates = run(follow)
    first, *later = alarms(found)
    assert AT < first < 40
    # The next one where 20 steps have passed.
    assert later == [first + 20]
    assert rates == pytest.approx([0.95 * 0.2] * AT + [1.2 * 0.2] * 40, rel=1e-15)
    assert said == []


def test_warn() -> None:
    found: list[Any] = []
    said = warned(lambda: found.extend(alarms(run(monitor(on_alarm=("warn",)))[1])))
    assert [text.partition(":")[0] for text in said] == [f"RegimeMonitor gives an alarm at step {s}" for s in found]
    assert said[0].endswith("edge ratio 1.2.")


def test_stop_is_at_once() -> None:
    _, found, _ = run(monitor(on_alarm=("stop",)))
    assert list(found)[-1] == alarms(found)[0]
    # Before the loss has doubled: no further step is made.
    path = Oscillation()
    trainer, _ = fit(path, monitor(on_alarm=("stop",)), Raise(AT, 1.2 / 0.95), ratio=0.95)
    assert trainer.should_stop
    assert trainer.global_step == alarms(found)[0] + 1
    x = path.path[-1]
    assert 5.0 * x[0].item() ** 2 + 0.5 * x[1].item() ** 2 < 1.0
    # As EarlyStopping does, Lightning respects the least number of steps.
    trainer, _ = fit(Oscillation(), monitor(on_alarm=("stop",)), Raise(AT, 1.2 / 0.95), ratio=0.95, min_steps=50)
    assert trainer.global_step >= 50


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_lower_the_learning_rate(factor: float) -> None:
    _, found, rates = run(monitor(on_alarm=("lower_lr",), lr_factor=factor), count=80)
    first, *later = alarms(found)
    raised = 0.95 * 0.2 * (1.2 / 0.95)
    assert rates[: first + 1] == [0.95 * 0.2] * AT + [raised] * (first + 1 - AT)
    # 1.2 · 0.9 is still beyond the edge: lowered again, twenty steps later.
    steps = [first, *later]
    expected = [raised * factor ** sum(step > at for at in steps) for step in range(first + 1, 80)]
    assert rates[first + 1 :] == pytest.approx(expected, rel=1e-15)
    assert bool(later) == (factor == 0.9)
    # λ_osc is a mean over both modes, and no larger than the first eigenvalue.
    assert 0.9 * 1.2 < found[79]["edge_ratio"] / factor ** len(steps) <= 1.2 * (1.0 + 1e-12)


def test_lower_the_learning_rate_under_a_scheduler() -> None:
    """Every later learning rate is the scheduled one times the factor."""

    def scheduled(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.95 * 0.2)
        rise = LambdaLR(optimizer, lambda step: 1.0 if step < AT else 1.2 / 0.95 + 1e-4 * step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    rates = [Rates(), Rates()]
    for one, actions in zip(rates, [(), ("lower_lr",)], strict=True):
        _, found = fit(Oscillation(), monitor(on_alarm=actions), one, module=Quadratic(scheduled), count=50)
    (first,) = alarms(found)
    plain, lowered = (one.found for one in rates)
    assert lowered == pytest.approx(
        [rate * (0.5 if step > first else 1.0) for step, rate in enumerate(plain)], rel=1e-14
    )
    assert first < 45


def test_the_last_good_checkpoint_is_kept(tmp_path: Path) -> None:
    follow = monitor(on_alarm=("warn", "checkpoint"), dirpath=str(tmp_path), checkpoint_every_n_steps=4)
    said: list[str] = []
    found: dict[int, dict[str, float]] = {}
    said += warned(lambda: found.update(run(follow, count=40)[1]))
    (first,) = alarms(found)
    # Saved after steps 0, 4, 8, …, while nothing grows: not once the oscillation does.
    path = tmp_path / "curvature-step=21.ckpt"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert follow.result.last_good == str(path)
    assert said[0].endswith(f"Last good checkpoint: {path}.")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 21 <= first
    # It is the run as it was: the path of the run without the monitor.
    witness = Oscillation()
    fit(witness, Raise(AT, 1.2 / 0.95), ratio=0.95, count=40)
    assert torch.equal(state["state_dict"]["x"], witness.path[21])


def test_quiet_again_after_an_alarm(tmp_path: Path) -> None:
    """One file from before the last alarm, and one since; a run without alarms has its newest."""
    follow = monitor(on_alarm=("lower_lr", "checkpoint"), dirpath=str(tmp_path), checkpoint_every_n_steps=10)
    _, found, _ = run(follow, count=100)
    (first,) = alarms(found)
    names = {one.name for one in tmp_path.iterdir()}
    assert len(names) == 2
    kept, newest = sorted(int(name.split("=")[1].split(".")[0]) for name in names)
    assert kept <= first < first + 20 < newest
    assert follow.result.last_good.endswith(f"={kept}.ckpt")
    quiet = monitor(on_alarm=("checkpoint",), dirpath=str(tmp_path / "quiet"), checkpoint_every_n_steps=25)
    fit(Oscillation(), quiet, count=60)
    assert [one.name for one in (tmp_path / "quiet").iterdir()] == ["curvature-step=51.ckpt"]


def test_a_second_alarm_takes_the_place_of_the_first(tmp_path: Path) -> None:
    follow = monitor(
        on_alarm=("lower_lr", "checkpoint"), dirpath=str(tmp_path), lr_factor=0.8, checkpoint_every_n_steps=5
    )
    _, found, _ = run(follow, Raise(90, 1.3), count=160)
    first, second, *later = alarms(found)
    assert first < 90 < second
    assert not later
    steps = sorted(int(one.name.split("=")[1].split(".")[0]) for one in tmp_path.iterdir())
    kept, newest = steps
    assert first + 20 <= kept <= second < newest
    assert follow.result.last_good.endswith(f"={kept}.ckpt")


@pytest.mark.parametrize(("every", "step"), [(1, 12), (10, 20)])
def test_a_loss_that_is_not_finite_is_an_alarm(every: int, step: int) -> None:
    """Also where the step itself is not judged."""

    class Broken(Quadratic):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + math.nan if batch_idx == 12 else loss  # the gradient is as before

    follow = monitor(on_alarm=("stop",), every_n_train_steps=every)
    trainer, found = fit(follow, module=Broken(sgd(0.5)), count=30)
    assert alarms(found) == [step]
    assert (follow.result.name == "diverging") == (every == 1)
    assert trainer.global_step == step + 1


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """With the same regimes, alarms and picture as the unbroken one, also where steps wait to be judged."""

    def oscillating() -> tuple[Any, Any]:
        return Oscillation(every=7), monitor(every_n_train_steps=10, on_alarm=("lower_lr",))

    first, follow = oscillating()
    _, whole = fit(first, follow, Raise(AT, 1.2 / 0.95), ratio=0.95, count=11, max_epochs=9)
    second_one, second = oscillating()
    path = tmp_path / "broken.ckpt"
    trainer, head = fit(second_one, second, Raise(AT, 1.2 / 0.95), ratio=0.95, count=11, max_epochs=3)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"][second.state_key]["progress"]["left"]
    third_one, third = oscillating()
    third_one.kept = second_one.path[:-1]
    _, tail = fit(third_one, third, ratio=0.95, count=11, max_epochs=9, resume=str(path))
    judged = {step: row["regime"] for step, row in whole.items() if "regime" in row}
    again = {step: row["regime"] for step, row in (head | tail).items() if "regime" in row}
    assert again == judged
    assert str(vars(third._history)) == str(vars(follow._history))  # with NaN
    assert follow._history.alarms
    assert third._tracker.state_dict() == follow._tracker.state_dict()
    assert third._alarms.state_dict() == follow._alarms.state_dict()
