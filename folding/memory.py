"""Memory of a process: the heap of the C library, and mapped files."""

import ctypes
import mmap
import os
from typing import Any

import numpy as np


def keep_freed() -> None:
  """Lets the C library keep freed memory for the next step, if it is glibc.

  By default it returns large arrays to the system, and each step then waits for
  the system to clear and map all its memory again. Other libraries of C have no
  such options. JAX must not have started, because threads keep their heaps.
  """
  mallopt = getattr(_library(), "mallopt", None)
  if mallopt is None:
    return
  # From malloc.h: one heap (M_ARENA_MAX), from which arrays of all sizes come
  # (M_MMAP_MAX), and which never shrinks (M_TRIM_THRESHOLD).
  for option, value in ((-8, 1), (-4, 0), (-1, -1)):
    mallopt(option, value)


def return_freed() -> None:
  """Returns the memory that is free now to the system, if the library is glibc.

  Arrays of other sizes, as of an evaluation or a checkpoint, leave gaps in the
  heap that those of a step do not fit into, so it grows with each of them.
  """
  trim = getattr(_library(), "malloc_trim", None)
  if trim is not None:
    trim(0)


def forget_mapped(array: np.ndarray) -> None:
  """Unmaps the pages of the file that an array is a view of, if it is of one.

  They count as memory of the process from their first use on. A later use maps
  them again.
  """
  base: Any = array
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, memoryview):
    base = base.obj
  if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
    base.madvise(mmap.MADV_DONTNEED)


def _library() -> ctypes.CDLL | None:
  """Returns the C library of this process, if its options are those of POSIX."""
  return ctypes.CDLL(None) if os.name == "posix" else None
