"""Stability threshold and preconditioner of a torch optimizer on a quadratic.

With the second moment taken as constant, a step of the optimizers known here is linear in the gradient, coordinate by
coordinate. At the edge, where a root of the recursion leaves the unit circle through z = −1, it reads H θ = T P θ with
a diagonal of thresholds T, one for the settings of each parameter group. Groups of unequal learning rate, momentum or
decoupled weight decay therefore need no approximation: P times T/T_ref has the one threshold T_ref for all. No other
root lies on the unit circle: there the imaginary parts of the groups' characteristic polynomials, divided by those of
the gradient, have one sign.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from lightning_curvature.distributed.shards import local
from lightning_curvature.functional.thresholds import adaptive_threshold, momentum_threshold
from lightning_curvature.optimizers.update import HasParameterGroups

Group = Mapping[str, Any]
_KNOWN: tuple[type[Optimizer], ...] = (SGD, Adam, AdamW, Adamax, RMSprop, Adagrad)


class NotYetSteppedError(ValueError):
    """An adaptive optimizer has no preconditioner before its first step."""


@dataclass(frozen=True)
class StabilityRule:
    """Where an optimizer's step on a quadratic turns unstable.

    Attributes:
        lr: η of the first parameter group that has a non-zero one and trainable parameters; 0 where none has.
        hessian: threshold on λ_max(H), that of the same group; 2/η for optimizers that are not known, NaN for adaptive
            ones, which have none on H itself.
        preconditioned: threshold on λ_max(P^{-1/2} H P^{-1/2}) with P as :func:`preconditioner` returns it, for all
            groups at once; NaN for optimizers that are not known. Bias corrections are those of the last step made,
            before the first step those of the long run.
        note: one sentence where something is assumed or left out.
    """

    lr: float
    hessian: float
    preconditioned: float
    note: str | None = None


def stability_rule(optimizer: HasParameterGroups) -> StabilityRule:
    r"""Return the thresholds of an optimizer with its present settings.

    Exact for ``torch.optim``'s SGD (momentum, dampening, Nesterov, weight decay), Adam and AdamW, Adamax, RMSprop
    and Adagrad on a quadratic, with the second moment taken as constant. Weight decay that an adaptive optimizer adds
    to the gradient acts as :math:`H + \lambda I` in place of H: it is left out, and the note says so.

    Args:
        optimizer: a torch optimizer, bare or as Lightning wraps it. A subclass that overrides ``step`` is not known.

    Returns:
        The rule. Thresholds are infinite where all learning rates are 0, and NaN where none exists: for
        ``maximize=True``, which climbs, and for settings that are never stable (momentum of 1).

    Source: Cohen et al. 2021 (arXiv 2103.00065) and 2022 (arXiv 2207.14484); see the functions ``momentum_threshold``
    and ``adaptive_threshold`` of :mod:`lightning_curvature.functional`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> stability_rule(torch.optim.SGD([weight], lr=0.5, momentum=0.5))
        StabilityRule(lr=0.5, hessian=6.0, preconditioned=6.0, note=None)
    """
    bare = _unwrapped(optimizer)
    groups = _moving_groups(bare)
    lr, kind, name = _lr(groups[0]), _kind(bare), type(bare).__name__
    if kind is None:
        note = f"{name} is not known: 2/η of gradient descent is drawn"
        return StabilityRule(lr, 2.0 / lr if lr else math.inf, math.nan, _joined(note, _inequality(groups, None)))
    if any(group.get("maximize", False) for group in groups):
        note = f"{name} with maximize=True climbs: the largest eigenvalue of H has no threshold"
        return StabilityRule(lr, math.nan, math.nan, _joined(note))
    try:
        threshold = _reference_threshold(bare, kind)
    except ValueError as error:
        return StabilityRule(lr, math.nan, math.nan, _joined(f"{name} has no threshold, since {error}".rstrip(".")))
    if kind is SGD:
        return StabilityRule(lr, threshold, threshold, _joined(_inequality(groups, kind)))
    coupled = max((float(g.get("weight_decay", 0.0)) for g in groups if not _is_decoupled(bare, g)), default=0.0)
    decay = f"weight_decay={coupled:g} of {name} acts as H + {coupled:g}·I, which is left out" if coupled else None
    return StabilityRule(lr, math.nan, threshold, _joined(_inequality(groups, kind), decay))


def momenta(optimizer: HasParameterGroups, parameters: Sequence[Tensor]) -> list[tuple[float, bool]]:
    """Return β of each parameter, of a heavy ball or of a first moment, and whether it is Nesterov's.

    Raises:
        ValueError: for an optimizer that is not known.
    """
    bare = _unwrapped(optimizer)
    kind = _known_kind(bare)
    group_of = {id(p): group for group in bare.param_groups for p in group["params"]}
    groups = [group_of.get(id(p), {}) for p in parameters]
    first = "betas" if kind in (Adam, AdamW, Adamax) else "momentum"
    betas = [group.get(first) or 0.0 for group in groups]
    return [
        (float(beta[0] if isinstance(beta, tuple | list) else beta), bool(group.get("nesterov", False)))
        for beta, group in zip(betas, groups, strict=True)
    ]


@torch.no_grad()
def preconditioner(optimizer: HasParameterGroups, parameters: Sequence[Tensor]) -> list[Tensor]:
    r"""Return the diagonal P by which the last step divided each coordinate, from the optimizer's state.

    .. math:: \theta_{t+1} = \theta_t - \eta\, P^{-1} m, \qquad
        P = \sqrt{\hat v} + \epsilon \text{ for Adam},\quad u \text{ for Adamax},\quad
        \sqrt{v - \bar g^2} + \epsilon \text{ for RMSprop},\quad \sqrt{\Sigma g^2} + \epsilon \text{ for Adagrad},

    and 1 for SGD, exactly as in ``torch.optim`` (v̂ with its bias correction, AMSGrad's maximum; ḡ where centered). The
    numerator m is the bias-corrected first moment, or the gradient.

    Where groups differ, P takes up their difference, so that the one threshold
    ``stability_rule(optimizer).preconditioned`` holds for all: the step of a group with η_g is
    η_g P⁻¹m = η (P η/η_g)⁻¹m, and likewise for momentum, decoupled weight decay and bias corrections.

    P is infinite, P^{-1/2} = 0, for coordinates that the optimizer does not move: parameters that it does not hold,
    that are frozen, that never had a gradient, or whose learning rate is 0.

    Args:
        optimizer: a torch optimizer, bare or as Lightning wraps it.
        parameters: the parameters of the Hessian, the optimizer's own objects.

    Returns:
        For each parameter P in the shape of this rank's shard, in float32 or wider, positive; fresh memory.

    Raises:
        ValueError: for an optimizer that is not known, and for settings that are never stable.
        NotYetSteppedError: a ValueError, before the first step of an adaptive optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = torch.optim.Adam([weight], eps=0.5)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> preconditioner(optimizer, [weight])  # after one step |g| + eps
        [tensor([2.5000, 4.5000])]
    """
    bare = _unwrapped(optimizer)
    kind, name = _known_kind(bare), type(bare).__name__
    group_of = {id(p): group for group in bare.param_groups for p in group["params"]}
    steps = _steps_made(bare, parameters) if kind is not SGD else [1.0] * len(parameters)
    moved = [p.requires_grad and id(p) in group_of and t > 0 for p, t in zip(parameters, steps, strict=True)]
    if not any(moved):
        raise NotYetSteppedError(
            f"optimizer must have moved at least one of the parameters, got {name} that has not: its preconditioner "
            "exists from its first step on."
        )
    reference = _reference_threshold(bare, kind)
    diagonals = []
    for p, t, moves in zip(parameters, steps, moved, strict=True):
        diagonal, factor = torch.ones_like(_wide(p)), math.inf
        if moves:
            group = group_of[id(p)]
            factor = _relative(_threshold(bare, kind, group, t), reference)
            diagonal = diagonal if kind is SGD else _diagonal(kind, bare.state[p], group, t)
        diagonals.append(diagonal.mul_(factor))
    return diagonals


def _relative(threshold: float, reference: float) -> float:
    """Return the ratio of two thresholds, also where both are infinite."""
    if threshold == reference:
        return 1.0
    if not (threshold > 0.0 and reference > 0.0):
        raise ValueError(
            "parameter groups must be stable under weight decay alone, got the thresholds "
            f"{reference:g} and {threshold:g}: lower lr or weight_decay."
        )
    return threshold / reference


def _threshold(optimizer: Any, kind: type[Optimizer], group: Group, step: float) -> float:
    """Return the threshold of a parameter group that has made so many steps; without any, the one of the long run."""
    lr = _lr(group)
    if kind is SGD:
        return momentum_threshold(
            lr,
            float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            weight_decay=float(group["weight_decay"]),
        )
    if kind is RMSprop:
        return momentum_threshold(lr, float(group["momentum"]))
    if kind is Adagrad:
        return momentum_threshold(lr / (1.0 + max(step - 1.0, 0.0) * float(group["lr_decay"])))
    beta1 = float(group["betas"][0])
    correction = 1.0 - beta1**step if step else 1.0
    decay = float(group["weight_decay"]) if _is_decoupled(optimizer, group) else 0.0
    return adaptive_threshold(lr, beta1, decoupled_weight_decay=decay, bias_correction=correction)


def _diagonal(kind: type[Optimizer], state: Mapping[str, Tensor], group: Group, step: float) -> Tensor:
    """Return P from the state of one parameter, for all kinds but SGD."""
    correction = 1.0
    if kind is Adamax:
        return _wide(state["exp_inf"]).clone()  # eps is in it
    if kind is Adagrad:
        second_moment = _wide(state["sum"])
    elif kind is RMSprop:
        second_moment = _wide(state["square_avg"])
        if group["centered"]:
            mean = _wide(state["grad_avg"])
            # A variance of 0 may come out below it, by rounding that differs from kernel to kernel.
            second_moment = torch.addcmul(second_moment, mean, mean, value=-1).clamp_(min=0.0)
    else:
        second_moment = _wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        correction = 1.0 - float(group["betas"][1]) ** step
    return second_moment.sqrt().div_(math.sqrt(correction)).add_(float(group["eps"]))


def _unwrapped(optimizer: Any) -> Any:
    # Lightning's wrapper passes for an instance of the wrapped class, with a step of its own.
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _kind(optimizer: Any) -> type[Optimizer] | None:
    """Return the known class of an optimizer, or of which it is a subclass that does not override ``step``."""
    # torch puts a profiling wrapper around the step of each class that is instantiated.
    step = inspect.unwrap(type(optimizer).step)
    return next((c for c in _KNOWN if isinstance(optimizer, c) and inspect.unwrap(c.step) is step), None)


def _known_kind(optimizer: Any) -> type[Optimizer]:
    kind = _kind(optimizer)
    if kind is None:
        known, name = ", ".join(cls.__name__ for cls in _KNOWN), type(optimizer).__name__
        raise ValueError(
            f"optimizer must be one of torch.optim's {known}, got {name}: its preconditioner is not known."
        )
    return kind


def _moving_groups(optimizer: Any) -> list[Group]:
    """Return the groups that take part in a step, of which the first gives η; if none does, the first of all."""
    groups: list[Group] = list(optimizer.param_groups)
    trainable = [group for group in groups if any(p.requires_grad for p in group["params"])] or groups[:1]
    return [group for group in trainable if _lr(group)] or trainable[:1]


def _lr(group: Group) -> float:
    return float(group.get("lr") or 0.0)


def _is_decoupled(optimizer: Any, group: Group) -> bool:
    # In torch 2.6 AdamW stands beside Adam, and its groups have no such entry.
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def _reference_threshold(optimizer: Any, kind: type[Optimizer]) -> float:
    """Return the threshold of the first group that moves, for the largest step count of its parameters."""
    group = _moving_groups(optimizer)[0]
    return _threshold(optimizer, kind, group, max(_steps_made(optimizer, group["params"]), default=0.0))


def _steps_made(optimizer: Any, parameters: Sequence[Tensor]) -> list[float]:
    """Return the step count in the state of each parameter, 0 where there is none; at most one synchronization."""
    counts = [optimizer.state.get(p, {}).get("step", 0.0) for p in parameters]
    tensors = [local(torch.as_tensor(count)).detach() for count in counts]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([t.to(device, torch.float64).reshape(()) for t in tensors]).tolist() if tensors else []


def _wide(tensor: Tensor) -> Tensor:
    return local(tensor).to(torch.promote_types(tensor.dtype, torch.float32))


def _inequality(groups: Sequence[Group], kind: type[Optimizer] | None) -> str | None:
    """Return a note on groups whose steps differ by more than their weight decay."""

    def setting(group: Group, key: str) -> float:
        value = group.get(key) or 0.0
        return float(value[0] if isinstance(value, tuple | list) else value)

    keys = ("lr", "momentum", "dampening", "nesterov", "betas") if kind else ("lr",)
    unequal = " and ".join(key for key in keys if len({setting(group, key) for group in groups}) > 1)
    first = "the threshold on λ_max(H) is the first group's"
    consequence = first if kind in (None, SGD) else "P is scaled to the first group's"
    return f"parameter groups differ in {unequal}: {consequence}" if unequal else None


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) + "." if any(notes) else None
