"""Gauss–Newton of any loss: its second derivative along the change of the outputs, by a pass through its head alone.

With ℓ(z) the loss as a function of the outputs z, and u their change along the step, dᵀGd = uᵀ(∇²ℓ)u. Parameters that
the loss reaches beside the outputs (penalties, temperatures) are outputs like any other, with u = d.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_curvature.directional.problem import Window
from lightning_curvature.distributed.shards import is_of_sharding
from lightning_curvature.functional.products import check_differentiable
from lightning_curvature.operators.differentiation import same_attention
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.replay.check import other_loss
from lightning_curvature.replay.head import Cut, find_cut, head_loss, made_outputs
from lightning_curvature.replay.isolation import parameters_replaced, without_hooks

Values = dict[str, Tensor]
# A change of the outputs, the one at hand and that by rounding: each as a list of tensors.
Change = Sequence[Tensor]


def take(window: Window) -> None:
    """Find where to cut off the head of the loss, unless that is known, and the outputs there at θ_t.

    Raises:
        ValueError: if there is no such place, or the head by itself has another loss.
    """
    objective, known = window.objective, window.objective.cut is not None
    if objective.differentiates:
        raise ValueError("the step differentiates by itself, and so depends on more than its outputs")
    if not known:

        def find() -> Cut | None:
            trained, name = window.update.parameters, objective.outputs_name
            return find_cut(objective, window.records[0], window.segment_of(0), trained, name)

        with window.at(0.0), window.precision(), same_attention(objective.module):
            objective.cut = window.in_step(find, lambda: None)
    window.headed = True
    with window.at(0.0):
        if not all(base.calls for base in window.base):
            pairs = zip(window.base, window.evaluations(), strict=True)
            window.base = [replace(base, calls=result.calls) for base, result in pairs]
        window.check()
        assert objective.cut is not None
        window.beside = parameters_beside(window)
        for index, base in enumerate(window.base):
            loss = _loss(window, index, _points(window, index))
            if other_loss(float(base.loss), float(loss), window.records[index].forward_dtype, ()) is not None:
                raise ValueError(
                    f"the loss must be a function of the outputs of {sorted(objective.cut.made)}, got "
                    f"{float(loss):.6g} from them alone where it was {float(base.loss):.6g}"
                )
    if not known:
        _check(window)


def _points(window: Window, index: int) -> list[Tensor]:
    """Return what one record's loss is a function of, at θ_t: outputs, then parameters."""
    return [*made(window, window.base[index]), *window.beside]


def made(window: Window, result: Evaluation) -> list[Tensor]:
    """Return the outputs of an evaluation at which the loss is cut off."""
    assert window.objective.cut is not None
    return made_outputs(window.objective.cut, result.calls)


def parameters_beside(window: Window) -> list[Tensor]:
    """Return copies of the parameters, as they are now, that the loss reaches beside the outputs."""
    assert window.objective.cut is not None
    return [window.update.parameters[k].detach().clone() for k in window.objective.cut.parameters]


def _loss(window: Window, index: int, points: list[Tensor]) -> Tensor:
    """Return one record's loss at other outputs and parameters beside them; to be called at θ_t."""
    objective, cut = window.objective, window.objective.cut
    assert cut is not None
    count = len(points) - len(cut.parameters)
    parameters = [id(window.update.parameters[k]) for k in cut.parameters]
    replaced = dict(zip(parameters, points[count:], strict=True))
    # No module with parameters runs: there is nothing to gather.
    hooks = [table for m in objective.module.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    with (
        window.precision(),
        parameters_replaced(objective.module, replaced),
        objective.gathers.none(),
        without_hooks(hooks, is_of_sharding),
    ):
        calls, segment = window.base[index].calls, window.segment_of(index)
        return head_loss(objective, window.records[index], segment, cut, calls, points[:count])


def derivatives(window: Window, index: int, changes: Sequence[Change], higher: bool) -> tuple[Values, list[Tensor]]:
    """Return first and second derivatives of one record's loss along changes of its outputs, and ∂ℓ/∂z.

    To be called at θ_t. With ``higher`` third and fourth ones, along the first change, 0 where the loss has none, and
    "crossing": the root mean square of uᵀ(∇²ℓ)n, u the first change and n independent errors as large as the outputs.
    """
    points = [z.detach().requires_grad_() for z in _points(window, index)]
    wide = torch.promote_types(points[0].dtype, torch.float32)
    t = torch.zeros(len(changes), dtype=wide, device=points[0].device, requires_grad=True)
    with torch.enable_grad():
        moved = [
            z + sum((t[i].to(z.device, z.dtype) * change[k] for i, change in enumerate(changes)), torch.zeros_like(z))
            for k, z in enumerate(points)
        ]
        loss = _loss(window, index, moved)
        first, *gradient = torch.autograd.grad(
            loss, [t, *points], create_graph=True, allow_unused=True, materialize_grads=True
        )
        check_differentiable(loss, [t, *points], [first, *gradient])
        second = torch.stack([_along(first[i], t, i, higher and i == 0) for i in range(len(changes))])
        values = {"first": first.detach(), "second": second.detach()}
        if higher:
            values["crossing"] = _crossing(first[0], points)
            values |= dict.fromkeys(("third", "fourth"), torch.zeros_like(loss.detach()))
            with contextlib.suppress(RuntimeError):  # some functions have two derivatives and no more
                third = _along(second[0], t, 0, graph=True)
                values |= {"third": third.detach(), "fourth": _along(third, t, 0, graph=False).detach()}
    return values, [part.detach() for part in gradient]


def _crossing(slope: Tensor, points: Sequence[Tensor]) -> Tensor:
    """Return √Σ((∇²ℓ)u)²z² over positions and components, from the derivative of the loss along u."""
    if slope.grad_fn is None:
        return torch.zeros_like(slope.detach(), dtype=torch.float64)
    pulled = torch.autograd.grad(slope, points, retain_graph=True, allow_unused=True, materialize_grads=True)
    return _squares(pulled, points).sqrt()


def _squares(gradient: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Return the sum over all components of the squares of a gradient times the size of its position's outputs."""
    pairs = zip(gradient, outputs, strict=True)
    return torch.stack([(g * _size(z)).detach().double().square().sum() for g, z in pairs]).sum()


def _check(window: Window) -> None:
    """Raise ValueError where the loss has no second derivative by its outputs."""
    try:
        with window.at(0.0):
            derivatives(window, 0, [[torch.ones_like(z) for z in _points(window, 0)]], higher=False)
    except RuntimeError as error:
        raise ValueError(f"its second derivative by the outputs is not to be had ({error})") from error


def _along(value: Tensor, t: Tensor, index: int, graph: bool) -> Tensor:
    """Return the derivative by one entry of t; 0 where the value does not depend on it."""
    if value.grad_fn is None:
        return torch.zeros_like(value)
    (derivative,) = torch.autograd.grad(
        value, t, create_graph=graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return derivative[index]


def pair(window: Window, plus: Sequence[Change], minus: Sequence[Change]) -> Values:
    """Return the numbers of a symmetric pair of outputs: those of ``pair_statistics``, and what rounding adds."""
    rows = []
    for index, (up, down) in enumerate(zip(plus, minus, strict=True)):
        base = _points(window, index)
        # Differences first: near convergence z is large and its changes are small.
        ups, downs = ([one - z for one, z in zip(side, base, strict=True)] for side in (up, down))
        odd, even = ([0.5 * (a + sign * b) for a, b in zip(ups, downs, strict=True)] for sign in (-1.0, 1.0))
        values, gradient = derivatives(window, index, [odd, even, _rounded(base)], higher=True)
        signal, defect, noise = values["second"]
        rows.append(
            {
                "signal": signal,
                "defect": defect.abs(),
                "third": values["third"],
                "fourth": values["fourth"],
                "head_slope": values["first"][0],
                "crossing": values["crossing"],
            }
            | _noise(base, gradient, noise)
        )
    return _totals(window, rows)


def one_sided(window: Window, minus: Sequence[Change]) -> Values:
    """Return the numbers of the outputs at θ_t − εd alone."""
    rows = []
    for index, down in enumerate(minus):
        base = _points(window, index)
        change = [z - one for z, one in zip(base, down, strict=True)]
        values, gradient = derivatives(window, index, [change, _rounded(base)], higher=True)
        signal, noise = values["second"]
        rows.append(
            {"twice_divergence": signal, "departure": values["third"].abs()}
            | {"head_slope": values["first"][0], "crossing": values["crossing"]}
            | _noise(base, gradient, noise)
        )
    return _totals(window, rows)


def _rounded(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return changes of random signs as large as the outputs of each position, the same in every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    signs = [(torch.rand(z.shape, generator=generator) < 0.5).to(z.device, z.dtype) * 2.0 - 1.0 for z in outputs]
    return [sign * _size(z) for sign, z in zip(signs, outputs, strict=True)]


def _size(outputs: Tensor) -> Tensor:
    """Return the root mean square of each position's components, to be broadcast over them."""
    return outputs.square().mean(-1, keepdim=True).sqrt() if outputs.ndim else outputs.abs()


def _noise(outputs: Sequence[Tensor], gradient: Sequence[Tensor], noise: Tensor) -> Values:
    """Return what rounding errors as large as the outputs do to the quadratic form and to the loss."""
    positions = sum(z.numel() // (z.shape[-1] if z.ndim > 1 else 1) for z in outputs)
    loss = _squares(gradient, outputs)
    return {
        "noise_gain": noise.abs(),
        "spread_gain": noise.abs(),
        "loss_noise_gain": loss * positions,
        "positions": loss.new_tensor(float(positions)),
    }


def _totals(window: Window, rows: Sequence[Values]) -> Values:
    """Add the numbers of the records, each as the loss weights it; positions are counted."""
    values = {name: window.total(row[name] for row in rows) for name in rows[0]}
    return values | {"positions": torch.stack([row["positions"] for row in rows]).sum()}
