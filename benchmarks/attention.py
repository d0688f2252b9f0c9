"""CPU time of causal attention by sequence length, four programs in turn.

    python -m benchmarks.attention [--rounds=5] [--longest=16384] [--json]

One layer with 8 heads of 32 channels, without positions, on one sequence:

- `dense, all logits`: `jax.nn.dot_product_attention` on unfolded queries and keys.
- `dense`: `attend_by_blocks`, the default of our models, on the same.
- `folded, G = 1`: `attend_by_blocks` with one number per query and key, twice.
- `linear time, G = 1`: `attend_checked`.

All compute the same function: s = sqrt(K) q is uniform in [-2, 2], t = k has
deviation 1, and unfolding repeats both. `attend_checked` finds while it runs
how many nodes keep the error below 1e-4 of the range of the values (these are
enough here; otherwise it would compute all logits). `error` is the largest
difference of linear time to exact attention, of about 1e-6 rounding, and `bound`
its proved bound.

`forward` is one call, `training` a forward and backward pass, and `decode` one
new token after that many. A cache holds the keys and values of earlier tokens;
linear time has a state of constant size instead. The programs of a length are
timed in turn, in CPU time: the sum over all cores, which other work on the machine
hardly changes. `times as fast` compares dense in blocks and linear time.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output, timing
from folding.models import (
  attention,
  decode,
  exact_attention,
  linear_attention,
)
from folding.models.linear_attention import Inputs

HEADS, SIZE = 8, 32
SHORTEST = 512
LONGEST_LOGITS = 2048  # at twice the length they take four times the memory
TOLERANCE = attention.TOLERANCE
DECODED_TOKENS = 32  # per call: the first ones of a call find cold caches
NODES = (64, 256)  # that `attend_checked` tries
LOGITS, DENSE, FOLDED, LINEAR = (
  "dense, all logits",
  "dense",
  "folded, G = 1",
  "linear time, G = 1",
)
DECODED = (DENSE, FOLDED, LINEAR)
PANELS = {  # what is timed: its title and programs
  "forward": ("forward", (LOGITS, *DECODED)),
  "training": ("forward and backward", (LOGITS, *DECODED)),
  "decode": ("decoding a token", DECODED),
}


def measure(rounds: int, longest: int) -> dict:
  """Returns figures of each length, from 512 in powers of 2."""
  num_lengths = max(longest // SHORTEST, 1).bit_length()
  lengths = [SHORTEST * 2**n for n in range(num_lengths)]
  return {
    "lengths": [_measure_length(n, rounds) for n in lengths],
    "rounds": rounds,
  }


def _measure_length(length: int, rounds: int) -> dict:
  inputs = _inputs(length)
  functions = {
    LOGITS: _all_logits,
    DENSE: functools.partial(_in_blocks, groups=SIZE),
    FOLDED: functools.partial(_in_blocks, groups=2),  # as our models do
    LINEAR: functools.partial(
      linear_attention.attend_checked, causal=True, tolerance=TOLERANCE
    ),
  }
  programs = {
    "forward": {name: jax.jit(f) for name, f in functions.items()},
    "training": {n: jax.jit(jax.grad(_loss(f))) for n, f in functions.items()},
  }
  if length > LONGEST_LOGITS:
    for group in programs.values():
      del group[LOGITS]
  forward = programs["forward"]
  exact = forward.get(LOGITS, forward[DENSE])
  span = linear_attention.measure_span(inputs)
  bounds = {n: linear_attention.span_bound(span, n).max() for n in NODES}
  num_nodes = next(n for n in NODES if bounds[n] <= TOLERANCE)
  decoders = {
    DENSE: _Decoder(_decode_exact, _cache(inputs, SIZE), inputs),
    FOLDED: _Decoder(_decode_exact, _cache(inputs, 1), inputs),
    LINEAR: _Decoder(_decode_linear, _state(inputs, span, num_nodes), inputs),
  }
  return {
    "length": length,
    "error": float(jnp.abs(exact(inputs) - forward[LINEAR](inputs)).max()),
    "bound": float(bounds[num_nodes] * jnp.ptp(inputs.v_BLIK)),
    "nodes": num_nodes,
    "bytes": {name: decoder.num_bytes for name, decoder in decoders.items()},
    **{
      what: _compare(
        {n: functools.partial(_run, f, inputs) for n, f in group.items()},
        rounds,
      )
      for what, group in programs.items()
    },
    "decode": _compare(decoders, 3 * rounds, DECODED_TOKENS),
  }


def _inputs(length: int) -> Inputs:
  rng = np.random.default_rng(0)
  q_BLH = rng.uniform(-2, 2, (1, length, HEADS)) / SIZE**0.5
  k_BLH = rng.standard_normal((1, length, HEADS))
  v_BLHK = rng.standard_normal((1, length, HEADS, SIZE))
  arrays = (q_BLH, k_BLH, v_BLHK)
  return Inputs(*(jnp.asarray(x, jnp.float32) for x in arrays))


def _unfold(x: Inputs, groups: int) -> tuple[jax.Array, jax.Array]:
  """Returns queries and keys with their number repeated, [B, L, H, groups]."""
  q, k = (jnp.repeat(a[..., None], groups, -1) for a in (x.q_BLH, x.k_BLJ))
  return q, k


def _all_logits(x: Inputs):
  q, k = _unfold(x, SIZE)
  return jax.nn.dot_product_attention(q, k, x.v_BLIK, is_causal=True)


def _in_blocks(x: Inputs, *, groups: int):
  q, k = _unfold(x, groups)
  biases = exact_attention.Biases()
  return exact_attention.attend_whole(
    q, k, x.v_BLIK, biases, None, causal=True, head_dim=SIZE
  )


def _loss(attend):
  return lambda inputs: (attend(inputs) ** 2).sum()


class _Decoder:
  """Adds the last token of a sequence again and again."""

  def __init__(self, step, cache, inputs: Inputs):
    last = Inputs(*(x[:, -1:] for x in inputs[:3]))
    self._step = jax.jit(functools.partial(step, last), donate_argnums=0)
    self._cache = cache
    self.num_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))

  def __call__(self) -> None:
    for _ in range(DECODED_TOKENS):
      self._cache, out = self._step(self._cache)
      jax.block_until_ready(out)


def _cache(x: Inputs, groups: int) -> decode.KVCache:
  return decode.make_cache(_unfold(x, groups)[1], x.v_BLIK)


def _decode_exact(x: Inputs, cache: decode.KVCache):
  newest = jnp.asarray(cache.v.shape[1] - 1)
  q, k = _unfold(x, cache.k.shape[1])
  cache = decode.write(cache, decode.make_cache(k, x.v_BLIK), newest)
  bias = jnp.zeros((1, 1, cache.v.shape[1]))
  out = exact_attention.attend(q, cache.k, cache.v, bias, None, head_dim=SIZE)
  return cache, out


def _state(x: Inputs, span, num_nodes: int) -> linear_attention.PastState:
  state = linear_attention.init_state(span, 1, HEADS, SIZE, num_nodes)
  return jax.jit(linear_attention.extend)(state, x)[0]


def _decode_linear(x: Inputs, state: linear_attention.PastState):
  return linear_attention.extend(state, x)


def _compare(
  calls: Mapping[str, Callable[[], None]], rounds: int, count: int = 1
) -> dict:
  """Returns seconds, and how many times as fast linear time is.

  Args:
    calls: Functions to time.
    rounds: How often.
    count: Repetitions within one call.
  """
  seconds = timing.time_in_turn(calls, rounds, time.process_time)
  return {
    "seconds": {n: statistics.median(s) / count for n, s in seconds.items()},
    **timing.ratio(seconds[DENSE], seconds[LINEAR]),
  }


def _run(program, inputs) -> None:
  jax.block_until_ready(program(inputs))


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=5)
  parser.add_argument("--longest", type=int, default=16384)
  args = parser.parse_args()
  result = measure(args.rounds, args.longest)
  timed = [
    output.Table(
      f"{title}: CPU ms (medians); how many times as fast as dense linear time "
      "is (quartiles)",
      ["tokens", *names, "times as fast"],
      [
        [f"{r['length']:,}", *_cells(r[what], names)] for r in result["lengths"]
      ],
    )
    for what, (title, names) in PANELS.items()
  ]
  kept = output.Table(
    "Difference of linear time to exact attention; bytes to decode with",
    ["tokens", "nodes", "error", "bound", *DECODED],
    [
      [
        f"{r['length']:,}",
        str(r["nodes"]),
        f"{r['error']:.0e}",
        f"{r['bound']:.0e}",
        *(f"{r['bytes'][name]:,}" for name in DECODED),
      ]
      for r in result["lengths"]
    ],
  )
  milliseconds = {
    f"{title}, CPU ms": {
      name: {
        r["length"]: 1e3 * r[what]["seconds"][name]
        for r in result["lengths"]
        if name in r[what]["seconds"]
      }
      for name in names
    }
    for what, (title, names) in PANELS.items()
  }
  plot = output.Lines(
    f"One layer of causal attention, {HEADS} heads of {SIZE} channels",
    "tokens",
    milliseconds,
  )
  output.show("attention", args, result, [*timed, kept], plot)


def _cells(compared: dict, names: Sequence[str]) -> list[str]:
  seconds = compared["seconds"]
  found = [1e3 * seconds[n] if n in seconds else None for n in names]
  return [
    *(
      "" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.2g}"
      for x in found
    ),
    "{ratio:.2g} ({ratio_low:.2g}-{ratio_high:.2g})".format(**compared),
  ]


if __name__ == "__main__":
  main()
