"""Inputs of one stabilization measurement, and the operations on them: products, gradients, perturbations, sums."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.distributed.together import cause_together, together
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.samples import SampleLosses
from lightning_curvature.operators import MicroBatch
from lightning_curvature.operators.fallback import FallbackOperator
from lightning_curvature.operators.micro_batches import Evaluation, building_graphs, check_graph
from lightning_curvature.stabilization.options import StabilizationOptions


@dataclass(frozen=True, eq=False)
class StabilizationProblem:
    """Inputs of one stabilization measurement.

    Attributes:
        losses: losses of single samples.
        parameters: the parameters to differentiate by and to perturb.
        directions: vectors that span the subspace in place of those of ``law``, (D, n), or None.
        on_product: called after every product.
        vectors_at_once: number of vectors multiplied at once, the same on every rank.
        seconds: time by stage; :meth:`timed` adds to it.
    """

    options: StabilizationOptions
    trainer: pl.Trainer
    losses: SampleLosses
    parameters: Sequence[Tensor]
    directions: Tensor | None
    on_product: Callable[[], None]
    vectors_at_once: int
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def space(self) -> VectorSpace:
        """The vector space of the parameters."""
        return VectorSpace(self.parameters)

    def new(self, k: int) -> range:
        """Return the numbers of the samples that stand for the next one."""
        return range(k, k + self.options.candidates)

    def operator(self, numbers: Sequence[int], total: int) -> FallbackOperator:
        """Return the operator of the Hessian of the losses' sum over ``total``."""
        return self._operator(self.losses.parts(numbers, total), reduce=sum_over_ranks(self.trainer))

    def _operator(self, parts: Sequence[MicroBatch], **options: Any) -> FallbackOperator:
        processes = self.trainer.num_devices
        return FallbackOperator(parts, self.parameters, second=self.losses.second, processes=processes, **options)

    @contextlib.contextmanager
    def sample(self, number: int) -> Generator[tuple[FallbackOperator, Tensor, Tensor], None, None]:
        """Give the Hessian of one of this rank's samples, its gradient (n,) and its loss inside the block."""
        (part,), losses = self.losses.parts([number], 1), list[Tensor]()

        def evaluate() -> Evaluation:
            result = part.evaluate()
            losses.append(result.loss.detach())
            return result

        with contextlib.closing(self._operator([replace(part, evaluate=evaluate)], keep_graph=True)) as operator:
            gradient = operator.local_gradient()
            yield operator, gradient, losses[0]

    def generator(self, use: int) -> torch.Generator:
        """Return the random numbers of one use, the same at every k and on every rank."""
        return torch.Generator(self.space.device).manual_seed(self.options.seed + use)

    def gradient(self, number: int) -> Tensor:
        """Return the gradient of the loss of one of this rank's samples, (n,)."""
        with building_graphs():
            loss = self.losses.one(number)
            check_graph(loss)
            return self.space.pack(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def mean_loss(self, k: int) -> Tensor:
        """Return this rank's share of L_k, a float64 scalar."""
        total = self.zeros()
        with torch.no_grad():
            for part in self.losses.parts(range(k), k):
                total += part.weight * part.evaluate().loss.double()
        return total

    def moved(self, moves: Iterable[Tensor]) -> Iterator[int]:
        """Move the parameters in place by each vector in turn, without gradients; restore them bit for bit."""
        targets = [p.detach() for p in self.parameters]
        kept = [t.clone() for t in targets]
        try:
            with torch.no_grad():
                for index, move in enumerate(moves):
                    torch._foreach_copy_(targets, kept)
                    for target, view in zip(targets, self.space.views(move), strict=True):
                        target.add_(view.to(target.dtype))
                    yield index
        finally:
            torch._foreach_copy_(targets, kept)

    def zeros(self, *shape: int) -> Tensor:
        """Return a table of zeros for :meth:`together`, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.space.device)

    def together(self, table: Tensor, fill: Callable[[Tensor], None]) -> Tensor:
        """Return the sum over ranks of a table that each fills in place, one collective; where one fails, all raise."""

        def make() -> dict[str, Tensor]:
            fill(table)
            return {"table": table}

        return together(self.trainer, make, {"table": table}, "evaluating samples")["table"]

    @contextlib.contextmanager
    def fail_together(self, operator: FallbackOperator) -> Generator[None, None, None]:
        """Raise on every rank the error that ended an operator's products on one of them."""
        try:
            yield
        except Exception as error:
            if operator.reduce is None:
                raise
            raise cause_together(self.trainer, operator.error, error) from None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Generator[None, None, None]:
        """Add the time of the block to a stage."""
        begun = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - begun

    def _clock(self) -> float:
        if self.space.device.type == "cuda":
            torch.cuda.synchronize(self.space.device)
        return time.perf_counter()


def check_directions(vectors: object, shape: tuple[int, int]) -> Tensor:
    """Return the vectors of the user's callable; raise unless they are finite, (D, N)."""
    if not isinstance(vectors, Tensor) or vectors.shape != shape or not bool(vectors.isfinite().all()):
        got = f"shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
        got = "others" if got == f"shape {shape}" else got
        raise MisconfigurationException(
            f"directions must return finite numbers, (subspace_dim, parameters) = {shape}, got {got}: return one row "
            "for each direction, all parameters in it."
        )
    return vectors.detach()
