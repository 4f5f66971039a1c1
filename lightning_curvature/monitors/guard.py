"""The guard of all hooks: an error that nobody expected costs a measurement, and not the run."""

import functools
from collections.abc import Callable
from typing import Any

# Hooks in which a monitor says that it cannot measure this module or Trainer: mistakes in them are the user's.
STARTING = frozenset({"setup", "on_fit_start", "on_train_start"})
HOOKS = STARTING | {"on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"}
HOOKS |= {"on_train_epoch_end", "on_train_end", "teardown", "on_exception", "state_dict", "load_state_dict"}


def guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook of a monitor that hands its errors to ``_rescue(name, error)``, and whose time is noted.

    A hook that it calls does neither.
    """

    @functools.wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._in_hook:
            return hook(self, *args, **kwargs)
        self._in_hook = True
        self._price.enter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self._rescue(hook.__name__, error)
            return {}  # as a state, one that leaves a monitor as it is
        finally:
            self._in_hook = False
            self._price.leave()

    return call
