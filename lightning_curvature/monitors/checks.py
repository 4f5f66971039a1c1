"""Checks of arguments and modules of monitors: one sentence with argument or object, rule, value and remedy."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


def check_names(argument: str, names: object, known: Sequence[str]) -> None:
    """Raise unless ``names`` is a non-empty sequence of known names."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"{argument} must be a non-empty sequence of names, got {names!r}: choose from {tuple(known)}."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument} must be names from {tuple(known)}, got {unknown[0]!r}: correct or remove it.")


def check_choice(argument: str, value: object, known: Sequence[object], remedy: str) -> None:
    """Raise unless ``value`` is one of the known ones."""
    # By type as well: 1 and True are equal.
    if not any(type(value) is type(one) and value == one for one in known):
        *others, last = map(repr, known)
        raise ValueError(f"{argument} must be {', '.join(others)} or {last}, got {value!r}: {remedy}.")


def check_count(argument: str, value: object, least: int, remedy: str, optional: bool = False) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``, or None where it is optional."""
    if optional and value is None:
        return
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"{argument} must be a whole number of at least {least}{', or None' if optional else ''}, got {value!r}: "
            f"{remedy}."
        )


def check_fraction(argument: str, value: object, remedy: str) -> None:
    """Raise unless ``value`` lies between 0 and 1."""
    if not isinstance(value, float) or not 0.0 < value < 1.0:
        raise ValueError(f"{argument} must lie between 0 and 1, got {value!r}: {remedy}.")


def check_numbers(argument: str, value: object, remedy: str, least: int = 1) -> tuple[int, ...]:
    """Return one number or several, ascending; raise unless all are whole and at least ``least`` (none only if 0)."""
    numbers = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    # Also those of numpy.
    numbers = tuple(int(n) if isinstance(n, Integral) and not isinstance(n, bool) else n for n in numbers)
    for number in numbers or (value,) * least:
        check_count(argument, str(number) if isinstance(number, bool) else number, least, remedy)
    return tuple(sorted(set(numbers)))


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
