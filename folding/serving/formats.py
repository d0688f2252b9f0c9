"""The formats that a model is written in, as rows of a table.

The modules of a format are imported when it is written, so that the command line
can list the formats quickly.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from folding import files
from folding.errors import ConfigError, require_package
from folding.serving import hub

Report = Callable[[str], None]


class Format(NamedTuple):
  """A row of `FORMATS`.

  Attributes:
    dtypes: Types of stored arrays; the first is the default, except that
      "safetensors", "hf" and "stablehlo" keep that of the model.
    words: The format in the help of the command line.
    size: The line about what was written, with the sizes that `write` returns.
    write: (path, model, dtype or None, report) -> sizes in bytes, "parameters"
      of the stored arrays. `report` gets lines about the model while it is
      written.
    ending: Ending of the file; "": a folder is written.
    package: Optional package that writes it, and the extra of that name.
  """

  dtypes: tuple[str, ...]
  words: str
  size: str
  write: Callable[[str, Any, Any, Report], dict[str, int]]
  ending: str = ""
  package: str = ""


def _safetensors(
  path: str, model: Any, dtype: Any, report: Report
) -> dict[str, int]:
  del report
  from folding.serving import export

  model = _smaller(model, dtype)
  size = export.export(path, model)
  return size | {"parameters": size["values"] + size["masks"]}


def _hf(path: str, model: Any, dtype: Any, report: Report) -> dict[str, int]:
  from folding.serving.export import export_hf

  return export_hf(path, model, dtype or model.dtype, report=report)


def _onnx(path: str, model: Any, dtype: Any, report: Report) -> dict[str, int]:
  del report
  from folding.serving.loaded import shrunk
  from folding.serving.onnx_export import export_onnx

  return export_onnx(path, shrunk(model), dtype or "float32")


def _gguf(path: str, model: Any, dtype: Any, report: Report) -> dict[str, int]:
  from folding.serving.gguf_export import export_gguf
  from folding.serving.loaded import shrunk

  return export_gguf(path, shrunk(model), dtype or "float32", report=report)


def _stablehlo(
  path: str, model: Any, dtype: Any, report: Report
) -> dict[str, int]:
  del report
  from folding.serving.export import export_stablehlo

  return export_stablehlo(path, _smaller(model, dtype))


def _smaller(model: Any, dtype: Any) -> Any:
  """Returns a model without units that are zero, in a dtype if one is given."""
  from folding.serving import loaded

  model = loaded.shrunk(model)
  return loaded.cast(model, dtype) if dtype else model


FORMATS = {
  "safetensors": Format(
    ("float32", "bfloat16"),
    "compact for folding.load",
    "{parameters:,} bytes stored ({values:,} of values, {masks:,} of masks), "
    "{dense:,} in the dense baseline; {files:,} bytes of files",
    _safetensors,
  ),
  "hf": Format(
    ("float32", "bfloat16"),
    "dense for transformers",
    "{files:,} bytes of files, for transformers",
    _hf,
  ),
  "onnx": Format(
    ("float32", "float16", "int8", "int7"),
    "a program for onnxruntime",
    "{files:,} bytes of files, for onnxruntime; {parameters:,} of them are "
    "parameters",
    _onnx,
    package="onnx",
  ),
  "gguf": Format(
    ("float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "a file for llama.cpp",
    "{file:,} bytes of file, for llama.cpp; {parameters:,} of them are "
    "parameters",
    _gguf,
    ending=".gguf",
    package="gguf",
  ),
  "stablehlo": Format(
    ("float32", "bfloat16"),
    "a program that needs only jax",
    "{program:,} bytes of program; {parameters:,} of them are parameters, "
    "stored dense",
    _stablehlo,
  ),
}


def require_writable(
  path: str | os.PathLike, format: str, dtype: str | None
) -> None:
  """Checks what can be checked before a model is read.

  Raises:
    ConfigError: there is no such format, it has no such dtype, the path is taken or
      of the wrong kind, or a package is missing.
  """
  if format not in FORMATS:
    raise ConfigError(
      f"format is one of {', '.join(FORMATS)}; it is {format!r}"
    )
  row = FORMATS[format]
  if dtype not in (None, *row.dtypes):
    raise ConfigError(f"--format={format} writes {' or '.join(row.dtypes)}")
  if row.package:
    require_package(row.package)
  if row.ending:
    files.require_new_file(os.fspath(path), row.ending)
  else:
    files.require_empty(os.fspath(path))


def save(
  model: Any,
  path: str | os.PathLike,
  format: str = "safetensors",
  dtype: str | None = None,
  *,
  max_drop: float | None = None,
  data: str | None = None,
  push_to_hub: str | None = None,
  report: Report = lambda _: None,
) -> dict[str, int]:
  """Writes a model, whole or not at all; units that are zero are left out.

  Args:
    model: A `folding.Model`.
    path: A new folder, or a new file for "gguf".
    format: "safetensors" (for `folding.load`), "hf" (transformers), "onnx"
      (onnxruntime), "gguf" (llama.cpp) or "stablehlo" (a program for jax).
    dtype: Type of the stored arrays; None: the default of the format.
    max_drop: Points that an ONNX program may lose on `data`, otherwise nothing is
      written; see `held_out.require_drop`.
    data: A held-out file with labels, with scores of pairs, or of texts alone.
    push_to_hub: Name of a repository, "user/name", that the folder is uploaded to.
      It is created if it does not exist.
    report: Called with lines about the model while it is written.

  Returns:
    Sizes in bytes, by name.

  Raises:
    ConfigError: see `require_writable`, the format cannot express the model,
      the program loses more than `max_drop`, or the hub refuses the folder.
    OSError: it cannot be written.
  """
  require_writable(path, format, dtype)
  if (max_drop is None) != (data is None):
    raise ConfigError("--max-drop and --data, a held-out file, need each other")
  if data is not None and format != "onnx":
    raise ConfigError("--max-drop and --data are for --format=onnx")
  row, path = FORMATS[format], os.fspath(path)
  if push_to_hub is not None:
    hub.require_pushable(push_to_hub, is_folder=not row.ending)
  if row.ending:
    return row.write(path, model, dtype, report)
  from folding.serving import card
  from folding.serving.loaded import dense_bytes

  with files.becoming(path) as part:
    size = row.write(part, model, dtype, report)
    name = push_to_hub or os.path.basename(os.path.abspath(path))
    notes = []
    if max_drop is not None and data is not None:
      from folding.serving import held_out

      notes.append(held_out.require_drop(part, model, data, max_drop))
      report(notes[-1])
    sizes = size | {"dense": dense_bytes(model)}
    card.write(part, model, format, name, sizes, dtype=dtype, notes=notes)
    if "files" in size:
      size["files"] = files.folder_bytes(part)
  if push_to_hub is not None:
    hub.push(path, push_to_hub)
  return size
