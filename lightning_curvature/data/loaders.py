"""Which objects can give a probe set: a dataloader, or batches that can be read again and again."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils.data import DataLoader, Dataset

# Modules of iterators that are used up when they have been read once; an object of the user's may begin anew.
_ONCE = frozenset({"builtins", "itertools", "torch.utils.data.dataloader"})


def leaves(loaders: Any, nested: bool) -> tuple[list[Any], TreeSpec]:
    """Return the loaders of a collection and its form; a given list without a DataLoader is a list of batches.

    ``nested`` says that a list can only be one of loaders, as the Trainer's are.
    """
    if isinstance(loaders, CombinedLoader):
        loaders, nested = loaders.iterables, True
    nested = nested or not isinstance(loaders, (list, tuple)) or any(isinstance(one, DataLoader) for one in loaders)
    return tree_flatten(loaders, is_leaf=lambda one: not (nested and isinstance(one, (dict, list, tuple))))


def check_dataloader(argument: str, value: Any, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless a value is a dataloader, or batches that can be read repeatedly; None is the Trainer's.

    The samples of a Dataset are no batches: a step would take the features of one for a batch.
    """
    found, _ = leaves(value, nested=False)
    wrong, got, remedy = found != [None], f"a {type(value).__name__}", "give a DataLoader, or a list of batches"
    if len(found) != 1:
        got += f" of {len(found)} dataloaders"
        remedy = "give one of them, or a list of batches of the form that training_step takes"
    elif isinstance(found[0], DataLoader):
        wrong = False
    elif isinstance(found[0], Dataset) or hasattr(found[0], "__getitems__"):
        remedy = "wrap it, DataLoader(dataset, batch_size=…)"
    elif isinstance(found[0], (list, tuple)) and any(map(_is_sample, found[0])):
        got, remedy = f"{got} of single samples", "wrap it, DataLoader(samples, batch_size=…)"
    elif isinstance(found[0], Iterator) and type(found[0]).__module__ in _ONCE:
        got, remedy = f"{got}, which can be read once", "give a DataLoader, or the list of its batches"
    elif isinstance(found[0], Iterable):
        wrong = isinstance(found[0], (str, bytes, PurePath, Tensor, Mapping, set, frozenset, type))
    if wrong:
        raise error(f"{argument} must be one dataloader, or batches that can be read repeatedly, got {got}: {remedy}.")


def _is_sample(item: Any) -> bool:
    """Whether an item is an input with a plain number for its target, and so no batch."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return False
    target = item[1]
    return isinstance(target, (int, float)) or (hasattr(target, "shape") and not tuple(target.shape))
