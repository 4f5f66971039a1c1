"""Evaluations of the objective along the step, reduced to the numbers that a measurement consists of.

Every function returns scalars of *this rank* whose mean over all ranks is that of the job. None communicates.
"""

import functools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lightning_curvature import functional
from lightning_curvature.directional import head
from lightning_curvature.directional.options import EXACT, KEYS
from lightning_curvature.directional.problem import Window
from lightning_curvature.distributed.together import attempted, lacks_derivatives
from lightning_curvature.functional import PairStatistics, output_noise_gain
from lightning_curvature.functional.products import hessian_form_terms
from lightning_curvature.monitors.modules import Modules, ModuleTable
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.operators.micro_batches import Evaluation

Values = dict[str, Tensor]
# What rounding adds, known where the outputs are.
_ROUNDED = ("noise_gain", "spread_gain", "loss_noise_gain", "positions")


def names(estimators: Collection[str], have_outputs: bool, headed: bool, modules: Modules | None = None) -> list[str]:
    """Return the names of all numbers that ``forwards`` and ``exact`` return."""
    by_module = [*_by_module("descent", modules), *_by_module("quadratic", modules)] if modules is not None else []
    numbers = by_module if "hvp" in estimators else []
    numbers += [f"{name}_{form}" for name in EXACT if name in estimators for form in ("descent", "quadratic")]
    along = bool({"kl", "finite_difference"} & set(estimators))
    if "finite_difference" in estimators:
        numbers += ["loss_plus", "loss_minus", *(PairStatistics._fields if have_outputs else ())]
    elif "kl" in estimators:
        numbers += ["loss_minus", "twice_divergence", "departure"]
    if have_outputs:
        numbers += ["gauss_newton_slope"] if "gauss_newton" in estimators else []
        numbers += (["head_slope", "crossing"] if headed else ["outputs_slope"]) if along else []
    return numbers + ([*_ROUNDED] if have_outputs and (along or not headed) else [])


def _by_module(form: str, modules: Modules) -> list[str]:
    return [f"hvp_{form}/{name}" for name in modules.names]


def table(values: Mapping[str, float], modules: Modules) -> ModuleTable:
    """Return the terms of gᵀd and dᵀHd by module, as "descent" and "quadratic"."""
    forms = ("descent", "quadratic")
    return ModuleTable(modules.names, {form: [values[name] for name in _by_module(form, modules)] for form in forms})


def forwards(window: Window, epsilon: float, estimators: Collection[str]) -> Values:
    """Return the numbers of the estimators with an ε: one pass for KL alone, two with the finite difference."""
    values: Values = {}
    if window.headed:
        symmetric = "finite_difference" in estimators
        return _through_head(window, epsilon, symmetric) if symmetric or "kl" in estimators else values
    if "finite_difference" in estimators:
        values = _symmetric_pair(window, epsilon)
    elif "kl" in estimators:
        values = _one_sided(window, epsilon)
    return values | (_rounding_statistics(window) if window.model is not None else {})


def _rounding_statistics(window: Window) -> Values:
    """Return how rounding errors of the outputs change loss and quadratic forms, in units of the squared roundoff."""
    model = window.model
    assert model is not None
    loss_gains, positions = [], []
    for residual, (z, mask) in zip(window.residuals, window.outputs, strict=True):
        rows = residual.square().sum(-1) * z.reshape(residual.shape).float().square().mean(-1)
        loss_gains.append(rows.mean() if mask is None else (mask * rows).sum() / mask.sum())
        positions.append(z.new_tensor(len(rows), dtype=torch.float64) if mask is None else mask.sum().double())
    noise = spread = window.scaled_total(output_noise_gain(z, model.likelihood, mask) for z, mask in window.outputs)
    if model.likelihood == "gaussian":
        # What all positions have in common says nothing of the scale on which the network bends.
        rows_of = ((z.reshape(-1, z.shape[-1] if z.ndim > 1 else 1), mask) for z, mask in window.outputs)
        spread = window.scaled_total(output_noise_gain(z - z.mean(0), "gaussian", mask) for z, mask in rows_of)
    return {
        "noise_gain": noise,
        "spread_gain": spread,
        "loss_noise_gain": window.scaled_total(loss_gains),
        "positions": torch.stack(positions).sum(),
    }


def _through_head(window: Window, epsilon: float, symmetric: bool) -> Values:
    """Return the same numbers where the loss is a function of outputs by its head: two passes, or one."""
    loss_minus, minus = _made(window, epsilon)
    if symmetric:
        loss_plus, plus = _made(window, -epsilon)
    with window.at(0.0):
        if symmetric:
            return {"loss_minus": loss_minus, "loss_plus": loss_plus} | head.pair(window, plus, minus)
        return {"loss_minus": loss_minus} | head.one_sided(window, minus)


def _made(window: Window, position: float) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the loss at θ_t − position·d, and for each record what it is a function of there."""
    with window.at(position):
        results, beside = list(window.evaluations(on_sides=True)), head.parameters_beside(window)
        return window.total(one.loss for one in results), [[*head.made(window, one), *beside] for one in results]


def _one_sided(window: Window, epsilon: float) -> Values:
    """Return loss and KL divergence at θ_t − εd: one pass."""
    assert window.model is not None
    loss, shifted = _pass(window, epsilon)
    statistics = [
        functional.divergence_statistics(z, moved, window.model.likelihood, mask)
        for (z, mask), moved in zip(window.outputs, shifted, strict=True)
    ]
    changes = [z - moved for (z, _), moved in zip(window.outputs, shifted, strict=True)]
    return {
        "loss_minus": loss,
        "twice_divergence": window.scaled_total(2.0 * s.divergence for s in statistics),
        "departure": window.scaled_total(s.departure for s in statistics),
        "outputs_slope": _slope(window, changes),
    }


def _slope(window: Window, changes: Sequence[Tensor]) -> Tensor:
    """Return how the loss, as it is read, changes with the outputs to first order; NaN where no target is known."""
    model, terms = window.model, []
    assert model is not None
    for residual, (_, mask), change in zip(window.residuals, window.outputs, changes, strict=True):
        rows = (residual * change.reshape(residual.shape)).sum(-1)
        terms.append(rows.mean() if mask is None else (mask * rows).sum() / mask.sum())
    return window.scaled_total(terms) * (math.nan if model.target is None else 1.0)


def _symmetric_pair(window: Window, epsilon: float) -> Values:
    """Return the losses at θ_t ± εd, and where there are outputs their ``pair_statistics``: two passes."""
    loss_minus, minus = _pass(window, epsilon)
    loss_plus, plus = _pass(window, -epsilon)
    values = {"loss_minus": loss_minus, "loss_plus": loss_plus}
    if window.model is None:
        return values
    statistics = [
        functional.pair_statistics(z, up, down, window.model.likelihood, mask)
        for (z, mask), up, down in zip(window.outputs, plus, minus, strict=True)
    ]
    fields = zip(PairStatistics._fields, zip(*statistics, strict=True), strict=True)
    changes = [0.5 * (up - down) for up, down in zip(plus, minus, strict=True)]
    values |= {name: window.scaled_total(terms) for name, terms in fields}
    return values | {"outputs_slope": _slope(window, changes)}


def _pass(window: Window, position: float) -> tuple[Tensor, list[Tensor]]:
    """Return the loss at θ_t − position·d, and where there is a likelihood the outputs of each record."""
    losses: list[Tensor] = []
    outputs: list[Tensor] = []
    with window.at(position):
        for result in window.evaluations(on_sides=True):
            losses.append(result.loss)
            if window.model is not None:
                outputs.append(window.model.arrange(result.outputs))
    return window.total(losses), outputs


def exact(window: Window, estimators: Collection[str]) -> tuple[Values, dict[str, Exception]]:
    """Return dᵀHd by double backward and dᵀGd by one forward-mode product, both with gᵀd, and who failed.

    Uses the update up. Not every module has the derivatives: each estimator fails by itself.
    """
    values: Values = {}
    errors: dict[str, Exception] = {}
    if set(EXACT).isdisjoint(estimators):
        return values, errors
    try:
        with window.line.direction() as direction, differentiable():
            for name, form, graph in (("gauss_newton", _gauss_newton, False), ("hvp", _hessian, True)):
                if name in estimators:
                    note = functools.partial(errors.__setitem__, name)
                    with torch.set_grad_enabled(graph):
                        values |= attempted(functools.partial(form, window, direction), note) or {}
    except Exception as error:
        errors |= dict.fromkeys(estimators, error.with_traceback(None))
    return values, {name: _explained(name, error) for name, error in errors.items()}


def _explained(name: str, error: Exception) -> Exception:
    """Return an error of torch as one sentence with a remedy; any other as it is."""
    if not isinstance(error, RuntimeError) or not lacks_derivatives(error):  # so is NotImplementedError
        return error
    kind, instead = ("second", "finite_difference") if name == "hvp" else ("forward-mode", "kl")
    what = str(error).partition("\n")[0].partition(" Please file")[0].rstrip(". ")
    return RuntimeError(
        f"{KEYS[name]} needs {kind} derivatives of the step, which failed ({what}): take {instead!r} for {name!r}."
    )


def _check_loss(window: Window, index: int, loss: Tensor) -> None:
    """Raise unless a step that is differentiated has the loss that it had.

    Dropout has other masks in compiled code and in fused attention than without them. Roundings of the forward pass are
    far below the square root of their unit, other masks far above it.
    """
    base, again = float(window.base[index].loss), float(loss.detach())
    if abs(again - base) > torch.finfo(window.records[index].forward_dtype).eps ** 0.5 * max(abs(base), abs(again)):
        # Without the two losses: a sentence that changes with each step would be said at each step.
        raise ValueError(
            "a repeated step must have the loss it had, got another one without compiled code and fused attention: let "
            "dropout draw the same masks, torch._inductor.config.fallback_random = True, or leave 'hvp' and "
            "'gauss_newton' out."
        )


def _hessian(window: Window, direction: list[Tensor]) -> Values:
    forms, parameters = [], window.update.parameters
    for index, result in enumerate(window.evaluations()):
        _check_loss(window, index, result.loss)
        forms.append(hessian_form_terms(result.loss, parameters, direction))
    values: Values = {}
    for form, terms in zip(("descent", "quadratic"), zip(*forms, strict=True), strict=True):
        values[f"hvp_{form}"] = window.total(by_parameter.sum() for by_parameter in terms)
        if window.modules is not None:
            by_module = window.total(window.modules.sums(parameters, by_parameter) for by_parameter in terms)
            values |= dict(zip(_by_module(form, window.modules), by_module, strict=True))
    return values


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode formulas, which newer versions do with a warning to users."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _gauss_newton(window: Window, direction: list[Tensor]) -> Values:
    _load_forward_mode()
    if window.headed:
        return _gauss_newton_of_head(window, direction)
    assert window.model is not None
    descents, quadratics, changes = [], [], []
    for index, (_, mask) in enumerate(window.outputs):
        with forward_ad.dual_level():
            result = _dual(window, index, direction)
            z, u = forward_ad.unpack_dual(window.model.arrange(result.outputs))
            loss, slope = forward_ad.unpack_dual(result.loss)
        if u is None or slope is None:
            raise ValueError(
                "outputs and loss must depend on the parameters that moved, got no derivative: check outputs=."
            )
        _check_loss(window, index, loss)
        quadratics.append(functional.output_quadratic_form(z, u, window.model.likelihood, mask))
        changes.append(u)
        descents.append(slope)
    values = {"descent": window.total(descents), "quadratic": window.scaled_total(quadratics)}
    values["slope"] = _slope(window, changes)
    return {f"gauss_newton_{name}": value for name, value in values.items()}


def _dual(window: Window, index: int, direction: list[Tensor]) -> Evaluation:
    moved = zip(window.update.parameters, direction, strict=True)
    return window.dual_evaluation(index, {id(p): forward_ad.make_dual(p.detach(), d) for p, d in moved})


def _gauss_newton_of_head(window: Window, direction: list[Tensor]) -> Values:
    assert window.objective.cut is not None
    beside = [direction[k] for k in window.objective.cut.parameters]
    descents, quadratics, slopes = [], [], []
    for index in range(len(window.records)):
        with forward_ad.dual_level():
            result = _dual(window, index, direction)
            pairs = [forward_ad.unpack_dual(z) for z in head.made(window, result)]
            loss, slope = forward_ad.unpack_dual(result.loss)
        changes = [torch.zeros_like(z) if u is None else u for z, u in pairs]
        _check_loss(window, index, loss)
        values, _ = head.derivatives(window, index, [[*changes, *beside]], higher=False)
        quadratics.append(values["second"][0])
        slopes.append(values["first"][0])
        descents.append(torch.zeros(()) if slope is None else slope)
    totals = {"descent": descents, "quadratic": quadratics, "slope": slopes}
    return {f"gauss_newton_{name}": window.total(terms) for name, terms in totals.items()}
