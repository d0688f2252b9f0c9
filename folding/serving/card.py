"""README.md of an exported folder: the model card that a hub shows."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from folding import files
from folding.errors import ConfigError, escaped, printable
from folding.model import Model, Origin
from folding.models import hf_weights
from folding.tasks import METRICS, task_of
from folding.training import run_dir

README, LICENSE = "README.md", "LICENSE"
_TAG = "folding"
_HUB_FOLDER = re.compile(r"models--([\w.-]+)--([\w.-]+)")  # in its cache
_HUB_ID = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?:@.+)?")  # and a revision
_TITLE = re.compile(r"(?:---\n.*?\n---\n)?\s*# *(\S+) *(?:\n|$)", re.DOTALL)
_PAPER = "https://doi.org/10.1038/s41598-025-92586-5"
# {verb of a task: name of a pipeline of transformers}
_PIPELINES = {
  "encode": "feature-extraction",
  "generate": "text-generation",
  "predict": "text-classification",
}
_LIBRARIES = {
  "safetensors": "folding",
  "hf": "transformers",
  "onnx": "onnxruntime",
  "stablehlo": "jax",
}
_ARGUMENTS = {
  "encode": '["a text", "another"]',
  "generate": '["Once upon a time"]',
  "predict": '["a text", "another"]',
}


def origin_of_folder(path: str) -> Origin:
  """Returns the origin of a model that is read from a folder of arrays.

  Its name is that on the hub, the title of its card if that is one word, or the name
  of the folder. What the card says counts if this library has written it.
  """
  metadata = _metadata(path)

  def lines(name: str) -> tuple[str, ...]:
    found = metadata.get(name)
    found = found if isinstance(found, list) else [found]
    return tuple(printable(x) for x in found if isinstance(x, str))

  base, notes = "".join(lines("made_from")[:1]), lines("notes")
  if _TAG not in lines("tags"):
    folder = os.path.basename(os.path.abspath(path))
    notes, base = (), _hub_id(path) or _title(path) or folder
  found = sorted(pathlib.Path(path).glob(f"{LICENSE}*"))
  texts = [file for file in found if _is_own(file)]
  return Origin(
    base,
    "".join(lines("license")[:1]),
    texts[0].read_text("utf-8", "replace") if texts else "",
    notes,
  )


def origin_of_run(path: str, start: str) -> Origin:
  """Returns the origin of a run: the checkpoint that it started from."""
  origin, (run, start) = Origin(), _first_start(path, start)
  if start and os.path.isdir(start):
    origin = origin_of_folder(start)
  elif start:
    hub_id = None if _was_folder(run, start) else _HUB_ID.fullmatch(start)
    origin = Origin(hub_id[1] if hub_id else os.path.basename(start))
  test = {}
  if os.path.isfile(os.path.join(path, "result.json")):
    test = run_dir.read_result(path).get("test") or {}
  found = [
    METRICS[name].line.format(test[name]) for name in METRICS if name in test
  ]
  notes = (f"Test split: {', '.join(found)}",) * bool(found)
  return origin._replace(notes=notes)


def _first_start(run: str, start: str) -> tuple[str, str]:
  """Returns the first run of those in between, and what it started from."""
  seen = set()
  while start and start not in seen:
    seen.add(start)
    if os.path.isdir(os.path.join(start, "checkpoints")):
      with contextlib.suppress(ConfigError, OSError):
        first = run_dir.load_order(start).pretrained
        run, start = (start, first) if first else (run, start)
  return run, start


def _was_folder(run: str, start: str) -> bool:
  """Returns whether a run read a folder that is gone, or that is not from here."""
  with contextlib.suppress(ConfigError, OSError):
    tokenizer = run_dir.load_order(run).data.tokenizer
    return pathlib.Path(start) in pathlib.Path(tokenizer).parents
  return False


def _metadata(path: str) -> dict[str, Any]:
  """Returns the head of a README.md; {} if there is none that can be read."""
  file = pathlib.Path(path, README)
  if not _is_own(file):
    return {}
  import huggingface_hub  # slow to import

  try:
    return huggingface_hub.metadata_load(file) or {}
  except Exception:  # YAML errors of several kinds: only information is lost
    return {}


def _title(path: str) -> str:
  """Returns the title of a README.md if it is a name; "": it is none."""
  file = pathlib.Path(path, README)
  text = file.read_text("utf-8", "replace") if _is_own(file) else ""
  found = _TITLE.match(text)
  return found[1] if found and _HUB_ID.fullmatch(found[1]) else ""


def _is_own(file: pathlib.Path) -> bool:
  """Returns whether a file of a checkpoint is one, and lies in its folder.

  Files in the cache of the hub are links to another folder of the same model. A link
  to anywhere else could publish a private file in the card.
  """
  folder = file.parent.resolve()
  models = (x for x in folder.parents if _HUB_FOLDER.fullmatch(x.name))
  own = next(models, folder)
  return file.is_file() and file.resolve().is_relative_to(own)


def _hub_id(path: str) -> str:
  """Returns the hub id of a folder in the cache of the hub; "": another one."""
  found = _HUB_FOLDER.search(os.path.abspath(path))
  return "/".join(found.groups()) if found else ""


def write(
  path: str,
  model: Any,
  format: str,
  name: str,
  sizes: Mapping[str, int],
  *,
  dtype: str | None = None,
  notes: Sequence[str] = (),
) -> None:
  """Writes README.md, and LICENSE if the origin has one.

  Args:
    path: The exported folder.
    model: A `folding.Model`.
    format: Name of the format.
    name: Title: name of the folder, or on the hub.
    sizes: Bytes of the "parameters" in the folder, and of the "dense" baseline
      in the type of the model.
    dtype: Type of the stored arrays; None: the default of the format.
    notes: More lines about the quality, of this folder alone.
  """
  from huggingface_hub import ModelCardData  # slow to import

  origin, task = model.origin, task_of(model)
  is_hub_id = "/" in origin.base
  library = _LIBRARIES[format]
  if task.makes_vectors and format in ("hf", "onnx"):
    library = "sentence-transformers"
  metadata = ModelCardData(
    license=origin.license or None,
    base_model=origin.base if is_hub_id else None,
    library_name=library,
    pipeline_tag=_PIPELINES[task.verb],
    tags=[_TAG],
    # For folders that are written from this one.
    made_from=origin.base or None,
    notes=[*origin.notes] or None,
    ignore_metadata_errors=True,
  )
  facts = _facts(path, model, format, sizes, dtype=dtype, notes=notes)
  source = f", made from {escaped(origin.base)}" if origin.base else ""
  lines = [
    f"# {escaped(name)}",
    f"A {task.words}{source} with [folding]({_PAPER}).",
    "\n".join(f"- {fact}" for fact in facts),
    f"```python\n{_usage(model, format, library, name)}\n```",
  ]
  content = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"
  files.write_file(os.path.join(path, README), content)
  if origin.license_text:
    files.write_file(os.path.join(path, LICENSE), origin.license_text)


def _facts(path, model, format, sizes, *, dtype, notes) -> list[str]:
  """Returns the sentences of a card about its folder, see `write`."""
  origin = model.origin
  facts = [
    f"The files have {files.folder_bytes(path):,} bytes.",
    f"It reads at most {model.shape.max_length} tokens of a text.",
    *map(escaped, origin.notes),
  ]
  if origin.notes and dtype not in (None, "float32", model.dtype):
    facts.append(
      f"The figures above were measured before its weights became {dtype}."
    )
  facts += (f"{escaped(note[:1].upper() + note[1:])}." for note in notes)
  if format == "hf" and hf_weights.idle_pooler(
    hf_weights.describe_pretrained(pathlib.Path(path))
  ):
    facts.append(
      "It has no trained pooler: `pooler_output` of transformers is tanh of the "
      "first hidden state, and the program below does not read it."
    )
  stored, dense = sizes["parameters"], sizes["dense"]
  if stored < dense:
    facts.append(
      f"Its parameters take {stored:,} bytes, and those of the dense model in "
      f"{model.dtype} {dense:,} ({1 - stored / dense:.1%} less)."
    )
  return facts


def _usage(model: Model, format: str, library: str, name: str) -> str:
  """Returns a program that loads the folder in its runtime."""
  task = task_of(model)
  texts = _ARGUMENTS[task.verb]
  if model.pair is not None:
    texts = '[("a text", "another")]'
    if format == "hf":
      texts = '{"text": "a text", "text_pair": "another"}'

  def quoted(path: str) -> str:
    return printable(json.dumps(path, ensure_ascii=False))

  if format == "safetensors":
    return (
      f"import folding\n\nmodel = folding.load({quoted(name)})\n"
      f"model.{task.verb}({texts})"
    )
  if library == "sentence-transformers":
    backend = ', backend="onnx"' if format == "onnx" else ""
    return (
      "from sentence_transformers import SentenceTransformer\n\n"
      f"model = SentenceTransformer({quoted(name)}{backend})\n"
      f"model.encode({texts})"
    )
  if format == "hf":
    return (
      "from transformers import pipeline\n\n"
      f'model = pipeline("{_PIPELINES[task.verb]}", model={quoted(name)})\n'
      f"model({texts})"
    )
  if format == "onnx":
    return (
      "import onnxruntime\nimport tokenizers\n\n"
      "tokenizer = tokenizers.Tokenizer.from_file("
      f"{quoted(f'{name}/tokenizer.json')})\n"
      "session = onnxruntime.InferenceSession("
      f"{quoted(f'{name}/model.onnx')})\n"
      "print([x.name for x in session.get_inputs()])"
    )
  return (
    "import pathlib\n\nimport jax.export\n\n"
    f"data = pathlib.Path({quoted(f'{name}/model.stablehlo')}).read_bytes()\n"
    "program = jax.export.deserialize(bytearray(data))"
  )
