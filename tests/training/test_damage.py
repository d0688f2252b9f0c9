"""Flips bits in every file of a run, and reads the run after each flip.

A flip must be refused, make another checkpoint be read, or change nothing that
is read. `metrics.jsonl` and the pages made of it have no checksums.
"""

import collections
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError
from folding.training import run_dir
from folding.training.checkpoint import Checkpoints, load_run
from tests.training import tiny

FLIPS, FLIPS_OF_LARGEST = 2, 120


def read(workdir):
  """Returns all that is read of a run as bytes; None if it is refused."""
  try:
    result = run_dir.read_result(str(workdir))
    config, params, tokenizer = load_run(str(workdir))
    labels = run_dir.load_labels(str(workdir))
  except ConfigError:
    return None
  arrays = [np.asarray(w).tobytes() for w in jax.tree.leaves(params)]
  return result, config, tokenizer.to_json(), labels, arrays


@pytest.fixture
def workdir(tmp_path):
  """Returns a run with two checkpoints of noise, the older one the best."""
  config, folder = tiny.config(), tmp_path / "run"
  with Checkpoints(str(folder)) as checkpoints:
    for step, loss in ((5, 1.0), (10, 2.0)):
      params = tiny.noise(tiny.shapes(config), seed=step)
      checkpoints.save(step, {"params": params, "step": jnp.ones(1)}, loss)
  tokenizer = train_tokenizer(config.data, ["a text to merge, a text"] * 9)
  run_dir.save(
    str(folder), config, tokenizer, labels=("a", "b", "c"), digest="a1"
  )
  run_dir.write_result(str(folder), {"seconds": 2.5, "test": {"loss": 1.5}})
  return folder


@pytest.mark.slow
def test_no_flipped_bit_changes_what_is_read(workdir, tmp_path, caplog):
  caplog.set_level(logging.CRITICAL)
  rng = np.random.default_rng(0)
  intact = read(workdir)
  older = shutil.copytree(workdir, tmp_path / "older")
  shutil.rmtree(older / "checkpoints" / "5")
  other = read(older)
  assert intact is not None
  assert other is not None
  assert intact[-1] != other[-1]
  # Step 10 is read only if step 5 is damaged.
  paths = [
    path
    for path in sorted(workdir.rglob("*"))
    if path.is_file() and "/checkpoints/10/" not in path.as_posix()
  ]
  largest = max(paths, key=lambda path: path.stat().st_size)
  assert largest.parent.name == "d"  # arrays
  counts = collections.Counter()
  for path in paths:
    content = path.read_bytes()
    for _ in range(FLIPS_OF_LARGEST if path == largest else FLIPS):
      at, bit = int(rng.integers(len(content))), int(rng.integers(8))
      changed = bytearray(content)
      changed[at] ^= 1 << bit
      path.write_bytes(changed)
      found = read(workdir)
      place = f"bit {bit} of byte {at} of {path.relative_to(workdir)}"
      assert found in (None, intact, other), place
      if path == largest:
        assert found == other, place
      if found is None:
        counts["refused"] += 1
      else:
        counts["no effect" if found == intact else "fell back"] += 1
      # `load_run` writes nothing, so the rest is as it was.
      path.write_bytes(content)
  print(dict(counts), "of", counts.total(), "flips in", len(paths), "files")
  assert read(workdir) == intact
  # Files of the run are refused; those of its best checkpoint are replaced.
  assert counts["refused"] >= FLIPS * 5
  assert counts["fell back"] >= FLIPS_OF_LARGEST + FLIPS * 5
