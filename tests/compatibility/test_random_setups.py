"""Random set-ups, several monitors at once: the run is the one without them, whatever the step does."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.monitors.base import Monitor
from tests.helpers.habits import HABITS, Habitual
from tests.helpers.runs import classification
from tests.helpers.stabilization import samples
from tests.helpers.witness import assert_same, copies, watch

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.2}, {"params": p[2:]}], lr=0.05, weight_decay=0.1),
}
# Those that leave the logger what a run of two monitors could not tell apart, or call what one step may call once.
LEFT_OUT = {"replaces_its_own_methods"}


class Setup:
    """What a seed gives."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.habits = draw.sample(sorted(HABITS.keys() - LEFT_OUT), draw.choice([1, 2, 3]))
        self.optimizer = draw.choice(list(OPTIMIZERS))
        self.options: dict[str, Any] = {
            "accumulate_grad_batches": draw.choice([1, 1, 2]),
            "gradient_clip_val": draw.choice([None, 0.5]),
            "max_epochs": draw.choice([1, 2]),
        }
        every = draw.choice([1, 2, 3])
        self.makers: list[Callable[[], Monitor]] = draw.sample(
            [
                lambda: DirectionalCurvatureMonitor(every_n_train_steps=every),
                lambda: DirectionalCurvatureMonitor(
                    estimators=("hvp", "critical"), every_n_train_steps=every, prefix="curvature_b"
                ),
                lambda: HessianSpectrumMonitor(every_n_train_steps=every + 1, probe_samples=16),
                lambda: HessianSpectrumMonitor(every_n_train_steps=4, products="difference", prefix="curvature_d"),
                lambda: BatchSharpnessMonitor(every_n_train_steps=every + 2, num_batches=8, min_batches=4),
                lambda: StabilizationMonitor(sample_sizes=(2,), probe_dataloader=samples(), at_steps=(every,)),
                lambda: NoiseCovarianceMonitor(parameter="network.0.weight", at_steps=(every,)),
            ],
            draw.choice([1, 2, 3]),
        )

    def module(self) -> Habitual:
        """Return the module, with all habits in its step."""
        habits, optimizer = [HABITS[name] for name in self.habits], OPTIMIZERS[self.optimizer]

        def step(module: Any, x: Tensor, logits: Tensor) -> Tensor | None:
            extras = [extra for one in habits if (extra := one(module, x, logits)) is not None]
            return functools.reduce(lambda a, b: a + b, extras) if extras else None

        class Drawn(Habitual):
            def configure_optimizers(self) -> Any:
                made = optimizer([*self.network.parameters(), *self.table.parameters()])
                return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.StepLR(made, 1, 0.9)}

        return Drawn(step)

    def run(self, *monitors: pl.Callback) -> Any:
        """Fit once."""
        first, *others = monitors or (None,)
        return watch(self.module, lambda: copies(classification(4)), first, lambda: others, **self.options)

    def __str__(self) -> str:
        return f"{self.habits}, {self.optimizer}, {self.options}"


def check(seed: int) -> None:
    """Compare the run of a seed with the watched one."""
    setup = Setup(seed)
    try:
        plain = setup.run()
    except (RuntimeError, KeyError):  # one habit writes what another, or the optimizer, has used
        pytest.skip(f"seed {seed} cannot be trained: {setup}")
    watched = setup.run(*(make() for make in setup.makers))
    try:
        assert_same(plain, watched)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {setup}: {error}") from None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.thinned(10)
def test_random_setups(seed: int) -> None:
    check(seed)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(30, 330))
def test_many_random_setups(seed: int) -> None:
    check(seed)
