"""Accuracy, size and speed of the same model, one row per model.

    python -m benchmarks.one_model RUN... [--peers] [--rounds=10] [--save]

Needs the extra `parity`. A RUN is a run of configs/pretrained.py that started
from a dense run of a BERT classifier. Rows:

    transformers  the dense run on PyTorch, exported with --format=hf
    dense         the dense run, `folding export`
    RUN           each run, `folding export`
    peers         with --peers, the dense model pruned by `torch_peers` to the
                  stored parameters of the first run, on PyTorch

Every figure of a row is of that row's exported model: accuracy on the test split,
allocated and nonzero parameters, bytes of the file of weights, and the time of a
forward pass over random tokens. All rows are timed in turn; times are medians.
"""

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output, timing, torch_peers
from folding.config import Config
from folding.data.batches import Data, make_data
from folding.errors import ConfigError
from folding.serving import export as export_lib
from folding.training import run_dir

SHAPES = ((1, 16), (8, 64), (32, 128))  # texts x tokens; as long as runs read


@dataclasses.dataclass(frozen=True)
class Model:
  """An exported model.

  Attributes:
    name: Name of its row.
    accuracy: On the test split.
    allocated: Number of parameters in arrays, zeros included.
    stored: Number of parameters that are not zero.
    file_bytes: Size of the file of weights.
    vocab_size: Number of token ids that it reads.
    forward: Runs int32[B, L] tokens and waits for the logits.
  """

  name: str
  accuracy: float
  allocated: int
  stored: int
  file_bytes: int
  vocab_size: int
  forward: Callable[[np.ndarray], Any]


def measure(
  workdirs: Sequence[str], rounds: int, rates: Sequence[float] = ()
) -> dict[str, Any]:
  """Returns one row per model.

  Args:
    workdirs: Runs from the same dense run.
    rounds: Number of timing rounds.
    rates: Peak learning rates to try of the peers; (): without peers.

  Raises:
    ConfigError: a run did not start from a dense run of a classifier.
  """
  configs = [run_dir.load_config(path) for path in workdirs]
  dense_path = configs[0].pretrained
  for path, config in zip(workdirs, configs, strict=True):
    if config.task != "classify" or config.pretrained != dense_path:
      raise ConfigError(f"{path} did not start from the dense run of the first")
  if dense_path is None or not os.path.isdir(dense_path):
    raise ConfigError(f"{workdirs[0]} did not start from a dense run")
  dense_data = _data(configs[0], export_lib.load(dense_path))
  dense = _transformers(dense_path)
  models = [
    _on_pytorch("transformers", dense, dense_data),
    _exported("dense", dense_path, configs[0]),
  ]
  for path, config in zip(workdirs, configs, strict=True):
    name = os.path.basename(os.path.normpath(path))
    models.append(_exported(name, path, config))
  makers = {
    "torch.nn.utils.prune": torch_peers.by_magnitude,
    "Torch-Pruning": torch_peers.by_channel,
  }
  for name, make in makers.items() if rates else ():
    pruned = torch_peers.prune_and_recover(
      dense,
      make,
      models[2].stored,
      config=configs[0],
      data=dense_data,
      rates=rates,
    )
    models.append(_on_pytorch(name, pruned, dense_data))
  longest = min(config.data.length for config in configs)
  shapes = [s for s in SHAPES if s[1] <= longest] or [(1, longest)]
  return {"rows": _timed(models, shapes, rounds), "rounds": rounds}


def _data(config: Config, loaded: export_lib.Loaded) -> Data:
  return make_data(config, loaded.tokenizer)


def _transformers(path: str) -> Any:
  """Returns a run as a model of `transformers`, in evaluation mode."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as folder:
    export_lib.export_hf(folder, export_lib.load(path))
    # It stays in evaluation mode: recovery has no dropout, as the run has none.
    return transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, attn_implementation="eager"
    ).eval()


def _on_pytorch(name: str, model: Any, data: Data) -> Model:
  import safetensors.torch
  import torch

  model = model.eval()

  @torch.inference_mode()
  def forward(tokens):
    return model(torch.as_tensor(tokens, dtype=torch.long)).logits

  weights = {n: w.contiguous() for n, w in model.named_parameters()}
  return Model(
    name=name,
    accuracy=torch_peers.accuracy(model, data),
    allocated=sum(w.numel() for w in weights.values()),
    stored=sum(int((w != 0).sum()) for w in weights.values()),
    file_bytes=len(safetensors.torch.save(weights)),
    vocab_size=model.config.vocab_size,
    forward=forward,
  )


def _exported(name: str, path: str, config: Config) -> Model:
  """Returns a run after `folding export` and `folding.load`."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = os.path.join(scratch, "export")
    small = export_lib.shrunk(export_lib.load(path))
    export_lib.export(
      folder, small.config, small.params, small.tokenizer, small.labels
    )
    file_bytes = os.path.getsize(os.path.join(folder, export_lib.WEIGHTS))
    loaded = export_lib.load(folder)
  params = jax.device_put(loaded.params)
  apply = jax.jit(loaded.model.apply)

  def forward(tokens, mask=None):
    logits = apply({"params": params}, jnp.asarray(tokens), mask)
    return jax.block_until_ready(logits)

  right = count = 0.0
  for batch in _data(config, loaded).eval_batches("test"):
    found = np.argmax(forward(batch["tokens"], batch["mask"]), axis=-1)
    right += float(np.sum((found == batch["labels"]) * batch["weights"]))
    count += float(np.sum(batch["weights"]))
  leaves = jax.tree.leaves(loaded.params)
  return Model(
    name=name,
    accuracy=right / count,
    allocated=sum(w.size for w in leaves),
    stored=sum(int(np.count_nonzero(w)) for w in leaves),
    file_bytes=file_bytes,
    vocab_size=loaded.tokenizer.vocab_size,
    forward=forward,
  )


def _timed(
  models: Sequence[Model], shapes: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
  """Returns the rows of the models, with seconds by shape of a batch."""
  rows = [
    {
      "name": model.name,
      "accuracy": model.accuracy,
      "allocated": model.allocated,
      "stored": model.stored,
      "file_bytes": model.file_bytes,
      "seconds": {},
      "speed": {},
    }
    for model in models
  ]
  for shape in shapes:
    rng = np.random.default_rng(0)
    calls = {}
    for n, model in enumerate(models):
      tokens = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
      calls[f"{n:02d}"] = lambda f=model.forward, t=tokens: f(t)
    seconds = timing.time_in_turn(calls, rounds)
    label = "{} x {}".format(*shape)
    for row, times in zip(rows, seconds.values(), strict=True):
      row["seconds"][label] = statistics.median(times)
      row["speed"][label] = timing.ratio(seconds["00"], times)
  return rows


def main() -> None:
  """Measures, and shows the table."""
  parser = output.make_parser(__doc__, rounds=10)
  parser.add_argument("runs", nargs="+")
  parser.add_argument("--peers", action="store_true")
  parser.add_argument("--learning-rates", default="2e-4,5e-4")
  args = parser.parse_args()
  rates = [float(text) for text in args.learning_rates.split(",")]
  result = measure(args.runs, args.rounds, rates if args.peers else ())
  labels = list(result["rows"][0]["seconds"])
  table = output.Table(
    "One row per exported model; ms per batch (texts x tokens)",
    ["model", "accuracy", "allocated", "stored", "file, MB", *labels],
    [
      [
        row["name"],
        f"{row['accuracy']:.1%}",
        f"{row['allocated']:,}",
        f"{row['stored']:,}",
        f"{row['file_bytes'] / 1e6:.1f}",
        *(f"{1e3 * row['seconds'][label]:.1f}" for label in labels),
      ]
      for row in result["rows"]
    ],
  )
  plot = output.Plot(
    "Times as fast as the dense model in transformers on PyTorch",
    {row["name"]: row["speed"] for row in result["rows"][1:]},
  )
  output.show("one_model", args, result, [table], plot)


if __name__ == "__main__":
  main()
