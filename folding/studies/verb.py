"""The verb `folding study`."""

import argparse
import os
from typing import Any


def add_to(verbs: Any) -> None:
  """Adds the verb to the subparsers of the command line."""
  verb = verbs.add_parser(
    "study", help="run a grid of runs, tell what it shows"
  )
  verb.add_argument(
    "study",
    metavar="STUDY.py[:ARGUMENT]",
    help="a file with get_study(), such as configs/studies/from_scratch.py",
  )
  verb.add_argument(
    "--workdir",
    metavar="DIR",
    required=True,
    help="of the study; the same command goes on with what is there",
  )
  verb.add_argument(
    "--list", action="store_true", help="print the runs and how far they are"
  )
  verb.add_argument(
    "--shard",
    metavar="I/N",
    default="1/1",
    help="this machine is I of N that share DIR (default: %(default)s)",
  )
  verb.add_argument(
    "--jobs",
    metavar="N",
    type=int,
    default=1,
    help="runs at a time, which share out the cores; 0: none, only write what is "
    "known so far (default: %(default)s)",
  )
  verb.add_argument(
    "--results", metavar="PAGE.md", help="where to write the page as well"
  )
  verb.add_argument(
    "--retry", action="store_true", help="try what failed once more"
  )
  verb.add_argument(
    "--energy",
    metavar="COUNTRY",
    help="estimate kWh and CO2 by CodeCarbon; an ISO 3166 code of three letters",
  )
  verb.set_defaults(call=study)


def study(args: argparse.Namespace) -> None:
  """Runs a study, or goes on, and writes what it shows."""
  import jax
  import rich.console

  from folding import files
  from folding.schema import ConfigError, TrainingError
  from folding.studies import board, gather, page, runner
  from folding.studies.study import load_study
  from folding.training import energy

  # This process plans; the accelerators, and their memory, are for the runs.
  jax.config.update("jax_platforms", "cpu")
  i, _, n = args.shard.partition("/")
  if not (i.isdecimal() and n.isdecimal()):
    raise ConfigError(f"--shard is I/N, such as 1/2; it is {args.shard!r}")
  if args.results and not args.results.endswith(".md"):
    raise ConfigError(f"--results is a PAGE.md; it is {args.results!r}")
  files.require_workdir(args.workdir)
  files.require_local(args.results or "")
  energy.require_tracker(args.energy or "")
  found = load_study(args.study)
  runner.require_same(found, args.workdir)
  shard = (int(i), int(n))
  is_idle = args.list or not args.jobs
  if is_idle and (args.retry or args.energy or args.shard != "1/1"):
    raise ConfigError(
      "--list and --jobs=0 run nothing; leave out --retry, --energy and --shard"
    )
  options = runner.Options(shard, args.jobs or 1, args.energy, args.retry)
  if args.list:
    for line in board.Board(found.trials(args.workdir)).lines():
      print(line)
    return
  if args.jobs:
    console = rich.console.Console()
    runner.run_study(found, args.workdir, options, console)
  rows = gather.gather(found, args.workdir)
  command = f"folding study {_portable(args.study)}"
  for path in (os.path.join(args.workdir, "results.md"), args.results):
    if path:
      page.publish(rows, path, command)
      print(f"The results are in {path}")
  failed = sum(row.status == "failed" for row in rows)
  if any(row.status == "open" for row in rows):
    print("The same command goes on with the runs that are open")
  if failed:
    raise TrainingError(
      f"{failed} of {len(rows)} runs failed, the page says why; the logs are in "
      f"{os.path.join(args.workdir, 'logs')}; --retry tries them again"
    )


def _portable(where: str) -> str:
  """Returns how a study is named on a page, without places on this machine."""
  file, colon, argument = where.partition(":")
  parts = [
    os.path.basename(part) if os.path.isabs(part) else part
    for part in argument.split(",")
  ]
  near = os.path.relpath(file)
  if near.startswith(os.pardir):
    near = os.path.basename(file)
  return f"{near}{colon}{','.join(parts)}"
