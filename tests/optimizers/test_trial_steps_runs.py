"""Trial updates in runs of Lightning's: clipped as the step's, the same as the step's, and unnoticed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.optimizers.trial_steps import TrialSteps
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp
from tests.helpers.trial_steps import Foretelling, Run


@pytest.mark.parametrize(
    ("value", "algorithm"), [(0.5, "norm"), (0.5, None), (0.3, "value"), (None, None), (0.0, "norm")]
)
def test_gradients_are_clipped_as_the_trainer_says(value: Any, algorithm: Any) -> None:
    trainer = make_trainer(gradient_clip_val=value, gradient_clip_algorithm=algorithm)
    run, other = Run(lambda p: SGD(p, lr=0.1, momentum=0.9), 2), Run(lambda p: SGD(p, lr=0.1, momentum=0.9), 2)
    gradient, space = run.gradient(1), VectorSpace(run.parameters)
    for p, part in zip(other.parameters, space.views(gradient), strict=True):
        p.grad = torch.empty_like(p).copy_(part)
    if value and algorithm == "value":
        torch.nn.utils.clip_grad_value_(other.all, value)
    elif value:
        torch.nn.utils.clip_grad_norm_(other.all, value)
    expected = other.real_update(space.pack([p.grad for p in other.parameters]))
    assert torch.equal(TrialSteps(trainer, run.optimizer, run.parameters).update_for(gradient), expected)


# ----------------------------------------------------------------------------------------------------------------------
# In a run of Lightning's: the update foretold from the gradient is the one that follows


class ClipsItself(Classifier):
    """Counts, logs, and clips by one of the habits that users have."""

    habit = "trainer"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts: list[int] = []
        self.register_buffer("sum", torch.zeros(()))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert type(optimizer) is AdamW
        self.counts.append(self.trainer.global_step)
        largest = max(p.grad.abs().max() for p in self.parameters() if p.grad is not None)
        self.sum += largest
        self.log("largest", largest, on_step=True, on_epoch=True)
        if self.habit == "trainer":
            self.clip_gradients(optimizer, 0.1, "value")
        elif self.habit == "module's parameters":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)
        elif self.habit == "optimizer's parameters":
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.grad.clamp(-0.01, 0.01)
        else:
            for p in self.network.parameters():
                p.grad = p.grad.sign()


def _fit(module: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
    trainer = make_trainer(*callbacks, max_epochs=2, **options)
    trainer.fit(module, loader(classification(3, dtype=torch.float32)))
    return {
        "weights": [p.tolist() for p in module.parameters()],
        "buffers": [b.tolist() for b in module.buffers()],
        "counts": getattr(module, "counts", None),
        "logged": {key: value.item() for key, value in trainer.logged_metrics.items()},
        "random": torch.get_rng_state().tolist(),
    }


def _optimizer(module: Any) -> Any:
    optimizer = AdamW(module.network.parameters(), lr=0.1, weight_decay=0.3)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.3), "interval": "step"}}


HABITS = ["trainer", "module's parameters", "optimizer's parameters", "replaced in the module"]
SETUPS: dict[str, tuple[type[Classifier], dict[str, Any]]] = {
    "as it is": (Classifier, {"precision": "32-true"}),
    "norm": (Classifier, {"precision": "32-true", "gradient_clip_val": 0.01}),
    "value": (Classifier, {"precision": "32-true", "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "mixed": (Classifier, {"precision": "bf16-mixed", "gradient_clip_val": 0.01}),
    "half": (Classifier, {"precision": "bf16-true", "gradient_clip_val": 0.01}),
} | {f"by {h}": (type("Own", (ClipsItself,), {"habit": h}), {"precision": "32-true"}) for h in HABITS}


@pytest.mark.parametrize("name", SETUPS)
def test_the_update_of_a_run_is_foretold_and_the_run_not_changed(name: str) -> None:
    cls, options = SETUPS[name]
    foretelling = Foretelling()
    watched = _fit(cls(mlp(4, 5, 3, dtype=torch.float32), _optimizer), foretelling, **options)
    assert len(foretelling.made) == 6
    for foretold, made in zip(foretelling.foretold, foretelling.made, strict=True):
        assert torch.equal(foretold, made)
        assert made.any()
    assert watched == _fit(cls(mlp(4, 5, 3, dtype=torch.float32), _optimizer), **options)


class ByHand(ClipsItself):
    """Manual optimization, under which Lightning asks nobody to clip."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(batch[0]), batch[1]))
        optimizer.step()


def test_nothing_is_clipped_under_manual_optimization() -> None:
    foretelling = Foretelling()
    _fit(ByHand(mlp(4, 5, 3, dtype=torch.float32), _optimizer), foretelling, precision="32-true")
    assert len(foretelling.made) == 6
    for foretold, made in zip(foretelling.foretold, foretelling.made, strict=True):
        assert torch.equal(foretold, made)


def test_what_the_module_clips_beside_is_put_back_gently() -> None:
    trainer = make_trainer()
    module = ClipsItself(mlp(4, 5, 3, dtype=torch.float32), _optimizer)
    module.habit = "module's parameters"
    module.trainer, trainer.strategy._lightning_module = trainer, module
    module.other = nn.Parameter(torch.ones(3))
    module.other.grad = gradient = torch.ones(3)
    module.register_buffer("factor", torch.tensor(2.0))
    parameters = list(module.network.parameters())
    value = (module.factor * parameters[0] ** 2).sum()
    trials = TrialSteps(trainer, _optimizer(module)["optimizer"], parameters)
    trials.update_for(torch.ones(sum(p.numel() for p in parameters)))
    assert module.other.grad is gradient
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    # A graph that has saved the buffer is still good.
    assert torch.equal(torch.autograd.grad(value, parameters[:1])[0], 4 * parameters[0])
