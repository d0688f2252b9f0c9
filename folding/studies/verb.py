"""The verb `folding study`."""

import argparse
from typing import Any


def add_to(verbs: Any) -> None:
  """Adds the verb to the subparsers of the command line."""
  verb = verbs.add_parser("study", help="train a grid of runs and compare them")
  verb.add_argument(
    "study",
    metavar="FILE[:ARGUMENT]",
    help="a file with get_study(), such as configs/studies/short.py",
  )
  verb.add_argument(
    "--workdir",
    metavar="DIR",
    required=True,
    help="study directory; the same command resumes what is in it",
  )
  verb.add_argument(
    "--engine",
    choices=("pool", "ray"),
    default="pool",
    help="processes on this machine, or tasks of a Ray cluster "
    "(default: %(default)s)",
  )
  verb.add_argument(
    "--jobs",
    metavar="N",
    type=int,
    help="runs at a time (default: 1; ray: as many as the cluster has room for)",
  )
  verb.add_argument(
    "--cpus",
    metavar="N",
    type=float,
    help="ray: cores per run (default: 1)",
  )
  verb.add_argument(
    "--gpus",
    metavar="N",
    type=float,
    help="ray: GPUs per run (default: 1 if the cluster has any)",
  )
  verb.set_defaults(call=study)


def study(args: argparse.Namespace) -> None:
  """Trains what is not finished, and writes what the study shows."""
  import math

  import jax

  from folding import files
  from folding.errors import ConfigError, TrainingError
  from folding.studies import grid, tables

  # This process plans; accelerators are for the runs.
  jax.config.update("jax_platforms", "cpu")
  files.require_workdir(args.workdir)
  found = grid.load_study(args.study)
  if args.engine == "ray":
    limit = math.inf if args.jobs is None else args.jobs
    engine = grid.Ray(args.cpus or 1.0, args.gpus, limit)
  elif args.cpus or args.gpus:
    raise ConfigError("--cpus and --gpus need --engine=ray")
  else:
    engine = grid.Pool(1 if args.jobs is None else args.jobs)
  try:
    failed = grid.run_study(found, args.workdir, engine)
  except KeyboardInterrupt:
    print("Stopped; the same command resumes the study")
    raise
  print(f"The results are in {tables.write(found, args.workdir)}")
  if failed:
    raise TrainingError(
      f"{len(failed)} runs failed: {', '.join(failed)}; see {args.workdir}/logs"
    )
