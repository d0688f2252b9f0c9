"""The command line `folding <verb>`; each verb takes a run directory.

A mistake of the user is one line on stderr and exit status 2. A verb imports
what it needs when it is called, so that `folding --help` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from folding import schema


def report(args: argparse.Namespace) -> None:
  """Writes the report of a run, and prints its summary."""
  show_report(args.run)


def show_report(workdir: str) -> None:
  """Writes the report of a run, and prints its summary."""
  from folding.reporting import pages
  from folding.reporting import report as report_lib

  report_lib.write_report(workdir)
  print(pages.summary(report_lib.load_run(workdir)).replace("**", ""))
  print(f"The report is in {os.path.join(workdir, 'report.md')}")


def evaluate(args: argparse.Namespace) -> None:
  """Prints the figures of a run's best checkpoint on a split, as JSON."""
  from folding.training import loop

  print(json.dumps(loop.evaluate_run(args.run, args.split)))


def compare(args: argparse.Namespace) -> None:
  """Writes a comparison of runs, and prints its table."""
  from folding.reporting import compare as compare_lib
  from folding.reporting import grouping

  text = compare_lib.compare(args.runs, args.output)
  # rich draws for a terminal; a pipe or a notebook gets the Markdown.
  if sys.stdout.isatty():
    compare_lib.show(grouping.columns(args.runs))
  else:
    print(text)
  print(f"The comparison is in {os.path.join(args.output, 'compare.md')}")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a verb and returns the exit status.

  Args:
    argv: The arguments after the program's name; None: those of the process.
  """
  args = _parser().parse_args(argv)
  return exit_status(lambda: args.call(args))


def exit_status(call: Callable[[], Any]) -> int:
  """Returns 0 after a call, or what its error stands for, told in one line.

  2 is a mistake of the user; 1 is training that cannot go on.
  """
  try:
    call()
  except (schema.ConfigError, OSError) as error:
    _print_error(str(error))
    return 2
  except schema.TrainingError as error:
    _print_error(str(error))
    return 1
  return 0


class _Parser(argparse.ArgumentParser):
  """Tells a wrong argument in one line, as every other mistake."""

  def error(self, message: str) -> NoReturn:
    _print_error(f"{message} (see {self.prog} --help)")
    self.exit(2)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="folding", description="Works on a trained run.")
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

  verb = verbs.add_parser("report", help="write the report of a run")
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.set_defaults(call=report)

  verb = verbs.add_parser("evaluate", help="test a run's best checkpoint")
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.add_argument(
    "--split", choices=("valid", "test"), default="test", help="of the data"
  )
  verb.set_defaults(call=evaluate)

  verb = verbs.add_parser("compare", help="show runs side by side")
  verb.add_argument(
    "runs", metavar="RUN", nargs="+", help="run directories, reference first"
  )
  verb.add_argument(
    "--output",
    metavar="DIR",
    default="comparison",
    help="where compare.md, .json and .png go (default: %(default)s)",
  )
  verb.set_defaults(call=compare)
  return parser


def _print_error(message: str) -> None:
  print(f"folding: error: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())
