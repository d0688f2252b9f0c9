"""The files by which sentence-transformers makes vectors of a checkpoint.

modules.json lists the steps: the model, 1_Pooling and perhaps 2_Normalize.
sentence_bert_config.json limits the length of texts; without that,
tokenizer_config.json does. Pooling is written with a flag per kind, as before
version 5.4 of the library, because all versions read that.
"""

import contextlib
import dataclasses
import os
from typing import Any, NamedTuple

import tokenizers

from folding import files
from folding.config import Design, ModelConfig, Pooling
from folding.errors import ConfigError, reason
from folding.models.hf_weights import TOKENIZER

MODULES, LIMITS = "modules.json", "sentence_bert_config.json"
# Some older checkpoints name it by another family. The first that exists counts.
_LIMITS_NAMES = tuple(
  f"sentence_{family}_config.json"
  for family in ("bert", "roberta", "distilbert", "xlm-roberta")
)
_PROMPTS = "config_sentence_transformers.json"
_OPTIONS = "tokenizer_config.json"
_MODE = "pooling_mode"
_FLAGS: dict[Pooling, str] = {
  "first": f"{_MODE}_cls_token",
  "mean": f"{_MODE}_mean_tokens",
  "last": f"{_MODE}_lasttoken",
}
_MODES: dict[str, Pooling] = {
  "cls": "first",
  "mean": "mean",
  "lasttoken": "last",
}


class Sentence(NamedTuple):
  """How a checkpoint makes vectors of texts.

  Attributes:
    pooling: How tokens become a vector, see `Design.pooling`.
    normalize: Whether vectors have length 1.
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
    ConfigError: the files are damaged, or ask for another step or pooling, for a
      prompt before each text, or for lowercase that the tokenizer does not make.
  """
  modules_path = os.path.join(path, MODULES)
  if not os.path.isfile(modules_path):
    return None
  try:
    modules = files.read_json(modules_path, list)
    steps = {m["type"].rsplit(".", 1)[-1]: m["path"] for m in modules}
    if [*steps] == ["Transformer"]:  # a cross-encoder, since version 5.4
      return None
    used = sorted(steps.keys() - {"Transformer", "Pooling", "Normalize"})
    if files.leads_out(steps.get("Pooling", "")):
      raise ConfigError(f"{modules_path} names a folder outside of its own")
    if not used:
      file = os.path.join(path, steps["Pooling"], "config.json")
      used = _pooling_modes(files.read_json(file, dict))
  except (LookupError, TypeError, AttributeError, OSError) as error:
    raise ConfigError(f"{modules_path} is damaged: {reason(error)}") from None
  if len(used) != 1 or used[0] not in _MODES:
    raise ConfigError(
      f"{path} makes sentence vectors by {', '.join(used) or 'nothing'}; only "
      f"one of {', '.join(_MODES)} is supported"
    )
  prompts = _read_options(path, _PROMPTS)
  name = prompts.get("default_prompt_name")
  texts = prompts.get("prompts")
  if name and not (isinstance(texts, dict) and texts.get(name) == ""):
    raise ConfigError(
      f"{os.path.join(path, _PROMPTS)} puts the prompt {name!r} before each text, "
      "which is not supported; set default_prompt_name to null there, and write "
      "the prompt into your texts"
    )
  known = (n for n in _LIMITS_NAMES if os.path.isfile(os.path.join(path, n)))
  limits_name = next(known, LIMITS)
  limits = _read_options(path, limits_name)
  limits_path = os.path.join(path, limits_name)
  if limits.get("do_lower_case") is True and not _lowers(path):
    raise ConfigError(
      f"{limits_path} sets do_lower_case, and {TOKENIZER} has no Lowercase "
      "normalizer; add one to it"
    )
  length = limits.get("max_seq_length")
  if length is not None and not (type(length) is int and length > 0):
    raise ConfigError(f"{limits_path}: max_seq_length is {length!r}")
  if length is None:
    most = _read_options(path, _OPTIONS).get("model_max_length")
    length = most if type(most) is int else None
  return Sentence(_MODES[used[0]], "Normalize" in steps, length)


def _pooling_modes(pooling: dict[str, Any]) -> list[str]:
  """Returns the kinds of pooling that a 1_Pooling/config.json combines."""
  if _MODE in pooling:
    modes = pooling[_MODE]
    return [modes] if isinstance(modes, str) else list(map(str, modes))
  # Before version 5.4, such as "pooling_mode_mean_tokens": true.
  flags = (x for x in pooling if x.startswith(_MODE) and pooling[x] is True)
  return [x[len(_MODE) + 1 :].split("_token")[0] for x in flags]


def _read_options(path: str | os.PathLike, name: str) -> dict[str, Any]:
  file = os.path.join(path, name)
  return files.read_json(file, dict) if os.path.isfile(file) else {}


def _lowers(path: str | os.PathLike) -> bool:
  """Returns whether the tokenizer of a folder makes lowercase."""
  # The library raises plain Exception if the file is missing or damaged.
  with contextlib.suppress(Exception):
    file = os.path.join(path, TOKENIZER)
    normalizer = tokenizers.Tokenizer.from_file(file).normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"
  return False


def write(path: str | os.PathLike, model: Design, max_length: int) -> None:
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
  pooling |= {flag: model.pooling == x for x, flag in _FLAGS.items()}
  limits = {"max_seq_length": max_length, "do_lower_case": False}
  prompts = {"prompts": {}, "default_prompt_name": None}
  prompts["similarity_fn_name"] = "cosine"
  for name, content in (
    (_PROMPTS, prompts),
    ("1_Pooling/config.json", pooling),
    (LIMITS, limits),
    (MODULES, modules),
  ):
    file = os.path.join(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    files.write_json(file, content)
