"""The files of a run directory.

config.json     the config as it was given, with its presets resolved
model.json      the model that training began with: its shape, the fractions that a
                plan prunes, and the names of a pair
tokenizer.json  the tokenizer, see `folding.data.tokenizers`
labels.json     class names in id order; only of a classifier
text.sha256     digest of all text and labels
checksums.json  checksums of the files above
metrics.jsonl   one record per line
result.json     outcome and provenance, with its own checksum
command.json    the last command that trained the run, for its report
fold.json       how a trained model was folded, see `folding.training.compress_trained`
checkpoints/    see `folding.training.checkpoint`
report.*        see `folding.reporting.report`

A run that a signal stops has saved a checkpoint, and a result of which
"finished" is false. `resume` continues it from there.

The files above `checksums.json` never change. They are verified whenever the
config is read. A run of an earlier version has no checksums, and is read with a
warning. None of the files may be a link out of the directory.

Every file is written whole or not at all, except that a killed process may
leave the last line of `metrics.jsonl` half-written.
"""

import contextlib
import dataclasses
import json
import logging
import operator
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax

from folding import config as config_lib
from folding import files, typed
from folding.config import Config, FoldConfig, ModelConfig, Order
from folding.data import special_tokens, tokenizers
from folding.errors import ConfigError, reason
from folding.model import Model, Origin, Targets
from folding.models.shape import (
  Shape,
  fold_of,
  make_shape,
  model_of,
  shape_of,
)
from folding.tasks import task_of
from folding.typed import differences, edited
from folding.version import __version__

_log = logging.getLogger(__name__)

_MODEL = "model.json"
_ASKED = "asked.json"  # of earlier versions, whose config.json was as it became

# Files that `checksums.json` lists beside config.json, missing ones as absent.
_FIXED = (
  "tokenizer.json",
  special_tokens.SPECIAL_TOKENS,
  tokenizers.TOKEN_MAP,
  "labels.json",
  "text.sha256",
  _MODEL,
)

# Fields of a config that may be paths; some also take a hub id or "bytes".
_PATHS = (
  "pretrained",
  "data.path",
  "data.tokenizer",
  "data.sts",
  "distill.teacher",
)


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Locks a run directory, new or not, for one process that writes into it.

  The operating system releases the lock when the process ends. File systems
  without locks are not locked. A directory that is still empty at the end is
  removed.

  Raises:
    ConfigError: another process holds the lock.
  """
  os.makedirs(workdir, exist_ok=True)
  try:
    handle = files.lock(workdir)
  except BlockingIOError as error:
    raise ConfigError(
      f"another process trains in {workdir}; wait for it, or choose another "
      "--workdir"
    ) from error
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      os.rmdir(workdir)
    if handle is not None:
      os.close(handle)


def save(workdir: str, config: Config, model: Model, digest: str) -> None:
  """Writes the files that a run begins with.

  Args:
    workdir: The run directory.
    config: The config as it was given, resolved.
    model: The model that training begins with.
    digest: `Data.digest`.
  """
  model.tokenizer.save(_path(workdir, "tokenizer.json"))
  if model.labels:
    text = json.dumps(model.labels, ensure_ascii=False)
    files.write_file(_path(workdir, "labels.json"), text)
  files.write_file(_path(workdir, "text.sha256"), digest)
  values = {
    "model": dataclasses.asdict(model_of(model.shape)),
    "fold": dataclasses.asdict(fold_of(model.shape)),
    "targets": model.targets and model.targets._asdict(),
    "pair": model.pair,
  }
  files.write_json(_path(workdir, _MODEL), values)
  text = config_lib.to_json(config)
  files.write_checksums(workdir, _FIXED, {"config.json": text})
  # Last: with it the run has begun.
  files.write_file(_path(workdir, "config.json"), text)


def is_new(workdir: str) -> bool:
  """Returns whether no run has begun in a directory."""
  return not os.path.exists(_path(workdir, "config.json"))


def is_begun(workdir: str, config: Config) -> bool:
  """Returns whether a directory holds the run of a config.

  The mesh, `distributed`, `train.accumulate`, `train.compact`, `train.energy` and
  the spelling of paths do not change the outcome, and may differ.

  Args:
    workdir: The run directory, which may not exist.
    config: Resolved; the config asked for now.

  Raises:
    ConfigError: the run is of another config; the message names the fields. Or
      see `files.require_inside`.
  """
  files.require_inside(workdir)
  if is_new(workdir):
    return False
  order = load_order(workdir)
  if changed := differences(_computed_as(order, config), config):
    raise ConfigError(
      f"{workdir} holds a run of another config ({'; '.join(changed)}); "
      f"choose another folder, or continue it with: folding resume {workdir}"
    )
  return True


def _computed_as(config: Config, other: Config) -> Config:
  """Returns a config with the fields of another that do not change the outcome."""
  spelt = {}
  for name in _PATHS:
    a, b = map(operator.attrgetter(name), (config, other))
    may_be_paths = a and b and not {a, b} & set(tokenizers.BUILT_IN)
    if may_be_paths and os.path.abspath(a) == os.path.abspath(b):
      spelt[name] = b
  config = edited(config, spelt)
  train = dataclasses.replace(
    config.train,
    accumulate=other.train.accumulate,
    compact=other.train.compact,
    energy=other.train.energy,
  )
  return dataclasses.replace(
    config,
    mesh=other.mesh,
    distributed=other.distributed,
    train=train,
  )


def load_model(workdir: str, order: Order) -> Model:
  """Returns the model that the training of a run began with, without arrays.

  Raises:
    ConfigError: model.json or labels.json is damaged.
  """
  shape, targets, pair = began(workdir, order)
  return Model(
    shape,
    order.task,
    {},
    load_tokenizer(workdir),
    load_labels(workdir),
    pair,
    origin=Origin(order.pretrained or ""),
    targets=targets,
  )


def began(
  workdir: str, order: Order
) -> tuple[Shape, Targets | None, tuple[str, str] | None]:
  """Returns shape, targets and pair of the model that a run began with.

  Raises:
    ConfigError: model.json is damaged.
  """
  path = _path(workdir, _MODEL)
  if not os.path.exists(path):  # of an earlier version
    config = config_lib.load(_path(workdir, "config.json"))
    f, names, targets = config.fpp, config.data.text_field, None
    if f != order.fpp and f.linear_layers is not None:  # a plan chose them
      targets = Targets(f.linear_layers, f.linear or 0, f.embedding or 0)
    pair = names if isinstance(names, tuple) else None
    return shape_of(config), targets, pair
  values = files.read_json(path, dict)
  try:
    model, fold = (
      typed.build(kind, values[name], name)
      for name, kind in (("model", ModelConfig), ("fold", FoldConfig))
    )
    pair, targets = values["pair"], values["targets"]
    if targets is not None:
      targets = Targets(**targets)._replace(layers=tuple(targets["layers"]))
    output = task_of(order).output_kind
    shape = make_shape(model, fold, output, order.data.length)
    return shape, targets, pair and tuple(pair)
  except (LookupError, TypeError, ValueError) as error:
    raise ConfigError(f"{path} is damaged: {reason(error)}") from None


def load_order(workdir: str) -> Config:
  """Returns the config of a run directory, as it was given.

  Raises:
    ConfigError: it is not a run, or one of an earlier version; or a file of it
      differs from its checksum, or is a link out of it.
  """
  files.require_inside(workdir)
  path = _path(workdir, "config.json")
  if not os.path.exists(path):
    raise ConfigError(f"{workdir!r} is not a run: it has no config.json")
  values = files.read_json(path, dict)
  if {"model_type", "format"} & values.keys():
    raise ConfigError(
      f"{workdir} is an export or another library's checkpoint, not a run"
    )
  try:
    is_checked = files.require_intact(workdir)
  except ConfigError as error:
    raise ConfigError(
      f"{error}; a run keeps its files: put the one back that it began with, or "
      "start another run"
    ) from None
  if not is_checked:
    _log.warning(
      "the files of %s cannot be verified: it has no %s, like runs of earlier "
      "versions",
      workdir,
      files.CHECKSUMS,
    )
  asked = _path(workdir, _ASKED)
  has_order = os.path.exists(_path(workdir, _MODEL))
  is_changed = not has_order and os.path.exists(asked)
  return config_lib.load(asked if is_changed else path)


def load_tokenizer(workdir: str) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a run directory."""
  return tokenizers.load_tokenizer(_path(workdir, "tokenizer.json"))


def load_labels(workdir: str) -> tuple[str, ...]:
  """Returns the class names of a run in id order; () for a language model.

  Raises:
    ConfigError: they are not different strings.
  """
  path = _path(workdir, "labels.json")
  if not os.path.exists(path):
    return ()
  labels = files.read_json(path, list)
  names = {x for x in labels if isinstance(x, str) and x.strip()}
  if len(names) < len(labels):
    raise ConfigError(
      f"{path} is damaged: labels must be different strings, none of them empty"
    )
  return tuple(labels)


def require_same_text(workdir: str, digest: str) -> None:
  """Checks that the text of a run is the one that it began with.

  Args:
    workdir: The run directory.
    digest: `Data.digest` of the text that is there now.

  Raises:
    ConfigError: it is another text.
  """
  path = _path(workdir, "text.sha256")
  if not os.path.exists(path):
    _log.warning("the text cannot be verified: %s is missing", path)
    return
  if pathlib.Path(path).read_text("utf-8", "replace").strip() != digest:
    raise ConfigError(
      f"the text or the labels changed since {workdir} began (their digest "
      "differs from text.sha256); restore them, or start another run"
    )


def read_metrics(path: str) -> list[dict[str, Any]]:
  """Returns the records of `metrics.jsonl`, without a half-written last line.

  Each has "split" ("train" or "valid"), "step" and "loss", among others.

  Args:
    path: The file; it may not exist.

  Raises:
    ConfigError: a line is damaged.
  """
  if not os.path.exists(path):
    return []
  records = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, start=1):
      try:
        record = json.loads(line)
        if record["split"] not in ("train", "valid"):
          raise ValueError(f"the split is {record['split']!r}")
        record |= {"step": int(record["step"]), "loss": float(record["loss"])}
      except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
      ) as error:
        if not line.endswith("\n"):
          break  # the last line, half-written
        raise ConfigError(
          f"{path} is damaged at line {number}: {type(error).__name__}: {error}"
        ) from error
      records.append(record)
  return records


def write_result(workdir: str, result: dict[str, Any]) -> None:
  """Writes `result.json`: the result with its device, versions and commit."""
  device = jax.devices()[0]
  versions = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
  record = {
    "schema": 2,
    "device": f"{device.device_kind} x{len(jax.devices())} "
    f"({platform.machine()}, {os.cpu_count()} cores)",
    "versions": {
      "folding": __version__,
      **versions,
      "python": platform.python_version(),
    },
    "commit": source_commit(),
    **result,
  }
  # In the file itself, because both must change in one step.
  record["checksum"] = _result_checksum(record)
  files.write_file(_path(workdir, "result.json"), json.dumps(record, indent=1))


def read_result(workdir: str) -> dict[str, Any]:
  """Returns the content of `result.json`, without its checksum.

  Raises:
    ConfigError: it was edited, is damaged or is of a later version.
  """
  path = _path(workdir, "result.json")
  result = files.read_json(path, dict)
  schema = result.get("schema", 1)
  if schema not in (1, 2):
    raise ConfigError(
      f"{path} has schema {schema!r}; this version reads schemas 1 and 2"
    )
  expected = result.pop("checksum", None)
  # Results of schema 1 may have none.
  is_old = expected is None and schema == 1
  if not is_old and expected != _result_checksum(result):
    raise ConfigError(
      f"{path} differs from its checksum: it was edited or is damaged"
    )
  seconds = result.get("seconds", 0.0)
  if type(seconds) not in (int, float):
    raise ConfigError(f"{path} is damaged: seconds is {seconds!r}")
  test = result.get("test") or {}
  if not isinstance(test, dict) or any(
    type(x) not in (int, float) and (x, name) != (None, "checkpoint_step")
    for name, x in test.items()
  ):
    raise ConfigError(f"{path} is damaged: test is {test!r}")
  return result


def _result_checksum(result: dict[str, Any]) -> str:
  # Sorted, and read back: tuples become lists, numbers as keys become strings.
  text = json.dumps(json.loads(json.dumps(result)), sort_keys=True)
  return files.checksum(text.encode("utf-8"))


def finished_result(workdir: str) -> dict[str, Any] | None:
  """Returns `read_result` of a run that was tested; None of any other."""
  if not os.path.exists(_path(workdir, "result.json")):
    return None
  result = read_result(workdir)
  return result if result.get("finished") else None


def write_command(
  workdir: str,
  command: str,
  edits: Sequence[str],
  dense_test: dict[str, Any] | None,
) -> None:
  """Writes `command.json`.

  Args:
    workdir: The run directory.
    command: The command line that trained the run.
    edits: The fields that it changes in its config file, as
      `typed.differences` returns them.
    dense_test: Test metrics of the dense run that it made smaller, if known. They
      are kept here because a report reads nothing outside its run.
  """
  record = {
    "command": command,
    "edits": list(edits),
    "dense_test": dense_test,
  }
  files.write_json(_path(workdir, "command.json"), record)


def read_command(workdir: str) -> dict[str, Any]:
  """Returns the content of `command.json`; {} without it.

  Raises:
    ConfigError: it is damaged.
  """
  path = _path(workdir, "command.json")
  if not os.path.exists(path):
    return {}
  record = files.read_json(path, dict)
  edits, dense = record.get("edits"), record.get("dense_test")
  has_edits = isinstance(edits, list) and all(isinstance(x, str) for x in edits)
  if not (has_edits and isinstance(record.get("command"), str)):
    raise ConfigError(f"{path} is damaged: command and edits are not texts")
  if not isinstance(dense, dict | None):
    raise ConfigError(f"{path} is damaged: dense_test is {dense!r}")
  return record


def source_commit() -> str | None:
  """Returns the commit of the source tree; None if installed elsewhere."""
  here = pathlib.Path(__file__).resolve()
  # An installed copy may lie in the repository of another project.
  if _git("ls-files", "--error-unmatch", str(here), at=here.parent) is None:
    return None
  return _git("rev-parse", "--short=12", "HEAD", at=here.parent)


def _git(*words: str, at: pathlib.Path) -> str | None:
  """Returns the output of git in a folder; None if it fails."""
  try:
    found = subprocess.run(
      ["git", "-C", str(at), *words],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return found.stdout.strip()


def _path(workdir: str, name: str) -> str:
  return os.path.join(workdir, name)
