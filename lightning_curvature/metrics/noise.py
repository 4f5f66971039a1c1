"""Metrics of the gradient noise of SGD: sums over samples, which merge over ranks, and the relation to curvature."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_curvature.arguments import checked, whole
from lightning_curvature.functional.noise import covariance_of_sums, kronecker_sums, linear_blocks
from lightning_curvature.losses.samples import equal_up_to_rounding
from lightning_curvature.metrics.model import CurvatureMetric, LossFunction, ModelMetric
from lightning_curvature.noise.measurement import noise_curvature_of
from lightning_curvature.noise.options import PARAMETER, NoiseOptions, Quantity
from lightning_curvature.noise.result import NoiseCurvature
from lightning_curvature.noise.sums import moments_of
from lightning_curvature.operators import linear_statistics
from lightning_curvature.operators.micro_batches import sample_count

_BATCH_SIZE = whole(1, "1 is a single sample")


class NoiseCovariance(CurvatureMetric):
    r"""The covariance of the gradient of a mini-batch, from gradients of single samples.

    .. math:: C = \frac1b \left( \frac1n \sum_i g_i g_i^\top - \bar g \bar g^\top \right)

    ``update`` takes ``gradients`` (n, D), one row a sample; ``compute`` gives C, (D, D) float64. States are sums over
    samples, which merge over ranks.

    Args:
        size: D.
        batch_size: b.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if ``size`` or ``batch_size`` is below 1, or gradients have another length.

    Source: Zhang, Yang and Tu (2026), eq. 2.

    Example:
        >>> metric = NoiseCovariance(2)
        >>> metric.update(torch.tensor([[1.0, 0.0]]))
        >>> metric.update(torch.tensor([[-1.0, 0.0]]))
        >>> metric.compute()
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    products: Tensor
    gradient: Tensor
    samples: Tensor

    @checked(size=whole(1, "count the parameters"), batch_size=_BATCH_SIZE)
    def __init__(self, size: int, batch_size: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.batch_size = size, batch_size
        self.add_state("products", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gradient", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    @checked()
    def update(self, gradients: Tensor) -> None:
        """Add samples."""
        if gradients.ndim != 2 or gradients.shape[1] != self.size:
            raise ValueError(
                f"gradients must be (n, {self.size}), got {tuple(gradients.shape)}: give one flat row a sample."
            )
        rows = gradients.detach().to(self.products)
        self.products = self.products + rows.mT @ rows
        self.gradient = self.gradient + rows.sum(0)
        self.samples = self.samples + len(rows)

    def compute(self) -> Tensor:
        """Return C; NaN without samples."""
        if not int(self.samples):
            return torch.full_like(self.products, torch.nan)
        return covariance_of_sums(self.products, self.gradient, int(self.samples), self.batch_size)

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the matrix; arguments as for the other metrics, ``val`` is one value."""
        import matplotlib.pyplot as plt

        values = (self.compute() if val is None else val).cpu().numpy()
        axes = ax if ax is not None else plt.subplots()[1]
        largest = float(numpy.nanmax(numpy.abs(values), initial=0.0))
        image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.figure.colorbar(image, ax=axes)
        axes.set(xlabel="coordinate", ylabel="coordinate", title=type(self).__name__)
        return axes.figure, axes


class NoiseCurvatureRelation(ModelMetric):
    r"""The relation of the noise covariance C of a linear layer's weight to the Hessian H of the loss.

    ``update`` takes ``inputs`` and ``targets`` of a batch and differentiates the model at its parameters as they are;
    ``compute`` gives a dict of floats, with the keys of :class:`~lightning_curvature.NoiseCovarianceMonitor` that
    belong to ``quantities``. ``relation`` then holds the whole result, a
    :class:`~lightning_curvature.noise.result.NoiseCurvature`. The weight must enter once for each sample, as
    z = W a; no Hessian of a single sample is formed. States are sums over samples, which merge over ranks.

    Args:
        model: maps inputs to outputs, in eval mode, without dropout.
        loss_function: mean loss of (outputs, targets).
        parameter: name of the weight of a ``torch.nn.Linear``.
        batch_size: b of C.
        quantities: names of values.
        top: 𝒩, number of leading directions of H; None for 40 % of D.
        haar_draws: random rotations for the baseline of the coupling.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown weight, or one that enters in another way, if the loss is not a mean over samples, or
            ``compute`` has no samples.

    Source: Zhang, Yang and Tu (2026), eqs. 2, 6, 7, 15, 18 and 46.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> metric = NoiseCurvatureRelation(model, nn.functional.cross_entropy, parameter="0.weight")
        >>> inputs, targets = torch.randn(64, 4), torch.arange(64) % 2
        >>> metric.update(inputs, targets)
        >>> sorted(metric.compute())[:3]
        ['noise_alignment', 'noise_commutativity', 'noise_commutativity_random']
    """

    kronecker: Tensor
    gradient: Tensor
    samples: Tensor

    @checked(parameter=PARAMETER, batch_size=_BATCH_SIZE)
    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        *,
        parameter: str,
        batch_size: int = 1,
        quantities: Sequence[Quantity] = NoiseOptions.quantities,
        top: int | None = None,
        haar_draws: int = NoiseOptions.haar_draws,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, loss_function, **kwargs)
        if "noise_awd_chain" in quantities:
            raise ValueError("quantities must not hold 'noise_awd_chain' here, got it: NoiseCovarianceMonitor has it.")
        path, _, name = parameter.rpartition(".")
        layer = dict(model.named_modules()).get(path)
        if name != "weight" or not isinstance(layer, nn.Linear):
            linear = [f"{n}.weight".lstrip(".") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"parameter must be the weight of a torch.nn.Linear, got {parameter!r}: choose one of {linear[:10]}."
            )
        out, into = layer.weight.shape
        self.parameter, self.batch_size = parameter, batch_size
        self.options = NoiseOptions(parameter=parameter, quantities=quantities, top=top, haar_draws=haar_draws)
        self.relation: NoiseCurvature | None = None
        packed = (3, out * (out + 1) // 2, into * (into + 1) // 2)
        self.add_state("kronecker", torch.zeros(packed, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gradient", torch.zeros(out * into, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def _layer(self) -> nn.Linear:
        layer = self._model[0].get_submodule(self.parameter.rpartition(".")[0])
        assert isinstance(layer, nn.Linear)
        return layer

    def update(self, inputs: Any, targets: Any) -> None:
        """Add the samples of a batch."""
        model, count, first = self._model[0], sample_count(targets), not int(self.samples)
        if first:
            self._check_mean(model(inputs), targets, count)
        factors = linear_statistics(
            self._layer, lambda: self._loss_function(model(inputs), targets), count, check=first
        )
        a, delta, s = (t.to(self.gradient) for t in (factors.activations, factors.gradients, factors.curvatures))
        self.kronecker = self.kronecker + kronecker_sums(linear_blocks(a, delta, s), a)
        self.gradient = self.gradient + (delta.mT @ a).flatten()
        self.samples = self.samples + count

    @torch.no_grad()
    def _check_mean(self, outputs: Any, targets: Any, count: int) -> None:
        """Raise unless the loss of a batch of tensors is the mean over its samples."""
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or len(outputs) != count:
            return
        rows = range(count)
        single = torch.stack([self._loss_function(outputs[i : i + 1], targets[i : i + 1]) for i in rows]).mean()
        whole = self._loss_function(outputs, targets)
        if bool(whole.isfinite()) and not equal_up_to_rounding(whole, single):
            raise ValueError(
                f"loss_function must be the mean over the samples of a batch, got {float(whole):.6g} where these have "
                f"{float(single):.6g}: use reduction='mean', without class weights."
            )

    def compute(self) -> dict[str, float]:
        """Return values by key."""
        if not int(self.samples):
            raise ValueError("samples must be added before compute, got none: call update first.")
        weight = self._layer.weight
        sums = {
            "kronecker": self.kronecker,
            "gradient": self.gradient,
            "counts": self.gradient.new_tensor([float(self.samples), 0.0]),
        }
        moments = moments_of(sums, weight.shape)
        self.relation = noise_curvature_of(self.options, moments, self.batch_size, weight.dtype, "kronecker")
        return self.relation.values()
