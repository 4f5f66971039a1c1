"""Products with the Hessian by a difference of two gradients."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.arguments import check_fields, checked, not_negative, positive
from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import NonFiniteProductError
from lightning_curvature.linalg.space import Reduce
from lightning_curvature.operators.base import PARAMETERS, PARTS, CurvatureOperator
from lightning_curvature.operators.differentiation import put_back_at_exit
from lightning_curvature.operators.exact import PROCESSES
from lightning_curvature.operators.memory import available_memory
from lightning_curvature.operators.micro_batches import Evaluation, MicroBatch, check_graph
from lightning_curvature.operators.sharding import Sharding
from lightning_curvature.operators.sides import Frozen, Looking, Side, eager

# Distances in units of u^{1/3} ‖θ‖, of which the best is found by measuring. Of 12 networks, fresh and trained, it lay
# between 0.003 and 1: a GPT's loss bends within shorter lengths than an MLP's.
_DISTANCES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_USUAL = 0.1
# A second distance tells the error of products, and the ratio to it that of errors by truncation, which go as r².
_SHORTER = 3.0

# Share of the free memory for the sides of kinks.
_SHARE = 0.25

_DISTANCE, _ERROR = positive("None has it measured"), not_negative("math.inf is unknown", finite=False)


@dataclass
class DifferenceHistory:
    """What differences of gradients have told of a loss; operators of one module may share it.

    Attributes:
        distance: the best distance r in units of u^{1/3} ‖θ‖; None until it is measured.
        error: by how much products at neighbouring distances differed there, relatively.
        smooth: whether the loss has no kinks; None until the first product, which looks for them.
    """

    distance: float | None = None
    error: float = math.inf
    smooth: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self, distance=_DISTANCE, error=_ERROR)


class GradientDifferenceOperator(CurvatureOperator):
    r"""Products with the Hessian by a central difference of gradients: two forward+backwards of the data.

    .. math:: Hv \approx \frac{\lVert v\rVert}{2r}
        \left[\nabla L\!\left(\theta + r\tfrac{v}{\lVert v\rVert}\right)
        - \nabla L\!\left(\theta - r\tfrac{v}{\lVert v\rVert}\right)\right],
        \qquad r = c\, u^{1/3} \lVert\theta\rVert

    For models without second derivatives: sharded parameters, whose gathering autograd does not see through, and layers
    whose backward cannot be differentiated. u is the rounding unit of the parameters' type: rounding of the gradients
    grows as u/r and truncation as r², so that their sum is least at a distance proportional to u^{1/3}. Its factor c
    depends on the network: the first product is preceded by seven more, at six distances along a sharp direction, of
    which the one is taken that agrees best with its neighbours.

    Each kink (ReLU, max pooling, …) stays on the side on which it is at θ, also in the backward: H is that of the sides
    at θ, as by double backward. One forward at θ notes the sides, whose masks are kept as long as they fit into a
    quarter of the free memory; else it is made for each product. Not so those of checkpointed layers, whose forwards
    run again within the backward, nor of a step whose operations change with the parameters.

    The parameters are perturbed in place, in this rank's shards, and restored bit for bit, also after an error. Where
    they are sharded, a rank that fails keeps its error in ``error`` and makes all gatherings with the others, with NaN
    for its gradients, until the operator is closed.

    Args:
        parts, parameters, reduce: see :class:`~.base.CurvatureOperator`.
        sharding: of the parameters, whose backward then reduces in place of ``reduce``; or None.
        history: of earlier operators of the module, whose distance is taken over.
        processes: number of processes that share the memory.

    Raises:
        ValueError: if a loss has no graph.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1))]
        >>> operator = GradientDifferenceOperator.of(model, torch.nn.functional.mse_loss, data)
        >>> bool(abs(operator(torch.ones(1)) - 2.0) < 1e-3)
        True
    """

    @checked(parts=PARTS, parameters=PARAMETERS, processes=PROCESSES)
    def __init__(
        self,
        parts: Sequence[MicroBatch],
        parameters: Sequence[Tensor],
        *,
        reduce: Reduce | None = None,
        sharding: Sharding | None = None,
        history: DifferenceHistory | None = None,
        processes: int = 1,
    ) -> None:
        super().__init__(parts, [local(p) for p in parameters], reduce=None if sharding else reduce)
        self._originals, self._sharding = list(parameters), sharding
        if sharding is not None:
            self.space = sharding.space
        self._around = sharding.around if sharding is not None else contextlib.nullcontext
        self._history, self._processes = history if history is not None else DifferenceHistory(), processes
        self._distance = _USUAL

    @functools.cached_property
    def _unit(self) -> float:
        """u^{1/3} ‖θ‖."""
        unit = max(torch.finfo(p.dtype).eps for p in self.parameters)
        return unit ** (1 / 3) * (self.space.norm(self.space.pack(self.parameters)) or 1.0)

    @property
    def together(self) -> bool:
        """Whether ranks make each product together."""
        return super().together or (self._sharding is not None and self._sharding.reduce is not None)

    def local_gradient(self) -> Tensor:
        """Return this rank's term of ∇L; of sharded parameters, this rank's coordinates of ∇L."""
        total = self.space.zeros()
        with self._around():
            for part in self.parts:
                self._add_gradient(total, part.evaluate, part.weight, 1.0)
        return total

    def local_product(self, vector: Tensor) -> Tensor:
        """Return this rank's term of Hv; of sharded parameters, this rank's coordinates of Hv."""
        length = self.space.norm(vector)
        if length == 0.0:
            return self.space.zeros()
        if self._history.distance is None:
            self._measure_distance(vector / length)
        self._distance = self._history.distance or _USUAL
        return self._product(vector, length, self._distance)

    def uncertainty(self, vector: Tensor, form: float) -> float:
        """Return how far a quadratic form vᵀHv may be off: twice its change at a shorter distance; one product."""
        length, shorter = self.space.norm(vector), self._distance / _SHORTER
        other = self.space.dot(vector, self.summed(lambda: self._product(vector, length, shorter)))
        error = 2.0 * abs(form - other)
        if self.together and not math.isfinite(error):
            raise NonFiniteProductError("a product at a shorter distance must be finite, got NaN or infinity.")
        if error > _SHORTER * self._history.error * abs(form):
            self._history.distance = None  # the loss has changed
        return error

    def _measure_distance(self, direction: Tensor) -> None:
        """Measure products at all distances, along the product with a direction: a sharp one."""
        first = self._product(direction, 1.0, _USUAL)
        length = self.space.norm(first)
        along = first / length if 0.0 < length < math.inf else direction
        products = [self._product(along, 1.0, distance) for distance in _DISTANCES]
        norms = [self.space.norm(product) for product in products]
        size = min(norms) or 1.0
        changes = [self.space.norm(a - b) / size for a, b in itertools.pairwise(products)]
        scores = [max(sides) for sides in zip((math.inf, *changes), (*changes, math.inf), strict=True)]
        best = min(range(len(scores)), key=scores.__getitem__)
        if math.isfinite(length + sum(norms)):  # else a rank may have failed, and the next product measures again
            self._history.distance = _DISTANCES[best] if scores[best] < math.inf else _USUAL
            self._history.error = scores[best]

    def _product(self, vector: Tensor, length: float, distance: float) -> Tensor:
        total, r = self.space.zeros(), distance * self._unit
        loose = [index for index, evaluate in enumerate(self._on_sides) if evaluate is None]
        kept = [index for index in range(len(self.parts)) if index not in loose]
        for group in (kept, *([index] for index in loose)):
            evaluations = [self._on_sides[i] or _frozen(self.parts[i], self._look(self.parts[i])) for i in group]
            for sign in (1.0, -1.0) if group else ():
                with self._at(vector, sign * r / length):
                    for index, evaluate in zip(group, evaluations, strict=True):
                        self._add_gradient(total, evaluate, self.parts[index].weight, sign * length / (2.0 * r))
        return total

    @functools.cached_property
    def _on_sides(self) -> list[Callable[[], Evaluation] | None]:
        """What evaluates each micro-batch with all kinks on the sides on which they are now.

        None where these do not fit into memory, and are looked at again in each product.
        """
        if self._history.smooth:
            return [part.evaluate for part in self.parts]
        evaluations, fits, kinks, room = [], list[float](), 0, math.inf
        for part in self.parts:
            sides = self._look(part)
            if any(sides):
                kinks += 1
                room = min(room, _SHARE * available_memory(self.space.device, self._processes))
                room -= sum(side.number.nbytes for one in sides for side in one)
            fits.append(float(room >= 0.0))
            evaluations.append(_frozen(part, sides) if room >= 0.0 else None)
        # Ranks that gather parameters make as many forwards each.
        table = torch.tensor([kinks, *fits], dtype=torch.float64, device=self.space.device)
        if self.error is not None:
            table.fill_(torch.nan)  # and all look again in each product
        reduce, least = None, 1
        if self._sharding is not None and self._sharding.reduce is not None:
            reduce, least = self._sharding.reduce, self._sharding.ranks
        known, *counts = (reduce(table) if reduce is not None else table).tolist()
        self._history.smooth = None if math.isnan(known) else not known
        return [one if count >= least else None for one, count in zip(evaluations, counts, strict=True)]

    def _look(self, part: MicroBatch) -> list[list[Side]]:
        """Return the sides of the kinks of each step of a micro-batch, at the parameters as they are."""
        modes: list[Looking] = []

        def looking() -> contextlib.AbstractContextManager[object]:
            modes.append(Looking())
            return eager(modes[-1])

        stepwise = part.stepwise
        if stepwise is not None:
            # With gradients, as it is differentiated: without them a layer may run other code. But a forward that
            # gathers shards must not wait for a backward.
            with torch.set_grad_enabled(self._sharding is None), self._around():
                if self._sharding is None:
                    stepwise(looking)
                else:
                    self._sharding.forward(self, lambda: stepwise(looking))
        return [mode.sides for mode in modes]

    @contextlib.contextmanager
    def _at(self, vector: Tensor, factor: float) -> Generator[None, None, None]:
        targets = [p.detach() for p in self.parameters]
        kept = [t.clone() for t in targets]
        with contextlib.ExitStack() as stack:
            put_back_at_exit(stack, functools.partial(torch._foreach_copy_, targets, kept))
            for target, view in zip(targets, self.space.views(vector), strict=True):
                target.add_(view, alpha=factor)
            with self._around():
                yield

    def _add_gradient(self, total: Tensor, evaluate: Callable[[], Evaluation], weight: float, factor: float) -> None:
        def loss_of() -> Tensor:
            loss = evaluate().loss
            check_graph(loss)
            return loss

        with torch.enable_grad():
            if self._sharding is not None:
                self.space.add_(total, self._sharding.gradients(self, loss_of, weight, self._originals), factor)
            else:
                gradients = torch.autograd.grad(loss_of(), self.parameters, allow_unused=True)
                self.space.add_(total, gradients, factor * weight)


def _frozen(part: MicroBatch, sides: Sequence[Sequence[Side]]) -> Callable[[], Evaluation]:
    modes, stepwise = [Frozen(one, differentiated=True) for one in sides], part.stepwise
    if stepwise is None or not any(sides):
        return part.evaluate

    def evaluate() -> Evaluation:
        if any(mode.other for mode in modes):  # other operations elsewhere: there are no sides to stay on
            return part.evaluate()
        waiting = iter(modes)
        return stepwise(lambda: eager(next(waiting, None)))

    return evaluate
