"""How long a classifier trains, dense and with `train.compact`.

    python -m benchmarks.compact [--steps=300] [--compact=0.9] [--rounds=1]
        [--energy=USA] [--save]

Six layers of width 384 over synthetic texts of two classes, trained from scratch.
`compact` is folded, loses 70% of the parameters in an early ramp, neurons as a whole,
and these leave the arrays. Both runs are trained from start to end, in turn.
`seconds` include all of it: compilation, evaluation, checkpoints and the test.
`CPU seconds` are less sensitive to other programs. No compiled program is reused.
With --energy=COUNTRY there are watt-hours of the machine, as CodeCarbon estimates
them (extra `energy`). Milliseconds are medians of logged steps before the first
mask update that can zero anything, and after the last mask update.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import output
from folding import config as config_lib
from folding import files
from folding.training import energy as energy_lib
from folding.training import loop, optimizer, run_dir

WORDS, TEXTS, LENGTH = 2000, 4000, 12  # of the synthetic texts
RUNS = ("dense", "compact")


def get_config(
  path: str, *, steps: int, compact: float, energy: str = ""
) -> config_lib.Config:
  """Returns the config of the run with `train.compact`."""
  return config_lib.Config(
    task="classify",
    data=config_lib.DataConfig(
      path=path, length=32, batch_size=32, vocab_size=2048
    ),
    model=config_lib.ModelConfig(
      num_layers=6, width=384, num_heads=12, causal=False
    ),
    # From early on, so that most steps are taken on small arrays.
    fpp=config_lib.FPPConfig(
      saving=0.7,
      granularity="neuron",
      score="saliency",
      begin=0.05,
      end=0.3,
      checks=15,
    ),
    train=config_lib.TrainConfig(
      steps=steps,
      learning_rate=5e-4,
      log_every=max(1, steps // 50),
      eval_every=max(1, steps // 4),
      tensorboard=False,
      compact=compact,
      energy=energy,
    ),
  )


def _write_texts(path: pathlib.Path) -> None:
  """Writes texts of words by Zipf's law; a word in three tells the class."""
  rng = np.random.default_rng(0)
  chance = 1 / np.arange(1, WORDS + 1)
  words = rng.choice(WORDS, (TEXTS, LENGTH), p=chance / chance.sum())
  labels = rng.integers(0, 2, TEXTS)
  tells = rng.random((TEXTS, LENGTH)) < 1 / 3
  words = np.where(tells, 2 * (words // 2) + labels[:, None], words)
  lines = [
    f"class {label}\t{' '.join(f'w{word}' for word in text)}\n"
    for label, text in zip(labels, words, strict=True)
  ]
  path.write_text("".join(lines), encoding="utf-8")


def measure(
  *, steps: int, compact: float, rounds: int, energy: str = ""
) -> dict[str, Any]:
  """Returns figures of each run, medians over rounds.

  Args:
    steps: Updates of each run.
    compact: As `train.compact`.
    rounds: Number of times that all runs are trained.
    energy: Country of `train.energy`; "": no estimate.
  """
  jax.config.update("jax_enable_compilation_cache", False)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "texts.tsv")
    _write_texts(path)
    config = get_config(str(path), steps=steps, compact=compact, energy=energy)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for index in range(rounds):
      for name in RUNS if index % 2 == 0 else RUNS[::-1]:
        jax.clear_caches()
        workdir = str(pathlib.Path(folder, f"{name}-{index}"))
        run = dataclasses.replace(config, dense=name == "dense")
        found[name].append(_train(run, workdir))
  rows = {
    name: {
      figure: statistics.median(run[figure] for run in runs)
      for figure in runs[0]
    }
    for name, runs in found.items()
  }
  return {
    "runs": rows,
    "ratio": {
      figure: rows["compact"][figure] / rows["dense"][figure]
      for figure in ("seconds", "cpu_seconds", "ms_after", "watt_hours")
      if figure in rows["dense"]
    },
    "steps": steps,
    "compact": compact,
    "rounds": rounds,
  }


def _train(config: config_lib.Config, workdir: str) -> dict[str, float]:
  """Trains a run and returns its figures."""
  start, cpu_start = time.perf_counter(), time.process_time()
  result = loop.run(config, workdir)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  records = run_dir.read_metrics(str(pathlib.Path(workdir, "metrics.jsonl")))
  config = run_dir.load_order(workdir)
  updates = optimizer.mask_updates(config)
  tokens = config.data.batch_size * config.data.length

  def milliseconds(is_part) -> float:
    return statistics.median(
      1e3 * tokens / record["tokens_per_second"]
      for record in records
      if record["split"] == "train" and is_part(record["step"])
    )

  sizes = result["layers"]
  used = {}
  if config.train.energy:
    spent = files.read_json(str(pathlib.Path(workdir, energy_lib.FILE)), dict)
    used["watt_hours"] = 1e3 * spent["kwh"]
  return {
    "seconds": seconds,
    "cpu_seconds": cpu,
    "ms_before": milliseconds(lambda step: step <= updates[1]),
    "ms_after": milliseconds(lambda step: step > updates[-1] + 1),
    "train_loss": statistics.mean(
      record["loss"] for record in records[-10:] if record["split"] == "train"
    ),
    "test_loss": result["test"]["loss"],
    "test_accuracy": result["test"]["accuracy"],
    "allocated": sum(float(np.prod(layer["shape"])) for layer in sizes),
    "stored": result["parameters"]["overall"]["stored"],
    **used,
  }


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=1)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--compact", type=float, default=0.9)
  parser.add_argument("--energy", default="", metavar="COUNTRY")
  args = parser.parse_args()
  result = measure(
    steps=args.steps,
    compact=args.compact,
    rounds=args.rounds,
    energy=args.energy,
  )
  rows = [
    [
      name,
      f"{row['seconds']:.1f}",
      f"{row['cpu_seconds']:.1f}",
      f"{row['watt_hours']:.2f}" if args.energy else "",
      f"{row['ms_before']:.0f}",
      f"{row['ms_after']:.0f}",
      f"{row['allocated'] / 1e6:.2f}",
      f"{row['stored'] / 1e6:.2f}",
      f"{row['test_loss']:.3f}",
      f"{row['test_accuracy']:.1%}",
    ]
    for name, row in result["runs"].items()
  ]
  table = output.Table(
    f"Training of {args.steps} steps, from start to end: "
    f"{result['ratio']['seconds']:.2f} of the time of dense, "
    f"{result['ratio']['cpu_seconds']:.2f} of its CPU time",
    [
      "run",
      "seconds",
      "CPU seconds",
      "Wh, CodeCarbon",
      "ms per step, start",
      "ms per step, end",
      "allocated, M",
      "stored, M",
      "test loss",
      "test accuracy",
    ],
    rows,
  )
  labels = {
    "seconds": "whole run",
    "cpu_seconds": "whole run, CPU time",
    "ms_after": "a step after the ramp",
    "watt_hours": "energy, CodeCarbon's estimate",
  }
  ratios = {labels[name]: {"ratio": x} for name, x in result["ratio"].items()}
  plot = output.Plot(
    f"Training of {args.steps} steps with train.compact",
    "relative to the dense baseline",
    {"compact": ratios},
  )
  output.show("compact", args, result, [table], plot)


if __name__ == "__main__":
  main()
