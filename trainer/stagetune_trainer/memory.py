"""The memory that a process holds: how much it was at most, and giving back what is free."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_BYTES_PER_MAXRSS = 1024  # Linux reports ru_maxrss in KiB

_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_MAXRSS


def resident_bytes() -> int | None:
    """Return what is resident of this process now; None where the kernel does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()


def release_memory() -> None:
    """Give back what nothing refers to: cycles, the GPU's free blocks, and the heap's free pages.

    glibc keeps what is freed for later use; between two phases of a stage that would stand beside
    what the next one takes.
    """
    # Layers of a window refer to it and it to them: without a word they stay in memory.
    gc.collect()
    torch.cuda.empty_cache()
    _heap_trimmer()()


def give_back_at_once() -> None:
    """Have glibc take memory of 64 KiB and more from the kernel and give it back when it is freed.

    For work that makes and frees tensors of all sizes without end: in its heap they leave gaps that
    later ones do not fit into. Another C library is left as it is.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


@cache
def _heap_trimmer() -> Callable[[], object]:
    """Return glibc's malloc_trim(3); another C library's heap is left as it is."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return lambda: None
    return lambda: trim(0)
