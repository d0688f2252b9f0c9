"""The command line `folding <verb>`; most verbs take a run directory.

A mistake of the user is one line on stderr and exit status 2. A verb imports
what it needs when it is called, so that `folding --help` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from folding import files, schema
from folding.studies import verb as study_verb
from folding.training import plan_verb
from folding.version import __version__


def show_report(workdir: str) -> None:
  """Writes the report of a run, and prints its summary."""
  from folding.reporting import report as report_lib

  report_lib.write_report(workdir)
  print(report_lib.describe(report_lib.load_run(workdir)))
  print(f"The report is in {os.path.join(workdir, 'report.md')}")


def evaluate(args: argparse.Namespace) -> None:
  """Prints the figures of a run's best checkpoint on a split, as JSON."""
  from folding.training import loop

  print(json.dumps(loop.evaluate_run(args.run, args.split)))


def resume(args: argparse.Namespace) -> None:
  """Goes on training a run, as its own config says."""
  from folding.training import loop

  loop.resume_run(args.run)
  show_report(args.run)


def shrink(args: argparse.Namespace) -> None:
  """Writes a run with smaller arrays, and prints how much smaller."""
  from folding.training import shrinking

  done = shrinking.shrink_run(args.run, args.output, args.multiple)
  print(
    f"{done['before']:,} parameters, zeros included, are now "
    f"{done['after']:,} ({done['after'] / done['before']:.1%})"
  )
  print(f"The smaller run is in {args.output}, at step {done['step']}")
  if done["step"] < done["steps"]:
    print(f"Its training goes on with: folding resume {args.output}")


def compare(args: argparse.Namespace) -> None:
  """Writes a comparison of runs, and prints its table."""
  from folding.reporting import compare as compare_lib

  print(compare_lib.compare(args.runs, args.output))
  print(f"The comparison is in {os.path.join(args.output, 'compare.md')}")


def export(args: argparse.Namespace) -> None:
  """Writes a model in a form that others load, and prints its size."""
  from folding.serving import export as export_lib

  schema.require(
    args.dtype in (None, "float32") or args.format != "hf",
    "--format=hf writes float32 alone",
  )
  files.require_empty(args.output)
  model = whole = export_lib.load(args.path)
  if args.format != "hf":
    model = export_lib.shrunk(model)
  if args.dtype:
    model = export_lib.cast(model, args.dtype)
  with files.becoming(args.output) as part:
    if args.format == "hf":
      size = export_lib.export_hf(part, model)
      print(f"{size['files']:,} bytes of files, for transformers, all dense")
    elif args.format == "stablehlo":
      size = export_lib.export_stablehlo(part, model)
      print(
        f"{size['program']:,} bytes of program; {size['parameters']:,} of them "
        "are parameters, stored dense"
      )
    else:
      size = export_lib.export(
        part, model.config, model.params, model.tokenizer, model.labels
      )
      print(
        f"{size['values'] + size['masks']:,} bytes stored ({size['values']:,} of "
        f"values, {size['masks']:,} of masks), "
        f"{export_lib.sizes(whole)['dense']:,} in the dense twin; "
        f"{size['files']:,} bytes of files"
      )
  print(f"The exported model is in {args.output}")


def predict(args: argparse.Namespace) -> None:
  """Prints the class of each line of a text file or of standard input."""
  from folding.serving import export as export_lib
  from folding.serving import predict as predict_lib

  model = export_lib.load(args.path)
  write = predict_lib.LINES[args.format]
  options = {"batch_size": args.batch_size, "at_once": args.file == "-"}
  with predict_lib.open_lines(args.file) as lines:
    found = predict_lib.predict(model, lines, **options)
    for line in write(found, model.labels):
      print(line, flush=True)


def generate(args: argparse.Namespace) -> None:
  """Prints prompts and what follows them: one as it comes, several in order."""
  from folding.serving import export as export_lib
  from folding.serving import predict as predict_lib
  from folding.serving import text
  from folding.serving.sampling import Sampling

  prompts = args.prompt or []
  if args.file is not None:
    with predict_lib.open_lines(args.file) as lines:
      prompts += lines
  elif not prompts:
    prompts = [""]
  try:
    "".join(prompts).encode()
  except UnicodeEncodeError as error:
    raise schema.ConfigError(f"a prompt is not UTF-8: {error.reason}") from None
  sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  pieces = text.continue_texts(
    export_lib.load(args.path),
    prompts,
    max_new_tokens=args.max_new_tokens,
    sampling=sampling,
    cache=args.cache,
  )
  for piece in pieces:
    print(piece, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a verb and returns the exit status.

  Args:
    argv: The arguments after the program's name; None: those of the process.
  """
  args = _parser().parse_args(argv)
  return exit_status(lambda: args.call(args))


def exit_status(call: Callable[[], Any]) -> int:
  """Returns 0 after a call, or what its error stands for, told in one line.

  2 is a mistake of the user, 1 training that cannot go on, 130 Ctrl-C.
  """
  try:
    call()
    sys.stdout.flush()
  except UnicodeEncodeError as error:
    _print_error(f"cannot print: {error} (PYTHONIOENCODING=utf-8 may help)")
    return 2
  except BrokenPipeError:  # as by `| head`; nobody is left to tell
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (schema.ConfigError, OSError) as error:
    _print_error(str(error))
    return 2
  except schema.TrainingError as error:
    _print_error(str(error))
    return 1
  except KeyboardInterrupt:
    return 130  # as a shell says it
  return 0


class _Parser(argparse.ArgumentParser):
  """Tells a wrong argument in one line, as every other mistake."""

  def error(self, message: str) -> NoReturn:
    _print_error(f"{message} (see {self.prog} --help)")
    self.exit(2)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="folding", description="Works on runs, models and studies."
  )
  parser.add_argument(
    "--version", action="version", version=f"folding {__version__}"
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

  verb = verbs.add_parser("report", help="write the report of a run")
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.set_defaults(call=lambda args: show_report(args.run))

  verb = verbs.add_parser("evaluate", help="test a run's best checkpoint")
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.add_argument(
    "--split", choices=("valid", "test"), default="test", help="of the data"
  )
  verb.set_defaults(call=evaluate)

  verb = verbs.add_parser("resume", help="go on training a run")
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.set_defaults(call=resume)

  verb = verbs.add_parser(
    "shrink", help="write a run without the neurons, heads, tokens that are 0"
  )
  verb.add_argument("run", metavar="RUN", help="a run directory")
  verb.add_argument(
    "--output", metavar="DIR", required=True, help="a new run directory"
  )
  verb.add_argument(
    "--multiple",
    metavar="N",
    type=int,
    default=1,
    help="round widths up to a multiple of N (default: %(default)s)",
  )
  verb.set_defaults(call=shrink)

  verb = verbs.add_parser("export", help="write a model for use elsewhere")
  verb.add_argument(
    "path", metavar="PATH", help="a run, an export or a Hugging Face checkpoint"
  )
  verb.add_argument(
    "--output", metavar="DIR", required=True, help="a new folder"
  )
  verb.add_argument(
    "--format",
    choices=("safetensors", "hf", "stablehlo"),
    default="safetensors",
    help="compact for folding.load, dense for transformers, or a program that "
    "needs only jax (default: %(default)s)",
  )
  verb.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="of the stored arrays (default: as they are)",
  )
  verb.set_defaults(call=export)

  verb = verbs.add_parser("predict", help="classify the lines of a text")
  verb.add_argument(
    "path", metavar="PATH", help="a run, an export or a Hugging Face checkpoint"
  )
  verb.add_argument(
    "file", metavar="FILE", help="one text a line; -: standard input"
  )
  verb.add_argument(
    "--format",
    choices=("tsv", "jsonl"),
    default="tsv",
    help="of what is printed (default: %(default)s)",
  )
  verb.add_argument(
    "--batch-size",
    metavar="N",
    type=int,
    default=64,
    help="texts at a time; standard input is answered after so many lines "
    "(default: %(default)s)",
  )
  verb.set_defaults(call=predict)

  verb = verbs.add_parser("generate", help="continue texts by a language model")
  verb.add_argument(
    "path", metavar="PATH", help="a run, an export or a Hugging Face checkpoint"
  )
  verb.add_argument(
    "--prompt",
    metavar="TEXT",
    action="append",
    help="may be given several times (default: begin a new document)",
  )
  verb.add_argument("--file", help="one prompt a line; -: standard input")
  for name, kind, default, what in (
    ("max-new-tokens", int, 100, "tokens of each prompt, at most"),
    ("temperature", float, 0.8, "0: always the likeliest token"),
    ("top-k", int, None, "draw among the N likeliest tokens"),
    ("top-p", float, None, "draw among the likeliest that sum to N"),
    ("seed", int, 0, "of the draws"),
  ):
    if default is not None:
      what += " (default: %(default)s)"
    verb.add_argument(
      f"--{name}", metavar="N", type=kind, default=default, help=what
    )
  verb.add_argument(
    "--cache",
    choices=("keys", "linear"),
    default="keys",
    help="keep all keys, or, with fold.groups=1, a state that does not grow",
  )
  verb.set_defaults(call=generate)

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

  plan_verb.add_to(verbs)
  study_verb.add_to(verbs)
  return parser


def _print_error(message: str) -> None:
  print(f"folding: error: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())
