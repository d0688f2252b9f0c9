"""A run read for use: its config, parameters, tokenizer and labels.

Neither the training data nor the optimizer state is loaded, nothing in the
run directory is changed, and any number of devices will do.
"""

import json
import logging
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from folding import config as config_lib
from folding import files
from folding.data.tokenizers import Tokenizer, load_tokenizer
from folding.schema import ConfigError, first_line, require
from folding.training.checkpoint import saved_loss, saved_steps

LABELS = "labels.json"  # class names in id order, beside the tokenizer
_TEXT = "text.sha256"  # of what a run began with

_log = logging.getLogger(__name__)


def load_run(workdir: str) -> tuple[config_lib.Config, Any, Tokenizer]:
  """Returns the config, parameters and tokenizer of a run directory.

  The checkpoint is the best in validation (fewest errors of a classifier, else
  lowest loss), or else the newest; one that cannot be read is passed over with
  a warning.

  Returns:
    (config, tree of NumPy arrays, tokenizer).

  Raises:
    ConfigError: it is no run, or no checkpoint of it can be read.
  """
  config = load_config(workdir)
  tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer.json"))
  folder = os.path.join(os.path.abspath(workdir), "checkpoints")
  steps = _best_first(folder)
  require(bool(steps), f"{workdir} has no checkpoint yet")
  for step in steps:
    try:
      return config, _read_params(os.path.join(folder, str(step))), tokenizer
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      reason = first_line(error)[:200]
      _log.warning("checkpoint %d of %s is damaged (%s)", step, workdir, reason)
  raise ConfigError(f"none of the checkpoints in {folder} can be read")


def load_config(workdir: str) -> config_lib.Config:
  """Returns the config of a run directory.

  Raises:
    ConfigError: it is no run.
  """
  path = os.path.join(workdir, "config.json")
  require(os.path.exists(path), f"{workdir} is no run: it has no config.json")
  values = files.read_json(path, dict)
  require(
    not {"model_type", "format"} & values.keys(),
    f"{workdir} is an export or another library's checkpoint, and no run",
  )
  try:
    return config_lib.from_dict(values)
  except ConfigError as error:
    raise ConfigError(f"{workdir} is no run: {error}") from error


def load_labels(workdir: str) -> tuple[str, ...]:
  """Returns the class names of a run in id order; () where none are kept."""
  path = os.path.join(workdir, LABELS)
  if not os.path.exists(path):
    return ()
  return tuple(files.read_json(path, list))


def require_data(workdir: str, names: tuple[str, ...], digest: str) -> None:
  """Refuses data that is not what a run began with.

  Args:
    workdir: Of the run.
    names: Class names of the data; () where it has none.
    digest: `Data.digest`.

  Raises:
    ConfigError: its classes are others or in another order, or its text is.
  """
  labels = load_labels(workdir)
  require(
    labels in ((), names),
    f"the classes of the data are {', '.join(names)}, and those of {workdir} are "
    f"{', '.join(labels)}; they must be the same, in the same order",
  )
  path = os.path.join(workdir, _TEXT)
  if os.path.exists(path):
    require(
      pathlib.Path(path).read_text("utf-8") == digest,
      f"the text is not that which the run in {workdir} began with; give that "
      "again, or choose another --workdir",
    )


def save_data(labels: tuple[str, ...], digest: str, workdir: str) -> None:
  """Writes what `require_data` needs."""
  path = os.path.join(workdir, LABELS)
  if labels:
    files.write_file(path, json.dumps(labels, ensure_ascii=False))
  elif os.path.exists(path):  # of a run that never began
    os.remove(path)
  files.write_file(os.path.join(workdir, _TEXT), digest)


def _best_first(folder: str) -> list[int]:
  """Returns the steps that were saved: the best, then from the newest on."""
  steps = sorted(saved_steps(folder), reverse=True)
  losses = {step: saved_loss(folder, step) for step in steps}
  # Of equal ones the oldest, as a run tests; without any loss the newest.
  best = min(reversed(steps), key=losses.__getitem__, default=None)
  if best is None or losses[best] == math.inf:
    return steps
  return [best, *(step for step in steps if step != best)]


def _read_params(checkpoint: str) -> Any:
  """Returns the parameters of a checkpoint, and reads nothing else of it."""
  path: Any = pathlib.Path(checkpoint, "default")
  handler = ocp.PyTreeCheckpointHandler()
  try:
    saved: Any = handler.metadata(path)
    like = {
      "params": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved["params"]
      )
    }
    # To host memory: the devices that wrote it may not be here.
    host = ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(
      item=like,
      restore_args=jax.tree.map(lambda _: host, like),
      partial_restore=True,
    )
    return handler.restore(path, args=args)["params"]
  finally:
    handler.close()
