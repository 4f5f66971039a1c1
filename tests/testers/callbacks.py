"""What Lightning expects of a callback: copies, several fits, modules that change, states, counted steps."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import TensorDataset

from tests.helpers.changes import AT, CHANGES, Change, Late
from tests.helpers.modules import Plain
from tests.helpers.runs import Batch, Capture, batched_samples, make_trainer, mlp, rows, warned
from tests.helpers.witness import Record, assert_same, watch
from tests.testers.arguments import assert_one_sentence
from tests.testers.family import FamilyTester

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "deepcopy": copy.deepcopy,
}
HOOKS = (
    *("setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
)
# An eigenvalue is known to the square of the residual, 1e-2 by default; all else differs by the ε that was learned.
KNOWN = 1e-4
BESIDE = ("epsilon", "_error", "_upper", "_stderr")


class Unseen(Plain):
    """Manual optimization; by Lightning's optimizer, or by the one within, of which nobody learns."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.within = False, within

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(self(batch[0]), batch[1])
        if self.within:
            self.manual_backward(loss)
            optimizer.optimizer.step()
        else:
            loss.backward()
            optimizer.step()


class Copier(pl.Callback):
    """Copies a monitor, and the module that it watches, wherever Lightning calls a callback."""

    def __init__(self, monitor: Any, make_copy: Callable[[Any], Any]) -> None:
        self.copies: dict[str, Any] = {}

        def copied(hook: str) -> Callable[..., None]:
            def call(trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
                self.copies[hook] = make_copy(monitor)
                own, module._trainer = module._trainer, None
                batch = batched_samples().dataset[:4]
                assert make_copy(module).training_step(batch, 0) == module.loss(module(batch[0]), batch[1])
                module._trainer = own

            return call

        for hook in HOOKS:
            setattr(self, hook, copied(hook))


class Silent(Plain):
    """Logs nothing, so that it can make a step without a Trainer."""

    def __init__(self, seed: int = 0, hidden: int = 6) -> None:
        super().__init__(mlp(4, hidden, 3, seed=seed))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), batch[1])


class Bang(pl.Callback):
    """Ends a fit."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        raise self.error("bang")


def fit(*callbacks: pl.Callback, module: Any = None) -> str:
    """Values of two steps."""
    capture = Capture()
    make_trainer(*callbacks, logger=capture).fit(module or Silent(), batched_samples())
    return str(rows(capture))


@functools.cache
def unwatched(name: str) -> Record:
    return changing(CHANGES[name], None)


def changing(change: Change, monitor: pl.Callback | None, *more: pl.Callback) -> Record:
    return watch(change.make, tuple, monitor, lambda: [*change.callbacks(), *more], max_epochs=3, **change.options)


class CallbackTester(FamilyTester):
    """Copies, fits, changes, states and steps."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return ways to copy, ends of a first fit, and changes within a run."""
        ends = {"ends": None, "error": ZeroDivisionError, "interrupt": KeyboardInterrupt}
        return {"make_copy": COPIES, "end": ends, "change": {name: name for name in CHANGES}}

    def test_copied_in_any_hook(self, make_copy: Callable[[Any], Any]) -> None:
        """The run goes on as it was; each copy holds nothing of it, and measures another fit as a new monitor does."""
        alone, fresh = (fit(self.family.make_few(every_n_train_steps=1), module=Silent(seed)) for seed in (0, 5))
        follow = self.family.make_few(every_n_train_steps=1)
        around = Copier(follow, make_copy), Copier(follow, make_copy)
        assert fit(around[0], follow, around[1]) == alone
        found = [one.copies[hook] for one in around for hook in HOOKS if hook in one.copies]
        assert len(found) >= 2 * len(HOOKS) - 1
        for one in (*found, make_copy(follow)):
            assert one.options == follow.options
            assert one._objective is None
            assert getattr(one, "_data", None) is None
        for one in (around[0].copies["on_before_optimizer_step"], around[1].copies["on_train_end"]):
            assert fit(one, module=Silent(5)) == fresh

    def test_second_fit_starts_afresh(self, end: type[BaseException] | None) -> None:
        """With another module, of the same shapes and of others, and however the first fit ended."""
        for module in (lambda: Silent(5), lambda: Silent(5, hidden=5)):
            fresh = fit(self.family.make_few(every_n_train_steps=1), module=module())
            follow = self.family.make_few(every_n_train_steps=1)
            with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt, SystemExit):
                fit(follow, *([Bang(end)] if end else []))
            make_trainer(follow).validate(Validated(), [0], verbose=False)
            assert fit(follow, module=module()) == fresh

    @pytest.mark.thinned(3)
    @pytest.mark.filterwarnings("ignore:parameter groups differ in lr")
    def test_change_within_a_run(self, change: str) -> None:
        """The run is as it was, and the values are those of a monitor that comes when the change is made."""
        options: dict[str, Any] = {}
        if "parameter" in self.family.few:
            options["parameter"] = CHANGES[change].parameter
        late = Late(self.family.make_few(prefix="curvature_late", **options))
        watched = changing(CHANGES[change], self.family.make_few(**options), late)
        assert_same(unwatched(change), watched)
        found, expected = rows(watched.logger), rows(watched.logger, "curvature_late")
        steps = [step for step in CHANGES[change].steps if step % 2 == 0]
        assert list(found) == steps
        assert list(expected) == [step for step in steps if step >= AT]
        for step, row in expected.items():
            for key, value in row.items():
                if not key.endswith(BESIDE):
                    assert found[step][key] == pytest.approx(value, rel=KNOWN), (step, key)
            assert row[self.family.watched] > 0.0

    def test_a_dataset_is_no_dataloader(self) -> None:
        """Said where the monitor is made; its samples would pass for batches."""
        if not hasattr(self.family.make_few(), "probe_dataloader"):
            pytest.skip("reads no probe set")
        dataset = TensorDataset(*batched_samples().dataset[:])
        sentence = (
            "probe_dataloader must be one dataloader, or batches that can be read repeatedly, got a TensorDataset: "
            "wrap it"
        )
        with pytest.raises(ValueError, match=sentence) as caught:
            self.family.make_few(probe_dataloader=dataset)
        assert_one_sentence(caught.value)

    def test_steps_that_lightning_does_not_count(self) -> None:
        """Only the first step ever begins, and none ends."""
        said = warned(lambda: fit(self.family.make_few(every_n_train_steps=1, on_error="warn"), module=Unseen(True)))
        made = 0 if self.family.monitor.__name__.startswith("Directional") else 1
        assert said == [
            f"{self.family.name} must find optimizer steps that Lightning counts, got none in 2 batches, and made "
            f"{made} of 1 measurements that were due: step by self.optimizers().step(), not by the step of the "
            "optimizer within."
        ]

    def test_no_measurement_at_all(self) -> None:
        """Once, beside what each of them has said."""
        said = warned(lambda: fit(self.family.make_few(every_n_train_steps=1, on_error="warn"), module=Unseen(False)))
        ends = [text for text in said if not text.startswith(f"{self.family.name} logs NaN")]
        assert ends == [
            f"{self.family.name} must make the measurements that are due, got 0 of 2: ValueError: training_step must "
            "hand its loss to self.manual_backward before the optimizer steps, got no such call: use "
            "self.manual_backward(loss), or give objective=."
        ]

    def test_state_that_does_not_fit(self) -> None:
        """It is told what is missing, and the fit is that of a new monitor."""
        known = self.family.monitor.state_types
        rule = f"the state of a {self.family.name} must hold {sorted(known)}, got"
        needed = sorted(known.keys() - self.family.monitor.state_optional)
        fitting = {key: kind() for key, kind in known.items()}
        cases = [(fitting | {"theta": 1}, "one with ['theta']")]
        cases += [(fitting | {key: None}, f"{key!r} of type NoneType") for key in known]
        cases += [({"theta": 1}, f"one without {needed}, one with ['theta']")] if needed else []
        fresh = fit(self.family.make_few())
        for state, got in cases:
            with pytest.raises(ValueError) as caught:
                self.family.make_few().load_state_dict(state)
            assert str(caught.value).startswith(f"{rule} {got}: it starts without")
            assert_one_sentence(caught.value)
            follow = self.family.make_few(on_error="warn")
            assert warned(functools.partial(follow.load_state_dict, state)) == [str(caught.value)]
            assert fit(follow) == fresh


class Validated(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> Any:
        return [0]
