"""Contexts in which a model can be differentiated twice, or runs the same code without gradients as with them."""

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction


@contextlib.contextmanager
def differentiable() -> Generator[None, None, None]:
    """Replace code without double backward or forward mode: fused attention, compiled graphs, reentrant checkpoints.

    And fused weight normalization, whose second derivatives are wrong: they take the norms for constants.
    """

    def run(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)

    # An inherited classmethod: the outermost of nested contexts removes the attribute of the class itself again.
    nested = "apply" in vars(CheckpointFunction)
    CheckpointFunction.apply = staticmethod(run)  # type: ignore[method-assign, assignment]
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
            patched(torch, _weight_norm=_weight_norm),
            patched(sys.modules["torch.nn.utils.weight_norm"], _weight_norm=_weight_norm),
        ):
            yield
    finally:
        if not nested:
            del CheckpointFunction.apply


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def same_attention(module: nn.Module) -> Generator[None, None, None]:
    """Disable the inference path of attention layers in eval mode, which the step, with gradients, did not take."""
    # That path leaves padded positions at zero: other outputs, not only another rounding.
    layers = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
    trained = any(
        isinstance(m, layers) and not m.training and any(p.requires_grad for p in m.parameters())
        for m in module.modules()
    )
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled and not trained)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def patched(target: object, **attributes: Any) -> Generator[None, None, None]:
    """Set attributes on an instance or module; restore its namespace afterwards, also after an error."""
    namespace = target.__dict__
    before = {name: namespace[name] for name in attributes if name in namespace}

    def take_off() -> None:
        for name, value in attributes.items():
            # An attribute that other code has set since stays.
            if namespace.get(name) is value:
                if name in before:
                    namespace[name] = before[name]
                else:
                    del namespace[name]

    with contextlib.ExitStack() as stack:
        stack.callback(take_off)  # once more, where the first time is broken off
        stack.callback(take_off)
        namespace.update(attributes)
        yield
