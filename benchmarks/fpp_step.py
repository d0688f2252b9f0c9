"""What a training step costs with FPP, over the same step without.

    python -m benchmarks.fpp_step [--rounds=40] [--devices=8] [--json]

The same folded model and AdamW, on the same batch; `bare` has no FPP, `held`
is FPP between two checks, `check` is a step in which FPP gathers statistics
and decides anew. `ratio` weighs the two by how often they come in the
quickstart, which has a check every nine steps. With --devices, CPU devices are
simulated and parameters, optimizer state and masks are split over all of them.
"""

import functools
import statistics

import jax
import numpy as np

from benchmarks import output, timing
from configs import quickstart
from folding import config as config_lib
from folding.models.transformer import make_model
from folding.training import optimizer as optimizer_lib
from folding.training import sharding
from folding.training.step import StepOptions, init_state, train_step


def measure(rounds: int, devices: int = 1) -> dict:
  """Returns seconds and ratios."""
  config = config_lib.resolve(quickstart.get_config())
  config.mesh = config_lib.MeshConfig(data=1, fsdp=devices)
  vocab_size, d = config.data.vocab_size, config.data
  model = make_model(config, vocab_size)
  tokens = np.random.default_rng(0).integers(
    0, vocab_size, (d.batch_size, d.length + 1), dtype=np.int32
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  batch = sharding.put_batch(
    mesh,
    {
      "tokens": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "weights": np.ones((d.batch_size, d.length), np.float32),
    },
  )
  abstract = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])
  rules = optimizer_lib.make_rules(
    config, abstract["params"], abstract["params"]
  )
  calls = {
    "bare": _stepper(config, model, [], batch, mesh, is_check=False),
    "check": _stepper(config, model, rules, batch, mesh, is_check=True),
    "held": _stepper(config, model, rules, batch, mesh, is_check=False),
  }
  seconds = timing.time_in_turn(calls, rounds)
  begin, end, every = optimizer_lib.check_steps(config)
  share = ((end - begin) // every + 1) / config.train.steps
  held = timing.ratio(seconds["held"], seconds["bare"])
  check = timing.ratio(seconds["check"], seconds["bare"])
  return {
    "ratio": share * check["ratio"] + (1 - share) * held["ratio"],
    "held": held,
    "check": check,
    "checks_per_step": share,
    "seconds": {n: statistics.median(s) for n, s in seconds.items()},
    "rounds": rounds,
    "devices": devices,
  }


def _stepper(config, model, rules, batch, mesh, is_check):
  """Returns a call that takes one step; in the middle of the ramp."""
  tx = optimizer_lib.make_optimizer(config, rules)
  state = init_state(model, tx, config.data.length, config.seed)
  places = sharding.tree_shardings(mesh, state)
  begin, end, every = optimizer_lib.check_steps(config)
  middle = begin + (end - begin) // every // 2 * every
  step = jax.jit(
    functools.partial(
      train_step,
      options=StepOptions(model=model, tx=tx, rules=rules, mesh=mesh),
      is_check=is_check,
    ),
    out_shardings=(places, sharding.whole(mesh)),
  )
  # Held steps start one after a check; each call repeats the same step.
  at = middle if is_check else middle + 1
  state = state._replace(opt_state=state.opt_state._replace(step=np.int32(at)))
  state = jax.device_put(state, places)
  return lambda: jax.block_until_ready(step(state, batch))


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__, rounds=40)
  parser.add_argument("--devices", type=int, default=1)
  args = parser.parse_args()
  if args.devices > 1:  # before jax starts
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
  result = measure(args.rounds, args.devices)
  table = output.Table(
    "A training step with FPP over one without; weighed by how often checks "
    f"come: {result['ratio']:.3f}",
    ["step", "milliseconds", "ratio", "quartiles"],
    [
      [
        name,
        f"{1e3 * result['seconds'][name]:.1f}",
        f"{result[name]['ratio']:.3f}",
        f"{result[name]['ratio_low']:.3f} to {result[name]['ratio_high']:.3f}",
      ]
      for name in ("held", "check")
    ]
    + [["bare", f"{1e3 * result['seconds']['bare']:.1f}", "1", ""]],
  )
  plot = output.Plot(
    "A training step with FPP: times as long as without",
    {"FPP": {name: result[name] for name in ("held", "check")}},
  )
  name = "fpp_step" if args.devices == 1 else f"fpp_step_{args.devices}"
  output.show(name, args, result, [table], plot)


if __name__ == "__main__":
  main()
