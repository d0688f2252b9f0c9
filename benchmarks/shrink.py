"""Size, memory and speed of a shrunk model, against its dense baseline.

    python -m benchmarks.shrink [--rounds=20] [--multiple=64] [--save] [--json]

An encoder with a classifier: W_Q and W_K folded to one row per head, W_V
diagonal, a random 70% of the neurons and embeddings zero, then shrunk. No
figure depends on the values, so neither model is trained. Sizes are those of
arrays and files, without masks. Peak memory, FLOPs and bytes moved are XLA's
analysis of the compiled program. Both models are timed in turn on the same
batch. The attention weights of all pairs of tokens do not shrink, so large
batches gain less peak memory in a training step.
"""

import functools
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from benchmarks import output, timing
from folding import config as config_lib
from folding import paths
from folding.models.shape import shape_of, with_shape
from folding.models.shrink import shrink
from folding.models.transformer import make_model
from folding.tasks import task_of
from folding.training import optimizer as optimizer_lib
from folding.training.step import StepOptions, init_state, train_step

PRUNED = 0.7
VOCAB, CLASSES = 8192, 8
SHAPES = ((2, 64), (8, 128))  # examples and tokens of a batch


def get_config() -> config_lib.Config:
  """Returns the config of the folded model before it is shrunk."""
  return config_lib.resolve(
    config_lib.Config(
      task="classify",
      preset="none",
      data=config_lib.DataConfig(length=128),
      model=config_lib.ModelConfig(
        num_layers=6, width=512, num_heads=16, causal=False
      ),
      fold=config_lib.FoldConfig(groups=1, values="diagonal"),
    )
  )


class _Programs(NamedTuple):
  """What a model compiles to, and calls that run it on a batch."""

  compiled: dict[str, Any]
  calls: dict[str, Any]


def measure(rounds: int, multiple: int) -> dict:
  """Returns figures of both models, and shrunk over dense."""
  config = get_config()
  params = _pruned(_init(config, VOCAB), np.random.default_rng(0))
  small = shrink(shape_of(config), params, multiple=multiple)
  smaller = with_shape(config, small.shape)
  baseline = config_lib.dense_baseline(config)
  dense = _init(baseline, VOCAB)
  arrays = {"dense": dense, "shrunk": small.params}
  by_shape = []
  for shape in SHAPES:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, shape, dtype=np.int32)
    models = {
      "dense": _programs(baseline, dense, tokens),
      "shrunk": _programs(
        smaller, small.params, np.asarray(small.cut.token_map)[tokens]
      ),
    }
    by_shape.append({"shape": list(shape), **_compare(models, rounds)})
  return {
    "parameters": _pair(arrays, _size),
    "file_bytes": _pair(arrays, _file_bytes),
    "by_shape": by_shape,
    "mlp_width": smaller.model.mlp_width,
    "rounds": rounds,
  }


def _compare(models: dict[str, _Programs], rounds: int) -> dict[str, Any]:
  """Returns the figures of a forward pass and of a training step."""
  result = {}
  for name in ("forward", "step"):
    seconds = timing.time_in_turn(
      {model: programs.calls[name] for model, programs in models.items()},
      rounds,
    )
    result[name] = {
      "speedup": timing.ratio(seconds["dense"], seconds["shrunk"]),
      "seconds": {n: statistics.median(s) for n, s in seconds.items()},
      "peak_bytes": _pair(models, lambda m, n=name: _peak(m.compiled[n])),
      "flops": _pair(models, lambda m, n=name: _cost(m.compiled[n], "flops")),
      "bytes_accessed": _pair(
        models, lambda m, n=name: _cost(m.compiled[n], "bytes accessed")
      ),
    }
  return result


def _init(config: config_lib.Config, vocab_size: int) -> Any:
  model = make_model(shape_of(config), vocab_size, CLASSES)
  tokens = jax.numpy.zeros((1, config.data.length), jax.numpy.int32)
  return jax.jit(model.init)(jax.random.key(0), tokens)["params"]


def _pruned(params: Any, rng: np.random.Generator) -> Any:
  """Returns the parameters with neurons and embeddings zeroed at random."""
  params = jax.tree.map(np.array, params)
  for name, w in paths.flatten(params).items():
    if name.endswith(("mlp/down/kernel", "embed/embedding")):
      w[rng.permutation(len(w))[: round(PRUNED * len(w))]] = 0
  return params


def _programs(
  config: config_lib.Config, params: Any, tokens: np.ndarray
) -> _Programs:
  model = make_model(
    shape_of(config), len(params["embed"]["embedding"]), CLASSES
  )
  rows = len(tokens)
  batch = {
    "tokens": jax.numpy.asarray(tokens),
    "labels": jax.numpy.arange(rows) % CLASSES,
    "weights": jax.numpy.ones(rows),
  }
  params = jax.tree.map(jax.numpy.asarray, params)
  tx = optimizer_lib.make_optimizer(config, model.shape.layers, [])
  state = init_state(model, tx, config.data.length, config.seed)
  options = StepOptions(model=model, tx=tx, task=task_of(config))
  step = functools.partial(train_step, options=options, is_mask_update=False)
  compiled = {
    "forward": jax.jit(lambda p, t: model.apply({"params": p}, t))
    .lower(params, batch["tokens"])
    .compile(),
    "step": jax.jit(step, donate_argnums=0).lower(state, batch).compile(),
  }
  states = [state]

  def take_step():
    new, _ = compiled["step"](states.pop(), batch)
    states.append(jax.block_until_ready(new))

  def forward():
    jax.block_until_ready(compiled["forward"](params, batch["tokens"]))

  return _Programs(compiled, {"forward": forward, "step": take_step})


def _pair(models: dict[str, Any], figure: Any) -> dict[str, float]:
  """Returns a figure of both models and shrunk over dense."""
  dense, shrunk = (figure(models[name]) for name in ("dense", "shrunk"))
  return {"dense": dense, "shrunk": shrunk, "ratio": shrunk / dense}


def _size(params: Any) -> int:
  return sum(w.size for w in jax.tree.leaves(params))


def _file_bytes(params: Any) -> int:
  arrays = {n: np.asarray(w) for n, w in paths.flatten(params).items()}
  return len(safetensors.numpy.save(arrays))


def _peak(compiled: Any) -> int:
  """Returns bytes of arguments, results and temporaries, donated ones once."""
  m = compiled.memory_analysis()
  return (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + m.temp_size_in_bytes
  )


def _cost(compiled: Any, name: str) -> float:
  return compiled.cost_analysis()[name]


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=20)
  parser.add_argument("--multiple", type=int, default=64)
  args = parser.parse_args()
  result = measure(args.rounds, args.multiple)

  def row(name: str, pair: dict[str, float]) -> list[str]:
    values = [f"{pair[model] / 1e6:,.1f}" for model in ("dense", "shrunk")]
    return [name, *values, f"{pair['ratio']:.3f}"]

  rows = [
    row("parameters (millions)", result["parameters"]),
    row("safetensors file (MB)", result["file_bytes"]),
  ]
  times, spent, memory = [], {}, {}
  for at in result["by_shape"]:
    for name in ("forward", "step"):
      r, (texts, length) = at[name], at["shape"]
      title = f"{name}, {texts} x {length} tokens"
      rows += [
        row(f"{title}: peak memory (MB)", r["peak_bytes"]),
        row(f"{title}: MFLOPs", r["flops"]),
        row(f"{title}: MB moved", r["bytes_accessed"]),
      ]
      speedup, memory[title] = r["speedup"], r["peak_bytes"]
      spent[title] = {
        "ratio": 1 / speedup["ratio"],
        "ratio_low": 1 / speedup["ratio_high"],
        "ratio_high": 1 / speedup["ratio_low"],
      }
      times.append(
        [
          title,
          *(f"{1e3 * r['seconds'][m]:.1f}" for m in ("dense", "shrunk")),
          f"{speedup['ratio']:.2f}",
          f"{speedup['ratio_low']:.2f} to {speedup['ratio_high']:.2f}",
        ]
      )
  sizes = output.Table(
    "A shrunk model over its dense baseline",
    ["", "dense", "shrunk", "ratio"],
    rows,
  )
  timed = output.Table(
    f"Dense over shrunk, {args.rounds} rounds in turn",
    ["", "dense, ms", "shrunk, ms", "times as fast", "quartiles"],
    times,
  )
  plot = output.Plot(
    "A shrunk model: less is better",
    "fraction of the dense baseline (bars: quartiles)",
    {
      "time": spent,
      "peak memory": memory,
      "size": {
        "parameters": result["parameters"],
        "file": result["file_bytes"],
      },
    },
  )
  output.show("shrink", args, result, [sizes, timed], plot)


if __name__ == "__main__":
  main()
