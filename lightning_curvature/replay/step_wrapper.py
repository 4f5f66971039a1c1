"""The wrapper through which monitors see the calls of ``training_step``: one for all of them, on for a moment."""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import lightning.pytorch as pl

from lightning_curvature.replay.isolation import patched


class _SharedWrapper:
    """The one wrapper of a module's ``training_step`` through which all monitors record it.

    Wrappers around wrappers would come off in the wrong order (monitors end a batch in the order in which they began
    it) and pile up; and Lightning, which reads the step's arguments through one wrapper only, would hand ``batch_idx``
    to a step that takes none.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.step: Callable[..., Any] = module.training_step
        self.recorders: list[Callable[..., Any]] = []
        self._patch = contextlib.ExitStack()

        @functools.wraps(self.step)
        def recorded_step(*args: Any, **kwargs: Any) -> Any:
            # Off before the step begins: who copies or pickles the module from here on finds it as it was.
            self.take_off()
            step = self.step
            for recorder in self.recorders:
                step = functools.partial(recorder, step)
            return step(*args, **kwargs)

        self._patch.enter_context(patched(module, training_step=recorded_step))

    def take_off(self) -> None:
        """Put back what was there."""
        self._patch.close()


_wrappers: dict[int, _SharedWrapper] = {}  # by id of the module; an entry lives as long as a recording


@contextlib.contextmanager
def recorded_through(
    module: pl.LightningModule, recorder: Callable[..., Any]
) -> Generator[Callable[..., Any], None, None]:
    """Send calls of ``training_step`` through ``recorder(step, *args)`` inside the block, which receives the step."""
    wrapper = _wrappers.get(id(module)) or _wrappers.setdefault(id(module), _SharedWrapper(module))
    wrapper.recorders.append(recorder)
    try:
        yield wrapper.step
    finally:
        wrapper.recorders.remove(recorder)
        if not wrapper.recorders:
            _wrappers.pop(id(module)).take_off()
