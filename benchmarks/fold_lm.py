"""The perplexity of a trained language model that is folded, without training.

    python -m benchmarks.fold_lm MODEL TEXT [--json]

MODEL is a Hugging Face folder or hub id of a language model with rotary
positions (Llama, Mistral, Qwen2), TEXT a file or a folder of text. W_Q and W_K
are folded to 3/4, a half and a quarter of the channels of a head, once with and
once without the fit of attention weights; W_V too where it says so.
Calibration is that of `configs/pretrained.py`.
"""

from typing import Any

import jax

from benchmarks import output
from configs import pretrained
from folding import config as config_lib
from folding.data.batches import make_data
from folding.training.run import Run
from folding.training.start import folded_start

CASES = ((0.75, 0), (0.5, 0), (0.25, 0), (0.5, 1), (0.25, 1))


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__)
  parser.add_argument("model")
  parser.add_argument("text")
  args = parser.parse_args()
  fit_steps = config_lib.CompressConfig().fit_steps
  dense = measure(args.model, args.text, 0, 0, 0)
  print(f"dense: {dense['perplexity']:.3f}", flush=True)
  rows = []
  for share, v_block in CASES:
    for steps in (0, fit_steps):
      rows.append(measure(args.model, args.text, share, v_block, steps))
      print(f"{_name(rows[-1])}: {rows[-1]['perplexity']:.3f}", flush=True)
  table = output.Table(
    f"Perplexity in test; dense {dense['perplexity']:.2f}",
    ["folded to", "perplexity", "divergence by layer, nats"],
    [
      [
        _name(row),
        f"{row['perplexity']:.2f}",
        " ".join(f"{x:.2f}" for x in row["divergence"]),
      ]
      for row in rows
    ],
  )
  plot = output.Plot(
    "Folded, not trained: perplexity over the dense model's",
    {
      ("fitted" if fitted else "not fitted"): {
        _kind(row): {"ratio": row["perplexity"] / dense["perplexity"]}
        for row in rows
        if bool(row["fit_steps"]) == fitted
      }
      for fitted in (False, True)
    },
  )
  output.show("fold_lm", args, {"dense": dense, "cases": rows}, [table], plot)


def measure(
  model: str, text: str, share: float, v_block: int, fit_steps: int
) -> dict[str, Any]:
  """Returns what a fold has in the test split, a share of 0: the dense model."""
  config = pretrained.get_config(model)
  config.data.path = text
  assert config.model.head_dim is not None
  groups = int(share * config.model.head_dim) // 2 * 2
  config.dense = not groups
  config.fold.groups, config.fold.v_block = groups, v_block
  config.compress.fit_steps = fit_steps
  config.fpp = config_lib.FPPConfig(overall=0.0)
  config = config_lib.resolve(config)
  data = make_data(config)
  config, params, report = folded_start(config, data)
  run = Run(config, data)
  figures = run.evaluate(jax.device_put(params), "test")
  return {
    "groups": groups,
    "v_block": v_block,
    "fit_steps": fit_steps,
    "perplexity": figures["perplexity"],
    "tokens": figures["num_tokens"],
    "divergence": [layer["divergence"] for layer in report],
  }


def _kind(row: dict[str, Any]) -> str:
  kind = "diagonal" if row["v_block"] else "dense"
  return f"G = {row['groups']}, W_V {kind}"


def _name(row: dict[str, Any]) -> str:
  return _kind(row) + (", fitted" if row["fit_steps"] else ", not fitted")


if __name__ == "__main__":
  main()
