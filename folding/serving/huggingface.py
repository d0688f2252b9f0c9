"""A model in the standard layout, that `transformers` loads as it is."""

import dataclasses
import functools
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from folding import files, paths
from folding.compression.fold import unfold
from folding.config import dense_twin
from folding.data.tokenizers import MappedTokenizer
from folding.data.trimming import trim_tokenizer
from folding.models.attention import rope_frequencies
from folding.models.hf_config import family_of
from folding.models.hf_save import save_pretrained
from folding.schema import ConfigError, require
from folding.serving.export import TOKENIZER, Loaded


def export_hf(
  path: str | os.PathLike, loaded: Loaded, family: str | None = None
) -> dict[str, int]:
  """Writes a model as a Hugging Face checkpoint to a new folder.

  Folded projections are written dense. Neurons and tokens that have left stay
  away, but each layer is as wide as the widest, as theirs have one width.

  Args:
    path: Made if need be; it must be empty.
    loaded: From `folding.load`; no heads were removed from it.
    family: See `folding.models.hf_config`; None: the first that fits.

  Returns:
    {"files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty, no architecture of theirs computes
      this model, or heads were removed from it.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_empty(path)
  config, m = loaded.config, loaded.config.model
  require(
    m.heads is None,
    "heads of this model were removed, and the standard layout has as many in "
    "all layers; export what it was shrunk from",
  )
  width = int(np.max(m.mlp_width))
  m = dataclasses.replace(m, mlp_width=width)
  family = family or family_of(m, len(loaded.labels))
  frequencies = None
  if m.positions == "rope":
    frequencies = rope_frequencies(m.head_dim, m.rope_base, m.rope_scaling)
  try:
    params = unfold(loaded.params, frequencies)
  except ValueError as error:
    raise ConfigError(f"it has no dense form: {error}") from None
  params = paths.map_named(functools.partial(_widened, width), params)
  model = dataclasses.replace(dense_twin(config).model, mlp_width=width)
  # Where W_V is diagonal no two heads share keys any more.
  num_kv_heads = params["blocks_0"]["attn"]["k"]["kernel"].shape[1]
  model = dataclasses.replace(model, num_kv_heads=num_kv_heads)
  tokenizer_json = loaded.tokenizer.to_json()
  if isinstance(loaded.tokenizer, MappedTokenizer):
    token_map = loaded.tokenizer.token_map
    if (token_map < 0).any():  # they would be rows that no text has
      tokenizer_json, ids = trim_tokenizer(tokenizer_json, token_map >= 0)
      token_map = token_map[ids]
    rows = params["embed"]["embedding"][token_map]
    params["embed"] = {"embedding": rows}
  with tempfile.TemporaryDirectory() as folder:
    tokenizer_path = pathlib.Path(folder, TOKENIZER)
    tokenizer_path.write_text(tokenizer_json, "utf-8")
    loaded.tokenizer.special.save(tokenizer_path)
    save_pretrained(
      params,
      model,
      family,
      path,
      tokenizer_path=tokenizer_path,
      max_length=config.data.length,
      num_classes=len(loaded.labels),
      label_names=loaded.labels,
    )
  return {
    "files": sum(e.stat().st_size for e in os.scandir(path) if e.is_file())
  }


def _widened(width: int, name: str, w: Any) -> np.ndarray:
  """Returns an array of so many neurons; those that it lacks do nothing."""
  w = np.asarray(w)
  if "/mlp/" not in name or name.endswith("down/bias"):
    return w
  axis = 0 if name.endswith("down/kernel") else -1
  missing = np.zeros((w.ndim, 2), int)
  missing[axis, 1] = width - w.shape[axis]
  return np.pad(w, missing)
