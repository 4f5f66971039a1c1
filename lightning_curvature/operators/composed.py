"""Operators built from others: preconditioned, and the second moment of mini-batch Hessians."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, checked, not_negative, sentence, whole
from lightning_curvature.operators.base import PARAMETERS, PARTS, CurvatureOperator
from lightning_curvature.operators.exact import HessianOperator
from lightning_curvature.operators.micro_batches import MicroBatch

_LR, _SPREAD = not_negative("pass the learning rate of the step"), whole(0, "count the mini-batches", MANY)
_GROUPS = Rule("give the number of each one's mini-batch", least=0, empty=True)


class PreconditionedOperator:
    r"""Products with :math:`P^{-1/2} A\, P^{-1/2}`, P diagonal and positive.

    Its eigenvalues are those of P⁻¹A, which decide the stability of an optimizer that divides by P.

    Args:
        operator: A.
        diagonal: P, one tensor for each parameter, infinite where the optimizer does not move it.

    Source: Cohen et al. 2022, section 3.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1))]
        >>> hessian = HessianOperator.of(model, torch.nn.functional.mse_loss, data)
        >>> PreconditionedOperator(hessian, [torch.tensor([[4.0]])])(torch.ones(1))
        tensor([0.5000])
    """

    @checked()
    def __init__(self, operator: CurvatureOperator, diagonal: Sequence[Tensor]) -> None:
        self.operator, self.space = operator, operator.space
        if [p.numel() for p in diagonal] != self.space.sizes:
            shapes = [tuple(p.shape) for p in diagonal]
            raise sentence("diagonal", "have the shapes of the parameters", shapes, "give one tensor for each of them")
        self._scale = self.space.pack([p.to(torch.promote_types(p.dtype, torch.float32)).rsqrt() for p in diagonal])

    def __call__(self, vector: Tensor) -> Tensor:
        """Return P^{-1/2} A P^{-1/2} v."""
        self.space.check(vector)
        return self.operator(vector * self._scale).mul_(self._scale)

    def uncertainty(self, vector: Tensor, form: float) -> float:
        """Return how far a quadratic form may be off; see :meth:`~.base.CurvatureOperator.uncertainty`."""
        return self.operator.uncertainty(vector * self._scale, form)

    @property
    def error(self) -> Exception | None:
        """The error of this rank, or None."""
        return self.operator.error

    def close(self) -> None:
        """Release what the operator keeps."""
        self.operator.close()


class SecondMomentOperator(HessianOperator):
    r"""Products with the second-moment contraction minus the identity.

    .. math:: S v = -2\eta\, \mathbb E_B[H_B v] + \eta^2\, \mathbb E_B[H_B (H_B v)],
        \qquad \mathbb E_B[(I - \eta H_B)^2] = I + S

    A product takes two with each mini-batch Hessian H_B; H itself is their mean. The eigenvalues of S are computed
    without the identity, in which their digits would be lost.

    Args:
        parts, parameters, options: see :class:`~.exact.HessianOperator`.
        lr: η.
        groups: for each micro-batch the number of its mini-batch; default: each is a mini-batch.
        spread: number of mini-batches, 0, 1, …, whose micro-batches lie on several ranks; each then takes two
            reductions a product. None where every mini-batch lies on one rank: one reduction for all.

    Source: Wu et al. 2018; Edge of stochastic stability (2025), eqs. 37 and 39.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0]]), torch.zeros(1, 1))]
        >>> operator = SecondMomentOperator.of(model, torch.nn.functional.mse_loss, data, lr=0.5)
        >>> operator(torch.ones(1))  # H_B = 2, 8: −2η · 5 + η² · (4 + 64)/2
        tensor([3.5000])
    """

    @checked(parts=PARTS, parameters=PARAMETERS, lr=_LR, groups=_GROUPS, spread=_SPREAD)
    def __init__(
        self,
        parts: Sequence[MicroBatch],
        parameters: Sequence[Tensor],
        *,
        lr: float,
        groups: Sequence[int] | None = None,
        spread: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(parts, parameters, **options)
        self.lr = lr
        if groups is not None and len(groups) != len(self.parts):
            counts = f"{len(groups)} for {len(self.parts)}"
            raise sentence("groups", "hold one for each of parts", counts, "leave none out")
        numbers = list(groups) if groups is not None else list(range(len(self.parts)))
        last = max(numbers, default=-1)
        if spread is not None and spread <= last:
            raise sentence("spread", f"be above the numbers in groups, {last}", spread, "count all mini-batches")
        self._spread = spread is not None and self.reduce is not None
        of_batch = range(spread) if spread is not None else dict.fromkeys(numbers)
        self._batches = [[i for i, n in enumerate(numbers) if n == number] for number in of_batch]
        sums = [sum(self.parts[i].weight for i in batch) for batch in self._batches]
        self._weights = torch.tensor(sums, dtype=torch.float64, device=self.space.device)
        if self._spread and self.reduce is not None:
            self._weights = self.reduce(self._weights)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return Sv."""
        self.space.check(vector)
        return self.local_product(vector) if self._spread else super().__call__(vector)

    def form_terms(self, vector: Tensor) -> Tensor:
        """Return the terms of vᵀSv: the square of a mini-batch's products is no sum over its micro-batches."""
        return self.space.dots_by_tensor(vector, self(vector))

    def local_product(self, vector: Tensor) -> Tensor:
        """Return this rank's term of Sv; all of Sv where mini-batches lie on several ranks."""
        total = self.space.zeros()
        for batch, weight in zip(self._batches, self._weights.tolist(), strict=True):
            once = self._batch_product(batch, weight, vector)
            twice = self._batch_product(batch, weight, once)
            total.add_(once, alpha=-2.0 * self.lr * weight).add_(twice, alpha=self.lr**2 * weight)
        return total

    def _batch_product(self, batch: list[int], weight: float, vector: Tensor) -> Tensor:
        """Return H_B v."""

        def local() -> Tensor:
            total, views = self.space.zeros(), self.space.views(vector)
            for index in batch:
                self.space.add_(total, self.product_of(index, views), self.parts[index].weight / weight)
            return total

        return self.summed(local) if self._spread else local()
