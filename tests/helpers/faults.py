"""An error at one visit of one line of the package, from outside."""

from __future__ import annotations

import functools
import linecache
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch.utils.checkpoint import CheckpointFunction

import lightning_curvature

PACKAGE = str(Path(lightning_curvature.__file__).parent)
# These lines hand a call on, between the run and the guard or between the Trainer and the user's step; the others are
# of a Trainer that is being made.
HANDING_ON = {"guarded", "call", "record_call", "attempted", "noted", "state_key", "monitors"}
Line = tuple[str, int]


class Fault(RuntimeError):
    pass


@functools.cache
def entries(code: CodeType) -> dict[int, int]:
    """Return where the instructions of each ``with`` begin, by its line."""
    starts: dict[int, int] = {}
    for start, _, line in code.co_lines():
        if line and linecache.getline(code.co_filename, line).lstrip().startswith("with "):
            starts.setdefault(line, start)
    return starts


def leaves(frame: FrameType) -> bool:
    """Return whether a ``with`` is about to call ``__exit__``: no error occurs there, and one would skip the call."""
    return frame.f_lasti > entries(frame.f_code).get(frame.f_lineno, frame.f_lasti)


class Tracer:
    """Counts the visits of each line of the package; at one visit of one line it raises."""

    def __init__(self, at: tuple[Line, int] | None = None, error: type[BaseException] = Fault) -> None:
        self.visits, self.at, self.error, self.fired = Counter[Line](), at, error, False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        # Where one line is looked for, functions of other files need not be followed.
        followed = code.co_filename.startswith(PACKAGE) if self.at is None else code.co_filename == self.at[0][0]
        of_recorder = {"__call__"} if code.co_filename.endswith("recording.py") else set()
        return self.line if followed and code.co_name not in HANDING_ON | of_recorder else None

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and not leaves(frame):
            here = frame.f_code.co_filename, frame.f_lineno
            self.visits[here] += 1
            if self.at == (here, self.visits[here]):
                self.fired = True
                raise self.error("injected")
        return self.line


def modes() -> Any:
    """What a context that was left open would show in."""
    cuda, modules = torch.backends.cuda, (torch, sys.modules["torch.nn.utils.weight_norm"])
    kernels = [cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]
    stacks = [torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()]
    replaced = ["apply" in vars(CheckpointFunction), *(one._weight_norm for one in modules)]
    code = [eval_frame._stance.stance, torch.backends.mha.get_fastpath_enabled()]
    return [torch.is_grad_enabled(), *kernels, *stacks, *replaced, *code]
