"""Contexts in which a model can be differentiated twice, or runs the same code without gradients as with them."""

import contextlib
import functools
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
    with contextlib.ExitStack() as stack:
        if "apply" not in vars(CheckpointFunction):  # inherited; of nested contexts the outermost takes it off again
            put_back_at_exit(stack, _checkpoint)
            CheckpointFunction.apply = staticmethod(_run)  # type: ignore[method-assign, assignment]
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
            patched(torch, _weight_norm=_weight_norm),
            patched(sys.modules["torch.nn.utils.weight_norm"], _weight_norm=_weight_norm),
        ):
            yield


def _run(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    return function(*args)


def _checkpoint() -> None:
    if "apply" in vars(CheckpointFunction):
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
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, functools.partial(torch.backends.mha.set_fastpath_enabled, enabled))
        torch.backends.mha.set_fastpath_enabled(enabled and not trained)
        yield


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
        put_back_at_exit(stack, take_off)
        namespace.update(attributes)
        yield


def put_back_at_exit(stack: contextlib.ExitStack, restore: Callable[[], object]) -> None:
    """Call a function when the stack closes, and again where something has failed until then: the call itself, say."""

    def again(kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            restore()

    stack.push(again)
    stack.callback(restore)
