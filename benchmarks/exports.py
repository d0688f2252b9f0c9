"""Exported files of runs, and how other runtimes read them."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from folding.config import Config
from folding.data.batches import Data
from folding.errors import ConfigError
from folding.serving import export as export_lib
from folding.serving import onnx_export
from folding.training import run_dir

ONNX: Mapping[str, onnx_export.Dtype] = {"ONNX": "float32", "ONNX int8": "int8"}


def load_configs(
  workdirs: Sequence[str], task: str
) -> tuple[list[Config], str]:
  """Returns the configs of runs, and the dense model that all started from.

  Raises:
    ConfigError: a run has another task, or started from another model or none;
      or two runs have the same name.
  """
  configs = [run_dir.load_order(path) for path in workdirs]
  dense = configs[0].pretrained
  for path, config in zip(workdirs, configs, strict=True):
    if config.task != task:
      raise ConfigError(f"{path} is of task {config.task!r}, not {task!r}")
    if config.pretrained != dense:
      raise ConfigError(f"{path} did not start from the model of the first run")
  if dense is None:
    raise ConfigError(f"{workdirs[0]} did not start from a dense model")
  if len({row_name(path) for path in workdirs}) < len(workdirs):
    raise ConfigError("two runs have the same name, and so would their rows")
  return configs, dense


def row_name(workdir: str) -> str:
  """Returns the name of the row of a run."""
  return os.path.basename(os.path.normpath(workdir))


def size(*parts: str) -> int:
  """Returns the bytes of a file; its path is given in parts."""
  return os.path.getsize(os.path.join(*parts))


def reloaded(folder: str, found: export_lib.Model) -> export_lib.Model:
  """Exports a shrunk model to a new folder and loads it from there."""
  small = export_lib.shrunk(found)
  export_lib.export(folder, small)
  return export_lib.load(folder)


def from_transformers(folder: str, kind: str, **options: Any) -> Any:
  """Returns a checkpoint as a model of `transformers`, in evaluation mode.

  Args:
    folder: The checkpoint.
    kind: Name of an Auto class.
    **options: Options of its `from_pretrained`.
  """
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return getattr(transformers, kind).from_pretrained(folder, **options).eval()


def accuracy(
  forward: Callable[..., Any], data: Data, split: str = "test"
) -> float:
  """Returns the accuracy on a split of (tokens, mask) -> logits."""
  right = count = 0.0
  for batch in data.eval_batches(split):
    found = np.argmax(forward(batch["tokens"], batch["mask"]), axis=-1)
    right += float(np.sum((found == batch["labels"]) * batch["weights"]))
    count += float(np.sum(batch["weights"]))
  return right / count


def onnx_forward(folder: str, output: str) -> Callable[..., np.ndarray]:
  """Returns (tokens, mask or None) -> an output of a program, on all cores."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = os.cpu_count() or 1
  # Threads that wait busily would slow down the model that is timed next.
  options.add_session_config_entry("session.intra_op.allow_spinning", "0")
  with open(os.path.join(folder, onnx_export.MODEL), "rb") as file:
    session = onnxruntime.InferenceSession(
      file.read(), options, providers=["CPUExecutionProvider"]
    )

  def forward(tokens: Any, mask: Any = None) -> np.ndarray:
    mask = np.ones_like(tokens) if mask is None else mask
    inputs = {
      onnx_export.TOKENS: np.asarray(tokens, np.int64),
      onnx_export.MASK: np.asarray(mask, np.int64),
    }
    return np.asarray(session.run([output], inputs)[0])

  return forward
