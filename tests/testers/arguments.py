"""Every mistake gets one sentence: argument, rule, what was given, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback

from tests.helpers.modules import Plain
from tests.helpers.runs import batched_samples, make_trainer
from tests.testers.family import FamilyTester, Misfit, Options, numbered


def assert_one_sentence(error: BaseException) -> None:
    """Read it as a user does: it ends, and stands on one line."""
    assert str(error).endswith(".")
    assert "\n" not in str(error)


class ArgumentTester(FamilyTester):
    """Bad arguments, and fits that a monitor does not fit."""

    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Return bad arguments and misfits."""
        return {"bad": numbered(self.family.bad_arguments), "misfit": self.family.misfits}

    def test_bad_arguments(self, bad: tuple[Options, str]) -> None:
        options, sentence = bad
        with pytest.raises(ValueError, match=f"^{sentence}") as caught:
            self.family.make_few(**options)
        assert_one_sentence(caught.value)

    def test_arguments_are_keyword_only(self) -> None:
        with pytest.raises(TypeError, match="positional argument"):
            self.family.monitor("lambda_max")  # type: ignore[arg-type]

    def test_misfits_are_found_before_the_first_step(self, misfit: Misfit) -> None:
        """With on_error="warn", too, for they last as long as the run; in a group of one, where shards can be made."""
        started: list[int] = []
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            module = misfit.module()
            follow = self.family.make_few(**({"on_error": "warn"} | dict(misfit.options)))
            note = LambdaCallback(on_train_start=lambda *args: started.append(1))
            trainer = make_trainer(follow, note, **misfit.trainer)
            with pytest.raises(misfit.error, match=misfit.sentence) as caught:
                trainer.fit(module, misfit.data())
        finally:
            dist.destroy_process_group()
        assert_one_sentence(caught.value)
        assert misfit.before_data in (None, not started)
        assert module.seen == 0
        assert trainer.global_step == 0

    def test_one_prefix_for_two_monitors(self) -> None:
        """Also where they follow two optimizers; Lightning's own sentence, in Trainer(), would not name the prefix."""
        trainer = make_trainer(self.family.make_few(prefix="a"), self.family.make_few(prefix="a", optimizer_index=1))
        sentence = f"prefix must differ between monitors of one class, got 'a' of two {self.family.name}s: give one of"
        with pytest.raises(MisconfigurationException, match=f"{sentence} them another prefix"):
            trainer.fit(Plain(), batched_samples())
