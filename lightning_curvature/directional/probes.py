"""Evaluations of the objective along the update, turned into the local sums that a measurement consists of.

Every function returns plain numbers of *this rank* (float64 scalars on the device) whose mean over all ranks is the
number of the job; nothing here communicates, except where the line search has to decide.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lightning_curvature.directional.likelihood import OutputModel
from lightning_curvature.distributed.shards import fresh_shards
from lightning_curvature.functional import (
    PairStatistics,
    divergence_statistics,
    hessian_quadratic_form,
    output_noise_gain,
    output_quadratic_form,
    pair_statistics,
)
from lightning_curvature.operators.differentiation import differentiable, same_attention
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.optimizers.update import ParameterUpdate
from lightning_curvature.replay.isolation import parameters_replaced
from lightning_curvature.replay.objective import RecordedBatch, StepObjective

Values = dict[str, Tensor]

# What the symmetric pair of outputs contributes.
PAIR_NAMES = PairStatistics._fields


@dataclass
class Window:
    """The batches that made one optimizer step, with everything needed to evaluate their loss along it.

    Attributes:
        objective: repeats the recorded steps.
        update: the optimizer step.
        records: the recorded batches; one, or several under gradient accumulation.
        precision: makes the context of a forward.
        segment: manual optimization: which of the optimizer steps of the last batch is measured.
        averaged: whether the loss is the mean over the records (else their sum).
        model: how the loss depends on the outputs; None where there are none.
        base: loss and outputs of each record at θ_t.
    """

    objective: StepObjective
    update: ParameterUpdate
    records: list[RecordedBatch]
    precision: Callable[[], contextlib.AbstractContextManager[object]]
    segment: int = 0
    averaged: bool = True
    model: OutputModel | None = None
    base: list[Evaluation] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """Weight of one record in the loss."""
        return 1.0 / len(self.records) if self.averaged else 1.0

    def evaluations(self) -> Iterator[tuple[int, Evaluation]]:
        """One pass over the window with the parameters as they are now."""
        for index, record in enumerate(self.records):
            # In manual optimization every earlier batch of the window ended without a step: segment 0.
            segment = self.segment if index == len(self.records) - 1 else 0
            with self.precision(), same_attention(self.objective.module):
                result = self.objective.evaluate(record, segment)
            yield index, result

    @contextlib.contextmanager
    def at(self, position: float) -> Generator[None, None, None]:
        """Set the parameters to θ_t − position·d, without gradients."""
        with self.update.at(position), fresh_shards(self.objective.module), torch.no_grad():
            yield

    def loss_at(self, position: float) -> Tensor:
        """Local loss at θ_t − position·d."""
        with self.at(position):
            return self._total([e.loss for _, e in self.evaluations()])

    def _total(self, terms: list[Tensor]) -> Tensor:
        return torch.stack([t.detach().double() for t in terms]).sum() * self.weight

    def base_loss(self) -> Tensor:
        """Local loss at θ_t."""
        return self._total([e.loss for e in self.base])

    def mask(self, index: int) -> Tensor | None:
        """Weights of the positions of one record."""
        given = self.base[index].mask
        if given is not None:
            return given.reshape(-1)
        return None if self.model is None else self.model.weights(self.records[index].batch)

    def arranged(self, outputs: Tensor | None) -> Tensor:
        """Outputs with the components last.

        Raises:
            ValueError: if a repetition gave none though the step itself did.
        """
        if outputs is None or self.model is None:
            raise ValueError("outputs must come with every evaluation, got none in a repetition: return them always.")
        return self.model.arrange(outputs)

    def mean_of(self, statistic: Callable[[int, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Weighted sum over the records of ``scale · statistic(index, base outputs, mask)``."""
        assert self.model is not None
        terms = []
        for index, base in enumerate(self.base):
            mask = self.mask(index)
            scale = self.model.scale(self.base[index].outputs, mask)  # type: ignore[arg-type]
            terms.append(scale * statistic(index, self.arranged(base.outputs), mask))
        return self._total(terms)


def take_base(window: Window, repeat: bool) -> None:
    """Collect loss and outputs at θ_t: the step's own, or (``repeat``) those of a forward of the probes' kind."""
    if repeat:
        with window.at(0.0):
            window.base = [e for _, e in window.evaluations()]
        return
    last = len(window.records) - 1
    for index, record in enumerate(window.records):
        assert record.base is not None
        loss = window.objective.base_loss(record, window.segment if index == last else 0)
        window.base.append(Evaluation(loss, record.base.outputs, record.base.mask))


def rounding_statistics(window: Window) -> Values:
    """What rounding errors of the outputs do to the loss and to quadratic forms, as multiples of the unit squared."""

    def loss_gain(index: int, z: Tensor, mask: Tensor | None) -> Tensor:
        assert window.model is not None
        residual = window.model.residual(window.base[index].outputs, window.records[index].batch)  # type: ignore[arg-type]
        rows = residual.square().sum(-1) * z.reshape(residual.shape).float().square().mean(-1)
        return rows.mean() if mask is None else (mask * rows).sum() / mask.sum()

    def count(index: int, z: Tensor, mask: Tensor | None) -> Tensor:
        components = z.shape[-1] if z.ndim > 1 else 1
        return z.new_tensor(z.numel() // components, dtype=torch.float64) if mask is None else mask.sum().double()

    def spread(index: int, z: Tensor, mask: Tensor | None) -> Tensor:
        # What all positions have in common says nothing of the scale on which the network bends.
        rows = z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1)
        return output_noise_gain(rows - rows.mean(0), likelihood, mask)

    assert window.model is not None
    likelihood = window.model.likelihood
    noise = window.mean_of(lambda i, z, w: output_noise_gain(z, likelihood, w))
    positions = [count(i, window.arranged(e.outputs), window.mask(i)) for i, e in enumerate(window.base)]
    return {
        "noise_gain": noise,
        "spread_gain": noise if likelihood != "gaussian" else window.mean_of(spread),
        "loss_noise_gain": window.mean_of(loss_gain),
        "positions": torch.stack(positions).sum(),
    }


def one_sided(window: Window, epsilon: float) -> Values:
    """Loss and KL divergence at θ_t − εd: one pass."""
    assert window.model is not None
    likelihood = window.model.likelihood
    losses: list[Tensor] = []
    shifted: list[Tensor] = []
    with window.at(epsilon):
        for _, result in window.evaluations():
            losses.append(result.loss)
            shifted.append(window.arranged(result.outputs))
    statistics = [
        divergence_statistics(window.arranged(base.outputs), z, likelihood, window.mask(i))
        for i, (base, z) in enumerate(zip(window.base, shifted, strict=True))
    ]
    return {
        "loss_minus": window._total(losses),
        "twice_divergence": window.mean_of(lambda i, z, w: 2.0 * statistics[i].divergence),
        "departure": window.mean_of(lambda i, z, w: statistics[i].departure),
    }


def symmetric_pair(window: Window, epsilon: float, with_outputs: bool) -> Values:
    """Losses at θ_t ± εd, and what their outputs tell (see ``pair_statistics``): two passes."""
    losses: dict[float, list[Tensor]] = {1.0: [], -1.0: []}
    outputs: dict[float, list[Tensor]] = {1.0: [], -1.0: []}
    for sign in (1.0, -1.0):
        with window.at(sign * epsilon):
            for _, result in window.evaluations():
                losses[sign].append(result.loss)
                if with_outputs:
                    outputs[sign].append(window.arranged(result.outputs))
    values = {"loss_minus": window._total(losses[1.0]), "loss_plus": window._total(losses[-1.0])}
    if not with_outputs:
        return values
    assert window.model is not None
    likelihood = window.model.likelihood
    found = [
        pair_statistics(window.arranged(base.outputs), plus, minus, likelihood, window.mask(i))
        for i, (base, plus, minus) in enumerate(zip(window.base, outputs[-1.0], outputs[1.0], strict=True))
    ]
    return values | {name: window.mean_of(lambda i, z, w, n=name: getattr(found[i], n)) for name in PAIR_NAMES}  # type: ignore[misc]


def exact(window: Window, hvp: bool, gauss_newton: bool) -> Values:
    """dᵀHd by double backward and dᵀGd by one forward-mode product, both with gᵀd. Uses the update up."""
    values: Values = {}
    with window.update.direction() as direction, differentiable():
        if gauss_newton:
            with torch.no_grad():
                values |= _gauss_newton(window, direction)
        if hvp:
            with torch.enable_grad():
                values |= _hessian(window, direction)
    return values


def _check_loss(window: Window, index: int, loss: Tensor) -> None:
    """Raise where a step that is differentiated is another than the one that was made.

    Dropout has other masks in compiled code and in fused attention than without them. Roundings of the forward pass are
    far below the square root of their unit, other masks far above it.
    """
    base, found = float(window.base[index].loss), float(loss.detach())
    if abs(found - base) > torch.finfo(window.records[index].forward_dtype).eps ** 0.5 * max(abs(base), abs(found)):
        # Without the two losses: a sentence that changes with each step would be said at each step.
        raise ValueError(
            "a repeated step must have the loss it had, got another one without compiled code and fused attention: let "
            "dropout draw the same masks, torch._inductor.config.fallback_random = True, or leave 'hvp' and "
            "'gauss_newton' out."
        )


def _hessian(window: Window, direction: list[Tensor]) -> Values:
    descents, quadratics = [], []
    for index, result in window.evaluations():
        _check_loss(window, index, result.loss)
        descent, quadratic = hessian_quadratic_form(result.loss, window.update.parameters, direction)
        descents.append(descent)
        quadratics.append(quadratic)
    return {"hvp_descent": window._total(descents), "hvp_quadratic": window._total(quadratics)}


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode formulas, which newer versions do in a way that they warn users about."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _gauss_newton(window: Window, direction: list[Tensor]) -> Values:
    assert window.model is not None
    _load_forward_mode()
    model = window.model
    module, moved = window.objective.module, list(zip(window.update.parameters, direction, strict=True))
    descents: list[Tensor] = []
    quadratics: list[Tensor] = []
    last = len(window.records) - 1
    for index, record in enumerate(window.records):
        with forward_ad.dual_level(), window.precision():
            duals = {id(p): forward_ad.make_dual(p.detach(), d) for p, d in moved}
            with parameters_replaced(module, duals):
                found = window.objective.evaluate(record, window.segment if index == last else 0)
            outputs = found.outputs
            z, u = forward_ad.unpack_dual(window.arranged(outputs))
            loss, slope = forward_ad.unpack_dual(found.loss)
        if u is None or slope is None:
            raise ValueError(
                "outputs and loss must depend on the parameters that moved, got no derivative: check outputs=."
            )
        _check_loss(window, index, loss)
        mask = window.mask(index)
        assert outputs is not None
        quadratics.append(model.scale(outputs, mask) * output_quadratic_form(z, u, model.likelihood, mask))
        descents.append(slope)
    return {"gn_descent": window._total(descents), "gn_quadratic": window._total(quadratics)}
