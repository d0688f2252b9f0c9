"""Accuracy, size and speed of sentence encoders, one row per exported file.

    python -m benchmarks.embeddings RUN... --sts=NAME=FILE.tsv [--sts=...] [--save]

Needs the extras `parity` and `onnx`. A RUN is a run of configs/embed.py; all
started from the same checkpoint. Rows:

    dense           the checkpoint, in `transformers` on PyTorch, in JAX and in ONNX
                    Runtime
    RUN             each run, in JAX and in ONNX Runtime
    static vectors  what model2vec makes of the checkpoint by default, without text:
                    each token is encoded alone, PCA leaves 256 numbers, a weight
                    follows from the rank of the token. The vector of a text is the
                    mean over its tokens. Needs model2vec, or is skipped.

Every figure of a row is of that file: parameters, MB, Spearman's correlation of
cosines with the scores of each FILE.tsv (columns "score", "sentence1", "sentence2"),
and texts per second. The time is from the texts of the first FILE.tsv to vectors, so
the tokenizer is in it. All use all cores and are timed in turn. Batches are 64 texts
of similar length, padded to the longest one, and in JAX to the next of a few
lengths; model2vec makes its own batches.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import exports, output, timing
from folding.data.padding import by_length, encode_rows, padded
from folding.data.sources import load_scored_pairs
from folding.data.trim import plain_tokenizer
from folding.reporting import plots
from folding.serving import export as export_lib
from folding.serving import onnx_export
from folding.training.evaluate import spearman_of_pairs

BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An exported file and what reads it.

  Attributes:
    name: Name of the model.
    runtime: What reads the file.
    parameters: Number of parameters in arrays.
    file_bytes: Size of the file.
    encode: Texts to vectors, float[texts, D].
  """

  name: str
  runtime: str
  parameters: int
  file_bytes: int
  encode: Callable[[list[str]], np.ndarray]


def measure(
  workdirs: Sequence[str], sts: Mapping[str, str], rounds: int
) -> dict[str, Any]:
  """Returns one row per exported file.

  Args:
    workdirs: Runs from the same checkpoint.
    sts: Files of scored pairs by name; the texts of the first one are timed.
    rounds: Number of timing rounds.

  Raises:
    ConfigError: a run is not an encoder of the same checkpoint, or a file of pairs
      is malformed.
  """
  _, dense_path = exports.load_configs(workdirs, "embed")
  pairs = {name: load_scored_pairs(path) for name, path in sts.items()}
  dense = export_lib.load(dense_path)
  with tempfile.TemporaryDirectory() as scratch:
    encoders = [
      *_on_pytorch(os.path.join(scratch, "hf"), dense),
      *_exported("dense", os.path.join(scratch, "dense"), dense),
    ]
    for path in workdirs:
      name = exports.row_name(path)
      folder = os.path.join(scratch, "runs", name)
      encoders += _exported(name, folder, export_lib.load(path))
    encoders += _static(os.path.join(scratch, "hf"))
  rows: list[dict[str, Any]] = [
    {
      "name": each.name,
      "runtime": each.runtime,
      "parameters": each.parameters,
      "file_bytes": each.file_bytes,
      "spearman": {
        name: spearman_of_pairs(each.encode(p.firsts + p.seconds), p.scores)
        for name, p in pairs.items()
      },
    }
    for each in encoders
  ]
  first = next(iter(pairs.values()))
  texts = first.firsts + first.seconds
  calls = {
    f"{n:02d}": functools.partial(each.encode, texts)
    for n, each in enumerate(encoders)
  }
  seconds = [*timing.time_in_turn(calls, rounds).values()]
  for row, times in zip(rows, seconds, strict=True):
    row["texts_per_second"] = timing.quartiles([len(texts) / x for x in times])
    row["speed"] = timing.ratio(seconds[0], times)  # against PyTorch
  return {"rows": rows, "rounds": rounds, "texts": len(texts)}


def _on_pytorch(folder: str, dense: export_lib.Model) -> list[Encoder]:
  """Returns an encoder in `transformers`; its files stay in the folder."""
  import torch

  export_lib.export_hf(folder, dense)
  model = exports.from_transformers(folder, "AutoModel")
  torch.set_num_threads(os.cpu_count() or 1)
  m = dense.config.model

  @torch.inference_mode()
  def forward(tokens, mask):
    ids, mask = (torch.as_tensor(x, dtype=torch.long) for x in (tokens, mask))
    h_BLD = model(input_ids=ids, attention_mask=mask).last_hidden_state
    position_L = torch.arange(ids.shape[1])
    kept_BL = {
      "mean": mask,
      "first": (position_L == 0).expand_as(mask),
      "last": position_L == mask.sum(1, keepdim=True) - 1,
    }[m.pooling]
    weights_BL1 = kept_BL[..., None].float()
    found_BD = (h_BLD * weights_BL1).sum(1) / weights_BL1.sum(1)
    if m.normalize:
      found_BD = torch.nn.functional.normalize(found_BD)
    return found_BD.numpy()

  return [
    Encoder(
      name="dense",
      runtime="PyTorch",
      parameters=_count(dense),
      file_bytes=exports.size(folder, "model.safetensors"),
      encode=functools.partial(_encode, dense, forward),
    )
  ]


def _exported(name: str, folder: str, found: export_lib.Model) -> list[Encoder]:
  """Returns an encoder after `folding export`, in each of our formats."""
  ours = os.path.join(folder, "folding")
  loaded = exports.reloaded(ours, found)
  make = functools.partial(Encoder, name=name, parameters=_count(loaded))
  encoders = [
    make(
      runtime="JAX",
      file_bytes=exports.size(ours, export_lib.WEIGHTS),
      encode=functools.partial(loaded.encode, batch_size=BATCH_SIZE),
    )
  ]
  for runtime, dtype in exports.ONNX.items():
    path = os.path.join(folder, dtype)
    onnx_export.export_onnx(path, loaded, dtype)
    forward = exports.onnx_forward(path, "sentence_embedding")
    encoders.append(
      make(
        runtime=runtime,
        file_bytes=exports.size(path, onnx_export.MODEL),
        encode=functools.partial(_encode, loaded, forward),
      )
    )
  return encoders


def _static(folder: str) -> list[Encoder]:
  """Returns the static vectors of a checkpoint; [] without model2vec."""
  try:
    from model2vec.distill import distill
  except ImportError as error:
    print(f"no static vectors, which need model2vec and skeletoken: {error}")
    return []
  model = distill(folder)
  path = os.path.join(folder, "static")
  model.save_pretrained(path)
  return [
    Encoder(
      name="static vectors",
      runtime="model2vec",
      parameters=model.embedding.size,
      file_bytes=exports.size(path, "model.safetensors"),
      encode=model.encode,
    )
  ]


def _count(loaded: export_lib.Model) -> int:
  return sum(w.size for w in jax.tree.leaves(loaded.params))


def _encode(
  loaded: export_lib.Model,
  forward: Callable[[np.ndarray, np.ndarray], np.ndarray],
  texts: Sequence[str],
) -> np.ndarray:
  """Returns float32[texts, D]; each batch is as long as its longest text.

  Args:
    loaded: The model that `forward` computes.
    forward: (tokens, mask) of shape [B, L] -> float[B, D], for any B and L.
    texts: Any number.
  """
  length = loaded.shape.max_length
  tokenizer, _ = plain_tokenizer(loaded.tokenizer)
  rows = encode_rows(tokenizer, texts, length).ids
  found = np.zeros((len(rows), loaded.shape.width), np.float32)
  for members, _ in by_length(rows, [length], BATCH_SIZE):
    shape = len(members), rows[members[-1]].size
    batch = padded([rows[i] for i in members], shape, tokenizer.pad_id)
    found[members] = forward(*batch)
  return found


def _plot(rows: Sequence[dict[str, Any]]) -> output.Scatter:
  """Returns the correlation on each test against speed, by runtime."""
  names = {
    "ONNX": "ONNX Runtime, float32",
    "ONNX int8": "ONNX Runtime, int8",
    "PyTorch": "PyTorch",
    "JAX": "JAX",
    "model2vec": "NumPy",
  }
  return output.Scatter(
    "Accuracy against speed of exported files; up and to the right is better",
    "texts per second",
    {
      f"Spearman's correlation, {test}": {
        name: {
          row["name"]: plots.Point(
            row["texts_per_second"][1], row["spearman"][test]
          )
          for row in rows
          if row["runtime"] == runtime
        }
        for runtime, name in names.items()
      }
      for test in rows[0]["spearman"]
    },
  )


def main() -> None:
  """Measures, and shows the table."""
  parser = output.make_parser(__doc__, rounds=3)
  parser.add_argument("runs", nargs="+")
  parser.add_argument(
    "--sts", action="append", required=True, metavar="NAME=FILE.tsv"
  )
  args = parser.parse_args()
  sts = dict(each.partition("=")[::2] for each in args.sts)
  result = measure(args.runs, sts, args.rounds)
  rows = result["rows"]
  table = output.Table(
    "One row per exported file: million parameters, MB, Spearman, texts per "
    "second (quartiles), times as fast as PyTorch",
    ["model", "runtime", "M", "MB", *sts, "texts/s", "quartiles", "speed"],
    [
      [
        row["name"],
        row["runtime"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['file_bytes'] / 1e6:.1f}",
        *(f"{row['spearman'][name]:.3f}" for name in sts),
        f"{row['texts_per_second'][1]:,.0f}",
        f"{row['texts_per_second'][0]:,.0f}-{row['texts_per_second'][2]:,.0f}",
        f"{row['speed']['ratio']:.2f}",
      ]
      for row in rows
    ],
  )
  output.show("embeddings", args, result, [table], _plot(rows))


if __name__ == "__main__":
  main()
