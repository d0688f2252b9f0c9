"""Tiny checkpoints on disk, written once."""

import shutil

import pytest

from tests.models import checkpoints


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
  """Returns a folder with a tiny Llama; not to be changed."""
  folder = tmp_path_factory.mktemp("checkpoints") / "llama"
  checkpoints.write(folder, "llama", "lm")
  return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
  """Returns a copy of it that a test may damage."""
  return shutil.copytree(llama_folder, tmp_path / "llama")
