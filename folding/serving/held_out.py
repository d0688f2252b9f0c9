"""What an ONNX program loses on held-out data, before it is published."""

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from folding.config import DataConfig
from folding.data import labels as labels_lib
from folding.data import local_files, sources
from folding.data.padding import (
  by_length,
  encode_rows,
  fine_bucket_lengths,
  padded,
  segments_of,
)
from folding.data.tokenizers import Text, load_tokenizer
from folding.errors import ConfigError
from folding.model import Model
from folding.models.hf_weights import TOKENIZER
from folding.serving import lines as lines_lib
from folding.serving.loaded import shrunk
from folding.serving.onnx_export import (
  MASK,
  MODEL,
  SEGMENTS,
  TOKENS,
  export_onnx,
)
from folding.tasks import METRICS, task_of
from folding.training.evaluate import cosines_of_rows, spearman_of_pairs

_BATCH = 32  # texts


def require_drop(folder: str, model: Model, path: str, max_drop: float) -> str:
  """Returns what an ONNX program loses of a metric, in words.

  The metric is the first one of the task: the accuracy of classes, the rank
  correlation of scores, or that of the cosines of sentence vectors; on texts alone it
  is the mean cosine with the vectors in float32. onnxruntime computes it here, of the
  program and of one in float32.

  Args:
    folder: The program.
    model: What it was written from.
    path: A held-out file with labels. For an encoder it is a `.txt` with one text
      per line, or a table with the columns "score", "sentence1" and "sentence2".
    max_drop: Points that the program may lose, each a hundredth of the metric.

  Raises:
    ConfigError: it loses more, the file cannot be read, or the model is a language
      model.
  """
  task = task_of(model)
  if task.predicts_tokens:
    raise ConfigError(
      "--max-drop compares labels or scores, and a language model has none"
    )
  with tempfile.TemporaryDirectory() as scratch:
    whole = os.path.join(scratch, "float32")
    export_onnx(whole, shrunk(model))
    name, before, after = _measured(model, path, [whole, folder])
  drop = 100 * (before - after)
  words = METRICS[name].words
  if name == "cosine":
    words = "mean cosine with the vectors in float32"
  line = (
    f"{words} on {os.path.basename(path)}: {before:.4f} in float32, {after:.4f} as "
    f"written, {drop:.2f} points less"
  )
  if not drop <= max_drop:  # NaN is refused, too
    raise ConfigError(f"{line}; --max-drop={max_drop:g} refuses that")
  return line


def _measured(
  model: Model, path: str, folders: Sequence[str]
) -> tuple[str, float, float]:
  """Returns the name of a metric, and its values for two programs."""
  form = task_of(model).labels
  if form is None and path.endswith(".txt"):
    with lines_lib.open_lines(path) as lines:
      texts = [line for line in lines if line.strip()]
    if not texts:
      raise ConfigError(f"{path} has only blank lines; give a text per line")
    whole, made = (_outputs(folder, model, texts) for folder in folders)
    return "cosine", 1.0, float(cosines_of_rows(whole, made).mean())
  if form is None:
    pairs = sources.load_scored_pairs(path)
    texts = pairs.firsts + pairs.seconds
    vectors = (_outputs(folder, model, texts) for folder in folders)
    before, after = (spearman_of_pairs(x, pairs.scores) for x in vectors)
    return "spearman", before, after
  task, columns = task_of(model), DataConfig(text_field=model.pair)
  try:
    rows = local_files.read_file([pathlib.Path(path)], columns, task)
  except ConfigError as error:
    names = " and ".join(model.pair or ("text",))
    raise ConfigError(
      f"{error} (--data expects the columns label and {names})"
    ) from None
  if model.pair is None and len(rows.columns) > 1:
    raise ConfigError(
      f"{path} has pairs of texts ({', '.join(rows.columns)}), and the model reads "
      "single ones; name one column text, or give --pairs if it was trained on pairs"
    )
  labels = labels_lib.to_array(
    rows.labels or (),
    form,
    model.labels,
    places=rows.places,
    allow_ids=True,
  )
  name = task.metrics[0]
  before, after = (
    form.measure(_outputs(folder, model, rows.texts), labels)[name]
    for folder in folders
  )
  return name, before, after


def _outputs(folder: str, model: Model, texts: Sequence[Text]) -> np.ndarray:
  """Returns the outputs of a program, [texts, C or D]."""
  import onnxruntime

  session = onnxruntime.InferenceSession(
    os.path.join(folder, MODEL), providers=["CPUExecutionProvider"]
  )
  output = session.get_outputs()[-1]  # sentence vectors follow the states
  tokenizer = load_tokenizer(os.path.join(folder, TOKENIZER))
  length = model.shape.max_length
  rows, seconds = encode_rows(tokenizer, texts, length)
  found: Any = np.zeros((len(rows), output.shape[-1]), np.float32)
  for members, bucket in by_length(rows, fine_bucket_lengths(length), _BATCH):
    tokens, mask = padded(
      [rows[i] for i in members], (len(members), bucket), tokenizer.pad_id
    )
    inputs = {TOKENS: tokens, MASK: mask}
    if model.shape.segments:
      assert seconds is not None  # it reads pairs
      inputs[SEGMENTS] = segments_of(seconds[members], mask)
    inputs = {name: x.astype(np.int64) for name, x in inputs.items()}
    [found[members]] = session.run([output.name], inputs)
  return found
