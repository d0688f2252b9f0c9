"""The files by which sentence-transformers makes vectors of a checkpoint.

modules.json lists the steps: the model, 1_Pooling and perhaps 2_Normalize.
sentence_bert_config.json limits the length of texts.
"""

import dataclasses
import os
from typing import Any, NamedTuple

from folding import files
from folding.config import ModelConfig, Pooling
from folding.errors import ConfigError, reason

MODULES, LIMITS = "modules.json", "sentence_bert_config.json"
_POOLING = "pooling_mode_"
_POOLINGS: dict[Pooling, str] = {
  "first": "cls_token",
  "mean": "mean_tokens",
  "last": "lasttoken",
}


class Sentence(NamedTuple):
  """How a checkpoint makes vectors of texts.

  Attributes:
    pooling: As `ModelConfig.pooling`.
    normalize: As `ModelConfig.normalize`.
    max_length: Most tokens of a text; None: as many as the model has positions.
  """

  pooling: Pooling = "mean"
  normalize: bool = False
  max_length: int | None = None

  def applied(self, model: ModelConfig) -> ModelConfig:
    """Returns the model with this pooling."""
    return dataclasses.replace(
      model, pooling=self.pooling, normalize=self.normalize, pooler=False
    )


def read(path: str | os.PathLike) -> Sentence | None:
  """Returns how a folder makes sentence vectors; None: no files say so.

  Raises:
    ConfigError: the files are damaged, or name another step or pooling.
  """
  modules_path = os.path.join(path, MODULES)
  if not os.path.isfile(modules_path):
    return None
  try:
    modules = files.read_json(modules_path, list)
    steps = {m["type"].rsplit(".", 1)[-1]: m["path"] for m in modules}
    pooling = files.read_json(
      os.path.join(path, steps["Pooling"], "config.json"), dict
    )
  except (LookupError, TypeError, AttributeError, OSError) as error:
    raise ConfigError(f"{modules_path} is damaged: {reason(error)}") from None
  left = sorted(steps.keys() - {"Transformer", "Pooling", "Normalize"})
  used = [x for x in pooling if x.startswith(_POOLING) and pooling[x] is True]
  names: dict[str, Pooling] = {_POOLING + y: x for x, y in _POOLINGS.items()}
  if left or len(used) != 1 or used[0] not in names:
    raise ConfigError(
      f"{path} makes sentence vectors by {', '.join(left or used) or 'nothing'}; "
      f"only one of {', '.join(names)} is supported"
    )
  length, limits_path = None, os.path.join(path, LIMITS)
  if os.path.isfile(limits_path):
    length = files.read_json(limits_path, dict).get("max_seq_length")
  if length is not None and not (type(length) is int and length > 0):
    raise ConfigError(f"{limits_path}: max_seq_length is {length!r}")
  return Sentence(names[used[0]], "Normalize" in steps, length)


def write(path: str | os.PathLike, model: ModelConfig, max_length: int) -> None:
  """Writes the files beside an encoder.

  Args:
    path: The folder of its checkpoint.
    model: Has the pooling.
    max_length: Most tokens of a text.
  """
  kinds = ["Transformer", "Pooling", *["Normalize"] * model.normalize]
  modules = [
    {
      "idx": n,
      "name": str(n),
      "path": f"{n}_{kind}" if n else "",
      "type": f"sentence_transformers.models.{kind}",
    }
    for n, kind in enumerate(kinds)
  ]
  pooling: dict[str, Any] = {"word_embedding_dimension": model.width}
  for ours, theirs in _POOLINGS.items():
    pooling[_POOLING + theirs] = model.pooling == ours
  limits = {"max_seq_length": max_length, "do_lower_case": False}
  for name, content in (
    ("1_Pooling/config.json", pooling),
    (LIMITS, limits),
    (MODULES, modules),
  ):
    file = os.path.join(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    files.write_json(file, content)
