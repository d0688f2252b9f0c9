"""The command line: `folding VERB`; most verbs take a run directory.

A mistake of the user is one line on stderr and exit status 2. Verbs import their
modules when they are called, so that `folding --help` is quick.
"""

import argparse
import contextlib
import functools
import inspect
import json
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from folding import config as config_lib
from folding import files, memory, typed
from folding.errors import ConfigError, TrainingError, one_line, printable
from folding.serving import formats
from folding.version import __version__

_Argument = tuple[str, dict[str, Any]]

_INTERRUPTED = 130  # exit status: 128 + SIGINT, as in a shell


class _Verb(NamedTuple):
  call: Callable[[argparse.Namespace], None]
  help: str
  arguments: Sequence[_Argument]
  earlier: Sequence[str]  # names, for one release


_VERBS: dict[str, _Verb] = {}


def _verb(
  help: str, *arguments: _Argument, earlier: Sequence[str] = ()
) -> Callable[..., Any]:
  """Registers a function as a verb. It is called with the parsed arguments."""

  def add(function):
    _VERBS[function.__name__] = _Verb(function, help, arguments, earlier)
    return function

  return add


def _argument(name: str, help: str, **options: Any) -> _Argument:
  """Returns an argument. Its help ends with the default, if it has one."""
  if options.get("default") is not None:
    help += " (default: %(default)s)"
  return name, {"help": help, **options}


class _Config(argparse.Action):
  """Keeps where the config is; a help that is asked for after it shows it."""

  def __call__(
    self, parser: Any, namespace: Any, values: Any, option: Any = None
  ) -> None:
    setattr(namespace, self.dest, values)
    parser.shown = values


_RUN = _argument("run", "a run directory", metavar="RUN")
_MODEL = _argument(
  "path",
  "a run, an export, a Hugging Face checkpoint or its name on the hub",
  metavar="PATH",
)
_CONFIG = _argument(
  "--config",
  "a file with get_config(), or the config.json of a run; "
  f"files of the library: {', '.join(files.shipped('configs'))}; "
  "--config.FIELD=VALUE sets a field",
  metavar="FILE[:ARGUMENT]",
  required=True,
  action=_Config,
)
_PAIRS = _argument(
  "--pairs",
  "the Hugging Face checkpoint reads pairs (runs and exports know)",
  action="store_true",
)
_NEW_FOLDER = _argument(
  "--output", "a new folder", metavar="DIR", required=True
)
_DTYPES = tuple(
  dict.fromkeys(x for row in formats.FORMATS.values() for x in row.dtypes)
)


@_verb(
  "train a run, or resume it",
  _CONFIG,
  _argument(
    "--workdir",
    "run directory; the same command resumes the run in it",
    metavar="DIR",
    required=True,
  ),
)
def train(args: argparse.Namespace) -> None:
  """Trains a run, or resumes it, and writes its report."""
  memory.keep_freed()
  config = config_lib.read(args.config, args.edits)
  from folding.training import distributed, loop

  loop.run(config, args.workdir)
  if distributed.is_main():
    edits = []
    if args.edits:
      edits = typed.differences(config_lib.read(args.config), config)
    _keep_command(args, args.workdir, edits)
    show_report(args.workdir)


@_verb(
  "show the memory and time of a training step on devices",
  _CONFIG,
  _argument(
    "--devices",
    "cpu-8 (simulated, an estimate), TPUs: v5p:4x4x2, v5e:2x2, v5p-64, or GPUs: "
    "h100:8, h100:4x8 (four hosts)",
    metavar="DEVICES",
    required=True,
  ),
  _argument("--json", "print JSON", action="store_true"),
  earlier=["plan"],
)
def estimate(args: argparse.Namespace) -> None:
  """Prints the memory and time of a training step, and whether it fits."""
  config = config_lib.resolve(config_lib.read(args.config, args.edits))
  from folding.models.shape import shape_of
  from folding.training import estimate as estimate_lib

  devices = estimate_lib.find_devices(args.devices)
  found = estimate_lib.estimate(shape_of(config), config, devices)
  print(json.dumps(found) if args.json else estimate_lib.table(found))


def _keep_command(
  args: argparse.Namespace, workdir: str, edits: Sequence[str] = ()
) -> None:
  """Writes the command that trained a run into it, for the report."""
  from folding.reporting import report as report_lib
  from folding.training import run_dir

  dense = report_lib.dense_test(workdir)
  run_dir.write_command(workdir, args.command, edits, dense)


def show_report(workdir: str) -> None:
  """Writes the report of a run, and prints its summary."""
  from folding.reporting import report as report_lib

  report_lib.write_report(workdir)
  print(report_lib.describe(report_lib.load_run(workdir)))
  print(f"The report is in {os.path.join(workdir, 'report.html')}")


@_verb(
  "make a trained model smaller",
  _MODEL,
  _argument(
    "--texts",
    "a file or folder of texts like those that the model will read; labels are "
    "ignored (with --steps, a classifier learns from them)",
    metavar="FILE",
    required=True,
  ),
  _argument(
    "--saving",
    "fraction of the parameters to save; several, such as 0.3,0.5, write a folder "
    "each",
    metavar="X",
    default="0.5",
  ),
  _argument(
    "--structured",
    "of a language model, remove neurons, heads and ranks, so that its arrays get "
    "smaller (default: zero single weights)",
    action="store_true",
    default=None,
  ),
  _argument(
    "--uniform",
    "one number of neurons and heads for all layers and nothing folded, so that "
    "--format=hf writes a small folder (a plan per layer loses less)",
    action="store_true",
  ),
  _argument(
    "--vocabulary",
    "of a language model with smaller arrays, keep the N tokens that the texts use "
    "most (default: all)",
    metavar="N",
    type=int,
  ),
  _argument(
    "--steps",
    "steps of training that recover quality, with the dense model as teacher; several "
    "savings share 1.5 N, each cut from the one before; the same command resumes",
    metavar="N",
    type=int,
    default=0,
  ),
  _PAIRS,
  _NEW_FOLDER,
)
def compress(args: argparse.Namespace) -> None:
  """Writes smaller models, and prints their size and what was lost."""
  try:
    savings = typed.parse(tuple[float, ...], args.saving, "--saving")
  except ConfigError:
    raise ConfigError(
      "--saving is one fraction or several, such as --saving=0.5 or "
      f"--saving=0.3,0.5; it is {args.saving!r}"
    ) from None
  memory.keep_freed()
  from folding.serving import compress_file

  folder = args.output
  if args.steps:
    if args.pairs:
      raise ConfigError(
        "leave --pairs out beside --steps: training finds them by the columns of "
        "--texts"
      )
    for folder in compress_file.train_sizes(
      args.path,
      args.texts,
      savings,
      args.output,
      steps=args.steps,
      structured=args.structured,
      uniform=args.uniform,
      vocabulary=args.vocabulary,
    ):
      _keep_command(args, folder)
      show_report(folder)
  else:
    *_, folder = compress_file.compress_file(
      args.path,
      args.texts,
      savings,
      args.output,
      structured=args.structured,
      uniform=args.uniform,
      vocabulary=args.vocabulary,
      pairs=args.pairs,
    )
  kind = "hf" if args.uniform else "onnx"
  print(f"Next: folding export {folder} --output=NEW --format={kind}")


@_verb("write the report of a run", _RUN)
def report(args: argparse.Namespace) -> None:
  """Writes the report of a run, and prints its summary."""
  show_report(args.run)


@_verb(
  "evaluate the best checkpoint of a run",
  _RUN,
  _argument(
    "--split", "split of the data", choices=("valid", "test"), default="test"
  ),
)
def evaluate(args: argparse.Namespace) -> None:
  """Prints the metrics of a run's best checkpoint on a split, as JSON."""
  from folding.training import loop

  print(json.dumps(loop.evaluate_run(args.run, args.split)))


@_verb("resume the training of a run", _RUN)
def resume(args: argparse.Namespace) -> None:
  """Continues the training of a run with its own config."""
  memory.keep_freed()
  from folding.training import loop

  loop.resume_run(args.run)
  show_report(args.run)


@_verb(
  "write a run without its neurons, heads and tokens that are zero",
  _RUN,
  _NEW_FOLDER,
  _argument(
    "--multiple",
    "round widths up to a multiple of N",
    metavar="N",
    type=int,
    default=1,
  ),
)
def shrink(args: argparse.Namespace) -> None:
  """Writes a run with smaller arrays, and prints how much smaller."""
  from folding.training import shrink_run

  done = shrink_run.shrink_run(args.run, args.output, args.multiple)
  print(
    f"{done['before']:,} parameters, zeros included, are now "
    f"{done['after']:,} ({done['after'] / done['before']:.1%})"
  )
  print(f"The smaller run is in {args.output}, at step {done['step']}")
  if done["step"] < done["steps"]:
    print(f"Its training goes on with: folding resume {args.output}")


@_verb(
  "show runs side by side",
  _argument(
    "runs", "run directories, reference first", metavar="RUN", nargs="+"
  ),
  _argument(
    "--output",
    "where compare.html, compare.md and compare.png go",
    metavar="DIR",
    default="comparison",
  ),
)
def compare(args: argparse.Namespace) -> None:
  """Writes a comparison of runs, and prints its table."""
  from folding.reporting import compare as compare_lib

  print(compare_lib.compare(args.runs, args.output))
  print(f"The comparison is in {os.path.join(args.output, 'compare.html')}")


@_verb(
  "train a grid of runs and compare them",
  _argument(
    "study",
    "a file with get_study(), such as configs/studies/short.py",
    metavar="FILE[:ARGUMENT]",
  ),
  _argument(
    "--workdir",
    "study directory; the same command resumes what is in it",
    metavar="DIR",
    required=True,
  ),
  _argument(
    "--engine",
    "processes on this machine, or tasks of a Ray cluster",
    choices=("pool", "ray"),
    default="pool",
  ),
  _argument(
    "--jobs", "pool: runs at a time (default: 1)", metavar="N", type=int
  ),
  _argument(
    "--cpus", "ray: cores per run (default: 1)", metavar="N", type=float
  ),
  _argument(
    "--gpus",
    "ray: GPUs per run (default: 1 if the cluster has any)",
    metavar="N",
    type=float,
  ),
)
def study(args: argparse.Namespace) -> None:
  """Trains the unfinished runs of a study, and writes its results."""
  files.require_workdir(args.workdir)
  # Runs that differ only in the seed share their compiled programs.
  compiled = os.path.abspath(os.path.join(args.workdir, "compiled"))
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
  import jax

  from folding.studies import grid, tables

  # This process plans; accelerators are for the runs.
  jax.config.update("jax_platforms", "cpu")
  found = grid.load_study(args.study)
  if args.engine == "ray":
    if args.jobs is not None:
      raise ConfigError("--jobs needs --engine=pool; Ray runs what has room")
    engine = grid.Ray(1.0 if args.cpus is None else args.cpus, args.gpus)
  elif args.cpus is not None or args.gpus is not None:
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


@_verb(
  "write a model for use elsewhere",
  _MODEL,
  _argument(
    "--output",
    "a new folder; gguf: a new file, NAME.gguf",
    metavar="PATH",
    required=True,
  ),
  _argument(
    "--format",
    "; ".join(f"{name}: {row.words}" for name, row in formats.FORMATS.items()),
    choices=tuple(formats.FORMATS),
    default="safetensors",
  ),
  _argument(
    "--dtype",
    "dtype of the stored arrays (default: as they are; onnx, gguf: float32); "
    "float16 is for onnx and gguf, int8 for onnx, int7 for onnx on x86 processors "
    "without VNNI, other quantised types for gguf",
    choices=_DTYPES,
  ),
  _argument(
    "--max-drop",
    "onnx: write nothing if the program loses more points than this on --data, "
    "compared with float32",
    metavar="X",
    type=float,
  ),
  _argument(
    "--data",
    "a held-out file with labels; for an encoder a .txt with one text per line, or "
    "a table with the columns score, sentence1 and sentence2",
    metavar="FILE",
  ),
  _PAIRS,
)
def export(args: argparse.Namespace) -> None:
  """Writes a model in a form that others load, and prints its size."""
  formats.require_writable(args.output, args.format, args.dtype)
  from folding.serving.loaded import load

  size = formats.save(
    load(args.path, pairs=args.pairs),
    args.output,
    args.format,
    args.dtype,
    max_drop=args.max_drop,
    data=args.data,
    report=print,
  )
  print(formats.FORMATS[args.format].size.format(**size))
  print(f"The exported model is in {args.output}")


@_verb(
  "classify or score the lines of a text",
  _MODEL,
  _argument(
    "file",
    "one text per line, or a pair with a tab between; -: standard input",
    metavar="FILE",
  ),
  _argument(
    "--format", "format of the output", choices=("tsv", "jsonl"), default="tsv"
  ),
  _argument(
    "--batch-size",
    "texts per batch; standard input is answered batch by batch",
    metavar="N",
    type=int,
    default=64,
  ),
  _PAIRS,
)
def predict(args: argparse.Namespace) -> None:
  """Prints the class or score of each line of a file or of standard input."""
  from folding.serving import lines as lines_lib
  from folding.serving import predict as predict_lib
  from folding.serving.loaded import load

  model = load(args.path, pairs=args.pairs)
  with lines_lib.open_lines(args.file) as lines:
    texts = lines_lib.pairs(lines, model.pair) if model.pair else lines
    found = predict_lib.predict(
      model, texts, batch_size=args.batch_size, at_once=args.file == "-"
    )
    for line in lines_lib.of_predictions(model, found, args.format):
      print(line, flush=True)


@_verb(
  "make vectors of the lines of a text",
  _MODEL,
  _argument("file", "one text per line; -: standard input", metavar="FILE"),
  _argument(
    "--output",
    "a .npy file: float32, a row per text",
    metavar="FILE.npy",
    required=True,
  ),
  _argument(
    "--batch-size", "texts per batch", metavar="N", type=int, default=64
  ),
)
def encode(args: argparse.Namespace) -> None:
  """Writes the vectors of the lines of a file or of standard input."""
  files.require_new_file(args.output, ".npy")
  import io

  import numpy as np
  import rich.console
  import rich.progress

  from folding.serving import lines as lines_lib
  from folding.serving.loaded import load

  model = load(args.path)
  model.require_encoder()
  with lines_lib.open_lines(args.file) as lines:
    texts = list(lines)
  if not any(text.strip() for text in texts):
    place = "standard input" if args.file == "-" else args.file
    raise ConfigError(f"there is no text in {place}")
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  ) as progress:
    bar = progress.add_task("encoding", total=len(texts))
    vectors = model.encode(
      texts,
      batch_size=args.batch_size,
      report=lambda count: progress.advance(bar, count),
    )
  content = io.BytesIO()
  np.save(content, vectors)
  files.write_file(args.output, content.getvalue())
  count, width = vectors.shape
  print(f"{count:,} vectors of {width} numbers are in {args.output}")


@_verb(
  "continue texts with a language model",
  _MODEL,
  _argument(
    "--prompt",
    "text to continue; may be repeated (default: begin a new document)",
    metavar="TEXT",
    action="append",
  ),
  _argument("--file", "one prompt per line; -: standard input"),
  _argument(
    "--max-new-tokens",
    "tokens per prompt, at most",
    metavar="N",
    type=int,
    default=100,
  ),
  _argument(
    "--temperature",
    "0: always the likeliest token; higher: more random",
    metavar="X",
    type=float,
    default=0.8,
  ),
  _argument(
    "--top-k", "draw from the N likeliest tokens", metavar="N", type=int
  ),
  _argument(
    "--top-p",
    "draw from the likeliest tokens that sum to X",
    metavar="X",
    type=float,
  ),
  _argument("--seed", "seed of sampling", metavar="N", type=int, default=0),
  _argument(
    "--cache",
    "a KV cache, or, with fold.groups=1, a state that does not grow",
    choices=("keys", "linear"),
    default="keys",
  ),
)
def generate(args: argparse.Namespace) -> None:
  """Prints prompts and their continuations; a single one is streamed."""
  from folding.serving import generate as generate_lib
  from folding.serving import lines as lines_lib
  from folding.serving.loaded import load
  from folding.serving.sampling import Sampling

  prompts = args.prompt or []
  if args.file is not None:
    with lines_lib.open_lines(args.file) as lines:
      prompts += lines
  elif not prompts:
    prompts = [""]
  sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
  pieces = generate_lib.continue_texts(
    load(args.path),
    prompts,
    max_new_tokens=args.max_new_tokens,
    sampling=sampling,
    cache=args.cache,
  )
  for piece in pieces:
    print(piece, end="", flush=True)


def leave_first_folder() -> None:
  """Takes the folder that Python put first on `sys.path` out of it.

  It is the current folder, or that of a script, and may hold any module. If
  `folding` itself is imported from there, the folder becomes the last one.
  """
  if sys.flags.safe_path:  # Python has put none there
    return
  folder = os.path.realpath(sys.path.pop(0))
  if folder == os.path.realpath(os.path.join(os.path.dirname(__file__), "..")):
    sys.path.append(folder)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a verb and returns the exit status.

  Args:
    argv: The arguments after the program's name; None: those of the process.
  """
  # The default also names the logger, with a colon before the file of a warning.
  handler = logging.StreamHandler()
  handler.addFilter(_OnceEach())
  logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[handler])
  return exit_status(lambda: _call(sys.argv[1:] if argv is None else argv))


class _OnceEach(logging.Filter):
  """Drops lines that were shown: some verbs read a run twice."""

  def __init__(self):
    super().__init__()
    self._shown: set[str] = set()

  def filter(self, record: logging.LogRecord) -> bool:
    line = record.getMessage()
    is_new = line not in self._shown
    self._shown.add(line)
    return is_new


def _call(argv: Sequence[str]) -> None:
  try:
    "".join(argv).encode()
  except UnicodeEncodeError as error:
    raise ConfigError(f"an argument is not UTF-8: {error.reason}") from None
  rest, edits = split_edits(argv)
  args = make_parser().parse_args(rest)
  if edits and not hasattr(args, "config"):
    raise ConfigError(f"{args.verb} takes no --config.{next(iter(edits))}")
  args.edits, args.command = edits, shlex.join(["folding", *argv])
  args.call(args)


def split_edits(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.FIELD=VALUE` and `--config.FIELD VALUE` out of arguments.

  Returns:
    The other arguments, and {field: text}; the last of a repeated field counts.

  Raises:
    ConfigError: a field has no value, or lacks the prefix "--config.".
  """
  rest: list[str] = []
  edits: dict[str, str] = {}
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith("--config."):
      name = argument.removeprefix("--").partition("=")[0]
      # A word alone is perhaps the value of a flag.
      is_set = argument.startswith("--") or "=" in argument
      if is_set and "." in name and name in typed.fields(config_lib.Config):
        raise ConfigError(f"write --config.{name}=VALUE to set this field")
      rest.append(argument)
      continue
    name, equals, text = argument.removeprefix("--config.").partition("=")
    if not equals:
      text = next(arguments, "--")
      if text.startswith("--"):
        raise ConfigError(f"--config.{name} needs a value")
    edits[name] = text
  return rest, edits


def run(argv: Sequence[str] | None = None) -> NoReturn:
  """Runs a verb as `main` does, and ends the process with its exit status."""
  leave(main(argv))


def leave(status: int) -> NoReturn:
  """Ends the process with an exit status.

  After Ctrl-C it skips Python's clean-up. JAX may still compile in a thread of its
  own. Clean-up waits for that, up to minutes, but frees the devices that the thread
  uses, so the process would end in a segmentation fault.
  """
  if status == _INTERRUPTED:
    with contextlib.suppress(OSError, ValueError):  # it may be closed
      sys.stdout.flush()
    os._exit(status)
  sys.exit(status)


def exit_status(call: Callable[[], Any]) -> int:
  """Makes a call and returns the exit status; prints an error in one line.

  0: success. 1: training cannot continue. 2: a mistake of the user. 130: Ctrl-C.
  """
  if sys.stdout is None:  # the result would go nowhere
    _print_error("standard output is closed; /dev/null may take it")
    return 2
  try:
    call()
    sys.stdout.flush()
  except UnicodeEncodeError as error:
    _print_error(f"cannot print: {error} (PYTHONIOENCODING=utf-8 may help)")
    return 2
  except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ConfigError, OSError) as error:
    _print_error(str(error))
    return 2
  except TrainingError as error:
    _print_error(str(error))
    return 1
  except KeyboardInterrupt:
    return _INTERRUPTED
  except Exception:  # JAX raises many types if it has no backend
    reason = _no_backend()
    if reason is None:
      raise
    _print_error(reason)
    return 2
  return 0


def _no_backend() -> str | None:
  """Returns why JAX cannot start; None if it can."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    # Without an NVIDIA GPU, JAX raises an AssertionError without a message.
    message = one_line(error) or "it found no such device"
    return (
      f"JAX cannot start with JAX_PLATFORMS={platforms}: {message}; unset "
      "JAX_PLATFORMS, or install 'folding-jax[cuda]' or 'folding-jax[tpu]' on a "
      "machine with such a device"
    )
  return None


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of all verbs."""
  parser = _Parser(
    prog="folding",
    description="Trains, compresses and serves transformers.",
    epilog="Example: folding train --config=configs/quickstart.py "
    "--workdir=runs/quickstart. `folding VERB --help` has the options of a verb.",
  )
  parser.add_argument(
    "--version", action="version", version=f"folding {__version__}"
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  for name, verb in _VERBS.items():
    parser_of_verb = verbs.add_parser(
      name, help=verb.help, aliases=verb.earlier, allow_abbrev=False
    )
    for flag, options in verb.arguments:
      parser_of_verb.add_argument(flag, **options)
    parser_of_verb.set_defaults(call=verb.call)
  return parser


class _Parser(argparse.ArgumentParser):
  """Reports a wrong argument in one line, and lists fields in the help.

  Attributes:
    shown: Config whose values the fields have, see `config.read`; None: defaults.
  """

  shown: str | None = None

  def error(self, message: str) -> NoReturn:
    _print_error(f"{message} (see {self.prog} --help)")
    self.exit(2)

  def format_help(self) -> str:
    found = super().format_help()
    if "--config" in self._option_string_actions:
      found += "\nfields, set by --config.FIELD=VALUE:\n"
      found += describe_fields(
        config_lib.read(self.shown) if self.shown else config_lib.Config()
      )
    return found


def describe_fields(config: config_lib.Config) -> str:
  """Returns each field of a config with its value, values and comment."""
  lines = []
  for name, hint in typed.fields(config_lib.Config).items():
    section, _, last = name.rpartition(".")
    holder = getattr(config, section) if section else config
    lines.append(f"  {name}={getattr(holder, last)}  ({typed.describe(hint)})")
    about = textwrap.wrap(_comments(type(holder)).get(last, ""), 74)
    lines += [f"      {line}" for line in about]
  return "\n".join(lines) + "\n"


@functools.cache  # getsource parses the whole file of a class
def _comments(section: type) -> dict[str, str]:
  found = {}
  for kind in reversed(section.__mro__[:-1]):  # all but object
    found |= typed.comments(inspect.getsource(kind).splitlines())
  return found


def _print_error(message: str) -> None:
  line = printable(" ".join(message.split()))
  print(f"folding: error: {line}", file=sys.stderr)
