"""The verb `folding compress`: smaller models from a file of texts."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from folding import config as config_lib
from folding import files
from folding.config import DataConfig, MeshConfig
from folding.data import corpus, sources
from folding.data.padding import padded, spaced, windows
from folding.data.tokenizers import Text
from folding.errors import ConfigError
from folding.model import Model
from folding.models.shape import shape_of
from folding.serving import lines as lines_lib
from folding.serving.compress import (
  WINDOW,
  compress_sizes,
  kept_of,
  require_fractions,
)
from folding.serving.loaded import cast, load, shrunk
from folding.tasks import task_of
from folding.training import loop, run_dir, sharding
from folding.training.allocate import Asked, require_reachable
from folding.training.evaluate import (
  cosines_of_rows,
  evaluate,
  make_eval_step,
)
from folding.training.recipe import recipe, taught

_HELD = 256  # held-out texts, or windows, that a smaller model is compared on
_ROWS = 8  # windows per batch


def compress_file(
  source: str,
  path: str,
  savings: Sequence[float],
  output: str,
  *,
  structured: bool | None = None,
  uniform: bool = False,
  vocabulary: int | None = None,
  pairs: bool = False,
) -> list[str]:
  """Writes a compact export per saving, and prints the loss of quality.

  The valid split is held out, or a tenth of the texts. On it the smaller model is
  compared with the dense one by the perplexity of a language model, the cosine of
  the vectors of an encoder, or the share of equal predictions of a classifier.
  Several sizes are measured once.

  Args:
    source: As for `folding.load`; a dense model.
    path: A file or folder of texts, as `data.path`; labels are ignored. For a model
      of pairs a file with two texts per line, with a tab between.
    savings: Fractions of the parameters to save.
    output: A new folder. With several savings, each gets a folder in it, named by
      its percentage.
    structured: As for `folding.compress`, like the next two.
    uniform: Whether all layers get one size.
    vocabulary: Number of tokens to keep.
    pairs: As for `folding.load`.

  Returns:
    The folders.

  Raises:
    ConfigError: see `folding.compress`, or the texts cannot be read.
  """
  files.require_empty(output)
  folders = _folders(output, savings)
  model = load(source, pairs=pairs)
  fit, held = _texts(path, model)
  smaller = compress_sizes(
    model,
    fit,
    savings,
    structured=structured,
    uniform=uniform,
    vocabulary=vocabulary,
    report=print,
  )
  for folder, small in zip(folders, map(shrunk, smaller), strict=True):
    if model.origin.dtype == "bfloat16":
      small = cast(small, "bfloat16")
    lost = f"On held-out text {_lost(model, small, held)}"
    small = dataclasses.replace(
      small, origin=small.origin._replace(notes=(f"{lost}.",))
    )
    size = small.save(folder)
    before, after = (_num_stored(one) for one in (model, small))
    print(
      f"It stores {after:,} parameters; the dense model has {before:,} "
      f"(compression {1 - after / before:.1%}). The files have "
      f"{size['files']:,} bytes. {lost}"
    )
    allocated = sum(w.size for w in jax.tree.leaves(small.params))
    if after < 0.99 * allocated:  # more than biases that are zero by chance
      print(
        f"Its arrays hold {allocated:,} parameters, zeros included, and so do "
        "exports for other programs; --structured makes the arrays smaller"
      )
    print(f"The smaller model is in {folder}")
  return folders


def _texts(path: str, model: Model) -> tuple[list[Text], list[Text]]:
  """Returns the texts to fit to, and those held out."""
  data = DataConfig(path=path, valid_fraction=0.1, test_fraction=0.0)
  is_stream = task_of(model).predicts_tokens
  if model.pair is not None:
    with lines_lib.open_lines(path) as lines:
      rows = list(lines_lib.pairs(lines, model.pair))
    tenth = {*spaced(len(rows), len(rows) // 10)}
    held = [rows[i] for i in sorted(tenth)]
    fit = [row for i, row in enumerate(rows) if i not in tenth]
  else:
    found = (
      corpus.load_documents(data)
      if is_stream
      else sources.load_texts(data, "embed").texts
    )
    fit, held = list(found["train"]), list(found["valid"])
  if not is_stream:
    held = [held[i] for i in spaced(len(held), _HELD)]
  if not held:
    raise ConfigError(
      f"{path} has too few different texts to hold a tenth of them out; give ten "
      "or more"
    )
  if is_stream:
    _held_out(model, held)  # before minutes of work
  return fit, held


def _num_stored(model: Model) -> int:
  """Returns the number of parameters that are not zero."""
  return sum(int(np.count_nonzero(w)) for w in jax.tree.leaves(model.params))


def _lost(model: Model, small: Model, texts: Sequence[Any]) -> str:
  """Returns how the outputs of a smaller model differ, in words."""
  task = task_of(model)
  if task.predicts_tokens:
    before, after = _perplexities(model, small, texts)
    return f"perplexity {before:.2f} is now {after:.2f}"
  if task.makes_vectors:
    cosine = cosines_of_rows(model.encode(texts), small.encode(texts)).mean()
    return f"the mean cosine with the dense vectors is {cosine:.3f}"
  a, b = ([x.label for x in one.predict(texts)] for one in (model, small))
  if task.labels and task.labels.kind == "score":
    gap = float(np.mean(np.abs(np.subtract(a, b))))
    return f"scores differ by {gap:.3g} on average"
  same = np.mean([x == y for x, y in zip(a, b, strict=True)])
  return f"{same:.1%} of the predictions are those of the dense model"


def _held_out(model: Model, texts: Sequence[Any]) -> np.ndarray:
  """Returns windows of held-out texts, each with the token after it."""
  length = min(model.shape.max_length, WINDOW)
  ids_WL = windows(model.tokenizer, texts, length + 1, _HELD)
  if not ids_WL.size:
    raise ConfigError(
      f"a tenth of the texts, held out, has fewer than {length + 1} tokens; give "
      "more text"
    )
  return ids_WL


def _perplexities(
  model: Model, small: Model, texts: Sequence[str]
) -> tuple[float, float]:
  """Returns the perplexities of two language models, per token of the first."""
  rows = list(_held_out(model, texts))
  count = sum(row.size - 1 for row in rows)
  before = _perplexity(model, rows, count)
  if small.tokenizer is not model.tokenizer:
    read = [model.tokenizer.decode(row) for row in rows]
    rows = small.tokenizer.encode_batch(read)
  return before, _perplexity(small, rows, count)


def _perplexity(model: Model, rows: Sequence[np.ndarray], count: int) -> float:
  """Returns the perplexity of rows of ids, as if they were `count` tokens."""
  most = model.shape.max_length  # a smaller vocabulary makes longer rows
  starts = [(row, n) for row in rows for n in range(0, row.size - 1, most)]
  rows = [row[n : n + most + 1] for row, n in starts]
  longest = max(row.size for row in rows) - 1
  length = min(most, -(-longest // _ROWS) * _ROWS) + 1
  batches = []
  for n in range(0, len(rows), _ROWS):
    ids_BL, mask_BL = padded(rows[n : n + _ROWS], (_ROWS, length), 0)
    batch = {"tokens": ids_BL[:, :-1], "targets": ids_BL[:, 1:]}
    batches.append({**batch, "weights": mask_BL[:, 1:].astype(np.float32)})
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  params = jax.device_put(model.params)
  task = task_of(model)
  step = make_eval_step(model.module, task, mesh)
  found = evaluate(
    step, params, batches, mesh, task=task, num_bytes=float(count)
  )
  return 2.0 ** found["bits_per_byte"]


def train_sizes(
  source: str,
  path: str,
  savings: Sequence[float],
  output: str,
  *,
  steps: int,
  structured: bool | None = None,
  uniform: bool = False,
  vocabulary: int | None = None,
) -> Iterator[str]:
  """Trains smaller models one after the other, and yields their run directories.

  A run is that of configs/embed.py for an encoder without a head, and otherwise that
  of configs/pretrained.py. With several savings the largest model is trained first.
  Each further one is cut from the trained one before it, with the dense model as
  teacher of all. The steps are then half as many again in total, in equal parts. A
  run that is there already is resumed. A signal that stops a run ends the iteration.

  Args:
    source: As for `compress_file`, like the options.
    path: Texts; with labels for a classifier, those of its head.
    savings: Fractions of the parameters to save.
    output: The run directory. With several savings, each gets one in it, named by
      its percentage.
    steps: Steps of training of a single model.
    structured: Whether the arrays of a language model get smaller too.
    uniform: Whether all layers get one size.
    vocabulary: Number of tokens to keep; for a single model.

  Raises:
    ConfigError: see `loop.run`, or a folder has other files.
  """
  if steps < 1:
    raise ConfigError(f"steps must be positive; it is {steps}")
  require_fractions(savings)
  savings = sorted(savings)
  folders = _folders(output, savings)
  for folder in folders:
    if run_dir.is_new(folder):
      files.require_empty(folder)
  if len(savings) > 1:
    steps = max(1, round(1.5 * steps / len(savings)))
    if vocabulary is not None:
      raise ConfigError(
        "a model with fewer tokens cannot be made smaller again; give one --saving "
        "beside --vocabulary and --steps"
      )
  model = load(source)
  name = "embed" if task_of(model).makes_vectors else "pretrained"
  kept = kept_of(model, vocabulary)
  configs = []
  for n, saving in enumerate(savings):
    config = config_lib.read(f"configs/{name}.py:{source},{saving}")
    if model.labels:  # else the config file leaves a checkpoint's head alone
      config = taught(config, saving)
    if structured or uniform or kept:
      config = recipe(
        config, saving, structured=structured, uniform=uniform, kept=kept
      )
    edits = {"data.path": path, "train.steps": steps}
    edits["train.eval_every"] = max(1, steps // 4)
    if len(savings) > 1 and model.shape.num_kv_heads < model.shape.num_heads:
      # A diagonal W_V beside shared keys has no dense form of this shape.
      edits["fold.values"] = "dense"
    if n:
      edits["pretrained"] = folders[n - 1]
      edits["distill.teacher"] = source
      # Reads on where the run before stopped.
      edits["data.first_batch"] = config.data.first_batch + n * steps
    configs.append(config_lib.resolve(config_lib.edited(config, edits)))
  for config in configs:  # before hours of training
    asked = Asked(shape_of(config), config.fpp, config.compress)
    require_reachable(asked, model.params)
  for config, folder in zip(configs, folders, strict=True):
    result = loop.run(config, folder)
    yield folder
    if not result["finished"]:
      return


def _folders(output: str, savings: Sequence[float]) -> list[str]:
  """Returns the folder of each saving.

  Raises:
    ConfigError: no saving is given, or the same one twice.
  """
  if len(savings) == 1:
    return [output]
  folders = [os.path.join(output, f"{100 * x:g}") for x in savings]
  if not folders or len({*folders}) < len(folders):
    raise ConfigError(
      f"give one saving, or different ones; they are {tuple(savings)}"
    )
  return folders
