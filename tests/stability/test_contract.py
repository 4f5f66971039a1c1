"""StabilityMonitor keeps what every monitor promises; an index takes more steps than most of these runs have."""

from tests.helpers.changes import CHANGES
from tests.helpers.runs import rows
from tests.helpers.witness import assert_same
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester, changing, unwatched
from tests.testers.effects import EffectTester
from tests.testers.families.stability import STABILITY
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = STABILITY


class TestEffects(EffectTester):
    family = STABILITY


class TestReports(ReportTester):
    family = STABILITY
    # The first steps, before the average is formed, have no number to watch: test_watching.py.
    test_early_stopping_acts_on_it = None  # type: ignore[assignment]
    test_model_checkpoint_keeps_the_smallest = None  # type: ignore[assignment]


class TestCallback(CallbackTester):
    family = STABILITY
    # An index remembers earlier steps, and begins with a step that is not measured: test_watching.py.
    test_no_measurement_at_all = None  # type: ignore[assignment]
    test_steps_that_lightning_does_not_count = None  # type: ignore[assignment]
    test_a_dataset_is_no_dataloader = None  # type: ignore[assignment]

    def test_change_within_a_run(self, change: str) -> None:
        """The run is as it was."""
        watched = changing(CHANGES[change], self.family.make_few())
        assert_same(unwatched(change), watched)
        assert list(rows(watched.logger)) == [step for step in CHANGES[change].steps if step % 2 == 0]
