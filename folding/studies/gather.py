"""One row a run: the tidy table that everything else is made from."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from folding import schema
from folding.reporting import grouping, runs
from folding.studies.board import Board
from folding.studies.study import DENSE, Study, Trial

_SMOOTH = 3  # records of the training loss that are averaged


@dataclasses.dataclass(frozen=True)
class Row:
  """A run of a study. None where there is no figure.

  Attributes:
    dataset: Name.
    method: Name.
    about: What the method is.
    level: Fraction that was to be saved; None for methods of one size.
    seed: Of the run.
    status: "finished", "failed" or "open".
    error: Why it failed.
    metric: "accuracy", of which more is better, or "bits_per_byte".
    quality: That figure on the test split.
    examples: Of the test split, of classifiers.
    perplexity: Of a token, of language models.
    compression: 1 - stored / dense parameters, measured. Dense is the model's
      own dense twin, or, of what is dense and small, the dense run.
    qkv: The same of W_Q, W_K and W_V.
    linear: The same of linear layers.
    embedding: The same of embeddings.
    parameters: Stored.
    bytes: Stored, masks included.
    seconds: Of training; those of the dense part included where there is one.
    tokens_per_second: Median.
    trainable: Mean over the steps of the parameters that still train, as a
      share of the dense twin's.
    halfway: Step at which the training loss comes half the way down that the
      dense run of this data set and seed comes. None where the dense part of a
      method after training does: that says nothing of the method.
    kwh: Electricity, an estimate.
    kg_co2e: Emissions, an estimate.
    steps: Of training.
    model: Its shape, in words.
    device: That it ran on.
    commit: Of the source.
    version: Of this library.
    run: Name of the run, in `runs/` of the study.
  """

  dataset: str
  method: str
  about: str
  level: float | None
  seed: int
  status: str
  error: str | None = None
  metric: str | None = None
  quality: float | None = None
  examples: int | None = None
  perplexity: float | None = None
  compression: float | None = None
  qkv: float | None = None
  linear: float | None = None
  embedding: float | None = None
  parameters: int | None = None
  bytes: int | None = None
  seconds: float | None = None
  tokens_per_second: float | None = None
  trainable: float | None = None
  halfway: float | None = None
  kwh: float | None = None
  kg_co2e: float | None = None
  steps: int | None = None
  model: str | None = None
  device: str | None = None
  commit: str | None = None
  version: str | None = None
  run: str | None = None


def gather(study: Study, workdir: str) -> list[Row]:
  """Returns a row for each run of a study, finished or not.

  Raises:
    ConfigError: runs of one data set had different text, or the dense part of
      one is gone.
  """
  trials = study.trials(workdir)
  board = Board(trials)
  loaded = {
    t.name: runs.load_run(t.run) for t in trials if t.name in board.seconds
  }
  _require_one_text([(t, loaded[t.name]) for t in trials if t.name in loaded])
  dense = {
    (t.dataset, t.seed): loaded[t.name]
    for t in trials
    if t.method == DENSE and t.name in loaded
  }
  rows = []
  for trial in trials:
    if trial.method is None:
      continue
    values: dict[str, Any] = {"status": "open"}
    if trial.name in board.errors:
      error = board.errors[trial.name]
      values = {"status": "failed", "error": error}
    elif trial.name in loaded:
      before = None
      if trial.needs is not None:
        before = loaded.get(trial.needs.name)
        schema.require(
          before is not None,
          f"{trial.run} started from {trial.needs.name}, which is not there any "
          "more; put it back, or delete both",
        )
      twin = dense.get((trial.dataset, trial.seed))
      values = _figures(trial, loaded[trial.name], before, twin)
    rows.append(
      Row(
        dataset=trial.dataset,
        method=trial.method,
        about=study.methods[trial.method].about,
        level=trial.level,
        seed=trial.seed,
        run=trial.name,
        **values,
      )
    )
  return rows


def _require_one_text(finished: Sequence[tuple[Trial, runs.Run]]) -> None:
  first: dict[str, runs.Run] = {}
  for trial, run in finished:
    if run.digest is None:
      continue
    other = first.setdefault(trial.dataset, run)
    schema.require(
      run.digest == other.digest,
      f"{other.workdir} and {run.name} were trained on different text of "
      f"{trial.dataset!r}; choose another --workdir for the new text",
    )


def _figures(
  trial: Trial, run: runs.Run, before: runs.Run | None, twin: runs.Run | None
) -> dict[str, Any]:
  result, parts = run.result, [*([before] if before else []), run]
  is_small = trial.study.methods[trial.method or DENSE].kind == "small"
  reference = twin if is_small else run
  half = halfway(parts, twin) if twin else None
  if before and half is not None and half <= before.result.steps:
    half = None
  return {
    "status": "finished",
    "metric": "bits_per_byte" if run.config.task == "lm" else "accuracy",
    "quality": grouping.quality(run),
    "perplexity": grouping.perplexity(run),
    "examples": getattr(run.test, "num_examples", None),
    **(_compression(run, reference, parts) if reference else {}),
    "parameters": grouping.stored_parameters(run),
    "bytes": grouping.stored_bytes(run),
    "seconds": sum(p.result.seconds for p in parts),
    "tokens_per_second": result.tokens_per_second,
    "halfway": half,
    "steps": sum(p.result.steps for p in parts),
    "model": _shape(run),
    "device": result.device,
    "commit": result.commit,
    "version": result.versions.get("folding"),
    **_energy(parts),
  }


def _compression(
  run: runs.Run, reference: runs.Run, parts: Sequence[runs.Run]
) -> dict[str, float | None]:
  """Returns what is saved, and what trains, of the reference's dense model."""

  def saved(group: str) -> float | None:
    stored = getattr(run.result.parameters, group).stored
    dense = getattr(reference.result.parameters, group).dense
    return runs.Count(dense, stored).compression

  dense = reference.result.parameters.overall.dense
  names = ("qkv", "linear", "embedding")
  return {
    **{name: saved(name) for name in names},
    "compression": saved("overall"),
    "trainable": _trainable(parts) / dense,
  }


def _shape(run: runs.Run) -> str:
  m, data = run.config.model, run.config.data
  return (
    f"layers: {m.num_layers}, width {m.width}, {m.num_heads} heads, {m.positions} "
    f"positions, length {data.length}, batch {data.batch_size}"
  )


def _energy(parts: Sequence[runs.Run]) -> dict[str, float]:
  totals: dict[str, float] = {}
  for part in parts:
    if part.energy is None:
      return {}
    for name in ("kwh", "kg_co2e"):
      totals[name] = totals.get(name, 0.0) + part.energy[name]
  return totals


def _trainable(parts: Sequence[runs.Run]) -> float:
  """Returns the mean over steps of trainable parameters.

  A record holds from its step to the next; before the first, and where nothing
  is pruned, all that the model has are trainable.
  """
  total = steps = 0.0
  for run in parts:
    size = sum(math.prod(layer.shape) for layer in run.result.layers)
    at, now = 0, size
    for record in run.train:
      total += now * (record["step"] - at)
      at, now = record["step"], record.get("trainable", size)
    total += now * (run.result.steps - at)
    steps += run.result.steps
  return total / steps


def halfway(parts: Sequence[runs.Run], twin: runs.Run) -> float | None:
  """Returns the step at which the loss is halfway down the dense run's way.

  Losses are those of training, the mean of up to three records; halfway lies
  between the dense run's first and its lowest. Between two records the step is
  interpolated. A run that begins below, by the luck of how it begins, has not
  come down yet; only one that never is above counts from its first record. None
  where it is not reached.

  Args:
    parts: The run, after its dense part if it has one.
    twin: The dense run.
  """
  losses = _smooth(twin.train)
  if not losses:
    return None
  aim = (losses[0][1] + min(loss for _, loss in losses)) / 2
  start, first = 0, None
  for part in parts:
    above = None
    for step, loss in _smooth(part.train):
      if loss > aim:
        above = step, loss
      elif above is not None:
        share = (above[1] - aim) / (above[1] - loss)
        return start + above[0] + share * (step - above[0])
      elif first is None:
        first = float(start + step)
    start += part.result.steps
  return first


def _smooth(records: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
  found = [(r["step"], r["loss"]) for r in records]
  return [
    (
      found[i][0],
      statistics.fmean(x for _, x in found[max(0, i + 1 - _SMOOTH) : i + 1]),
    )
    for i in range(len(found))
  ]


def to_csv(rows: Sequence[Row]) -> str:
  """Returns the rows as CSV; what is None is empty."""
  text = io.StringIO()
  names = [field.name for field in dataclasses.fields(Row)]
  writer = csv.DictWriter(text, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows(dataclasses.asdict(row) for row in rows)
  return text.getvalue()


def read_csv(path: str) -> list[Row]:
  """Returns the rows of a file that `to_csv` made.

  Raises:
    ConfigError: a column is missing or unknown, or a value is of a wrong type.
  """
  texts = {"dataset", "method", "about", "status", "error", "metric"}
  texts |= {"model", "device", "commit", "version", "run"}
  whole = {"seed", "examples", "parameters", "bytes", "steps"}

  def read(name: str, text: str) -> Any:
    if text == "":
      return "" if name == "about" else None  # a method may say nothing
    if name in texts:
      return text
    return int(text) if name in whole else float(text)

  with open(path, encoding="utf-8", newline="") as file:
    records = list(csv.DictReader(file))
  try:
    return [
      schema.build(Row, {n: read(n, t) for n, t in record.items()}, "row")
      for record in records
    ]
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(f"{path!r} is damaged: {error}") from error
