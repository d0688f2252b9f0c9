"""Memory of a process that the system counts."""

import mmap
import pathlib

import numpy as np
import pytest

from folding import memory

STATUS = pathlib.Path("/proc/self/status")


def _mapped():
  """Returns the bytes of files that are in the memory of this process."""
  [line] = [x for x in STATUS.read_text().splitlines() if "RssFile" in x]
  return 1024 * int(line.split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_forget_mapped_unmaps_pages_that_were_read(tmp_path):
  size = 1 << 25
  (tmp_path / "file").write_bytes(b"\1" * size)
  with open(tmp_path / "file", "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  view = np.frombuffer(data, np.uint8).reshape(2, -1).T
  assert view.sum() == size
  before = _mapped()
  memory.forget_mapped(view[1:])
  assert before - _mapped() >= 0.9 * size
  assert view.sum() == size  # read again
