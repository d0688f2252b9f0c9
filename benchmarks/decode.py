"""Decoding: tokens per second and bytes of the cache, folded against dense.

    python -m benchmarks.decode [--rounds=20] [--batch-size=8] [--longest=16384]
                                [--save] [--json]

Four models of one shape, timed in turn:

- dense;
- folded, G = 4: four numbers per key, a diagonal W_V;
- folded, G = 1: one number per key, a diagonal W_V;
- linear time, G = 1: a state of constant size in place of keys. It has as many nodes as
  `folding generate --cache=linear` takes for this model.

Parameters are random. The number of nodes depends on the ranges of queries and
keys, so a trained model may need others. Each call decodes the last 8 tokens
per row that fit into a cache of the given length.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output, timing
from folding import config as config_lib
from folding.models import constant_state
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.serving import generate
from folding.serving.sampling import Sampling, make_draw

LENGTHS = (1024, 4096, 16384)
VOCAB_SIZE, CHUNK, PROMPT = 1024, 8, 64
MODEL = config_lib.ModelConfig(num_layers=4, width=256, num_heads=8)
GROUPS = {
  "dense": 0,
  "folded, G = 4": 4,
  "folded, G = 1": 1,
  "linear time, G = 1": 1,
}


def measure(rounds: int, batch_size: int, longest: int) -> dict:
  """Returns tokens per second, bytes and ratios, by length and kind."""
  return {
    "lengths": {
      n: _measure_at(n, rounds, batch_size) for n in LENGTHS if n <= longest
    },
    "batch_size": batch_size,
    "rounds": rounds,
  }


def _measure_at(length: int, rounds: int, batch_size: int) -> dict:
  decoders = {name: _Decoder(name, length, batch_size) for name in GROUPS}
  seconds = timing.time_in_turn(decoders, rounds)
  dense_bytes = decoders["dense"].cache_bytes
  return {
    name: {
      "tokens_per_second": batch_size * CHUNK / statistics.median(times),
      "speed": timing.ratio(seconds["dense"], times),
      "cache_bytes": decoders[name].cache_bytes,
      "cache_ratio": decoders[name].cache_bytes / dense_bytes,
    }
    for name, times in seconds.items()
  }


class _Decoder:
  """Decodes the last tokens of a text of a length."""

  def __init__(self, name: str, length: int, batch_size: int):
    groups = GROUPS[name]
    config = config_lib.resolve(
      config_lib.Config(
        preset="none",
        model=MODEL,
        fold=config_lib.FoldConfig(
          groups=groups, values="diagonal" if groups else "dense"
        ),
      )
    )
    model = make_model(shape_of(config), VOCAB_SIZE)
    tokens = np.random.default_rng(0).integers(
      0, VOCAB_SIZE, (batch_size, PROMPT), dtype=np.int32
    )
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    states = None
    if name == "linear time, G = 1":
      spans = constant_state.measure_spans(model, params)
      states = constant_state.empty_states(model, spans, batch_size, 1.6)
    start = np.zeros(batch_size, np.int32)
    draw = make_draw(Sampling(), VOCAB_SIZE)
    prefill = jax.jit(
      functools.partial(
        generate.prefill, model, num_new=jnp.int32(0), num_slots=length
      )
    )
    # Slots that hold no keys take the same time as the others.
    self._state = prefill(params, tokens, start, states=states, draw=draw)
    self._position = np.int32(length - CHUNK)
    caches = jax.tree.leaves(self._state.caches)
    self.cache_bytes = sum(x.nbytes for x in caches)
    decode = functools.partial(generate.decode, model, num_tokens=CHUNK)
    decode = jax.jit(decode, donate_argnames="state")
    self._decode = lambda state: decode(params, state, start, draw=draw)

  def __call__(self) -> None:
    state = self._state._replace(position=self._position)
    self._state, tokens = self._decode(state)
    jax.block_until_ready(tokens)


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=20)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--longest", type=int, default=max(LENGTHS))
  args = parser.parse_args()
  result = measure(args.rounds, args.batch_size, args.longest)
  table = output.Table(
    f"Decoding {args.batch_size} rows",
    ["length", "kind", "tokens/s", "speed", "quartiles", "cache", "ratio"],
    [
      [
        f"{length:,}",
        name,
        f"{one['tokens_per_second']:,.0f}",
        f"{one['speed']['ratio']:.2f}",
        f"{one['speed']['ratio_low']:.2f} to {one['speed']['ratio_high']:.2f}",
        f"{one['cache_bytes'] / 1e6:.2f} MB",
        f"{one['cache_ratio']:.3f}",
      ]
      for length, kinds in result["lengths"].items()
      for name, one in kinds.items()
    ],
  )
  speed = {
    name: {
      f"{length:,} tokens": kinds[name]["speed"]
      for length, kinds in result["lengths"].items()
    }
    for name in GROUPS
    if name != "dense"
  }
  plot = output.Plot(
    f"Decoding {args.batch_size} texts",
    "times as fast as with a dense cache (bars: quartiles)",
    speed,
  )
  output.show("decode", args, result, [table], plot)


if __name__ == "__main__":
  main()
