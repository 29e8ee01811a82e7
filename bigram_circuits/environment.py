"""Settings from the environment, each read here and nowhere else. An empty variable counts as unset."""

from __future__ import annotations

import os
from pathlib import Path

RUNS = "BIGRAM_CIRCUITS_RUNS"
"""The variable that names the folder of runs that are given none."""
DEVICE = "BIGRAM_CIRCUITS_DEVICE"
"""The variable that names the device that models are loaded to where none is given."""


def runs_folder() -> Path:
    """The folder in which a run that is given none gets one: that of `BIGRAM_CIRCUITS_RUNS`, or `runs`.

    Raises:
        OSError: If the variable names something that is no folder.
    """
    folder = Path(os.environ.get(RUNS) or "runs").expanduser()
    if os.environ.get(RUNS) and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{RUNS} should name a folder for runs, but {str(folder)!r} is a file")
    return folder


def default_device() -> str | None:
    """The device of `BIGRAM_CIRCUITS_DEVICE`, unchecked; None if it is not set."""
    return os.environ.get(DEVICE) or None
