"""Values against the oracle, what they cost, resumed runs, and two ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.counting import Passes
from tests.helpers.processes import run_on_ranks
from tests.helpers.runs import Capture, Classifier, batched_samples, make_trainer, mlp, rows
from tests.testers import ranks
from tests.testers.family import FamilyTester, Options, numbered

# Sums of a few hundred terms in another order, in three steps of training and searches of some ten products: a thousand
# roundings of 1e-16, relative to the value; errors and residuals are absolute, beside values of order one.
ROUNDING = 1e-9


class AgreementTester(FamilyTester):
    """The oracle, counts, checkpoints, ranks."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return the options whose evaluations are counted."""
        return {
            "counted": numbered(self.family.counted),
            "accumulate": {f"of {n}": n for n in self.family.accumulations},
        }

    @pytest.mark.check
    def test_values_are_those_of_the_oracle(self) -> None:
        compared = list(self.family.compared())
        assert {name for name, *_ in compared} >= {self.family.watched}
        for name, found, expected, tolerance in compared:
            assert found == pytest.approx(expected, rel=tolerance), name
            # One that lets everything pass would be no check.
            assert tolerance < 0.1, name

    def test_evaluations(self, counted: tuple[Options, list[int]]) -> None:
        """Forwards of the network in each batch, beyond that of the step itself; the first time one to check it."""
        options, forwards = counted
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
        passes = Passes(module.network)
        trainer = make_trainer(passes, self.family.make_few(**options), max_epochs=2)
        trainer.fit(module, batched_samples())
        first, *later = forwards
        assert [count - 1 for count in passes.forwards] == [first + 1, *later]

    def test_a_resumed_run_logs_what_the_unbroken_run_does(self, accumulate: int, tmp_path: Path) -> None:
        """Bit for bit: starts of searches and distances are learned along the run, and come back with it."""

        def run(epochs: int, resume: str | None = None) -> tuple[pl.Trainer, dict[int, dict[str, float]]]:
            capture = Capture()
            follow, precision = self.family.make(**self.resumed()), self.family.precision
            options: dict[str, Any] = {"max_epochs": epochs, "accumulate_grad_batches": accumulate}
            trainer = make_trainer(follow, logger=capture, precision=precision, **options)
            dtype = torch.float64 if precision == "64-true" else torch.float32
            learner = Classifier(mlp(4, 5, 3, dtype=dtype), lambda m: torch.optim.Adam(m.parameters(), lr=0.03))
            # In order: which samples come next is then no matter of random states, which a checkpoint does not hold.
            trainer.fit(learner, batched_samples(32, dtype=dtype), ckpt_path=resume)
            return trainer, rows(capture)

        _, unbroken = run(2)
        trainer, head = run(1)
        path = str(tmp_path / "last.ckpt")
        trainer.save_checkpoint(path)
        _, tail = run(2, path)
        steps = 4 // accumulate
        assert list(unbroken) == list(range(0, 2 * steps, 2))
        assert list(tail) == list(range(steps, 2 * steps, 2))
        assert str(head | tail) == str(unbroken)  # a NaN equals itself as a string
        if self.family.learned is not None:
            assert len({row[self.family.learned] for row in unbroken.values()}) > 2

    def resumed(self) -> dict[str, Any]:
        """Return options at every second step, and at no other time."""
        options: dict[str, Any] = {"every_n_train_steps": 2, "on_error": "raise"}
        return options | ({"at_end": False} if "at_end" in self.family.few else {})

    def test_two_ranks_give_the_values_of_one(self) -> None:
        name = self.family.name
        found = run_on_ranks(ranks.__name__, [name, ranks.UNWATCHED])
        alone = ranks.job(name)()
        for outcome, plain in zip(found[name], found[ranks.UNWATCHED], strict=True):
            assert list(outcome.rows) == list(alone.rows) == [0, 1, 2]
            for step, expected in alone.rows.items():
                assert outcome.rows[step].keys() == expected.keys()
                for key, value in expected.items():
                    close = pytest.approx(value, rel=ROUNDING, abs=ROUNDING, nan_ok=True)
                    assert outcome.rows[step][key] == close, (step, key)
            # Training is the same to the bit, and nobody waits for anybody more often than is said.
            assert outcome.state.keys() == plain.state.keys()
            assert all(torch.equal(value, plain.state[k]) for k, value in outcome.state.items())
            extra = [a - b for a, b in zip(outcome.collectives, plain.collectives, strict=True)]
            assert self.family.collectives in (None, extra)
            assert all(extra)
        first, second = found[name]
        assert repr(first.rows) == repr(second.rows)
        assert first.rows[0] != first.rows[2]
