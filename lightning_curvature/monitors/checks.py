"""Checks of modules: one sentence with object, rule, value and remedy."""

from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


def check_not_quantized(monitor: str, module: nn.Module) -> None:
    """Raise where a module computes with eight bits or less, which have no derivatives worth the name."""
    remedy = "train the module in float32, bfloat16 or float16, or leave the monitor out"
    for name, part in [*module.named_modules(), *module.named_parameters()]:
        if kind := _quantized(part):
            raise MisconfigurationException(
                f"{monitor} must find modules that can be differentiated, got the quantized {name!r} ({kind}): "
                f"{remedy}."
            )
    for name, p in module.named_parameters():
        if p.dtype.is_floating_point and p.dtype.itemsize == 1:
            raise MisconfigurationException(
                f"{monitor} must find parameters of at least 16 bits, got {name!r} of {p.dtype}: {remedy}."
            )


def check_real(monitor: str, parameters: Iterable[Tensor]) -> None:
    """Raise where parameters are complex: a step along one has a real and an imaginary part."""
    if any(p.is_complex() for p in parameters):
        raise MisconfigurationException(
            f"{monitor} must find real parameters, got complex ones: train their real and imaginary parts."
        )


def is_lazy(module: nn.Module) -> bool:
    """Return whether a module has parameters whose shape its first forward decides."""
    return any(isinstance(p, UninitializedTensorMixin) for p in module.parameters())


# By name, since none of these packages needs to be there: modules, and tensors in place of parameters.
_QUANTIZED = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.ao.nn.sparse.quantized.",
    "transformer_engine.pytorch.",
    "bitsandbytes.nn.",
    "torchao.dtypes.",
    "torchao.float8.",
    "torchao.prototype.",
    "torchao.quantization.",
)
# They stand among the others, and compute in whatever type they are given.
_NOT_QUANTIZED = (
    "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
    "bitsandbytes.nn.modules.Embedding",
    "bitsandbytes.nn.modules.StableEmbedding",
)


def _quantized(part: nn.Module | Tensor) -> str | None:
    """Name of the class that makes a module or parameter a quantized one, or None."""
    for kind in type(part).__mro__:
        name = f"{kind.__module__}.{kind.__name__}"
        if name.startswith(_QUANTIZED) and name not in _NOT_QUANTIZED:
            return name
    return None


class UniqueKey(str):
    """Key of a monitor before its setup, which finds monitors of one prefix and says so.

    Lightning compares the keys when it makes a Trainer; its own sentence does not name the prefix.
    """

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other if isinstance(other, UniqueKey) else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other
