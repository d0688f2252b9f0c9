"""The report of one run: `report.json`, `report.md`, `report.html`, plots."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from folding import config as config_lib
from folding import errors, files, typed
from folding.errors import ConfigError
from folding.models.shape import Shape
from folding.reporting import page
from folding.tasks import METRICS, task_of
from folding.training import energy, run_dir

KINDS = ("qkv", "linear", "embedding", "other", "overall")
SCHEMA = 1

_RESULT = (
  "finished", "steps", "total_steps", "seconds", "tokens_per_second",
  "device", "versions", "commit",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory as it was read.

  Sizes are `{kind: {"dense", "stored", "compression"}}`: of the dense
  baseline, of the stored (nonzero) values, and 1 - stored / dense, which is None
  for a kind without parameters. Sizes in bytes also have "masks", which locate the
  stored values, and "compression_with_masks".

  Attributes:
    name: Name of the directory.
    workdir: Path of the directory.
    config: The config as it was given, with its presets resolved.
    shape: Shape of the model that training began with.
    result: Steps, seconds and provenance of `result.json`.
    parameters: Number of parameters by kind, see `KINDS`.
    bytes: Number of bytes by kind.
    allocated: Number of parameters in arrays, zeros included.
    layers: "path", "shape" and "stored" of the arrays, see `accounting.account`.
    train: Training records of `metrics.jsonl` by rising step.
    valid: Validation records by rising step.
    test: Test metrics; None before the end. An accuracy has a 95% interval,
      "accuracy_low" and "accuracy_high".
    energy: `energy.json`, an estimate; None without it.
    digest: SHA-256 of all text and labels; None if unknown.
    command: `command.json`, see `run_dir.write_command`; {} without it.
  """

  name: str
  workdir: str
  config: config_lib.Config
  shape: Shape
  result: dict[str, Any]
  parameters: dict[str, dict[str, Any]]
  bytes: dict[str, dict[str, Any]]
  allocated: int
  layers: list[dict[str, Any]]
  train: list[dict[str, Any]]
  valid: list[dict[str, Any]]
  test: dict[str, Any] | None
  energy: dict[str, Any] | None
  digest: str | None
  command: dict[str, Any]

  @property
  def loss_unit(self) -> str:
    """Unit of the loss."""
    return task_of(self.config).loss_unit


def load_run(workdir: str) -> Run:
  """Reads a run directory.

  Raises:
    ConfigError: the folder is not a run, or one of its files is damaged.
  """
  config, folder = run_dir.load_order(workdir), pathlib.Path(workdir)
  shape, *_ = run_dir.began(workdir, config)
  for name in ("metrics.jsonl", "result.json"):
    if not (folder / name).is_file():
      raise ConfigError(
        f"{workdir} has no {name} yet; the first evaluation writes it"
      )
  records = run_dir.read_metrics(str(folder / "metrics.jsonl"))
  values = run_dir.read_result(workdir)
  used, command = energy.read(workdir), _command(workdir)
  digest = folder / "text.sha256"
  try:
    run = Run(
      name=os.path.basename(os.path.abspath(workdir)),
      workdir=workdir,
      config=config,
      shape=shape,
      result={name: values[name] for name in _RESULT},
      parameters={kind: _size(values["parameters"][kind]) for kind in KINDS},
      bytes={kind: _size(values["bytes"][kind]) for kind in KINDS},
      allocated=sum(math.prod(layer["shape"]) for layer in values["layers"]),
      layers=[
        {"path": x["path"], "shape": x["shape"], "stored": int(x["stored"])}
        for x in values["layers"]
      ],
      train=[r for r in records if r["split"] == "train"],
      valid=[r for r in records if r["split"] == "valid"],
      test=_test(values),
      energy=used,
      digest=digest.read_text("utf-8", "replace").strip()
      if digest.is_file()
      else None,
      command=command,
    )
    for show in (describe, plan, _size_table, _origin):
      show(run)  # a value of another type fails here
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{folder / 'result.json'} is damaged: {errors.reason(error)}"
    ) from error
  return run


def _command(workdir: str) -> dict[str, Any]:
  """Returns `command.json`, if its metrics can be shown; see `Run`."""
  found = run_dir.read_command(workdir)
  try:
    _test_metric(found.get("dense_test"))
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise ConfigError(
      f"the dense_test of {os.path.join(workdir, 'command.json')} is damaged: "
      f"{errors.reason(error)}"
    ) from error
  return found


def write_report(workdir: str) -> dict[str, Any]:
  """Writes `report.json`, `report.md`, `report.html` and plots into a run.

  Args:
    workdir: The run directory; the run may be unfinished.

  Returns:
    The content of `report.json`.

  Raises:
    ConfigError: the folder is not a run, or one of its files is damaged.
  """
  run = load_run(workdir)
  metrics = summarize(run)
  plots = _draw(run)
  files.write_json(os.path.join(workdir, "report.json"), metrics)
  # The page comes last: all plots that it embeds exist.
  page.write(workdir, "report", _page(run, metrics, plots), plots)
  return metrics


def summarize(run: Run) -> dict[str, Any]:
  """Returns the metrics of a run, the content of `report.json`."""
  config, path = run.config, run.config.data.path
  default = config_lib.resolve(config_lib.Config())
  return {
    "schema": SCHEMA,
    "run": run.name,
    "task": config.task,
    "data": pathlib.Path(path).name if path else config.data.name,
    "preset": config.preset,
    "dense": config.dense,
    "seed": config.seed,
    **run.result,
    "parameters": run.parameters,
    "allocated_parameters": run.allocated,
    "bytes": run.bytes,
    "sparsity": next(
      (r["sparsity"] for r in run.train[::-1] if "sparsity" in r), None
    ),
    "test": run.test,
    "dense_test": run.command.get("dense_test"),
    "energy": run.energy,
    "settings": typed.differences(default, config),
  }


def dense_test(workdir: str) -> dict[str, Any] | None:
  """Returns the test metrics of the dense run that a run made smaller.

  It reads the run that the config names, so the config has to be trusted. None if
  the run did not start from a finished dense run on the same data.
  """
  run = load_run(workdir)
  # A run that started from a smaller one has the dense run as its teacher.
  starts = run.config.pretrained, run.config.distill.teacher
  for path in filter(None, starts):
    with contextlib.suppress(ConfigError, OSError):
      dense = load_run(path)
      if dense.config.dense and run.digest and dense.digest == run.digest:
        return dense.test
  return None


class Kept(NamedTuple):
  """A dimension of a layer, such as its neurons, before and after.

  Attributes:
    dense: Size in the dense baseline.
    size: Size in the run; units that are zero do not count.
    text: The size in words.
  """

  dense: int
  size: int
  text: str


def plan(run: Run) -> dict[str, list[Kept]]:
  """Returns the dimensions of all layers by name; {} if all are dense."""
  shape, fpp = run.shape, run.config.fpp
  arrays = {array["path"]: array for array in run.layers}

  def nonzero(layer: int, path: str, size: int, is_pruned: bool) -> int:
    array = arrays.get(f"blocks_{layer}/{path}/kernel")
    if array is None or not is_pruned:
      return size
    # Its first axis may be shorter than at the start (`train.compact`).
    return round(array["stored"] / max(1, math.prod(array["shape"][1:])))

  by_input = run.config.fold.axis == "input"
  rows = "inputs of W_Q, W_K" if by_input else "rows of W_Q, W_K"
  has_heads = fpp.attention == "heads"
  has_neurons = fpp.granularity == "neuron"
  found: dict[str, list[Kept]] = {}
  for n, (a, b) in enumerate(
    zip(shape.dense().layers, shape.layers, strict=True)
  ):
    is_dense = b.values == "dense"
    heads = nonzero(n, "attn/o", len(b.heads), has_heads)
    neurons = nonzero(n, "mlp/down", b.mlp_width, has_neurons)
    reads = shape.width if by_input else a.head_dim
    groups, rank = b.groups or reads, b.value_dim if is_dense else 0
    for name, was, now, text in (
      ("heads", len(a.heads), heads, f"{heads}"),
      (rows, reads, groups, f"{groups}"),
      ("rank of W_V", a.value_dim, rank, f"{rank}" if is_dense else "diagonal"),
      ("neurons", a.mlp_width, neurons, f"{neurons:,}"),
    ):
      found.setdefault(name, []).append(Kept(was, now, text))
  is_smaller = any(x.size < x.dense for kept in found.values() for x in kept)
  return found if is_smaller else {}


def describe(run: Run) -> str:
  """Returns a run and its metrics as one paragraph."""
  shape, result = run.shape, run.result
  kind, dense = task_of(run.config).words, run.command.get("dense_test")
  steps, overall = f"{result['steps']:,}", run.parameters["overall"]
  size = f"It has {overall['dense']:,} parameters."
  if not run.config.dense:
    zeros = f" that are not zero, in arrays of {run.allocated:,}"
    size = (
      f"It stores {overall['stored']:,} parameters"
      f"{zeros if overall['stored'] < run.allocated else ''}; its dense baseline "
      f"has {overall['dense']:,} (compression {percent(overall['compression'])})."
    )
  if not result["finished"]:
    steps += f" of {result['total_steps']:,}"
  return (
    f"A {kind} with {_counted(shape.num_layers, 'layer')}, width {shape.width} "
    f"and {_counted(shape.num_heads, 'head')}, trained for {steps} steps in "
    f"{duration(result['seconds'])} on {errors.printable(str(result['device']))}. "
    f"{size} Test: {_test_metric(run.test)}."
    + (f" The dense run has {_test_metric(dense)}." if dense else "")
  )


def _counted(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(fraction: int | float | None) -> str:
  """Returns a fraction in percent, with one digit; "–" for None."""
  return "–" if fraction is None else f"{fraction:.1%}"


def duration(seconds: int | float) -> str:
  """Returns a time as hours, minutes and seconds, such as "0:03:51"."""
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def table(
  header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1
) -> str:
  """Returns a Markdown table.

  Args:
    header: Names of the columns.
    rows: Cells, one for each name of the header.
    num_text: Number of first columns that are aligned left, as text.
  """
  cells = [[c.replace("|", "\\|") for c in row] for row in (header, *rows)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  rule = [
    "-" * width if i < num_text else "-" * (width - 1) + ":"
    for i, width in enumerate(widths)
  ]
  lines = []
  for row in (cells[0], rule, *cells[1:]):
    padded = [
      cell.ljust(width) if i < num_text else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append(f"| {' | '.join(padded)} |")
  return "\n".join(lines) + "\n"


def _size(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a size of `result.json` with its compression; see `Run`."""
  dense, stored = values["dense"], values["stored"]
  size = {**values, "compression": 1 - stored / dense if dense else None}
  if "masks" in values:
    with_masks = 1 - (stored + values["masks"]) / dense if dense else None
    size["compression_with_masks"] = with_masks
  return size


def _test(result: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the test metrics of `result.json`; see `Run`."""
  # Metrics of an unfinished run are not those of its end.
  if not result["finished"]:
    return None
  test = {"checkpoint_step": None, **result["test"]}
  if "accuracy" in test:
    low, high = accuracy_interval(test["accuracy"], test["num_examples"])
    test |= {"accuracy_low": low, "accuracy_high": high}
  return test


def accuracy_interval(
  accuracy: float, num_examples: int
) -> tuple[float, float]:
  """Returns both ends of the 95% interval of an accuracy (Wilson's)."""
  # Importing scipy.stats is slow.
  from scipy import stats

  correct = stats.binomtest(round(accuracy * num_examples), num_examples)
  interval = correct.proportion_ci(method="wilson")
  return float(interval.low), float(interval.high)


def _draw(run: Run) -> dict[str, tuple[str, str]]:
  """Writes the plots; returns their titles and descriptions by file name."""
  fpp, total = run.config.fpp, run.result["total_steps"]
  pruning = [record for record in run.train if "sparsity" in record]
  marks, found = {}, {}
  if pruning and not run.config.compress.prunes:
    marks = {"FPP begins": fpp.begin * total, "FPP ends": fpp.end * total}

  def path(name: str) -> str:
    return os.path.join(run.workdir, name)

  if layers := plan(run):
    title = "What each layer keeps; rows and ranks are per head"
    found["plan.png"] = title, _draw_plan(layers, path("plan.png"))
  found["curves.png"] = "Loss", _draw_curves(run, marks, path("curves.png"))
  title = "Stored parameters by kind"
  found["parameters.png"] = title, _draw_sizes(run, path("parameters.png"))
  # A model that was made small before its first step has nothing to show here.
  if len({record["sparsity"] for record in pruning}) > 1:
    about = _draw_sparsity(run, pruning, marks, path("sparsity.png"))
    found["sparsity.png"] = "Sparsity", about
  return found


def _draw_plan(layers: Mapping[str, Sequence[Kept]], path: str) -> str:
  """Writes the picture of a plan, and returns its description."""
  # Importing matplotlib is slow, and reading a run does not need it.
  from folding.reporting import plots

  height = 1.6 + 0.3 * len(next(iter(layers.values())))
  with plots.saved(path, len(layers), height) as all_axes:
    for axes, (name, rows) in zip(all_axes, layers.items(), strict=True):
      bars = {
        str(n): {"dense baseline": row.dense, "kept": row.size}
        for n, row in enumerate(rows)
      }
      label = re.sub(r"W_\w", r"$\g<0>$", name)  # a formula
      notes = [row.text for row in rows]
      plots.draw_bars(axes, bars, x_label=label, notes=notes)
    all_axes[0].set_ylabel("layer")
  return " ".join(
    f"{name} by layer: {', '.join(row.text for row in rows)}; "
    f"dense {rows[0].dense:,}."
    for name, rows in layers.items()
  )


def _draw_curves(run: Run, marks: Mapping[str, float], path: str) -> str:
  """Writes the picture of the losses, and returns its description."""
  from folding.reporting import plots

  curves = {
    "training": [(r["step"], r["loss"]) for r in run.train],
    "validation": [(r["step"], r["loss"]) for r in run.valid],
  }
  with plots.saved(path) as axes:
    plots.draw_lines(
      axes,
      curves,
      x_label="step",
      y_label=f"loss ({run.loss_unit})",
      marks=marks,
    )
  ends = [f"{n} loss ends at {x[-1][1]:.3f}" for n, x in curves.items() if x]
  return f"{'; '.join(ends) or 'no values yet'}."


def _draw_sizes(run: Run, path: str) -> str:
  """Writes the picture of the parameters, and returns its description."""
  from folding.reporting import plots

  bars = {
    kind: {"dense baseline": size["dense"], "stored": size["stored"]}
    for kind, size in run.parameters.items()
  }
  with plots.saved(path) as axes:
    plots.draw_bars(axes, bars, x_label="number of parameters")
  sizes = [
    f"{kind} {size['stored']:,} of {size['dense']:,}"
    for kind, size in run.parameters.items()
  ]
  return f"{', '.join(sizes)}."


def _draw_sparsity(
  run: Run,
  pruning: Sequence[Mapping[str, Any]],
  marks: Mapping[str, float],
  path: str,
) -> str:
  """Writes the picture of the sparsity, and returns its description."""
  from folding.reporting import plots

  has_zeros = run.parameters["overall"]["stored"] < run.allocated
  gone = "zero" if has_zeros else "removed"
  lines = {
    gone: [(r["step"], 100 * r["sparsity"]) for r in pruning],
    "frozen": [(r["step"], 100 * r.get("frozen", 0)) for r in pruning],
  }
  with plots.saved(path) as axes:
    plots.draw_lines(
      axes,
      lines,
      x_label="step",
      y_label="share of the prunable parameters (%)",
      marks=marks,
    )
  last = percent(pruning[-1]["sparsity"])
  return f"In the end {last} are {gone}."


def _page(
  run: Run, metrics: Mapping[str, Any], plots: Mapping[str, tuple[str, str]]
) -> str:
  """Returns the text of `report.md`."""
  parts = [
    f"# {page.escaped(run.name)}",
    page.escaped(describe(run)),
    *(_figure(name, *plots[name]) for name in plots if name == "plan.png"),
    "## Size",
    _size_table(run),
    "qkv: W_Q, W_K and W_V. linear: W_O, the feed-forward layers and the head. "
    "other: biases, norms and further small parameters. "
    "Dense: the same model, neither folded nor pruned. Stored: nonzero values. "
    "Masks: bytes that locate the stored values. Compression: 1 - stored / "
    "dense.",
    "## Plots",
    *(_figure(name, *plots[name]) for name in plots if name != "plan.png"),
    "## Next",
    _next(run),
    "## How to reproduce",
    *_settings(run, metrics["settings"]),
    table(("", "This run"), _origin(run), 2),
  ]
  if not run.result["finished"]:
    parts.insert(
      2,
      "> **Unfinished:** the sizes are those of the last checkpoint, and there "
      "are no test metrics yet.",
    )
  return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _figure(name: str, title: str, about: str) -> str:
  return f'![{about}]({name} "{title}")'


def _next(run: Run) -> str:
  """Returns the command that most users of a run need next, with its purpose."""
  has_zeros = run.parameters["overall"]["stored"] < run.allocated
  if not run.result["finished"]:
    purpose, words = "finish the run", ["resume", run.workdir]
  elif run.config.dense:
    config = f"--config=configs/pretrained.py:{run.workdir}"
    words = ["train", config, "--workdir=NEW"]
    purpose = "make the model 70% smaller and recover it"
  elif has_zeros and {run.config.fpp.granularity, run.config.fpp.attention} & {
    "neuron",
    "heads",
  }:
    purpose = "remove zero neurons, heads and tokens from the arrays"
    words = ["shrink", run.workdir, "--output=NEW"]
  else:
    purpose = "write a model that runs elsewhere"
    words = ["export", run.workdir, "--output=NEW", "--format=onnx"]
  return f"To {purpose}: {page.code(shlex.join(['folding', *words]))}"


def _settings(run: Run, from_default: Sequence[str]) -> list[str]:
  """Returns the command of a run, and a table of the fields that differ."""
  parts = ["`config.json` is the whole configuration."]
  if run.command:
    parts = [f"{page.code(run.command['command'])}\n\n{parts[0]}"]
    base, lines = "Config file", run.command["edits"]
    about = "These fields differ from the config file:"
  else:
    base, lines = "Default", from_default
    about = "These fields differ from the default run:"
  rows = []
  for line in lines:
    field, _, change = line.partition(": ")
    values = change.partition(" -> ")[::2]
    rows.append([page.code(field), *map(page.escaped, values)])
  if rows:
    parts += [about, table(("Field", base, "This run"), rows, 3)]
  return parts


def _size_table(run: Run) -> str:
  """Returns the table of parameters and bytes by kind."""
  header = (
    "Kind", "Parameters, dense", "stored", "compression",
    "Bytes, dense", "stored", "masks", "compression with masks",
  )  # fmt: skip
  rows = []
  for kind in KINDS:
    number, size = run.parameters[kind], run.bytes[kind]
    rows.append(
      [
        kind,
        f"{number['dense']:,}",
        f"{number['stored']:,}",
        percent(number["compression"]),
        f"{size['dense']:,}",
        f"{size['stored']:,}",
        f"{size['masks']:,}",
        percent(size["compression_with_masks"]),
      ]
    )
  return table(header, rows)


def _origin(run: Run) -> list[tuple[str, str]]:
  """Returns names and values of what a run was made with."""
  found = {
    "device": run.result["device"],
    "commit": run.result["commit"] or "unknown",  # outside a clone
    "seed": str(run.config.seed),
    **run.result["versions"],
  }
  if run.energy is not None:
    by = f"estimated by {run.energy['by']}; {run.energy['country']}"
    found["electricity"] = f"{run.energy['kwh']:.3g} kWh ({by})"
    found["emissions"] = f"{run.energy['kg_co2e']:.3g} kg CO2e ({by})"
  return [(page.escaped(k), page.escaped(str(v))) for k, v in found.items()]


def _test_metric(test: Mapping[str, Any] | None) -> str:
  """Returns the test metric in words."""
  if test is None:
    return "not measured"
  step = test["checkpoint_step"]
  at = "" if step is None else f", at the checkpoint of step {step:,}"
  if "bits_per_byte" in test:
    return (
      f"{test['bits_per_byte']:.3f} bits per byte (perplexity "
      f"{test['perplexity']:,.2f} over {test['num_tokens']:,} tokens){at}"
    )
  others = ", ".join(
    f"{shown.words} {test[metric]:.3f}"
    for metric, shown in METRICS.items()
    if metric in test and metric not in ("loss", "accuracy")
  )
  if "accuracy" not in test:
    return f"{others} ({test['num_examples']:,} examples){at}"
  # Runs of earlier versions have no other metrics.
  return (
    f"{percent(test['accuracy'])} accuracy (95% interval "
    f"{percent(test['accuracy_low'])} to {percent(test['accuracy_high'])}, "
    f"{test['num_examples']:,} examples){', ' if others else ''}{others}{at}"
  )
