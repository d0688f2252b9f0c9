"""What attention in linear time gains over dense attention with its logits.

    python -m benchmarks.attention [--rounds=5] [--longest=8192] [--json]

Causal attention of 8 heads of 32 channels without positions, folded to one
number a query and key, on one text: s = sqrt(K) q uniform in [-2, 2], t = k of
deviation 1. Dense is `jax.nn.dot_product_attention` on the unfolded queries and
keys. Blocks is `attend_by_blocks` as models call it by default: exact, without
storing all logits. Linear is `attend_checked` as models call it: it finds while
it runs how many nodes make the error at most 1e-4 of the range of the values
(here they suffice; else it would compute all logits). So all are the same
function: `error` is the largest difference of dense and linear (the rounding of
dense is about 1e-6 of it) and `bound` is its proved bound. The three are timed in
turn, and `times` compares dense and linear. `train` is a forward and backward
pass; that of dense attention is timed up to 4,096 tokens. FLOPs and bytes moved are XLA's analysis of the compiled
forward pass; as it counts the body of a loop once, those of linear are its 512
tokens' (one turn of the loop) times the length. Decoding carries a state of the
same size whatever the length, instead of a cache of keys and values that grows:
in bytes, of one layer.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output, timing
from folding.models import attention, blocks, linear_attention
from folding.models.linear_attention import Inputs

HEADS, SIZE = 8, 32
SHORTEST, LONGEST_TRAINED = 512, 4096
TOLERANCE = 1e-4  # as in `folding.models.attention`
NODES = (64, 256)  # that `attend_checked` tries


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
  linear = functools.partial(
    linear_attention.attend_checked, causal=True, tolerance=TOLERANCE
  )
  functions = {"dense": _dense, "blocks": _blocks, "linear": linear}
  forward = {name: jax.jit(f) for name, f in functions.items()}
  out = {name: f(inputs) for name, f in forward.items()}
  span = linear_attention.measure_span(inputs)
  bounds = {n: linear_attention.span_bound(span, n).max() for n in NODES}
  num_nodes = next(n for n in NODES if bounds[n] <= TOLERANCE)
  counted = functools.partial(  # the branch that is taken
    linear_attention.attend_linear, causal=True, num_nodes=num_nodes
  )
  state = jax.eval_shape(
    functools.partial(
      linear_attention.init_state, span, 1, HEADS, SIZE, num_nodes
    )
  )
  result: dict[str, Any] = {
    "length": length,
    "error": float(jnp.abs(out["dense"] - out["linear"]).max()),
    "bound": float(bounds[num_nodes] * jnp.ptp(inputs.v_BLIK)),
    "nodes": num_nodes,
    "forward": _compare(forward, inputs, rounds),
    "state_bytes": sum(4 * x.size for x in jax.tree.leaves(state)),
    "cache_bytes": 2 * 4 * length * HEADS * SIZE,
    "cost": {
      "dense": _cost(_dense, inputs),
      "linear": _cost(counted, _inputs(SHORTEST), length / SHORTEST),
    },
  }
  if length <= LONGEST_TRAINED:
    train = {name: jax.jit(jax.grad(_loss(f))) for name, f in functions.items()}
    result["train"] = _compare(train, inputs, rounds)
  return result


def _inputs(length: int) -> Inputs:
  rng = np.random.default_rng(0)
  q_BLH = rng.uniform(-2, 2, (1, length, HEADS)) / SIZE**0.5
  k_BLH = rng.standard_normal((1, length, HEADS))
  v_BLHK = rng.standard_normal((1, length, HEADS, SIZE))
  arrays = (q_BLH, k_BLH, v_BLHK)
  return Inputs(*(jnp.asarray(x, jnp.float32) for x in arrays))


def _dense(x: Inputs):
  q, k = (jnp.repeat(a[..., None], SIZE, -1) for a in (x.q_BLH, x.k_BLJ))
  return jax.nn.dot_product_attention(q, k, x.v_BLIK, is_causal=True)


def _blocks(x: Inputs):
  return blocks.attend_by_blocks(
    _logits,
    x.q_BLH[..., None],
    blocks.Keys(x.k_BLJ[..., None], x.v_BLIK, None),
    attention.Biases(),
    causal=True,
    window=None,
  )


def _logits(q_BLHG, query_L, keys, key_M, biases):
  bias = attention.position_bias(
    query_L, key_M, biases, causal=True, window=None
  )
  k_BJGM = keys.k_BMJG.transpose(0, 2, 3, 1)
  return attention.attention_logits(q_BLHG, k_BJGM, bias, None, head_dim=SIZE)


def _loss(attend):
  return lambda inputs: (attend(inputs) ** 2).sum()


def _compare(programs: dict, inputs: Inputs, rounds: int) -> dict:
  """Returns seconds, and how many times as fast linear attention is."""
  seconds = timing.time_in_turn(
    {
      name: functools.partial(_run, program, inputs)
      for name, program in programs.items()
    },
    rounds,
  )
  return {
    "seconds": {n: statistics.median(s) for n, s in seconds.items()},
    **timing.ratio(seconds["dense"], seconds["linear"]),
  }


def _run(program, inputs) -> None:
  jax.block_until_ready(program(inputs))


def _cost(function, inputs, times: float = 1) -> dict:
  analysis = jax.jit(function).lower(inputs).compile().cost_analysis() or {}
  return {
    "flops": times * analysis["flops"],
    "bytes": times * analysis["bytes accessed"],
  }


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__, rounds=5)
  parser.add_argument("--longest", type=int, default=8192)
  args = parser.parse_args()
  result = measure(args.rounds, args.longest)
  timed = output.Table(
    "Dense / blocks / linear causal attention in ms; linear: times as fast",
    ["tokens", "forward", "times", "train", "times"],
    [
      [f"{r['length']:,}", *_cells(r["forward"]), *_cells(r.get("train"))]
      for r in result["lengths"]
    ],
  )
  counted = output.Table(
    "Their difference; XLA's count, dense / linear; bytes to decode with",
    [
      *("tokens", "nodes", "error", "bound", "GFLOP", "GB moved"),
      *("cache", "state"),
    ],
    [
      [
        f"{r['length']:,}",
        str(r["nodes"]),
        f"{r['error']:.0e}",
        f"{r['bound']:.0e}",
        *(
          " / ".join(f"{r['cost'][n][what] / 1e9:.2f}" for n in r["cost"])
          for what in ("flops", "bytes")
        ),
        f"{r['cache_bytes']:,}",
        f"{r['state_bytes']:,}",
      ]
      for r in result["lengths"]
    ],
  )
  speed = {
    name: {
      f"{r['length']:,} tokens": r[what]
      for r in result["lengths"]
      if r.get(what)
    }
    for name, what in (("forward", "forward"), ("training step", "train"))
  }
  plot = output.Plot("Linear-time attention: times as fast as dense", speed)
  output.show("attention", args, result, [timed, counted], plot)


def _cells(compared: dict | None) -> list[str]:
  if compared is None:
    return ["", ""]
  milliseconds = [f"{1e3 * s:.1f}" for s in compared["seconds"].values()]
  return [
    " / ".join(milliseconds),
    "{ratio:.0f} ({ratio_low:.0f}-{ratio_high:.0f})".format(**compared),
  ]


if __name__ == "__main__":
  main()
