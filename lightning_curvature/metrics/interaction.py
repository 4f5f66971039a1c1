"""Metrics of mini-batch gradients against the full Hessian: IAS and GNI."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_curvature.arguments import Rule, checked
from lightning_curvature.functional import NoiseTerms, add_to_moments, merge_moments
from lightning_curvature.functional.sharpness import BATCH_SIZES
from lightning_curvature.metrics.model import Batch, LossFunction
from lightning_curvature.metrics.sharpness import MiniBatchMetric
from lightning_curvature.operators import Curvature, CurvatureOperator
from lightning_curvature.operators.exact import CURVATURE, KEEP_GRAPH
from lightning_curvature.operators.micro_batches import sample_count
from lightning_curvature.operators.mini_batch import MiniBatch
from lightning_curvature.replay.batches import copied
from lightning_curvature.reporting.loggers import warn

_DATA = Rule("give a list of (inputs, targets), or None for pairs")


class FullCurvatureMetric(MiniBatchMetric):
    r"""Base of :class:`InteractionAwareSharpness` and :class:`GradientNoiseInteraction`, which share the numerator.

    With ``data`` it is :math:`g_B^\top H g_B`, by a product with all samples. Without, two consecutive mini-batches are
    a pair, and a draw is :math:`\frac12 (g_B^\top H_{B'} g_B + g_{B'}^\top H_B\, g_{B'})`, which has the same mean: B
    and B' are independent, and H is the mean of H_B. Arguments as for :class:`InteractionAwareSharpness`.
    """

    _shared: ClassVar[tuple[str, ...]] = ("_model", "_data")
    # The ratio at other batch sizes.
    _at_batch_sizes: ClassVar[Callable[[NoiseTerms, int | Sequence[int], bool], Tensor]]

    _carried: ClassVar[tuple[str, ...]] = ("waiting",)

    noise_moments: Tensor
    waiting: list[Batch]

    @checked(data=_DATA, curvature=CURVATURE, keep_graph=KEEP_GRAPH)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        data: Sequence[Batch] | None = None,
        curvature: Curvature = "hessian",
        keep_graph: bool | Literal["auto"] = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, curvature=curvature, **kwargs)
        self._data = list(data) if data is not None else None
        self._keep_graph = keep_graph
        # The first of a pair.
        self.add_state("waiting", [], dist_reduce_fx=None)
        # For other batch sizes, beside the moments: the means of ‖g_B‖² and of n/b.
        self.add_state("noise_moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, inputs: Any, targets: Any) -> None:  # type: ignore[override]
        """Add a mini-batch; without ``data`` the metric keeps the first of a pair and evaluates it with the second."""
        if self._data is not None:
            self._add_exact(inputs, targets, self._data)
        elif not self.waiting:
            self.waiting = [copied((inputs, targets))]
        else:
            # After a merge of metrics that each had one, more of them wait.
            *self.waiting, partner = self.waiting
            with closing(self._mini_batch(*partner)) as first, closing(self._mini_batch(inputs, targets)) as last:
                crossed = last.curvature_along(first.gradient) + first.curvature_along(last.gradient)
                self._add(0.5 * crossed, self._denominator_of_pair(first, last))

    def _add_exact(self, inputs: Any, targets: Any, data: Sequence[Batch]) -> None:
        # The gradient alone of the mini-batch, without its graph.
        batch = MiniBatch(CurvatureOperator(self._micro_batches([(inputs, targets)]), self._trained()))
        with closing(self._whole(data)) as whole:
            self._add(whole.curvature_along(batch.gradient), self._denominator(batch, whole))
        share = _samples(data) / sample_count(targets)
        self.noise_moments = add_to_moments(self.noise_moments, batch.squared_norm, share)

    def _whole(self, data: Sequence[Batch]) -> MiniBatch:
        return MiniBatch(self._operator_type(self._micro_batches(data), self._trained(), keep_graph=self._keep_graph))

    def _denominator_of_pair(self, first: MiniBatch, last: MiniBatch) -> float:
        raise NotImplementedError

    def _denominator(self, batch: MiniBatch, whole: MiniBatch) -> float:
        raise NotImplementedError

    @checked()
    def noise_terms(self, replacement: bool = False) -> NoiseTerms:
        """Return the contributions of gradient and noise; takes ``data``, and one more product with it.

        Mini-batches of several sizes count with their harmonic mean. All ranks must call it. ``replacement`` says
        whether a mini-batch can hold a sample twice.

        Raises:
            ValueError: without ``data``, without mini-batches, or for mini-batches of all samples.
        """
        if self._data is None:
            raise ValueError(
                "data must be given for other batch sizes, got none: pass all samples as data=[(inputs, targets), …]."
            )
        with self._over_ranks():
            count, curvature = self.moments[:2].tolist()
            drawn, square, share = self.noise_moments[:3].tolist()
        samples = _samples(self._data)
        if not drawn:
            raise ValueError("mini-batches must be given first, got none: call update with each of them.")
        with closing(self._whole(self._data)) as whole:
            return NoiseTerms.from_batches(
                # Skipped mini-batches have a curvature of 0.
                batch_curvature=curvature * count / drawn,
                batch_square=square,
                gradient_curvature=whole.self_curvature,
                gradient_square=whole.squared_norm,
                batch_size=samples / share,
                samples=samples,
                replacement=replacement,
            )

    @checked(sizes=BATCH_SIZES)
    def over_batch_sizes(self, sizes: int | Sequence[int], replacement: bool = False) -> Tensor:
        """Return the value at one batch size, a scalar, or at several, (sizes,), from :meth:`noise_terms`; float64.

        ``replacement`` says whether a mini-batch, measured or asked for, can hold a sample twice.
        """
        return type(self)._at_batch_sizes(self.noise_terms(replacement), sizes, replacement)


class InteractionAwareSharpness(FullCurvatureMetric):
    r"""Interaction-aware sharpness (IAS): the curvature of the whole loss along the gradients of mini-batches.

    .. math:: \frac{E_B[g_B^\top H\, g_B]}{E_B\lVert g_B\rVert^2}

    It stays below 2/η. ``update`` takes ``inputs`` and ``targets`` of a mini-batch, drawn as training draws them;
    ``compute`` gives the ratio, a float64 scalar; see :class:`RatioOfMeans` for ``standard_error`` and ``count``.

    With ``data`` each mini-batch is a draw: it takes the mini-batch's gradient, and a gradient with its graph and one
    Hessian–vector product of all of ``data``. Without, each *pair* of consecutive mini-batches is a draw: it takes a
    gradient with its graph and one product of each, the cost of batch sharpness.

    Pairs scatter more: with 200 mini-batches of 32 on a fitted perceptron (1,797 digits) five times as much; of 60
    values, 10 lay more than two standard errors below the exact one, none above. A few draws without the rare large
    ones give too small a value and too small an error.

    A pair takes H from the other mini-batch: the two must be independent. Consecutive mini-batches of an epoch are not,
    since they share no sample: the numerator is then off by b/(n−b) of its distance to
    :math:`E_B[g_B^\top H_B\, g_B]`.

    Other arguments are those of :class:`~lightning_curvature.metrics.BatchSharpness`.

    Args:
        data: batches of any sizes that make up all samples, the same on every rank; None for pairs.
        keep_graph: for ``data``; see :class:`~lightning_curvature.operators.HessianOperator`.

    Raises:
        ValueError: for an unknown ``curvature``, or ``data`` without a batch.

    Source: Lee and Jang 2023; Edge of stochastic stability (2025), appendix C.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0]]), torch.zeros(1, 1))]
        >>> metric = InteractionAwareSharpness(model, nn.functional.mse_loss, data=data)
        >>> for x, y in data:  # H = 1 + 4
        ...     metric.update(x, y)
        >>> metric.compute().round(decimals=4)
        tensor(5., dtype=torch.float64)
    """

    _at_batch_sizes = NoiseTerms.ias

    def _denominator_of_pair(self, first: MiniBatch, last: MiniBatch) -> float:
        return 0.5 * (first.squared_norm + last.squared_norm)

    def _denominator(self, batch: MiniBatch, whole: MiniBatch) -> float:
        return batch.squared_norm


class GradientNoiseInteraction(FullCurvatureMetric):
    r"""Gradient–noise interaction (GNI): at 2/η the loss oscillates.

    .. math:: \frac{E_B[g_B^\top H\, g_B]}{\lVert g\rVert^2}

    Arguments, ``update``, ``compute``, errors and cost as for :class:`InteractionAwareSharpness`; g is the gradient of
    the same ``data``. Give ``data`` unless the mini-batches are independent of each other and of the parameters.
    Without, the denominator of a pair is :math:`g_B^\top g_{B'}`, whose mean is ‖g‖² for independent mini-batches.
    Mini-batches of one epoch share no sample, and the mean is :math:`\lVert g\rVert^2 - \operatorname{tr}\Sigma/(n-1)`,
    negative near a minimum; so is that of mini-batches from the last training steps. Where the mean is not positive,
    the value is NaN, with a warning.

    With ``data`` and without a reset while the parameters move, it is the ratio of the means over a trajectory, exactly
    2/η where SGD is stationary on a quadratic.

    Source: Edge of stochastic stability (2025), definition 2 and proposition 3; Lee and Jang 2023.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> data = [(torch.tensor([[1.0]]), torch.zeros(1, 1)), (torch.tensor([[2.0]]), torch.zeros(1, 1))]
        >>> metric = GradientNoiseInteraction(model, nn.functional.mse_loss, data=data)
        >>> for x, y in data:  # g_B = 2x²θ: 5 · ½(4 + 64) / 25
        ...     metric.update(x, y)
        >>> metric.compute().round(decimals=4), metric.over_batch_sizes([1, 2]).round(decimals=4)
        (tensor(6.8000, dtype=torch.float64), tensor([6.8000, 5.0000], dtype=torch.float64))
    """

    _at_batch_sizes = NoiseTerms.gni

    def compute(self) -> Tensor:
        """Return the ratio; NaN, with a warning, where noise hides g in the pairs."""
        # A single pair, as in ``forward``, often has none.
        if self._data is None and not self._for_forward and self.moments[0] and not self.moments[2] > 0.0:
            warn(
                "GradientNoiseInteraction must find a positive mean of the denominators g_B·g_B', got "
                f"{float(self.moments[2]):.3g}: give data= all samples, or mini-batches that are drawn independently."
            )
        return super().compute()

    def _denominator_of_pair(self, first: MiniBatch, last: MiniBatch) -> float:
        return first.operator.space.dot(first.gradient, last.gradient)

    def _denominator(self, batch: MiniBatch, whole: MiniBatch) -> float:
        return whole.squared_norm


def _samples(data: Sequence[Batch]) -> int:
    return sum(sample_count(y) for _, y in data)
