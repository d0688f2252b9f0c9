"""Tokens per second of language models, in JAX, transformers and llama.cpp.

    python -m benchmarks.generation PATH... [--rounds=5] [--save] [--json]

Needs the extras `gguf` and `parity`. Each PATH is what `folding generate` reads; the
first is the dense model. Each model is exported to formats `hf` and `gguf`. All are
timed in turn, one text at a time, on all cores: to read a prompt of 256 random tokens,
and to continue one of 8 by 64. Times are medians.
"""

import functools
import importlib
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import exports, output, timing
from folding.serving import export as export_lib
from folding.serving.generate import Generator
from folding.serving.gguf_export import export_gguf

READ, BEGUN, NEW = 256, 8, 64  # tokens
DTYPES = ("float32", "float16", "q8_0")

# (ids of a prompt, number of new tokens); waits for them.
Continue = Callable[[np.ndarray, int], Any]


def _in_jax(loaded: export_lib.Model) -> Continue:
  generator = Generator(loaded.module)
  params = jax.device_put(loaded.params)
  return lambda ids, count: generator(params, [ids], max_new_tokens=count)


def _in_transformers(folder: str) -> Continue:
  import torch

  model = exports.from_transformers(folder, "AutoModelForCausalLM")

  def call(ids: np.ndarray, count: int) -> None:
    prompt = torch.tensor(ids[None], dtype=torch.long)
    with torch.inference_mode():
      model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
      )

  return call


def _in_llama_cpp(path: str) -> Continue:
  xllamacpp: Any = importlib.import_module("xllamacpp")
  options = xllamacpp.CommonParams()
  options.model.path, options.n_ctx, options.n_parallel = path, 512, 1
  for threads in (options.cpuparams, options.cpuparams_batch):
    threads.n_threads, threads.poll = os.cpu_count() or 1, 0
  options.verbosity = 0
  server = xllamacpp.Server(options)
  fixed = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

  def call(ids: np.ndarray, count: int) -> None:
    asked = {"prompt": ids.tolist(), "max_tokens": count, **fixed}
    found = server.handle_completions(asked)
    if found["usage"]["completion_tokens"] != count:
      raise RuntimeError(
        f"llama.cpp did not continue by {count} tokens: {found}"
      )

  return call


def _cache_bytes(loaded: export_lib.Model) -> int:
  """Returns the bytes of the KV cache per token, in float32."""
  prefill = functools.partial(loaded.module.apply, method="prefill")
  tokens, start = jnp.zeros((1, READ), jnp.int32), jnp.zeros(1, jnp.int32)
  _, caches = jax.eval_shape(
    prefill, {"params": loaded.params}, tokens, start, None
  )
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)]
  return sum(sizes) // READ


def measure(paths: list[str], rounds: int, scratch: str) -> dict[str, Any]:
  """Returns figures by model and runtime; speeds are relative to the first."""
  calls, models, vocab_size = {}, {}, 1 << 31
  for index, path in enumerate(paths):
    loaded = export_lib.shrunk(export_lib.load(path))
    name, folder = exports.row_name(path), os.path.join(scratch, f"hf{index}")
    vocab_size = min(vocab_size, loaded.num_rows)
    models[name] = {
      "parameters": sum(x.size for x in jax.tree.leaves(loaded.params)),
      "cache_bytes": _cache_bytes(loaded),
    }
    calls[name, "JAX"] = _in_jax(loaded)
    export_lib.export_hf(folder, loaded)
    calls[name, "transformers"] = _in_transformers(folder)
    for dtype in DTYPES:
      file = os.path.join(scratch, f"{index}-{dtype}.gguf")
      size = export_gguf(file, loaded, dtype)
      models[name][dtype] = size["file"]
      calls[name, f"llama.cpp {dtype}"] = _in_llama_cpp(file)
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, vocab_size, READ).astype(np.int32)
  seconds = {
    kind: timing.time_in_turn(
      {key: functools.partial(call, ids, count) for key, call in calls.items()},
      rounds,
    )
    for kind, ids, count in (
      ("read", prompt, 1),
      ("continue", prompt[:BEGUN], NEW),
    )
  }
  first = next(iter(calls))
  return {
    "models": models,
    "rows": [
      {
        "model": key[0],
        "runtime": key[1],
        "read": READ / statistics.median(seconds["read"][key]),
        "continue": NEW / statistics.median(seconds["continue"][key]),
        "speed": {
          kind: timing.ratio(times[first], times[key])
          for kind, times in seconds.items()
        },
      }
      for key in calls
    ],
  }


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=5)
  parser.add_argument("paths", nargs="+", metavar="PATH")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    result = measure(args.paths, args.rounds, scratch)
  result["rounds"] = args.rounds
  speeds = output.Table(
    f"Tokens per second: a prompt of {READ} tokens, and {NEW} new ones",
    ["model", "runtime", "read", "ratio", "continue", "ratio"],
    [
      [
        row["model"],
        row["runtime"],
        f"{row['read']:,.0f}",
        f"{row['speed']['read']['ratio']:.2f}",
        f"{row['continue']:,.1f}",
        f"{row['speed']['continue']['ratio']:.2f}",
      ]
      for row in result["rows"]
    ],
  )
  sizes = output.Table(
    "Sizes: GGUF files, and the KV cache per token in JAX",
    ["model", "parameters", *DTYPES, "cache"],
    [
      [
        name,
        f"{one['parameters']:,}",
        *(f"{one[dtype] / 1e6:,.1f} MB" for dtype in DTYPES),
        f"{one['cache_bytes']:,} bytes",
      ]
      for name, one in result["models"].items()
    ],
  )
  series = {
    kind: {
      f"{row['model']}, {row['runtime']}": row["speed"][kind]
      for row in result["rows"]
    }
    for kind in ("read", "continue")
  }
  plot = output.Plot(
    "Language models, one text at a time",
    "times as fast as the first model in JAX (bars: quartiles)",
    series,
  )
  output.show("generation", args, result, [speeds, sizes], plot)


if __name__ == "__main__":
  main()
