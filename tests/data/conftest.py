"""The prepared standard library, once for all tests of the room."""

import pytest

from folding.data import python_stdlib


@pytest.fixture(scope="session")
def stdlib_dir(tmp_path_factory) -> str:
  """Returns a TFDS folder that holds both configs of `python_stdlib`."""
  folder = str(tmp_path_factory.mktemp("tfds"))
  python_stdlib.prepare("source", folder)
  python_stdlib.prepare("topic", folder)
  return folder
