"""Third-party loading code, without its chatter: one line for an error, no warnings, no progress bars, no questions."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn the multi-line errors of the loading libraries into one line that says what failed."""
    try:
        yield
    except BaseException as error:  # a damaged file can raise almost anything
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # from a Rust extension
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), _place_of(error))
        raise ValueError(f"{what}: {reason.strip()[:300]}") from error


def _place_of(error: BaseException) -> str:
    """The kind of an error that says nothing, and where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + (f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, and never ask whether code that ships with a model may run: it may not."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    patience, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
