"""What the C library does with memory that is freed. Only the command line changes this, for its own process."""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20


def return_freed_memory() -> None:
    """Make the C library give the memory of tensors of 1 MiB and more back to the system as soon as they are freed.

    glibc keeps what is freed for later, in pieces that later tensors often do not fit. This sets what the environment
    variable `MALLOC_MMAP_THRESHOLD_` would, unless that is set. With another C library, it does nothing.
    """
    if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
