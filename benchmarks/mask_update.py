"""What a mask update costs: against a sort, an optimizer step, and in memory.

    python -m benchmarks.mask_update [--sizes=1,4,16,64] [--rounds=5] [--json]
    python -m benchmarks.mask_update --sizes=1000 --rounds=3

Sizes are in millions of parameters, in bfloat16 matrices of up to 2,048 x
8,192, of which 70% are pruned by weight. In turn, in one process:

    mask   an update of FPP with a check: statistics in, thresholds by counting,
           bits packed, gradients and parameters held
    sort   the same scores, thresholds by sorting, bits packed; nothing else
    step   AdamW, clipped by norm, and the sum of its updates and parameters

`memory` is parameters, moments, FPP's state and the scratch memory of a mask
update, by XLA's own analysis of the compiled program, over the first three. What
it writes is not counted: in a training step that takes the place of what was
there. A size that the free memory does not hold is left out.
"""

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import output, timing
from folding.compression import scores as scores_lib
from folding.compression.fpp import fpp
from folding.compression.rules import Rule, pack

_ROWS, _COLUMNS = 2048, 8192
_TARGET, _SCORE = 0.7, "relative"
# Of a parameter: itself, its gradient, two moments, and two numbers of float32
# that an update needs meanwhile.
_BYTES = 16

_adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def measure(millions: float, rounds: int) -> dict[str, Any]:
  """Returns the figures of one size, or why it is left out."""
  shapes = _shapes(millions)
  size = sum(shape[0] * shape[1] for shape in shapes.values())
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if jax.default_backend() == "cpu" and _BYTES * size > free:
    return {
      "parameters": size,
      "left_out": f"needs about {_BYTES * size / 1e9:.1f} GB of memory; "
      f"{free / 1e9:.1f} GB are free",
    }
  calls, memory = _calls(shapes)
  seconds = timing.time_in_turn(calls, rounds)
  return {
    "parameters": size,
    "mask_over_sort": timing.ratio(seconds["mask"], seconds["sort"]),
    "mask_over_step": timing.ratio(seconds["mask"], seconds["step"]),
    "memory": memory,
    "seconds": {n: statistics.median(s) for n, s in seconds.items()},
  }


def _shapes(millions: float) -> dict[str, tuple[int, int]]:
  total = round(millions * 1e6)
  count = max(1, round(total / (_ROWS * _COLUMNS)))
  rows = min(_ROWS, max(1, round(total / _COLUMNS / count)))
  return {f"w{i}": (rows, _COLUMNS) for i in range(count)}


def _calls(
  shapes: dict[str, tuple[int, int]],
) -> tuple[dict[str, Callable[[], None]], float]:
  """Returns what is timed, and the memory of a mask update as a ratio."""
  draw = jax.jit(
    lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16),
    static_argnums=1,
  )
  params, grads = (
    {
      n: draw(jax.random.key(i + seed), s)
      for i, (n, s) in enumerate(shapes.items())
    }
    for seed in (0, 1000)
  )
  stats = {n: jnp.ones(s[:1], jnp.float32) for n, s in shapes.items()}
  rules = [Rule(r"w\d+", _TARGET)]
  checks = 101
  tx = fpp(
    optax.identity(), rules, begin=0, end=checks - 1, every=1, score=_SCORE
  )
  update = jax.jit(
    lambda g, state, p, stats: tx.update(g, state, p, stats=stats)
  )
  # In the middle of the ramp; after a check, some elements are frozen.
  state = jax.jit(tx.init)(params)._replace(step=jnp.int32(checks // 2))
  _, state = update(grads, state, params, stats)
  moments = jax.jit(_adamw.init)(params)
  program = update.lower(grads, state, params, stats).compile()
  analysis = program.memory_analysis()
  assert analysis is not None
  scratch = analysis.temp_size_in_bytes
  held = _bytes((params, moments, state))
  ramp = 1 - (1 - (checks // 2 + 1) / (checks - 1)) ** 3
  threshold = jax.jit(_by_sorting, static_argnums=1)
  lying = {"params": params, "moments": moments}

  def mask():
    jax.block_until_ready(update(grads, state, lying["params"], stats))

  def sort():
    for name, shape in shapes.items():
      k = int(ramp * _TARGET * shape[0] * shape[1])
      jax.block_until_ready(threshold(lying["params"][name], k, stats[name]))

  def step():
    found = _step(lying["params"], lying["moments"], grads)
    lying["params"], lying["moments"] = jax.block_until_ready(found)

  calls = {"mask": mask, "sort": sort, "step": step}
  return calls, (held + scratch) / held


def _by_sorting(w: jax.Array, k: int, average: jax.Array) -> jax.Array:
  """Returns the packed bits of the k lowest scores, found by a sort."""
  scores = scores_lib.element_scores(_SCORE, w, average, jax.random.key(0))
  return pack(scores <= jnp.sort(scores.reshape(-1))[k - 1])


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _step(params: Any, moments: Any, grads: Any) -> tuple[Any, Any]:
  updates, moments = _adamw.update(grads, moments, params)
  return optax.apply_updates(params, updates), moments


def _bytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def _row(found: dict[str, Any]) -> list[str]:
  size = f"{found['parameters'] / 1e6:,.0f} M"
  if "left_out" in found:
    return [size, found["left_out"], "", "", "", "", ""]
  return [
    size,
    *(f"{1e3 * found['seconds'][n]:,.0f}" for n in ("mask", "sort", "step")),
    f"{found['mask_over_sort']['ratio']:.3f}",
    f"{found['mask_over_step']['ratio']:.2f}",
    f"{found['memory']:.3f}",
  ]


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__, rounds=5)
  parser.add_argument("--sizes", default="1,4,16,64", help="millions")
  args = parser.parse_args()
  found = [measure(float(m), args.rounds) for m in args.sizes.split(",")]
  table = output.Table(
    "A mask update",
    ["parameters", *(f"{n}, ms" for n in ("mask", "sort", "step"))]
    + ["mask / sort", "mask / step", "memory"],
    [_row(each) for each in found],
  )
  ratios = {
    name: {
      _row(each)[0]: each[what] for each in found if "left_out" not in each
    }
    for name, what in (
      ("over a sort", "mask_over_sort"),
      ("over an optimizer step", "mask_over_step"),
    )
  }
  plot = output.Plot("A mask update: times as long as ...", ratios)
  result = {"sizes": found, "rounds": args.rounds}
  output.show("mask_update", args, result, [table], plot)


if __name__ == "__main__":
  main()
