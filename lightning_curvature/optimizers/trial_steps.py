"""The update that an optimizer would make with another gradient, without a trace."""

import contextlib
import copy
import functools
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators.differentiation import put_back_at_exit
from lightning_curvature.replay.isolation import gradient_hooks, muted, without_gradients, without_hooks
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import Snapshot, restored

# Torch's dictionaries of hooks on all optimizers. The names are private: where they differ, trial steps call the hooks.
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class TrialSteps:
    r"""Steps of an optimizer from its present state with given gradients, undone.

    .. math:: d(g) = \theta - \theta'(g) = \eta\,\Delta\theta, \qquad
        \theta'(g) \text{ the parameters after the optimizer's own step from } \theta \text{ with the gradient } g .

    The optimizer itself makes the step, with clipping, momentum, preconditioner and weight decay. Then everything in
    its reach is put back, bit for bit, into the same objects, also after an error: parameters, gradients, state,
    options, attributes, also those of its classes, variables of closures, inner optimizers, generators (files are not).
    Version counters come back too, so that autograd graphs kept for the parameters remain valid. A call needs memory
    for the parameters and the optimizer's state once more, and for one gradient; none for parameters without a gradient
    where the step is one of torch's, which leave them alone. Of sharded parameters (FSDP2) each rank saves its shards;
    all ranks ask for the same update together, since clipping and steps may communicate.

    The Trainer's precision plugin clips the gradients first, or the module where it overrides
    ``configure_gradient_clipping``; it then logs nothing, and its state is put back. Under manual optimization
    Lightning does not clip, and nothing is clipped here. A trial calls no code that hangs on the step and may count or
    write: the module's ``optimizer_step`` and ``on_before_optimizer_step``, hooks of steps and parameters, a ``step``
    that somebody has put on the instance (learning-rate schedulers do), and the gradient scaler. Every trial draws the
    random numbers of the optimizer's next step.

    Args:
        trainer: says how gradients are clipped.
        optimizer: the bare torch optimizer, ``trainer.optimizers[i]``.
        parameters: those of its parameters that have a gradient in a trial; any order.

    Raises:
        MisconfigurationException: as :meth:`check` does; for parameters that the optimizer does not hold.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=0.5)
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
        >>> trials = TrialSteps(trainer, optimizer, [weight])
        >>> trials.update_for(torch.tensor([0.0, 4.0])), weight.tolist(), dict(optimizer.state)
        (tensor([0.0000, 0.2500]), [1.0, 2.0], {})
    """

    def __init__(self, trainer: pl.Trainer, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        self.check(optimizer)
        self._trainer, self._optimizer, self._parameters = trainer, optimizer, list(parameters)
        self._held = [p for group in optimizer.param_groups for p in group["params"]]
        held, name = {id(p) for p in self._held}, type(optimizer).__name__
        if strange := [p for p in self._parameters if id(p) not in held]:
            raise MisconfigurationException(
                f"parameters must be among those of the optimizer, got {len(strange)} that {name} does not hold: give "
                "those of its param_groups."
            )
        self._space = VectorSpace([local(p) for p in self._parameters])

    @staticmethod
    def check(optimizer: Any) -> None:
        """Raise a MisconfigurationException where ``step`` needs an argument, as L-BFGS its closure."""
        arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
        needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        if needed:
            raise MisconfigurationException(
                f"optimizer must step on gradients alone for trial updates, got {type(optimizer).__name__}, whose step "
                f"needs {' and '.join(needed)}: train with another optimizer, or leave 'lambda_gen' and "
                "'update_sharpness' out."
            )

    @torch.no_grad()
    def update_for(self, gradient: Tensor) -> Tensor:
        """Return the update d = θ − θ', (n,), that the optimizer would make with a gradient, in fresh memory.

        Args:
            gradient: flat like d, this rank's shards in the order of ``parameters``; unclipped, unscaled; only read.

        Raises:
            MisconfigurationException: if something that the optimizer holds can neither be put back nor copied, or if
                its step fails (an optimizer that asserts a closure, or takes none but sparse gradients).
        """
        with self._undone():
            self._step(gradient)
            after = self._space.pack([local(p) for p in self._parameters])
        return self._space.add_(after.neg_(), [local(p) for p in self._parameters], 1.0)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call code of the optimizer: where that fails, and it alone, the optimizer is not one for trial steps."""
        try:
            return function(*args)
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_oom_error(error):
                raise
            raise MisconfigurationException(
                "optimizer must be one whose state can be put back and which steps on dense gradients alone, got "
                f"{type(self._optimizer).__name__} ({type(error).__name__}: {error}): train with another optimizer, or "
                "leave 'lambda_gen' and 'update_sharpness' out."
            ) from error

    @contextlib.contextmanager
    def _undone(self) -> Generator[None, None, None]:
        """Let the optimizer step inside the block unheard, from parameters without gradients, and undo it."""
        module, stepped = self._trainer.lightning_module, {id(p) for p in self._parameters}
        everywhere = [*self._held, *(module.parameters() if module is not None else ())]
        leaves_alone = inspect.unwrap(type(self._optimizer).step).__module__.startswith("torch.optim.")
        spared = [p for p in self._held if leaves_alone and id(p) not in stepped]
        home = importlib.import_module("torch.optim.optimizer")  # torch deletes its name from torch.optim
        tables = [getattr(home, key, None) for key in _GLOBAL_HOOKS] + gradient_hooks(self._held)
        devices = {p.device for p in self._held}
        with contextlib.ExitStack() as stack:
            for device in devices:
                put_back_at_exit(stack, RandomState(device).restore)
            stack.enter_context(without_gradients(everywhere))
            stack.enter_context(without_hooks(tables))
            copied = functools.partial(self._call, copy.deepcopy)
            stack.enter_context(restored([self._optimizer, *self._held], spared, _silence, copied))
            for device in devices - {torch.device("cpu")}:
                # A step may still be writing on a stream of its own. torch.mps has one device and takes no argument.
                stack.callback(getattr(torch, device.type).synchronize, *(() if device.type == "mps" else (device,)))
            yield

    def _step(self, gradient: Tensor) -> None:
        for p, values in zip(self._parameters, self._space.views(gradient), strict=True):
            # Of the strides that autograd gives it, on which kernels and the order of their sums depend.
            p.grad = torch.empty_like(p)
            local(p.grad).copy_(values)
        self._clip()
        with torch.enable_grad():  # as in training: steps that need it off turn it off
            self._call(self._optimizer.step)
        for p in self._parameters:
            p.grad = None

    def _clip(self) -> None:
        module, trainer = self._trainer.lightning_module, self._trainer
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if module is not None and not module.automatic_optimization:
            return
        if not is_overridden("configure_gradient_clipping", module, pl.LightningModule):
            kind = GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)
            trainer.precision_plugin.clip_gradients(self._optimizer, value or 0.0, kind)
            return
        with contextlib.ExitStack() as stack:
            put_back_at_exit(stack, Snapshot([module], passed=module.parameters()).restore)
            stack.enter_context(muted(module, trainer.global_step))
            module.configure_gradient_clipping(self._optimizer, value, algorithm)


def _silence(value: Any) -> None:
    """Take hooks and a ``step`` that others have put there off an optimizer, also one inside a wrapper."""
    if hasattr(type(value), "step") and hasattr(value, "param_groups"):
        attributes = getattr(value, "__dict__", {})
        attributes.pop("step", None)
        hooks = [key for key in attributes if key.startswith("_optimizer_") and key.endswith("_hooks")]
        attributes.update({key: OrderedDict() for key in hooks})
