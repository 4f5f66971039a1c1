"""What the parts of a measurement of sample growth have in common: operators, single samples, ranks, clocks."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_curvature.distributed.failures import failure_of
from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import HessianOperator
from lightning_curvature.operators.exact import check_graph
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.stabilization.options import GrowthOptions, GrowthProblem


class GrowthTools:
    """What the parts of one measurement share.

    Args:
        options: what is measured.
        problem: on what.
        at_once: vectors that are multiplied at once, the same on every rank.

    Attributes:
        options: what is measured.
        losses: of single samples.
        samples: those that there are.
        parameters: those that are differentiated and moved.
        space: of the parameters.
        seed: of random vectors.
        on_product: called after every product.
        processes: how many share the memory.
        at_once: vectors that are multiplied at once, the same on every rank.
        seconds: time by stage.
    """

    def __init__(self, options: GrowthOptions, problem: GrowthProblem, at_once: int) -> None:
        self.options, self.losses, self.samples = options, problem.losses, problem.losses.samples
        self.parameters, self.space = list(problem.parameters), VectorSpace(problem.parameters)
        self.seed, self.on_product = problem.seed, problem.on_product
        self.processes, self.at_once = problem.trainer.num_devices, at_once
        self.seconds: dict[str, float] = {}
        self._trainer, self._reduce = problem.trainer, sum_over_ranks(problem.trainer)

    def new(self, k: int) -> range:
        """Numbers of the samples that stand for the next one."""
        return range(k, k + self.options.candidates)

    def operator(self, numbers: Iterable[int], total: int) -> HessianOperator:
        """Products with the Hessian of the sum of losses over ``total``."""
        parts = self.losses.parts(list(numbers), total)
        return HessianOperator(parts, self.parameters, reduce=self._reduce, processes=self.processes)

    def generator(self, use: int) -> torch.Generator:
        """Random numbers for one use, the same at every k and on every rank."""
        return torch.Generator(self.space.device).manual_seed(self.seed + use)

    def gradients(self, number: int, graph: bool = False) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Loss of one of this rank's samples and its gradient."""
        with building_graphs():
            loss = self.losses.one(number)
            check_graph(loss)
            return loss, torch.autograd.grad(loss, self.parameters, create_graph=graph, allow_unused=True)

    def numbers(self, *shape: int) -> Tensor:
        """Zeros for the numbers that ranks bring together, float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.space.device)

    def mean_loss(self, k: int) -> Tensor:
        """This rank's part of L_k, a float64 scalar."""
        total = self.numbers()
        with torch.no_grad():
            for part in self.losses.parts(range(k), k):
                total += part.weight * part.evaluate().loss.double()
        return total

    def moved(self, moves: Iterable[Tensor]) -> Iterator[int]:
        """Move the parameters in place by each vector in turn, without gradients; bit for bit back afterwards."""
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

    def together(self, own_part: Callable[[], Tensor], nothing: Tensor, after: HessianOperator | None = None) -> Tensor:
        """Sum over the ranks of what each has a part of, one collective; all raise where one fails.

        Args:
            own_part: makes this rank's part.
            nothing: zeros of its shape.
            after: an operator whose products went before, some of which one of the ranks may have failed to make.
        """
        if self._reduce is None:
            return own_part()
        error, part = None, nothing
        try:
            if after is not None and after.error is not None:
                raise after.error
            part = own_part()
        except Exception as caught:
            error = caught.with_traceback(None)  # which holds graphs
        # A loss may be NaN where the parameters were moved to; that a rank failed is another thing.
        failed = part.new_full((1,), float(error is not None))
        summed = self._reduce(torch.cat([failed, part.reshape(-1)]))
        if summed[0]:
            raise failure_of(self._trainer, error, error or RuntimeError()).cause from None
        return summed[1:].reshape(part.shape)

    @contextlib.contextmanager
    def products(self, operator: HessianOperator) -> Generator[None, None, None]:
        """Tell on every rank what ended the products of an operator on one of them."""
        try:
            yield
        except Exception as error:
            if self._reduce is None:
                raise
            raise failure_of(self._trainer, operator.error, error).cause from None

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
