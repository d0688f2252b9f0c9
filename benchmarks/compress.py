"""Peak memory and time of compressing a language model, by its size.

    python -m benchmarks.compress [--texts=64] [--largest=4] [--save] [--json]

A small Llama of random weights is made 30% smaller as by `folding.compress`. Its
layers, width or vocabulary are 1, 2 and 4 times as many. Each model is compressed
in a process of its own, of which the peak memory is read after each part. It
includes the weights, Python and the libraries; the table has the memory before
compression, too. Seconds include compilation.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import output
from folding import config as config_lib
from folding.data.tokenizers import train_tokenizer
from folding.model import Model
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.training import compress_trained as pipeline
from folding.training.allocate import Asked
from folding.training.recipe import recipe

LENGTH, ROWS, SAVING = 128, 16, 0.3
PARTS = "sensitivities", "measured_options", "fold_pretrained"
BASE = {"layers": 4, "width": 128, "vocabulary": 8192}


def get_config(layers: int, width: int) -> config_lib.Config:
  """Returns the config of a model that is compressed."""
  model = config_lib.llama(
    num_layers=layers,
    width=width,
    num_heads=width // 32,
    num_kv_heads=width // 64,
    mlp_width=width * 5 // 2,
    tie_embeddings=True,
  )
  config = config_lib.Config(
    task="lm",
    data=config_lib.DataConfig(length=LENGTH),
    model=model,
    pretrained="random weights",
  )
  config = recipe(config, SAVING)
  config = config_lib.edited(config, {"compress.prune": "sparsegpt"})
  return config_lib.resolve(config)


def measure(sizes: Mapping[str, int], texts: int) -> dict[str, Any]:
  """Returns seconds and peak memory in MB of each part, in this process."""
  config = get_config(sizes["layers"], sizes["width"])
  model = make_model(shape_of(config).dense(), sizes["vocabulary"])
  tokens = jax.numpy.zeros((1, LENGTH), jax.numpy.int32)
  params = jax.tree.map(
    np.array, jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  )
  rng = np.random.default_rng(0)
  batches = [
    {"tokens": rng.integers(0, sizes["vocabulary"], (ROWS, LENGTH), np.int32)}
    for _ in range(max(1, texts // ROWS))
  ]
  seconds, peak = {}, {"before": _peak()}

  def timed(part: str) -> Callable[..., Any]:
    function = getattr(pipeline, part)

    def run(*args: Any, **options: Any) -> Any:
      start = time.perf_counter()
      result = function(*args, **options)
      seconds[part], peak[part] = time.perf_counter() - start, _peak()
      return result

    return run

  for part in PARTS:
    setattr(pipeline, part, timed(part))
  asked = Asked(shape_of(config), config.fpp, config.compress)
  # Nothing reads it.
  tokenizer = train_tokenizer(config_lib.DataConfig(tokenizer="bytes"), [])
  dense = Model.of(config, params, tokenizer)
  list(pipeline.compress_sizes([asked], dense, batches))
  return {
    **sizes,
    "parameters": sum(w.size for w in jax.tree.leaves(params)),
    "seconds": seconds,
    "peak_mb": peak,
  }


def _peak() -> float:
  """Returns the peak memory of this process so far, in MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _apart(sizes: Mapping[str, int], texts: int) -> dict[str, Any]:
  """Returns `measure` of a new process."""
  command = [sys.executable, "-m", "benchmarks.compress"]
  command += [f"--texts={texts}", f"--one={json.dumps(dict(sizes))}"]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__)
  parser.add_argument("--texts", type=int, default=64)
  parser.add_argument("--largest", type=int, default=4, help="times as large")
  parser.add_argument("--one", help="measure one model: a JSON object of sizes")
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(json.loads(args.one), args.texts)))
    return
  models = {"base": BASE} | {
    f"{n} x {axis}": BASE | {axis: n * size}
    for axis, size in BASE.items()
    for n in (2, 4, 8)
    if n <= args.largest
  }
  found = {name: _apart(sizes, args.texts) for name, sizes in models.items()}

  def table(title: str, key: str, digits: int) -> output.Table:
    rows = [
      [name, f"{one['parameters'] / 1e6:.1f}"]
      + [f"{value:,.{digits}f}" for value in one[key].values()]
      for name, one in found.items()
    ]
    return output.Table(
      title, ["", "million parameters", *found["base"][key]], rows
    )

  tables = [
    table("Peak memory so far, MB", "peak_mb", 0),
    table("Time, s", "seconds", 1),
  ]

  def line(axis: str, value: Callable[[Any], float]) -> dict[float, float]:
    return {
      one[axis] // BASE[axis]: value(one)
      for name, one in found.items()
      if name == "base" or name.endswith(axis)
    }

  plot = output.Lines(
    "Compression of a small Llama",
    "times as many",
    {
      "peak memory, MB": {
        axis: line(axis, lambda one: one["peak_mb"][PARTS[-1]]) for axis in BASE
      },
      "time, s": {
        axis: line(axis, lambda one: sum(one["seconds"].values()))
        for axis in BASE
      },
    },
  )
  result = {"texts": args.texts, "length": LENGTH, "found": found}
  output.show("compress", args, result, tables, plot)


if __name__ == "__main__":
  main()
