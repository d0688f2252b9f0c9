"""The prepared standard library, once for all tests and workers."""

import fcntl
import os

import pytest

from folding.data import python_stdlib


def prepare_stdlib(tmp_path_factory) -> str:
  """Returns a TFDS folder with both configs of `python_stdlib`."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent  # shared by the workers
  folder = str(base / "stdlib")
  with open(base / "stdlib.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    python_stdlib.prepare("source", folder)
    python_stdlib.prepare("topic", folder)
  return folder


@pytest.fixture(scope="session")
def stdlib_dir(tmp_path_factory) -> str:
  return prepare_stdlib(tmp_path_factory)
