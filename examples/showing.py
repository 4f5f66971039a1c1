"""How to look at the logs of an example."""

import os
import shutil
import sys
from pathlib import Path


def tensorboard(folder: Path) -> str:
    """Return the command that shows a folder on TensorBoard, as it can be typed where the script was started."""
    beside = Path(sys.executable).parent / "tensorboard"
    found = shutil.which("tensorboard")
    if not beside.exists() or (found and os.path.samefile(found, beside)):
        return f"tensorboard --logdir {folder}"
    path = os.path.relpath(beside)
    return f"{beside if path.startswith('..') else path} --logdir {folder}"
