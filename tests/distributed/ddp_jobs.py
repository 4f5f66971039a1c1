"""Runs under DDP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.cases import BATCHES, Case, adamw, batches, beyond_the_edge, momentum, one_batch
from tests.helpers.runs import Batch, Classifier, MakeOptimizer, mlp


def classifier(make_optimizer: MakeOptimizer = momentum, *hidden: int, dtype: torch.dtype = torch.float64) -> Any:
    return Classifier(mlp(4, *(hidden or (6,)), 3, dtype=dtype), make_optimizer)


single = {"batches": partial(batches, dtype=torch.float32), "trainer": {"precision": "32-true"}}

sgd_64 = Case(partial(classifier, momentum))
adamw_64 = Case(partial(classifier, adamw))
sgd_32 = Case(partial(classifier, momentum, dtype=torch.float32), **single)
adamw_32 = Case(partial(classifier, adamw, dtype=torch.float32), **single)
# Five batches in windows of two: the last window has one batch only.
accumulated = Case(partial(classifier), partial(batches, 5), trainer={"accumulate_grad_batches": 2})
adapted = Case(classifier, monitor={"epsilon": "auto"}, estimators=("kl", "finite_difference"))


def regressor() -> Classifier:
    return Classifier(mlp(4, 6, 2), momentum, F.mse_loss)


def regression() -> list[Batch]:
    return [(x, torch.stack([x.square().sum(-1).sin(), x.sum(-1)], -1)) for x, _ in batches()]


squared_error = Case(regressor, regression)


class Unused(Classifier):
    """Holds a layer that no forward reaches."""

    def __init__(self, make_optimizer: MakeOptimizer = momentum) -> None:
        super().__init__(mlp(4, 6, 3), make_optimizer)
        self.spare = nn.Linear(3, 3).double()


class Rare(Classifier):
    """Sends some of the samples through a layer more; a process that got none of these does not touch the layer."""

    def __init__(self, make_optimizer: MakeOptimizer = momentum) -> None:
        super().__init__(mlp(4, 6, 3), make_optimizer)
        self.extra = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 1.0
        outputs = self.network(x)
        if chosen.any():
            outputs = outputs.index_add(0, chosen.nonzero().squeeze(-1), self.extra(x[chosen]))
        return outputs


def rare_batches() -> list[Batch]:
    """Only the second process's half of a global batch holds samples for the extra layer."""
    found = []
    for x, y in batches():
        column = x[:, 0].clamp(max=1.0)
        column[len(x) // 2 :: 3] = 1.5
        found.append((torch.cat([column[:, None], x[:, 1:]], -1), y))
    return found


def mean_of_halves(module: Any, batch: Batch) -> dict[str, Tensor]:
    """The loss that DDP descends: the mean over ranks of each one's mean, however many samples it has."""
    x, y = batch
    halves = 1 if dist.is_initialized() else 2
    weights = torch.cat([torch.full((len(part),), 1.0 / len(part), dtype=x.dtype) for part in x.tensor_split(halves)])
    outputs = module(x)
    loss = (weights * F.cross_entropy(outputs, y, reduction="none")).sum() / halves
    return {"loss": loss, "outputs": outputs, "mask": weights}


class Uneven(Rare):
    """Is trained on batches of which the processes have parts of different size."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = mean_of_halves(self, batch)["loss"]
        self.log("train_loss", loss)
        return loss


def uneven_batches() -> list[Batch]:
    """Sixteen samples, then fifteen, nine and seven: the first process has one more of the last three."""
    return [(x[:size], y[:size]) for (x, y), size in zip(rare_batches(), (16, 15, 9, 7), strict=True)]


unused = Case(Unused, strategy="ddp_find_unused_parameters_true")
rare = Case(Rare, rare_batches, strategy="ddp_find_unused_parameters_true", monitor={"by_module": True})


def squared_weights(z: Tensor, y: Tensor) -> Tensor:
    """A loss of no likelihood that the batch could tell."""
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=z.dtype)[y]
    return (weight * (z.softmax(-1) - F.one_hot(y, 3)).square().sum(-1)).mean()


class Penalized(Classifier):
    """Its loss reaches a weight beside the outputs, which two modules make."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first, *rest, last = self.network
        hidden = first(batch[0])
        for layer in rest:
            hidden = layer(hidden)
        loss = self.loss(last(hidden), batch[1]) + 0.01 * last.weight.square().sum() + 0.1 * hidden.square().mean()
        self.log("train_loss", loss)
        return loss


def penalized() -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return Penalized(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.3), squared_weights)


by_head = Case(penalized)
by_head_accumulated = replace(by_head, trainer={"accumulate_grad_batches": 2})


def kinked(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.Hardtanh(), nn.Linear(12, 3)]
    return Classifier(nn.Sequential(*layers).double(), momentum)


class Checkpointed(Classifier):
    """Its graph does not show the kinks: all ranks repeat the step, from the second measured one on."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


def checkpointed() -> Classifier:
    return Checkpointed(kinked().network, momentum)


on_sides = Case(kinked)
on_sides_accumulated = replace(on_sides, trainer={"accumulate_grad_batches": 2})
on_sides_repeated = Case(checkpointed)
uneven = replace(rare, module=Uneven, batches=uneven_batches, monitor=rare.monitor | {"objective": mean_of_halves})


def noisy() -> Classifier:
    """Everything that a repeated forward could disturb: batch statistics, random numbers, averages."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
    return Classifier(nn.Sequential(*layers).double(), adamw)


disturbed = Case(noisy)
undisturbed = disturbed.unwatched()

# One collective more or less is one collective: few steps, each measured or not, tell.
seldom = Case(classifier, estimators=("kl", "finite_difference"), monitor={"every_n_train_steps": 2})
seldom_deep = replace(seldom, module=partial(classifier, momentum, 6, 6, 6))
exact = replace(seldom, estimators=("hvp", "gauss_newton", "kl", "finite_difference"))
exact_by_module = replace(exact, monitor=exact.monitor | {"by_module": True})
flipping = Case(partial(classifier, beyond_the_edge), one_batch, ("oscillation", "kl"))
flipping_exact = replace(flipping, estimators=("oscillation", "hvp"))
flipping_unwatched = flipping.unwatched()
searching = replace(seldom, estimators=("critical",))
unwatched = seldom.unwatched()
unwatched_deep = seldom_deep.unwatched()


def early_stopping() -> list[Any]:
    return [EarlyStopping("curvature/headroom", mode="max", patience=1, check_on_train_epoch_end=True)]


EPOCHS = 8
stopped = Case(classifier, estimators=("hvp",), callbacks=early_stopping, trainer={"max_epochs": EPOCHS})

JOBS = [name for name, value in list(globals().items()) if isinstance(value, Case)]
MEASURED = [step % 2 == 0 for step in range(BATCHES)]
