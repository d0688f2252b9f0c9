"""What a classifier loses with the tokens that training uses least, untrained.

    python -m benchmarks.tokens RUN... [--fractions=0.67] [--json]

A RUN is a dense classifier, as configs/pretrained.py tunes one. That fraction of
its tokens is embedded as zero, or read as the unknown token, or leaves the
tokenizer, which cuts words into others (`fpp.embedding_granularity=trim`).
"""

import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import output
from folding.data.batches import make_data
from folding.data.tokenizers import Tokenizer
from folding.serving.vocabulary import read_as_unknown
from folding.training.loop import open_run
from folding.training.run import Run
from folding.training.trim import token_usage, without_least_used


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path)
  parser.add_argument("--fractions", default="0.67")
  args = parser.parse_args()
  fractions = [float(text) for text in args.fractions.split(",")]
  rows = [row for run in args.runs for row in measure(str(run), fractions)]
  columns = list(rows[0]["accuracy"])
  table = output.Table(
    "Test accuracy without further training",
    ["run", "tokens gone", "occur in test", *columns],
    [
      [
        row["run"],
        f"{row['fraction']:.0%}",
        f"{row['occur']:.1%}",
        *(f"{row['accuracy'][name]:.1%}" for name in columns),
      ]
      for row in rows
    ],
  )
  plot = output.Plot(
    "Accuracy over that with all tokens",
    {
      name: {
        f"{row['run']}, {row['fraction']:.0%} gone": {
          "ratio": row["accuracy"][name] / row["accuracy"]["all"]
        }
        for row in rows
      }
      for name in columns[1:]
    },
  )
  output.show("tokens", args, {"cases": rows}, [table], plot)


def measure(workdir: str, fractions: list[float]) -> list[dict[str, Any]]:
  """Returns the accuracies of a run, a row for each fraction."""
  run, checkpoints = open_run(workdir)
  with checkpoints:
    found = checkpoints.restore_best(run.like)
  assert found is not None
  params = jax.tree.map(np.asarray, found[1].params)
  plain = run.data.tokenizer
  embedding_VD = params["embed"]["embedding"]
  usage_V = token_usage(run.data, len(embedding_VD))

  def with_rows(rows):
    return {**params, "embed": {"embedding": rows}}

  def accuracy(tokenizer: Tokenizer, params: Any) -> float:
    that = Run(run.config, make_data(run.config, tokenizer))
    return that.evaluate(params, "test")["accuracy"]

  whole, rows = accuracy(plain, params), []
  for fraction in fractions:
    trim = without_least_used(plain, usage_V, fraction)
    keep_V = trim.token_map >= 0
    zeroed = with_rows(np.where(keep_V[:, None], embedding_VD, 0))
    unknown, mapped = read_as_unknown(zeroed, plain)
    test = [b["tokens"][b["mask"]] for b in run.data.eval_batches("test")]
    rows.append(
      {
        "run": pathlib.Path(workdir).name,
        "fraction": fraction,
        "occur": float(1 - keep_V[np.concatenate(test)].mean()),
        "accuracy": {
          "all": whole,
          "zero": accuracy(plain, zeroed),
          "unknown": accuracy(mapped, unknown),
          "trim": accuracy(trim, with_rows(embedding_VD[trim.plain_ids])),
        },
      }
    )
    print(rows[-1], flush=True)
  return rows


if __name__ == "__main__":
  main()
