"""Overhead of FPP in a training step.

    python -m benchmarks.fpp_step [--rounds=40] [--devices=8] [--save] [--json]

Three steps of the quickstart's model on the same batch, timed in turn:

- bare: without FPP;
- held: with FPP, between two mask updates;
- check: with FPP, a mask update.

`ratio` weighs held and check as the quickstart does, which updates its masks
every nine steps. With --devices, CPU devices are simulated, and parameters,
optimizer state and masks are split over all of them.
"""

import dataclasses
import statistics

import jax
import numpy as np

from benchmarks import output, timing
from configs import quickstart
from folding import config as config_lib
from folding.models.shape import shape_of
from folding.training import optimizer as optimizer_lib
from folding.training import sharding
from folding.training.step import Program

NAMES = {"held": "between mask updates", "check": "at a mask update"}


def get_config(devices: int, *, prunes: bool) -> config_lib.Config:
  """Returns the resolved config of the quickstart, with or without FPP."""
  config = dataclasses.replace(
    quickstart.get_config(), mesh=config_lib.MeshConfig(data=1, fsdp=devices)
  )
  if not prunes:
    config = dataclasses.replace(
      config, fpp=config_lib.FPPConfig(linear=0.0, embedding=0.0)
    )
  return config_lib.resolve(config)


def measure(rounds: int, devices: int = 1) -> dict:
  """Returns seconds and ratios."""
  config = get_config(devices, prunes=True)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  vocab_size, d = config.data.vocab_size, config.data
  tokens = np.random.default_rng(0).integers(
    0, vocab_size, (d.batch_size, d.length + 1), dtype=np.int32
  )
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.ones((d.batch_size, d.length), np.float32),
  }
  batch = sharding.put_batch(mesh, batch)
  configs = [get_config(devices, prunes=prunes) for prunes in (False, True)]
  bare, pruned = (
    Program(
      shape_of(each),
      each,
      mesh,
      vocab_size=vocab_size,
      num_classes=0,
    )
    for each in configs
  )
  calls = {
    "bare": _stepper(bare, batch, is_mask_update=False),
    "check": _stepper(pruned, batch, is_mask_update=True),
    "held": _stepper(pruned, batch, is_mask_update=False),
  }
  seconds = timing.time_in_turn(calls, rounds)
  share = len(optimizer_lib.mask_updates(config)) / config.train.steps
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


def _stepper(program: Program, batch, *, is_mask_update: bool):
  """Returns a call that takes one step in the middle of the ramp."""
  updates = optimizer_lib.mask_updates(program.order)
  middle = updates[(len(updates) - 1) // 2]
  # Held steps come right after a mask update; each call repeats the same step.
  at = middle if is_mask_update else middle + 1
  state = program.draw(program.order.seed)
  state = state._replace(opt_state=state.opt_state._replace(step=np.int32(at)))
  state = jax.device_put(state, program.state_shardings)
  step = program.step(is_mask_update=is_mask_update, donates=False)
  return lambda: jax.block_until_ready(step(state, batch))


def main() -> None:
  """Measures, and shows the results."""
  parser = output.make_parser(__doc__, rounds=40)
  parser.add_argument("--devices", type=int, default=1)
  args = parser.parse_args()
  if args.devices > 1:  # before jax starts
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
  result = measure(args.rounds, args.devices)
  table = output.Table(
    "A training step with FPP over one without; mean over a run: "
    f"{result['ratio']:.3f}",
    ["step", "milliseconds", "ratio", "quartiles"],
    [
      [
        title,
        f"{1e3 * result['seconds'][name]:.1f}",
        f"{result[name]['ratio']:.3f}",
        f"{result[name]['ratio_low']:.3f} to {result[name]['ratio_high']:.3f}",
      ]
      for name, title in NAMES.items()
    ]
    + [["without FPP", f"{1e3 * result['seconds']['bare']:.1f}", "1", ""]],
  )
  plot = output.Plot(
    "A training step of the quickstart with FPP",
    "time relative to the step without FPP (bars: quartiles)",
    {"FPP": {title: result[name] for name, title in NAMES.items()}},
  )
  name = "fpp_step" if args.devices == 1 else f"fpp_step_{args.devices}"
  output.show(name, args, result, [table], plot)


if __name__ == "__main__":
  main()
