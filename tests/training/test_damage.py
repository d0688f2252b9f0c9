"""Damages each file that this library writes and reads, and reads it again.

A damaged file must be refused, be made again, make another checkpoint be read,
or change nothing that is read. The first three give a line, each time.
`metrics.jsonl` and the pages made of it have no checksums.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import folding
from folding import config as c
from folding import files
from folding.data import batches, corpus
from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError
from folding.models.shape import shape_of
from folding.serving import export as export_lib
from folding.serving import onnx_export
from folding.training import run_dir
from folding.training.checkpoint import Checkpoints, load_run
from tests.serving import models
from tests.training import tiny
from tests.training.conftest import save_run, warnings_of, write_text

FLIPS, CUTS, FLIPS_OF_LARGEST = 3, 2, 30


class Place(NamedTuple):
  """A folder that is read.

  Attributes:
    folder: The folder.
    read: Returns all that is read of it, as values that can be compared.
    other: What may be read instead, with a line; None: nothing.
  """

  folder: pathlib.Path
  read: Callable[[], Any]
  other: Any = None


def arrays(tree):
  return [np.asarray(w).tobytes() for w in jax.tree.leaves(tree)]


def write_run(folder):
  """Writes a run with two checkpoints of noise, the older one the best."""
  config = tiny.config()
  with Checkpoints(str(folder)) as checkpoints:
    for step, loss in ((5, 1.0), (10, 2.0)):
      params = tiny.noise(tiny.shapes(config), seed=step)
      state = {"params": params, "step": jnp.ones(1)}
      checkpoints.save(step, state, loss, shape_of(config))
  tokenizer = train_tokenizer(config.data, ["a text to merge, a text"] * 9)
  save_run(folder, config, tokenizer, labels=("a", "b", "c"))
  test = {"loss": 1.5, "checkpoint_step": 5}
  run_dir.write_result(str(folder), {"finished": True, "test": test})


def run(folder):
  """Returns a run as `load`, `predict` and `export` read it."""
  write_run(folder)

  def read():
    result = run_dir.read_result(str(folder))
    found = load_run(str(folder))
    rest = found.shape, found.tokenizer.to_json(), found.labels
    return result, *rest, arrays(found.params)

  params = tiny.noise(tiny.shapes(tiny.config()), seed=10)
  return Place(folder, read, (*read()[:-1], arrays(params)))


def checkpoints(folder):
  """Returns the checkpoints of a run as `evaluate` and `shrink` read them."""
  write_run(folder)
  shape = shape_of(tiny.config())
  began = dataclasses.replace(shape, segments=2)  # unlike that of its state
  shapes = tiny.shapes(tiny.config())
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
    {"params": shapes, "step": jnp.ones(1)},
  )

  def read():
    with Checkpoints(str(folder), cleans=False) as saved:
      step, state = saved.restore_best(like)
      return step, saved.shape(step, began), arrays(state)

  state = {"params": tiny.noise(shapes, seed=10), "step": jnp.ones(1)}
  other = 10, shape, arrays(state)
  return Place(folder / "checkpoints", read, other)


def exported(write, folder):
  """Returns an export as `load` reads it."""
  write(folder, models.make(model=c.bert(**models.SHAPE, pooler=True)))

  def read():
    found = folding.load(folder)
    tokenizer = found.tokenizer
    ids = tokenizer.pad_id, tokenizer.begin_ids, tokenizer.end_ids
    return (
      repr(found.config),
      found.labels,
      tokenizer.to_json(),
      list(map(str, ids)),
      arrays(found.params),
    )

  return Place(folder, read)


def compact(folder):
  def write(path, model):
    export_lib.export(path, model)

  return exported(write, folder)


def hf(folder):
  return exported(export_lib.export_hf, folder)


def program(write, folder):
  """Returns a program for others, verified as a user can."""
  write(folder, models.make(model=c.bert(**models.SHAPE)))
  names = files.all_files(str(folder))

  def read():
    files.require_intact(str(folder))
    return [(folder / x).read_bytes() for x in names if x != files.CHECKSUMS]

  return Place(folder, read)


def onnx(folder):
  return program(onnx_export.export_onnx, folder)


def stablehlo(folder):
  return program(export_lib.export_stablehlo, folder)


def tokens(folder):
  """Returns the tokens of large text, with a trained tokenizer."""
  folder.mkdir()
  data = c.DataConfig(
    path=str(write_text(folder / "a.txt", 50)),
    vocab_size=270,
    length=8,
    batch_size=2,
  )
  config = c.resolve(c.Config(task="lm", data=data))

  def read():
    found = batches.make_data(config)
    streams = arrays(dict(found.examples._streams))
    return found.digest, found.num_bytes, found.tokenizer.to_json(), streams

  read()
  return Place(folder / corpus.FOLDER, read)


MAKERS = [run, checkpoints, compact, hf, onnx, stablehlo, tokens]


def damages(
  content: bytes, rng: np.random.Generator, flips: int
) -> Iterator[tuple[str, bytes | None]]:
  """Yields (what was done, new content); None: the file is removed."""
  for _ in range(flips if content else 0):
    at, bit = int(rng.integers(len(content))), int(rng.integers(8))
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    yield f"bit {bit} of byte {at} flipped", bytes(changed)
  for _ in range(CUTS if content else 0):
    size = int(rng.integers(len(content)))
    yield f"cut to {size} bytes", content[:size]
  if content:
    yield "emptied", b""
  yield "removed", None


def outcome(place: Place, intact: Any, caplog) -> str:
  """Reads a damaged place; fails if the damage has an effect in silence."""
  caplog.clear()
  try:
    found = place.read()
  except (ConfigError, OSError) as error:  # as in `cli.exit_status`
    assert "\n" not in str(error)
    return "refused"
  is_told = bool(warnings_of(caplog))
  if found == intact:
    return "told, no effect" if is_told else "no effect"
  assert is_told, "silent"
  assert found == place.other
  return "another checkpoint"


def harmed(place, caplog, rng, choose=lambda every: every):
  """Returns the number of damages by outcome."""
  intact = place.read()
  assert not warnings_of(caplog)
  names = files.all_files(str(place.folder))
  # The arrays of step 10 are read only if step 5 is damaged.
  paths = [place.folder / x for x in names if "10/default/" not in x]
  largest = max(paths, key=lambda path: path.stat().st_size)
  every = []
  for path in paths:
    flips = FLIPS_OF_LARGEST if path == largest else FLIPS
    every += [(path, *x) for x in damages(path.read_bytes(), rng, flips)]
  counts = collections.Counter()
  for path, name, changed in choose(every):
    content = path.read_bytes()
    path.unlink() if changed is None else path.write_bytes(changed)
    try:
      first, second = (outcome(place, intact, caplog) for _ in range(2))
    except Exception as error:
      raise AssertionError(f"{path}: {name}") from error
    # As loud the second time, unless the file was made again.
    is_mended = path.exists() and path.read_bytes() == content
    assert second == ("no effect" if is_mended else first), f"{path}: {name}"
    counts["made again" if is_mended else first] += 1
    path.write_bytes(content)
  assert place.read() == intact
  return counts


@pytest.mark.parametrize("make", MAKERS, ids=lambda x: x.__name__)
def test_one_damaged_file_is_never_silent(make, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(corpus, "LARGE", 0)
  rng = np.random.default_rng(1)
  harmed(
    make(tmp_path / "place"),
    caplog,
    rng,
    lambda every: [every[i] for i in rng.choice(len(every), 3)],
  )


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS, ids=lambda x: x.__name__)
def test_no_damage_is_silent(make, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(corpus, "LARGE", 0)
  counts = harmed(make(tmp_path / "place"), caplog, np.random.default_rng(0))
  print(make.__name__, dict(counts), "of", counts.total())
  # Most files matter.
  assert counts["no effect"] < 0.4 * counts.total()
