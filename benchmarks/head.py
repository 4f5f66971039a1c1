"""λ_KL and λ_GN of losses through their heads: cost and precision, ``python benchmarks/head.py``.

Trains classifiers of 10, 256 and 5,000 classes in float32 under a Trainer; plain and measured steps alternate, each
followed by a forward. Prints for each loss the extra time of a measured step in forwards (median of neighbours), of the
default pair and of forward mode, against the limit of two forwards, and the largest difference from dᵀGd in float64.
Cross-entropy is read in closed form, the others go through their heads. Beside it one product of curvlinops with the
Gauss–Newton matrix, where it knows the loss, and how far the categorical reading of integer targets is off.
"""

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import curvlinops
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import DirectionalCurvatureMonitor
from lightning_curvature.functional import output_quadratic_form

Loss = Callable[[Tensor, Tensor], Tensor]
WIDTH, BATCH, STEPS, RATE = 1024, 256, 24, 0.05


def weighted(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with a weight for each class."""
    return F.cross_entropy(z, y, weight=torch.linspace(0.2, 2.0, z.shape[-1], dtype=z.dtype))


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    """Squared error to one-hot labels, summed over the classes."""
    return (z - F.one_hot(y, z.shape[-1])).square().sum(-1).mean()


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Focal loss with γ = 2."""
    log_p = z.log_softmax(-1).gather(1, y[:, None])
    return (-((1.0 - log_p.exp()) ** 2) * log_p).mean()


LOSSES: dict[str, Loss] = {
    "cross-entropy (closed form)": F.cross_entropy,
    "class weights": weighted,
    "one-hot squared error": one_hot,
    "focal": focal,
}


class Module(pl.LightningModule):
    """An MLP of four layers, which keeps θ before each step."""

    def __init__(self, loss: Loss, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = [part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
        self.network = nn.Sequential(*body, nn.Linear(WIDTH, classes))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return self.network(x)

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Clock(pl.Callback):
    """Times a batch and all that callbacks do in it, then a forward; keeps θ before and after measured steps."""

    def __init__(self, behind: bool, first: "Clock | None" = None) -> None:
        self.behind, self.first = behind, first or self
        self.steps: list[float] = []
        self.forwards: list[float] = []
        self.kept: list[tuple[nn.Module, nn.Module, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        if not self.behind:
            self.network = copy.deepcopy(pl_module.network) if batch_idx % 8 == 0 else None
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop."""
        if self.behind:
            self.steps.append(time.perf_counter() - self.first.start)
            with torch.no_grad():
                begin = time.perf_counter()
                pl_module.training_step(batch)
                self.forwards.append(time.perf_counter() - begin)
            if self.first.network is not None:
                self.kept.append((self.first.network, copy.deepcopy(pl_module.network), batch))


def truth(loss: Loss, before: nn.Module, after: nn.Module, batch: Any) -> tuple[float, float]:
    """Return dᵀGd/(η gᵀd) of the loss and of the categorical reading, in float64."""
    network, x, y = copy.deepcopy(before).double(), batch[0].double(), batch[1]
    theta = {name: p.detach() for name, p in network.named_parameters()}
    d = {name: p - q.double() for (name, p), q in zip(theta.items(), after.parameters(), strict=True)}
    z, u = torch.func.jvp(lambda p: torch.func.functional_call(network, p, (x,)), (theta,), (d,))
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(z + t * u, y), t, create_graph=True)
    (second,) = torch.autograd.grad(slope, t)
    return float(second / slope) / RATE, float(output_quadratic_form(z, u)) / float(slope) / RATE


def peer(loss: Loss, before: nn.Module, after: nn.Module, batch: Any, forward: float) -> float | None:
    """Return the time of one product of curvlinops with G in forwards; None where it does not know the loss."""
    kinds: dict[Loss, tuple[nn.Module, Any]] = {
        F.cross_entropy: (nn.CrossEntropyLoss(), batch[1]),
        one_hot: (nn.MSELoss(reduction="sum"), F.one_hot(batch[1], before[-1].out_features).float()),  # type: ignore[index]
    }
    if loss not in kinds:
        return None
    function, target = kinds[loss]
    parameters = list(before.parameters())
    operator = curvlinops.GGNLinearOperator(
        before, function, parameters, [(batch[0], target)], check_deterministic=False
    )
    d = [(p - q).detach() for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        operator @ d
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / forward


def measure(name: str, classes: int) -> str:
    """Return the row of one loss."""
    generator, cells, others = torch.Generator().manual_seed(1), [], []
    batches = [
        (
            torch.randn(BATCH, WIDTH, generator=generator),
            torch.randint(classes, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]
    for estimators in (("kl", "finite_difference"), ("gauss_newton",)):
        first = Clock(behind=False)
        last = Clock(behind=True, first=first)
        follow = DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=2)  # type: ignore[arg-type]
        found: list[float] = []
        original = follow.measure

        def noted(*args: Any, original: Any = original, follow: Any = follow, found: Any = found) -> None:
            original(*args)
            found.append(follow.result.values()["lambda_kl" if "kl" in follow.estimators else "lambda_gn"])

        follow.measure = noted  # type: ignore[method-assign]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[first, follow, last],
        )
        trainer.fit(Module(LOSSES[name], classes), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        extra = [(last.steps[k] - last.steps[k + 1]) / statistics.median(last.forwards) for k in range(2, STEPS - 1, 2)]
        true = [truth(LOSSES[name], *kept) for kept in last.kept]
        # A reading by chance, all classes being alike at first, is NaN at the first step.
        values = [pair for pair in zip(found[::4], true, strict=True) if math.isfinite(pair[0])]
        off = max(abs(value / exact[0] - 1.0) for value, exact in values)
        cells += [f"{statistics.median(extra):.1f}", f"{off:.0e}"]
        others = [max(abs(reading / exact - 1.0) for exact, reading in true)]
        product = peer(LOSSES[name], *last.kept[0], statistics.median(last.forwards))
    beside = ["–" if product is None else f"{product:.1f}", f"{others[0]:.0%}"]
    return f"| {name} | {classes} | " + " | ".join([*cells, *beside]) + " |"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| loss | classes | pair | off by | forward mode | off by | curvlinops | categorical reading off by |")
    print("|---|---|---|---|---|---|---|---|")
    for classes in (10, 256, 5000):
        for name in LOSSES:
            print(measure(name, classes), flush=True)


if __name__ == "__main__":
    main()
