"""What a step gives: loss, outputs, mask; read off whatever it returned."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

OUTPUTS_REMEDY = (
    "return them from training_step as {'loss': …, 'outputs': …}, compute them by calling self(…) exactly once, or "
    "name the submodule that makes them, outputs='head'"
)


@dataclass
class Evaluation:
    """Loss and, where they can be had, outputs of one batch.

    Attributes:
        loss: scalar mean loss.
        outputs: outputs of shape (B, …), or None.
        mask: weight of each position, or None.
    """

    loss: Tensor
    outputs: Tensor | None = None
    mask: Tensor | None = None


def read_result(result: Any, seen: list[Any], objective: bool = False) -> Evaluation:
    """Read what a step, or the user's objective, returned; only the latter's "mask" means weights of positions."""
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        got = f"a dict of {list(result)}" if isinstance(result, dict) and loss is None else type(loss).__name__
        raise ValueError(
            f"the step must return a loss tensor or a dict with 'loss', got {got}: return the loss, or give objective=."
        )
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean().")
    mask = result.get("mask") if objective and isinstance(result, dict) else None
    return Evaluation(loss.reshape(()), find_outputs(result, seen), mask)


def find_outputs(result: Any, seen: list[Any]) -> Tensor | None:
    """Outputs from the returned dict, else from the one forward that was seen (of a tuple the first)."""
    if isinstance(result, dict):
        for key in ("outputs", "logits"):
            if isinstance(result.get(key), Tensor):
                return result[key]
    if len(seen) != 1:
        return None
    output = seen[0]
    if isinstance(output, dict):
        output = output.get("logits", output.get("outputs"))
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None
