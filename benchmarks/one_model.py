"""Accuracy, size and speed of the same model, one row per model.

    python -m benchmarks.one_model RUN... [--peers] [--rounds=10] [--save]

Needs the extras `parity` and `onnx`. A RUN is a run of configs/pretrained.py that
started from a dense run of a BERT classifier. Rows:

    dense         the dense run
    RUN           each run
    peers         with --peers, the dense model pruned by `torch_peers` to the
                  allocated parameters of the first run, on PyTorch

Every figure of a row is of that row's exported model: accuracy on the test split,
allocated and nonzero parameters, bytes of the files of weights (`folding export`,
and with --format=hf, onnx and onnx in int8), peak memory of the compiled JAX
program, and the time of a forward pass over random tokens in JAX, ONNX Runtime and,
for the dense run and the peers, `transformers` on PyTorch. All are timed in turn;
times are medians. Learned positions are extended by zeros if a shape is longer
than what the runs read; time does not depend on values.
"""

import copy
import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import exports, output, timing, torch_peers
from folding.config import Config
from folding.data.batches import Data, make_data
from folding.data.tokenizers import MappedTokenizer
from folding.data.trim import plain_tokenizer
from folding.errors import ConfigError
from folding.reporting import plots, report
from folding.serving import export as export_lib
from folding.serving import onnx_export

SHAPES = ((1, 16), (8, 64), (32, 128))  # texts x tokens

Forward = Callable[[np.ndarray], Any]  # int32[B, L] tokens; waits for logits


@dataclasses.dataclass(frozen=True)
class Model:
  """An exported model.

  Attributes:
    name: Name of its row.
    accuracy: On the test split, by runtime.
    allocated: Number of parameters in arrays, zeros included.
    stored: Number of parameters that are not zero.
    file_bytes: Size of the file of weights, by format.
    vocab_size: Number of token ids that it reads.
    forwards: By runtime.
    peak_bytes: Bytes of arguments and scratch of the JAX program, by shape.
  """

  name: str
  accuracy: dict[str, float]
  allocated: int
  stored: int
  file_bytes: dict[str, int]
  vocab_size: int
  forwards: dict[str, Forward]
  peak_bytes: Callable[[tuple[int, int]], int | None] = lambda shape: None


def measure(
  workdirs: Sequence[str], rounds: int, rates: Sequence[float] = ()
) -> dict[str, Any]:
  """Returns one row per model.

  Args:
    workdirs: Runs from the same dense run.
    rounds: Number of timing rounds.
    rates: Peak learning rates to try of the peers; (): without peers.

  Raises:
    ConfigError: a run is not a classifier of the same dense run.
  """
  configs, dense_path = exports.load_configs(workdirs, "classify")
  dense_data = make_data(configs[0], export_lib.load(dense_path).tokenizer)
  dense = _transformers(dense_path)
  models = [_exported("dense", dense_path, configs[0])]
  models[0].accuracy["PyTorch"] = torch_peers.accuracy(dense, dense_data)
  models[0].forwards["PyTorch"] = _pytorch_forward(copy.deepcopy(dense))
  for path, config in zip(workdirs, configs, strict=True):
    models.append(_exported(exports.row_name(path), path, config))
  makers = {
    "torch.nn.utils.prune": torch_peers.by_magnitude,
    "Torch-Pruning": torch_peers.by_channel,
  }
  for name, make in makers.items() if rates else ():
    pruned = torch_peers.prune_and_recover(
      dense,
      make,
      models[1].allocated,
      config=configs[0],
      data=dense_data,
      rates=rates,
    )
    models.append(_on_pytorch(name, pruned, dense_data))
  return {
    "rows": _timed(models, rounds),
    "rounds": rounds,
    "num_examples": dense_data.num_examples["test"],
  }


def _transformers(path: str) -> Any:
  """Returns a run as a model of `transformers`, in evaluation mode."""
  with tempfile.TemporaryDirectory() as folder:
    export_lib.export_hf(folder, export_lib.load(path))
    # It stays in evaluation mode: recovery has no dropout, as the run has none.
    return exports.from_transformers(
      folder, "AutoModelForSequenceClassification", attn_implementation="eager"
    )


def _pytorch_forward(model: Any) -> Forward:
  import torch

  @torch.inference_mode()
  def forward(tokens):
    return model(torch.as_tensor(tokens, dtype=torch.long)).logits

  _extend_on_pytorch(model.bert.embeddings)
  return forward


def _extend_on_pytorch(embeddings: Any) -> None:
  """Adds positions of zeros, so that the longest shape can be timed."""
  import torch

  old = embeddings.position_embeddings
  count = max(length for _, length in SHAPES)
  if old.num_embeddings >= count:
    return
  new = torch.nn.Embedding(count, old.embedding_dim)
  with torch.no_grad():
    new.weight.zero_()
    new.weight[: old.num_embeddings] = old.weight
  embeddings.position_embeddings = new
  embeddings.position_ids = torch.arange(count)[None]
  embeddings.token_type_ids = torch.zeros((1, count), dtype=torch.long)


def _on_pytorch(name: str, model: Any, data: Data) -> Model:
  import safetensors.torch

  model = model.eval()
  weights = {n: w.contiguous() for n, w in model.named_parameters()}
  return Model(
    name=name,
    accuracy={"PyTorch": torch_peers.accuracy(model, data)},
    allocated=sum(w.numel() for w in weights.values()),
    stored=sum(int((w != 0).sum()) for w in weights.values()),
    file_bytes={"hf": len(safetensors.torch.save(weights))},
    vocab_size=model.config.vocab_size,
    forwards={"PyTorch": _pytorch_forward(model)},
  )


def _exported(name: str, path: str, config: Config) -> Model:
  """Returns a run after `folding export`, in each format and runtime."""
  found = export_lib.load(path)
  file_bytes, accuracy, forwards = {}, {}, {}
  with tempfile.TemporaryDirectory() as scratch:
    folder = os.path.join(scratch, "export")
    loaded = exports.reloaded(folder, found)
    file_bytes["folding"] = exports.size(folder, export_lib.WEIGHTS)
    try:
      export_lib.export_hf(os.path.join(scratch, "hf"), found)
      file_bytes["hf"] = exports.size(scratch, "hf", "model.safetensors")
    except ConfigError as error:
      print(f"{name}: no Hugging Face file: {error}")
    data, long = make_data(config, loaded.tokenizer), _extended(loaded)
    plain = data
    if isinstance(loaded.tokenizer, MappedTokenizer):  # its map is in the graph
      plain = make_data(config, plain_tokenizer(loaded.tokenizer)[0])
    for runtime, dtype in exports.ONNX.items():
      for which, each in (("short", loaded), ("long", long)):
        onnx_export.export_onnx(
          os.path.join(scratch, dtype + which), each, dtype
        )
      file_bytes[runtime] = exports.size(
        scratch, dtype + "short", onnx_export.MODEL
      )
      runs = [
        exports.onnx_forward(os.path.join(scratch, dtype + which), "logits")
        for which in ("short", "long")
      ]
      accuracy[runtime] = exports.accuracy(runs[0], plain)
      forwards[runtime] = runs[1]
  accuracy["JAX"] = exports.accuracy(_jax_forward(loaded), data)
  forwards["JAX"] = _jax_forward(long)
  leaves = jax.tree.leaves(loaded.params)
  return Model(
    name=name,
    accuracy=accuracy,
    allocated=sum(w.size for w in leaves),
    stored=sum(int(np.count_nonzero(w)) for w in leaves),
    file_bytes=file_bytes,
    vocab_size=loaded.tokenizer.vocab_size,
    forwards=forwards,
    peak_bytes=functools.partial(_peak_bytes, long),
  )


def _extended(loaded: export_lib.Model) -> export_lib.Model:
  """Returns a model that reads the longest shape: more positions, of zeros."""
  length = max(loaded.shape.max_length, *(size for _, size in SHAPES))
  params = dict(loaded.params)
  if "position_embed" in params:
    w_PD = np.asarray(params["position_embed"]["embedding"])
    more = np.zeros((length - len(w_PD), w_PD.shape[1]), w_PD.dtype)
    params["position_embed"] = {"embedding": np.concatenate([w_PD, more])}
  shape = dataclasses.replace(loaded.shape, max_length=length)
  return dataclasses.replace(loaded, shape=shape, params=params)


def _jax_forward(loaded: export_lib.Model) -> Callable[..., Any]:
  params = jax.device_put(loaded.params)
  apply = jax.jit(loaded.module.apply)

  def forward(tokens, mask=None):
    logits = apply({"params": params}, jnp.asarray(tokens), mask)
    return jax.block_until_ready(logits)

  return forward


def _peak_bytes(loaded: export_lib.Model, shape: tuple[int, int]) -> int:
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  program = jax.jit(loaded.module.apply).lower(
    {"params": loaded.params}, tokens
  )
  memory: Any = program.compile().memory_analysis()
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _timed(models: Sequence[Model], rounds: int) -> list[dict[str, Any]]:
  """Returns the rows of the models, with seconds by runtime and shape."""
  rows: list[dict[str, Any]] = [
    {
      "name": model.name,
      "accuracy": model.accuracy,
      "allocated": model.allocated,
      "stored": model.stored,
      "file_bytes": model.file_bytes,
      "peak_bytes": model.peak_bytes(SHAPES[-1]),
      "seconds": {runtime: {} for runtime in model.forwards},
      "speed": {runtime: {} for runtime in model.forwards},
    }
    for model in models
  ]
  for shape in SHAPES:
    rng = np.random.default_rng(0)
    calls, places = {}, {}
    for n, model in enumerate(models):
      tokens = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
      for runtime, forward in model.forwards.items():
        key = f"{n:02d} {runtime}"
        calls[key] = functools.partial(forward, tokens)
        places[key] = rows[n], runtime
    seconds = timing.time_in_turn(calls, rounds)
    label = "{} x {}".format(*shape)
    for key, times in seconds.items():
      row, runtime = places[key]
      row["seconds"][runtime][label] = statistics.median(times)
      # Against the dense model in the same runtime.
      base = seconds.get(f"00 {runtime}", times)
      row["speed"][runtime][label] = timing.ratio(base, times)
  return rows


def _plot(rows: Sequence[dict[str, Any]], num_examples: int) -> output.Scatter:
  """Returns accuracy, with its 95% interval, against time by runtime."""
  shape = "{} x {}".format(*SHAPES[1])
  names = {
    "ONNX": "ONNX Runtime, float32",
    "ONNX int8": "ONNX Runtime, int8",
    "PyTorch": "PyTorch",
  }

  def point(row: dict[str, Any], runtime: str) -> plots.Point:
    accuracy = row["accuracy"][runtime]
    low, high = report.accuracy_interval(accuracy, num_examples)
    return plots.Point(
      1e3 * row["seconds"][runtime][shape],
      100 * accuracy,
      y_error=(100 * (accuracy - low), 100 * (high - accuracy)),
    )

  return output.Scatter(
    "Test accuracy against time of exported files: the upper left is best",
    "ms for {} texts of {} tokens".format(*SHAPES[1]),
    {
      "test accuracy, %, with 95% intervals": {
        name: {
          row["name"]: point(row, runtime)
          for row in rows
          if runtime in row["seconds"]
        }
        for runtime, name in names.items()
      }
    },
  )


def main() -> None:
  """Measures, and shows the table."""
  parser = output.make_parser(__doc__, rounds=10)
  parser.add_argument("runs", nargs="+")
  parser.add_argument("--peers", action="store_true")
  parser.add_argument("--learning-rates", default="2e-4,5e-4")
  args = parser.parse_args()
  rates = [float(text) for text in args.learning_rates.split(",")]
  result = measure(args.runs, args.rounds, rates if args.peers else ())
  rows = result["rows"]
  runtimes = ("JAX", "ONNX", "ONNX int8", "PyTorch")
  formats = ("folding", "hf", "ONNX", "ONNX int8")

  def accuracies(row):
    return [
      f"{row['accuracy'][r]:.1%}" if r in row["accuracy"] else ""
      for r in runtimes
    ]

  sizes = output.Table(
    "One row per exported model: test accuracy by runtime, parameters, MB",
    [
      *("model", *runtimes, "allocated", "nonzero"),
      *(f"{x} MB" for x in formats),
      "peak MB in JAX, 32 x 128",
    ],
    [
      [
        row["name"],
        *accuracies(row),
        f"{row['allocated']:,}",
        f"{row['stored']:,}",
        *(
          f"{row['file_bytes'][x] / 1e6:.1f}" if x in row["file_bytes"] else ""
          for x in formats
        ),
        f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "",
      ]
      for row in rows
    ],
  )
  labels = ["{} x {}".format(*shape) for shape in SHAPES]
  times = output.Table(
    "ms per batch (texts x tokens), and times as fast as the dense model there",
    ["model", "runtime", *labels],
    [
      [
        row["name"],
        runtime,
        *(
          f"{1e3 * row['seconds'][runtime][x]:.1f} "
          f"({row['speed'][runtime][x]['ratio']:.1f})"
          for x in labels
        ),
      ]
      for row in rows
      for runtime in runtimes
      if runtime in row["seconds"]
    ],
  )
  output.show(
    "one_model",
    args,
    result,
    [sizes, times],
    _plot(rows, result["num_examples"]),
  )


if __name__ == "__main__":
  main()
