"""A run directory read back: its config, its measurements and its result.

Only what a page about a run needs. Nothing here draws, and nothing imports
jax: a run made on a cluster is read on a laptop.
"""

import dataclasses
import json
import math
import os
import pathlib
import typing
from typing import Any

from folding import config as config_lib
from folding import files, schema

GROUPS = ("qkv", "linear", "embedding", "other", "overall")
SCHEMA = 1

# The 97.5% point of the normal distribution: two-sided 95%.
_Z95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Count:
  """Parameters or bytes of the dense twin, and those that are stored."""

  dense: int
  stored: int
  masks: int = 0  # bytes of masks and indices, not part of `stored`

  @property
  def compression(self) -> float | None:
    """1 - stored / dense; None where the dense twin has nothing."""
    return 1 - self.stored / self.dense if self.dense else None

  @property
  def compression_with_masks(self) -> float | None:
    """As `compression`, the masks counted as stored."""
    return Count(self.dense, self.stored + self.masks).compression


@dataclasses.dataclass(frozen=True)
class Groups:
  """A `Count` for each group of parameters."""

  qkv: Count
  linear: Count
  embedding: Count
  other: Count
  overall: Count


@dataclasses.dataclass(frozen=True)
class Layer:
  """One array of the model as it was measured at the end."""

  path: str
  group: str
  shape: list
  dense: int
  stored: int
  zeros: float  # fraction of zeros in the array

  @property
  def compression(self) -> float | None:
    """1 - stored / dense."""
    return Count(self.dense, self.stored).compression


@dataclasses.dataclass(frozen=True)
class Result:
  """What `result.json` says."""

  finished: bool
  steps: int
  total_steps: int
  seconds: float
  tokens_per_second: float | None
  device: str
  versions: dict
  commit: str | None
  test: dict | None
  parameters: Groups
  bytes: Groups
  layers: list


@dataclasses.dataclass(frozen=True)
class LmTest:
  """The test figures of a language model; the loss is in nats a token."""

  loss: float
  bits_per_byte: float
  perplexity: float
  num_tokens: int
  checkpoint_step: int | None = None  # that was tested; None: the last


@dataclasses.dataclass(frozen=True)
class ClassifyTest:
  """The test figures of a classifier; the loss is in nats an example."""

  loss: float
  accuracy: float
  num_examples: int
  checkpoint_step: int | None = None  # that was tested; None: the last


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory. `train` and `valid` are records by rising step."""

  name: str
  workdir: str
  config: config_lib.Config
  result: Result
  train: list[dict[str, Any]]
  valid: list[dict[str, Any]]
  test: LmTest | ClassifyTest | None  # None before the end
  energy: dict[str, Any] | None = None  # estimates, where they were asked for
  digest: str | None = None  # SHA-256 of all its text and labels

  @property
  def prunes(self) -> bool:
    """Whether FPP zeroes anything: folding alone may save what was asked."""
    return self.config.fpp.prunes and (
      not self.train or any("sparsity" in record for record in self.train)
    )

  @property
  def prunes_at_once(self) -> bool:
    """Whether what is zeroed was decided before the first step."""
    return self.prunes and self.config.compress.prune != "none"

  @property
  def folds(self) -> bool:
    """Whether any attention weight is folded."""
    m, f = self.config.model, self.config.fold
    layers = config_lib.layers_of(m, f)
    return any(layer.groups or layer.values != "dense" for layer in layers)


def load_run(workdir: str) -> Run:
  """Returns what is known of a run.

  A last line of `metrics.jsonl` that a killed process left half-written is
  ignored. Where a resumed run measured a step again, the later record counts.

  Raises:
    schema.ConfigError: the folder is not a run, or one of its files is
      damaged; the message names the file.
  """
  schema.require(
    os.path.isdir(workdir), f"there is no run directory {workdir!r}"
  )
  for name in ("config.json", "metrics.jsonl", "result.json"):
    schema.require(
      os.path.isfile(os.path.join(workdir, name)),
      f"{workdir!r} is not a run directory: it has no {name}",
    )
  values = files.read_json(os.path.join(workdir, "config.json"), dict)
  config = config_lib.from_dict(values)
  result = _read_result(os.path.join(workdir, "result.json"))
  records = _read_metrics(os.path.join(workdir, "metrics.jsonl"))
  used = os.path.join(workdir, "energy.json")
  test = None
  # A figure measured before the end is not the figure of this run.
  if result.finished and result.test is not None:
    kind = LmTest if config.task == "lm" else ClassifyTest
    test = _build(kind, result.test, "test of result.json")
    if isinstance(test, ClassifyTest):
      schema.require(
        0 <= test.accuracy <= 1 and test.num_examples > 0,
        f"result.json is damaged: an accuracy of {test.accuracy} on "
        f"{test.num_examples} examples",
      )
  return Run(
    name=os.path.basename(os.path.abspath(workdir)),
    workdir=workdir,
    config=config,
    result=result,
    train=[r for r in records if r["split"] == "train"],
    valid=[r for r in records if r["split"] == "valid"],
    test=test,
    energy=files.read_json(used, dict) if os.path.exists(used) else None,
    digest=text_digest(workdir),
  )


def text_digest(workdir: str) -> str | None:
  """Returns the SHA-256 of a run's text and labels, None where none is kept."""
  path = pathlib.Path(workdir, "text.sha256")
  return path.read_text("utf-8", "replace").strip() if path.is_file() else None


def wilson(accuracy: float, num_examples: int) -> tuple[float, float]:
  """Returns the 95% Wilson interval of a proportion.

  It solves |p - accuracy| = z sqrt(p (1 - p) / n) for p, so that it stays in
  [0, 1] and has a width even where every example is right.

  Example:
    >>> low, high = wilson(0.9, 100)
    >>> print(f"{low:.3f} to {high:.3f}")
    0.826 to 0.945

  References: Wilson, "Probable inference, the law of succession, and
    statistical inference", 1927.
  """
  z2_n = _Z95**2 / num_examples
  middle = (accuracy + z2_n / 2) / (1 + z2_n)
  spread = accuracy * (1 - accuracy) / num_examples
  half = _Z95 * math.sqrt(spread + z2_n / (4 * num_examples)) / (1 + z2_n)
  # Rounding must not leave what was measured outside.
  low, high = max(0.0, middle - half), min(1.0, middle + half)
  return min(low, accuracy), max(high, accuracy)


def _read_result(path: str) -> Result:
  values = files.read_json(path, dict)
  found = values.get("schema")
  schema.require(
    found == SCHEMA,
    f"{path!r} has schema {found!r}; this version reads schema {SCHEMA}",
  )
  result = _build(Result, values, "result.json")
  layers = [
    _build(Layer, layer, f"layers[{i}] of result.json")
    for i, layer in enumerate(result.layers)
  ]
  for layer in layers:
    schema.require(
      layer.group in GROUPS,
      f"result.json is damaged: {layer.path} is of the group {layer.group!r}",
    )
  return dataclasses.replace(result, layers=layers)


def _build(kind: type, values: Any, where: str) -> Any:
  return schema.build(kind, _known(kind, values, where), where)


def _known(kind: type, values: Any, where: str) -> dict[str, Any]:
  """Returns the fields we read: a later writer may add others."""
  schema.require(
    isinstance(values, dict), f"{where} is damaged: it is not an object"
  )
  hints = typing.get_type_hints(kind)
  known = {}
  for field in dataclasses.fields(kind):
    name = field.name
    if name not in values:
      schema.require(
        field.default is not dataclasses.MISSING,
        f"{where} is damaged: it has no {name!r}",
      )
    elif dataclasses.is_dataclass(hints[name]):
      known[name] = _known(hints[name], values[name], f"{where}.{name}")  # pyright: ignore[reportArgumentType]
    else:
      known[name] = values[name]
  return known


def _read_metrics(path: str) -> list[dict[str, Any]]:
  """Returns the records by step, the last one of each split and step."""
  with open(path, encoding="utf-8", errors="replace") as file:
    lines = file.readlines()
  records = {}
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      key = (record["split"], record["step"])
      schema.require(
        isinstance(key[1], int) and isinstance(record["loss"], int | float),
        "step and loss must be numbers",
      )
    except (ValueError, KeyError, TypeError) as error:
      if not line.endswith("\n"):
        break  # only a last line can lack its end
      raise schema.ConfigError(
        f"{path!r} is damaged at line {number}: {error}"
      ) from error
    records[key] = record
  return [records[key] for key in sorted(records, key=lambda key: key[1])]
