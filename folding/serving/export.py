"""Models as folders: what `load` reads, and the forms that others read.

A compact export, from `export`, holds

config.json          {"format", "schema", "config": ours, resolved, "labels",
                     "sha256": {file: checksum} of the other files}
model.safetensors    parameters, zeros packed (see `save_packed`)
tokenizer.json       of the `tokenizers` library
token_map.json       if the tokenizer's ids are mapped to fewer rows
special_tokens.json  if pad and end tokens are known by more than their names

`export_hf` writes a dense folder for `transformers`, `export_stablehlo` a
program for `jax.export`, and `onnx_export.export_onnx` one for onnxruntime.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import export as jax_export

from folding import config as config_lib
from folding import files, paths
from folding.compression.accounting import account
from folding.compression.fold import unfold
from folding.config import UNLABELLED, Config
from folding.data.tokenizers import (
  OPTIONS,
  MappedTokenizer,
  Tokenizer,
  load_tokenizer,
)
from folding.data.trim import trim_tokenizer
from folding.errors import ConfigError, reason
from folding.models import hf_config, hf_weights, sentence
from folding.models.attention import layer_frequencies
from folding.models.shrink import shrink
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.serving.batched import (
  outputs,
  require_numbers,
  require_several,
  require_size,
)
from folding.serving.packed import load_packed, save_packed
from folding.training.checkpoint import load_run
from folding.training.run_dir import load_labels

FORMAT, SCHEMA = "folding", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
STABLEHLO, META = "model.stablehlo", "meta.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_STABLEHLO_OUTPUTS = {
  "lm": "float32[b, l, V]: logits",
  "embed": "float32[b, D]: vectors",
}

# Special tokens of BERT and of RoBERTa, by their names in transformers.
_ENCODER_TOKENS = {
  "cls": ("[CLS]", "<s>"),
  "sep": ("[SEP]", "</s>"),
  "mask": ("[MASK]", "<mask>"),
  "unk": ("[UNK]", "<unk>"),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model ready for use.

  Attributes:
    config: Resolved.
    params: Nested dicts of arrays.
    tokenizer: Text to the ids that the model reads.
    labels: Names of the head's outputs, classes in id order; () for a next-token
      model, and for an encoder of sentences.
  """

  config: Config
  params: dict[str, Any]
  tokenizer: Tokenizer
  labels: tuple[str, ...] = ()

  def encode(
    self,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda _: None,
  ) -> np.ndarray:
    """Returns the vectors of texts, float32[texts, D].

    Args:
      texts: Any number. The model reads at most `data.length` tokens of each.
      batch_size: Texts per batch; those of a batch are of similar length.
      report: Called after each batch with its number of texts.

    Raises:
      ConfigError: the model is of another task than "embed", a text is no
        string, or the model returns NaN.
    """
    require_size(batch_size)
    self.require_encoder()
    require_several(texts)
    texts = list(texts)
    for number, text in enumerate(texts):
      if not isinstance(text, str):
        raise ConfigError(f"text {number} is not a string: {text!r:.60}")
    found = outputs(
      self.config,
      self.tokenizer,
      functools.partial(_encode, self.model, jax.device_put(self.params)),
      texts,
      batch_size=batch_size,
      width=self.config.model.width,
      report=report,
    )
    require_numbers(np.isfinite(found), self.config.model.dtype)
    return found

  def require_encoder(self) -> None:
    """Raises `ConfigError` unless the model makes vectors of texts."""
    task = self.config.task
    if task == "lm":
      raise ConfigError(
        "this is a language model, and nothing says how it makes a vector of a "
        "text; give an encoder, or a checkpoint with the modules.json of "
        "sentence-transformers"
      )
    if task != "embed":
      raise ConfigError(
        f"this model is of task {task!r} and makes no vectors; use folding "
        "predict"
      )

  @property
  def model(self) -> Transformer:
    """The Linen module: `model.apply({"params": params}, tokens, mask)`."""
    # A loop over layers would stack, and so copy, the weights at each call.
    model = dataclasses.replace(self.config.model, scan_layers=False)
    config = dataclasses.replace(self.config, model=model)
    return make_model(config, self.num_rows, len(self.labels))

  @property
  def num_rows(self) -> int:
    """V, the rows of the embedding."""
    return self.params["embed"]["embedding"].shape[0]


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, tokens_BL, mask_BL, segments_BL):
  return model.apply({"params": params}, tokens_BL, mask_BL, True, segments_BL)


def load(path: str | os.PathLike, *, pairs: bool = False) -> Loaded:
  """Reads a model for use.

  Args:
    path: A folder: what `folding export` or `export` wrote, a run (its best
      checkpoint, or the newest), or a Hugging Face checkpoint. Or a name on
      the Hugging Face hub, such as "org/model".
    pairs: Whether a Hugging Face checkpoint reads pairs, which it does not say.

  Raises:
    ConfigError: it is none of them, has another schema, is truncated, or
      differs from its checksums.
  """
  path = str(hf_weights.find_pretrained(os.fspath(path)))
  config_path = os.path.join(path, CONFIG)
  if not os.path.isfile(config_path):
    raise ConfigError(
      f"{path} is neither a run nor an exported model: it has no {CONFIG}"
    )
  values = files.read_json(config_path, dict)
  if values.get("format") == FORMAT:
    return _load_export(path, values)
  if "folding" in values:
    raise ConfigError(
      f"{path} is a program for onnxruntime; load what it was exported from"
    )
  if "model_type" in values:
    return _load_hf(path, pairs)
  config, params, tokenizer = load_run(path)
  labels: tuple[str, ...] = ()
  if config.task not in UNLABELLED:
    count = params["head"]["kernel"].shape[1]
    labels = load_labels(path) or tuple(map(str, range(count)))
    if len(labels) != count:
      raise ConfigError(
        f"{path}/labels.json has {len(labels)} names for {count} classes"
      )
  return Loaded(config, params, tokenizer, labels)


def _load_export(path: str, values: dict[str, Any]) -> Loaded:
  schema = values.get("schema")
  if type(schema) is not int or schema != SCHEMA:
    raise ConfigError(
      f"{path} is an export of schema {schema!r}, and this version of folding "
      f"reads schema {SCHEMA}"
    )
  try:
    config = config_lib.from_dict(values["config"])
    labels = tuple(values["labels"])
    if config.task not in UNLABELLED and not labels:  # an earlier export
      config.task = "embed"
      config.model.normalize = values.get("is_normalized") is True
    config = config_lib.resolve(config)
    checksums = {WEIGHTS: "", TOKENIZER: ""} | values["sha256"]
  except (KeyError, TypeError) as error:
    raise ConfigError(f"{path}/{CONFIG} is damaged: {reason(error)}") from None
  names = {label for label in labels if isinstance(label, str)}
  if len(names) != len(labels):
    raise ConfigError(
      f"{path}/{CONFIG} is damaged: labels must be different names; they are "
      f"{labels!r}"
    )
  for name, expected in checksums.items():
    if os.path.basename(name) != name:
      raise ConfigError(f"{path}/{CONFIG} is damaged: sha256 names {name!r}")
    file = os.path.join(path, name)
    if not os.path.isfile(file):
      raise ConfigError(f"{path} has no {name}")
    if _checksum(file) != expected:
      raise ConfigError(
        f"{file} is not the file that was exported: its checksum differs from "
        f"that in {CONFIG}; copy it again"
      )
  params = load_packed(
    os.path.join(path, WEIGHTS),
    functools.partial(_check_shapes, path, config, len(labels)),
  )
  tokenizer = load_tokenizer(os.path.join(path, TOKENIZER))
  return Loaded(config, params, tokenizer, labels)


def _load_hf(path: str, pairs: bool) -> Loaded:
  how = sentence.read(path)
  found = hf_weights.load_pretrained(
    path, task="embed" if how else None, segments=pairs
  )
  if found.head == "none":
    how = how or sentence.Sentence()
  tokenizer = load_tokenizer(found.tokenizer_path)
  if tokenizer.vocab_size > found.vocab_size:
    raise ConfigError(
      f"{found.tokenizer_path} does not fit the model: its ids go up to "
      f"{tokenizer.vocab_size - 1}, and there are {found.vocab_size} embeddings"
    )
  # transformers pools at the last token that is not the pad token.
  is_causal_classifier = found.config.causal and bool(found.label_names)
  if is_causal_classifier and tokenizer.ends_with_pad:
    raise ConfigError(
      f"{found.tokenizer_path} ends each text with the pad token "
      f"({tokenizer.pad_id}), which this kind of classifier ignores; save the "
      "tokenizer with add_eos_token=False, which computes the same"
    )
  task, length, model = found.task, found.max_length, found.config
  params, labels = dict(found.params), found.label_names
  if how is not None:
    task, labels = "embed", ()
    length = min(length, how.max_length or length)
    model = how.applied(model)
    params.pop("pooler", None)
    if "position_embed" in params:
      w = params["position_embed"]["embedding"]
      params["position_embed"] = {"embedding": w[:length]}
  config = Config(
    task=task,
    preset="none",
    data=config_lib.DataConfig(
      path=path,
      length=length,
      text_field=("sentence1", "sentence2") if pairs else None,
    ),
    model=model,
  )
  config = config_lib.resolve(config)
  shapes = {name: np.shape(w) for name, w in paths.flatten(params).items()}
  _check_shapes(path, config, len(labels), shapes)
  return Loaded(config, params, tokenizer, labels)


def _check_shapes(
  path: str,
  config: Config,
  num_classes: int,
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises `ConfigError` unless these are the shapes of the config's model."""
  rows = shapes.get("embed/embedding", (0,))[0]
  made = param_shapes(make_model(config, rows, num_classes))
  expected = {name: x.shape for name, x in paths.flatten(made).items()}
  for name in sorted(expected.keys() | shapes.keys()):
    if expected.get(name) != shapes.get(name):
      raise ConfigError(
        f"the parameters in {path} are not of its config: {name} is "
        f"{shapes.get(name)}, not {expected.get(name)}"
      )


def _checksum(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def export(
  path: str | os.PathLike,
  config: Config,
  params: dict[str, Any],
  tokenizer: Tokenizer,
  labels: Sequence[str] = (),
) -> dict[str, int]:
  """Writes a compact model to a new folder.

  Args:
    path: Created if it does not exist; must be empty.
    config: Resolved.
    params: Its parameters; zeros take no room, and the dtype is kept.
    tokenizer: Text to the ids that the parameters are for.
    labels: One name per class; () for a model without a head.

  Returns:
    {"dense": bytes of the dense baseline, "values" and "masks": bytes stored,
    as `folding.account` counts them, "files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_empty(path)
  os.makedirs(path, exist_ok=True)
  save_packed(params, os.path.join(path, WEIGHTS))
  tokenizer.save(os.path.join(path, TOKENIZER))
  values = {
    "format": FORMAT,
    "schema": SCHEMA,
    "labels": list(labels),
    "sha256": {
      name: _checksum(os.path.join(path, name))
      for name in sorted(os.listdir(path))
    },
    "config": config_lib.to_dict(config),
  }
  # Written last: it marks the folder as complete.
  files.write_json(os.path.join(path, CONFIG), values, ensure_ascii=False)
  size = sizes(Loaded(config, params, tokenizer, tuple(labels)))
  return size | {"files": folder_bytes(path)}


def sizes(loaded: Loaded) -> dict[str, int]:
  """Returns bytes: "dense" of the dense baseline, "values" and "masks" stored."""
  rows = loaded.num_rows
  if isinstance(loaded.tokenizer, MappedTokenizer):
    rows = loaded.tokenizer.plain_size
  dense = make_model(
    config_lib.dense_twin(loaded.config), rows, len(loaded.labels)
  )
  found = account(loaded.params, param_shapes(dense))["bytes"]["overall"]
  return {
    "dense": found["dense"],
    "values": found["stored"],
    "masks": found["masks"],
  }


def folder_bytes(path: str) -> int:
  """Returns the bytes of the files in a folder and those below it."""
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(path)
    for name in names
  )


def shrunk(loaded: Loaded) -> Loaded:
  """Returns the model after `folding.shrink`, with its tokenizer mapped.

  The function stays the same, to float rounding: tokens of a classifier with a
  zero embedding share one row of zeros.
  """
  config, params, cut = shrink(loaded.config, loaded.params)
  tokenizer = loaded.tokenizer
  if "embed/embedding" in cut.kept:
    tokenizer = MappedTokenizer(tokenizer, cut.token_map)
  return dataclasses.replace(
    loaded,
    config=config,
    params=jax.tree.map(np.asarray, params),
    tokenizer=tokenizer,
  )


def cast(loaded: Loaded, dtype: str) -> Loaded:
  """Returns the model with its floating-point arrays in another dtype.

  Rotary frequencies keep theirs: their rounding error grows with the position.
  """

  def cast_one(name, x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not is_float or name.endswith("/frequency"):
      return x
    return np.asarray(x).astype(jnp.dtype(dtype))

  params = paths.map_named(cast_one, loaded.params)
  return dataclasses.replace(loaded, params=params)


def export_hf(
  path: str | os.PathLike,
  loaded: Loaded,
  dtype: str = "float32",
  *,
  report: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
  """Writes a Hugging Face checkpoint to a new folder.

  The Auto classes of `transformers` load it. Folded projections are written
  dense. Removed neurons and trimmed tokens stay out, but every MLP is padded to
  the width of the widest one.

  Args:
    path: Created if it does not exist; must be empty.
    loaded: From `folding.load`; no heads were removed from it.
    dtype: Type of the stored arrays.
    report: Called with the size of the arrays before they are written.

  Returns:
    {"files": bytes of the folder}.

  Raises:
    ConfigError: the folder is not empty, no family computes this model, or its
      classifier would ignore the end of a text.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_empty(path)
  m = loaded.config.model
  width = int(np.max(m.mlp_width))
  m = dataclasses.replace(m, mlp_width=width)
  family = hf_config.family_of(m, len(loaded.labels))
  frequencies = None
  if m.positions == "rope":
    frequencies = {
      f"blocks_{n}/attn": layer_frequencies(m, layer)
      for n, layer in enumerate(config_lib.layers_of(m, loaded.config.fold))
    }
  try:
    params = unfold(loaded.params, frequencies, m.head_dim)
  except ValueError as error:
    raise ConfigError(f"it has no dense form: {error}") from None
  params = paths.map_named(functools.partial(_widened, width), params)
  # Heads that share keys have values of their own beside a diagonal W_V; the
  # dense form then repeats the keys.
  m = dataclasses.replace(
    config_lib.dense_twin(loaded.config).model,
    mlp_width=width,
    num_kv_heads=params["blocks_0"]["attn"]["k"]["kernel"].shape[1],
  )
  tokenizer, token_map = plain_tokenizer(loaded.tokenizer)
  if token_map is not None:
    params["embed"] = {"embedding": params["embed"]["embedding"][token_map]}
  described = hf_config.Description(
    family=family,
    config=m,
    vocab_size=params["embed"]["embedding"].shape[0],
    max_length=loaded.config.data.length,
    pad_id=_hf_pad_id(tokenizer, m.causal and bool(loaded.labels)),
    token_types=hf_config.FAMILIES[family].defaults.get("type_vocab_size", 0),
    problem=loaded.config.task,
    label_names=loaded.labels,
  )
  size = sum(w.size for w in paths.flatten(params).values())
  size *= jnp.dtype(dtype).itemsize
  stored = sizes(loaded)
  report(
    f"About {size:,} bytes of arrays will be written; {stored['values']:,} are "
    "stored now: transformers reads dense arrays, with folded projections, "
    "removed neurons and zeros in full"
  )
  ends = tokenizer.end_ids.tolist()
  begin = [*tokenizer.begin_ids.tolist(), None][0]
  hf_weights.save_pretrained(
    path,
    params,
    described,
    dtype=dtype,
    eos_token_id=ends[0] if len(ends) == 1 else ends,
    # Without a first token, a decoder generates from the end of a text.
    bos_token_id=ends[0] if m.causal and begin is None else begin,
  )
  options = tokenizer_options(tokenizer, described)
  files.write_file(os.path.join(path, TOKENIZER), tokenizer.to_json())
  files.write_json(os.path.join(path, OPTIONS), options)
  if loaded.config.task == "embed":
    sentence.write(path, loaded.config.model, loaded.config.data.length)
  return {"files": folder_bytes(path)}


def _widened(width: int, name: str, w: Any) -> np.ndarray:
  """Returns an array of an MLP with this many neurons, filled with zeros."""
  w = np.asarray(w)
  if "/mlp/" not in name or name.endswith("down/bias"):
    return w
  axis = 0 if name.endswith("down/kernel") else -1
  missing = np.zeros((w.ndim, 2), int)
  missing[axis, 1] = width - w.shape[axis]
  return np.pad(w, missing)


def plain_tokenizer(
  tokenizer: Tokenizer,
) -> tuple[Tokenizer, np.ndarray | None]:
  """Returns a tokenizer without a map, and the row of each of its ids."""
  if not isinstance(tokenizer, MappedTokenizer):
    return tokenizer, None
  text, token_map = tokenizer.to_json(), tokenizer.token_map
  if (token_map < 0).any():  # tokens that were trimmed need no row
    text, ids = trim_tokenizer(text, token_map >= 0)
    token_map = token_map[ids]
  inner = tokenizers.Tokenizer.from_str(text)
  return Tokenizer(inner, tokenizer.special), token_map


def _hf_pad_id(tokenizer: Tokenizer, is_causal_classifier: bool) -> int:
  """Returns a pad id that ends no text.

  A causal classifier of transformers pools at the last token that is not the
  pad token.
  """
  if not is_causal_classifier or not tokenizer.ends_with_pad:
    return tokenizer.pad_id
  if not tokenizer.begin_ids.size:
    raise ConfigError(
      f"the tokenizer ends each text with the pad token ({tokenizer.pad_id}), "
      "which this kind of classifier ignores in transformers"
    )
  return int(tokenizer.begin_ids[0])


def tokenizer_options(
  tokenizer: Tokenizer, described: hf_config.Description
) -> dict[str, Any]:
  """Returns the tokenizer_config.json under which transformers reads as we do."""
  inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  begin = tokenizer.begin_ids
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": described.max_length,
    "pad_token": inner.id_to_token(described.pad_id),
    "eos_token": inner.id_to_token(tokenizer.end_id),
    "bos_token": inner.id_to_token(int(begin[0])) if begin.size else None,
    "clean_up_tokenization_spaces": False,
    # As in `folding.data.tokenizers`: "<end>" in a text is text.
    "split_special_tokens": True,
    # GPT-2 would add token_type_ids to the embedding.
    "model_input_names": ["input_ids", "attention_mask"],
  }
  if described.config.segments:
    options["model_input_names"].append("token_type_ids")
  if not described.config.causal:
    known = inner.get_vocab()
    for kind, names in _ENCODER_TOKENS.items():
      found = [name for name in names if name in known]
      options[f"{kind}_token"] = found[0] if found else None
  elif described.head == "lm" and tokenizer.special.chat_template is not None:
    # It contains special tokens, which then have to be read as such.
    options["split_special_tokens"] = False
    options["chat_template"] = tokenizer.special.chat_template
  return options


def export_stablehlo(path: str | os.PathLike, loaded: Loaded) -> dict[str, int]:
  """Writes a program of `jax.export` to a new folder.

  It maps (tokens int32[b, l], mask bool[b, l]), of any batch and length, to
  float32 logits: [b, C] of a text, [b, l, V] of a next-token model; of task
  "embed" to the vector of a text, [b, D]. A model with
  a segment embedding has a third input, segments int32[b, l]. The
  parameters are inside, as dense arrays. With jax and flatbuffers installed,
  `jax.export.deserialize(data)` reads model.stablehlo, and `.call(tokens, mask)`
  runs it. The folder also has tokenizer.json, which gives the ids that the
  program reads, and meta.json, which describes inputs, output and class names.

  Args:
    path: Created if it does not exist; must be empty.
    loaded: From `folding.load`.

  Returns:
    {"parameters": bytes of the arrays, "program": bytes of the file}.

  Raises:
    ConfigError: the folder is not empty, or the program is too large.
    OSError: it cannot be written.
  """
  path = os.fspath(path)
  files.require_empty(path)
  size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
  if size >= 1 << 31:  # a limit of flatbuffers
    raise ConfigError(
      f"a program holds less than 2 GiB of parameters; these are {size:,} bytes"
    )
  model, tokenizer = loaded.model, loaded.tokenizer

  @jax.jit
  def forward(tokens_BL, mask_BL, segments_BL=None):
    # Padding may be any number, but ids beyond the last row embed as NaN.
    fill_BL = jnp.clip(tokens_BL, 0, tokenizer.plain_size - 1)
    tokens_BL = jnp.where(mask_BL, tokens_BL, fill_BL)
    if isinstance(tokenizer, MappedTokenizer):
      tokens_BL = jnp.asarray(tokenizer.token_map, jnp.int32)[tokens_BL]
    return model.apply(
      {"params": loaded.params}, tokens_BL, mask_BL, True, segments_BL
    )

  # Learned positions are limited; the others continue beyond data.length.
  length = loaded.config.data.length
  is_limited = loaded.config.model.positions == "learned"
  bounds = ["b >= 1", "l >= 1", *([f"l <= {length}"] if is_limited else [])]
  shape: Any = jax_export.symbolic_shape("b, l", constraints=bounds)
  inputs = {
    "tokens": "int32[b, l]: ids of tokenizer.json; any where mask is false",
    "mask": "bool[b, l]: true at tokens, false at padding, which comes last",
  }
  if loaded.config.model.segments:
    inputs["segments"] = "int32[b, l]: 1 at the second text of a pair, else 0"
  exported = jax_export.export(forward, platforms=PLATFORMS)(
    *(
      jax.ShapeDtypeStruct(shape, jnp.bool_ if name == "mask" else jnp.int32)
      for name in inputs
    )
  )
  program = bytes(exported.serialize())
  meta = {
    "program": STABLEHLO,
    "inputs": inputs,
    "output": _STABLEHLO_OUTPUTS.get(
      loaded.config.task, "float32[b, C]: logits"
    ),
    "labels": list(loaded.labels),
    "trained_length": length,
    "longest": length if is_limited else None,
    "platforms": list(PLATFORMS),
    "jax": jax.__version__,
    "calling_convention": exported.calling_convention_version,
  }
  os.makedirs(path, exist_ok=True)
  files.write_file(os.path.join(path, STABLEHLO), program)
  files.write_file(os.path.join(path, TOKENIZER), tokenizer.to_json())
  files.write_json(os.path.join(path, META), meta, ensure_ascii=False)
  return {"parameters": size, "program": len(program)}
