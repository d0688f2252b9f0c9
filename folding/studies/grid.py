"""A study: a grid of runs, and the engines that train it.

A study directory holds `runs/` (run directories) and `logs/` (the output of
each run), both by the name of the run. A run is finished if its `result.json`
says so. The next call trains or resumes the others.
"""

import contextlib
import dataclasses
import logging
import math
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent import futures
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, runtime_checkable

from folding import config as config_lib
from folding import files, memory
from folding.config import Config
from folding.errors import ConfigError, reason
from folding.studies.methods import Method
from folding.training import run_dir
from folding.training.progress import stop_signal
from folding.typed import edited

DENSE = "dense"  # the baseline of every comparison
OURS = "ours"  # the method that the others are tested against
DENSE_PART = "dense-part"  # the dense run that other runs start from
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 120.0  # for stopped runs to save
_RETRIES = 3  # of a run whose node failed


@dataclasses.dataclass(frozen=True)
class Study:
  """A grid of runs. A study file has `get_study()`, which returns one.

  Attributes:
    datasets: {name: base config}: task, data, model, steps and all else that
      the methods do not edit.
    methods: {name: method}, "dense" among them; see `methods.pick`.
    savings: Fractions of the dense baseline's parameters to save.
    seeds: Seeds; one run each per method, saving and data set.
    pretrain: Fraction of the steps that train the dense model from which
      methods with `after` start.

  Raises:
    ConfigError: a name, a type or a fraction is not valid, or a seed or saving
      is given twice.

  Example:
    >>> from folding.studies.methods import pick
    >>> study = Study({"text": Config()}, pick("dense", "ours"), (0.7,), (0, 1))
    >>> [trial.name for trial in study.trials("DIR")]
    ['text--dense--s0', 'text--ours--70--s0', 'text--dense--s1', \
'text--ours--70--s1']
  """

  datasets: Mapping[str, Config]
  methods: Mapping[str, Method]
  savings: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8)
  seeds: tuple[int, ...] = (0, 1, 2)
  pretrain: float = 0.6

  def __post_init__(self):
    if not self.datasets or not self.seeds:
      raise ConfigError("a study needs a data set and a seed")
    if DENSE not in self.methods or DENSE_PART in self.methods:
      raise ConfigError(
        f"a study needs a method {DENSE!r}, and none called {DENSE_PART!r}"
      )
    for name in (*self.datasets, *self.methods):
      if not re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", name):
        raise ConfigError(
          f"{name!r} names a folder: use letters, digits and single -, _ or ."
        )
    for kind, found in ((Config, self.datasets), (Method, self.methods)):
      for name, value in found.items():
        if not isinstance(value, kind):
          raise ConfigError(
            f"{name!r} must be a {kind.__name__}: {value!r:.60}"
          )
    for seed in self.seeds:
      if not (type(seed) is int and 0 <= seed < 2**32):
        raise ConfigError(
          f"a seed is a whole number, 0 to 2^32 - 1; not {seed!r}"
        )
    for values in (self.seeds, self.savings):
      if len(set(values)) < len(values):
        raise ConfigError(f"a seed or a saving is given twice: {values}")
    for value in (*self.savings, self.pretrain):
      if not 0 < value < 1:
        raise ConfigError(f"not a fraction between 0 and 1: {value}")

  def trials(self, workdir: str) -> list["Trial"]:
    """Returns the runs in order: dense starts, then seed by seed."""
    starts: dict[str, Trial] = {}
    rest: list[Trial] = []
    for seed in self.seeds:
      for dataset in self.datasets:
        base = Trial(self, os.path.abspath(workdir), dataset, None, seed)
        for name, method in self.methods.items():
          if method.after:
            starts[base.name] = base
          savings = self.savings if method.has_savings else (None,)
          rest += [
            dataclasses.replace(base, method=name, saving=saving)
            for saving in savings
          ]
    return [*starts.values(), *rest]


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a study.

  Attributes:
    study: The study.
    workdir: Its directory, absolute.
    dataset: Name of the data set.
    method: Name of the method; None: the dense run that other runs start from.
    seed: Seed of the run.
    saving: Fraction to save; None if the method has one size.
  """

  study: Study
  workdir: str
  dataset: str
  method: str | None
  seed: int
  saving: float | None = None

  @property
  def name(self) -> str:
    """Name of the run and its directory."""
    saving = [] if self.saving is None else [f"{100 * self.saving:g}"]
    method = self.method or DENSE_PART
    return "--".join([self.dataset, method, *saving, f"s{self.seed}"])

  @property
  def run(self) -> str:
    """The run directory."""
    return os.path.join(self.workdir, "runs", self.name)

  @property
  def log(self) -> str:
    """The file with the output of the run."""
    return os.path.join(self.workdir, "logs", f"{self.name}.log")

  @property
  def start(self) -> "Trial | None":
    """The dense run that this run starts from; None: it starts untrained."""
    if self.method is None or not self.study.methods[self.method].after:
      return None
    return dataclasses.replace(self, method=None, saving=None)

  @property
  def result(self) -> dict[str, Any] | None:
    """Contents of the run's `result.json`; None: it is not finished."""
    return run_dir.finished_result(self.run)

  def config(self) -> Config:
    """Returns the config of the run.

    Raises:
      ConfigError: an edit names no field or has a wrong type.
    """
    base = self.study.datasets[self.dataset]
    steps = base.train.steps
    part = max(1, round(self.study.pretrain * steps))
    if self.method is None:
      edits = {"dense": True, "seed": self.seed, "train.steps": part}
      return edited(base, edits)
    if self.start is not None:
      edits = {
        "pretrained": self.start.run,
        "data.tokenizer": os.path.join(self.start.run, "tokenizer.json"),
        "train.steps": max(1, steps - part),
        # Continue in the data; repeated batches would be overfitted.
        "data.first_batch": base.data.first_batch + part,
      }
      base = edited(base, edits)
    edits = self.study.methods[self.method].edits(base, self.saving or 0.0)
    return edited(base, {**edits, "seed": self.seed})

  def check(self) -> None:
    """Raises `ConfigError` if the run cannot have its config."""
    try:
      config_lib.resolve(self.config())
    except Exception as error:  # edits are the user's code
      raise ConfigError(f"the run {self.name}: {reason(error)}") from error


def load_study(where: str) -> Study:
  """Returns the study of a file.

  Args:
    where: "FILE.py", or "FILE.py:ARGUMENT" to call get_study(ARGUMENT).

  Raises:
    ConfigError: there is no such file, or it returns no `Study`.
  """
  study = files.call_in_file(where, "get_study")
  if not isinstance(study, Study):
    raise ConfigError(f"get_study() of {where!r} returns no Study")
  return study


@runtime_checkable  # type checks at run time need it
class Engine(Protocol):
  """Trains runs somewhere.

  Attributes:
    limit: Number of runs to submit at a time.
  """

  limit: float

  def submit(self, config: Config, trial: Trial) -> futures.Future:
    """Starts a run; the result is its error in one line, "" on success."""
    ...

  def stop(self) -> None:
    """Stops the runs that were submitted; each saves a checkpoint."""
    ...


class Pool:
  """Processes on this machine, one per run.

  Args:
    jobs: Number of runs at a time.

  Attributes:
    limit: Number of runs at a time.
    processes: {run that was submitted: its process}.

  Raises:
    ConfigError: jobs is below 1.
  """

  def __init__(self, jobs: int = 1):
    if jobs < 1:
      raise ConfigError(f"jobs must be at least 1; it is {jobs}")
    self.limit: float = jobs
    self.processes: dict[futures.Future, BaseProcess] = {}

  def submit(self, config: Config, trial: Trial) -> futures.Future:
    """See `Engine`."""
    # An executor of one process per run: a run that is killed breaks no other,
    # and all its memory is returned. Ctrl-C is for this process, which stops
    # its runs in turn.
    executor = futures.ProcessPoolExecutor(
      max_workers=1,
      mp_context=multiprocessing.get_context("spawn"),
      initializer=signal.signal,
      initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    before = set(multiprocessing.active_children())
    future = executor.submit(train, config, trial.run, trial.log)
    executor.shutdown(wait=False)
    (self.processes[future],) = {*multiprocessing.active_children()} - before
    return future

  def stop(self) -> None:
    """See `Engine`."""
    running = [f for f in self.processes if not f.done()]
    try:
      for future in running:
        self.processes[future].terminate()
      futures.wait(running, timeout=_SAVE_SECONDS)
    finally:
      for future in running:
        self.processes[future].kill()


class Ray:
  """Tasks of a Ray cluster: the one that `ray start` made, or a local one.

  All hosts see the study directory under the same path. A run is repeated if
  its node dies; it resumes from its newest checkpoint.

  Args:
    cpus: Cores per run.
    gpus: GPUs per run, each used by one run at a time. None: 1 if the cluster
      has any.

  Attributes:
    limit: Infinite; Ray queues what does not fit.

  Raises:
    ConfigError: Ray is not installed, or the cluster has too few cores or GPUs.
  """

  limit: float = math.inf

  def __init__(self, cpus: float = 1.0, gpus: float | None = None):
    try:
      import ray
    except ImportError as error:
      raise ConfigError(
        "engine 'ray' needs Ray: pip install 'folding-jax[ray]'"
      ) from error
    self._ray = ray
    self._references: dict[futures.Future, Any] = {}
    self._is_ours = not ray.is_initialized()
    if self._is_ours:
      ray.init(log_to_driver=False, logging_level=logging.ERROR)
    total = ray.cluster_resources()
    gpus = min(1.0, total.get("GPU", 0)) if gpus is None else gpus
    for name, asked in (("CPU", cpus), ("GPU", gpus)):
      if asked > total.get(name, 0):
        self.stop()
        raise ConfigError(
          f"a run asks for {asked:g} {name}; the cluster has "
          f"{total.get(name, 0):g}"
        )
    # A process per run (max_calls), so that all its memory is returned.
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1}
    self._train = ray.remote(max_retries=_RETRIES, **options)(train)

  def submit(self, config: Config, trial: Trial) -> futures.Future:
    """See `Engine`."""
    reference = self._train.remote(config, trial.run, trial.log)
    future = reference.future()
    self._references[future] = reference
    return future

  def stop(self) -> None:
    """See `Engine`."""
    running = [f for f in self._references if not f.done()]
    for future in running:
      self._ray.cancel(self._references[future])  # as Ctrl-C in the task
    futures.wait(running, timeout=_SAVE_SECONDS)
    if self._is_ours:
      self._ray.shutdown()


def train(config: Config, workdir: str, log: str) -> str:
  """Trains or resumes a run in this process.

  Args:
    config: Config of the run.
    workdir: Run directory.
    log: File to which the output of the run is appended.

  Returns:
    The error of the run in one line, "" on success.
  """
  from folding.training import loop

  with (
    open(log, "a", encoding="utf-8") as file,
    contextlib.redirect_stdout(file),
    contextlib.redirect_stderr(file),
  ):
    try:
      _wait_until_free(workdir)
      memory.keep_freed()
      loop.run(config, workdir)
    except Exception as error:
      traceback.print_exc()
      return reason(error)
  return ""


def run_study(study: Study, workdir: str, engine: Engine) -> dict[str, str]:
  """Trains the unfinished runs of a study, and prints one line per run.

  Args:
    study: The runs.
    workdir: Study directory; created if it does not exist.
    engine: Where runs are trained; stopped at the end.

  Returns:
    {name of a failed run: its error in one line}.

  Raises:
    ConfigError: the config of a run is not valid, or the directory holds finished
      runs of other configs. Nothing was trained.
    KeyboardInterrupt: SIGINT or SIGTERM arrived. Runs have saved; the next call
      resumes them.
  """
  trials = study.trials(workdir)
  for trial in trials:
    if trial.seed == study.seeds[0]:  # the others differ in that alone
      trial.check()
  todo = [trial for trial in trials if not _is_finished(trial)]
  for folder in ("runs", "logs"):
    os.makedirs(os.path.join(workdir, folder), exist_ok=True)
  with stop_signal() as stopped:
    try:
      failed = _train_all(todo, len(trials), engine, stopped)
    finally:
      engine.stop()
    if stopped(0):
      raise KeyboardInterrupt
  return failed


def _is_finished(trial: Trial) -> bool:
  """Returns whether a run is finished.

  Raises:
    ConfigError: it was trained with another config.
  """
  if trial.result is None:
    return False
  run_dir.is_begun(trial.run, config_lib.resolve(trial.config()))
  return True


def _train_all(
  todo: list[Trial],
  total: int,
  engine: Engine,
  stopped: Callable[[int], bool],
) -> dict[str, str]:
  """Trains runs until all are over or a signal arrives; returns the failed ones.

  Args:
    todo: Runs in order; those that are submitted leave the list.
    total: Number of runs of the study, finished ones included.
    engine: Where runs are trained.
    stopped: From `stop_signal`.
  """
  running: dict[futures.Future, Trial] = {}
  failed: dict[str, str] = {}

  def close(trial: Trial, error: str = "") -> None:
    if not error and trial.result is None:
      error = "stopped before its end"
    if error:
      failed[trial.name] = error
    text = f"failed: {error}" if error else _outcome(trial)
    over = total - len(todo) - len(running)
    print(f"[{over}/{total}] {trial.name}: {text}", flush=True)

  def submit(trial: Trial) -> None:
    try:
      running[engine.submit(trial.config(), trial)] = trial
    except Exception as error:  # an engine may fail in any way
      close(trial, reason(error))

  while (todo or running) and not stopped(0):
    for trial in list(todo):
      start = trial.start
      if len(running) >= engine.limit:
        break
      if start and start.name in failed:
        todo.remove(trial)
        close(trial, f"{start.name}, which it starts from, failed")
      elif start is None or start.result is not None:
        todo.remove(trial)
        submit(trial)
    done, _ = futures.wait(
      running, timeout=_POLL_SECONDS, return_when=futures.FIRST_COMPLETED
    )
    if stopped(0):  # the runs may have had the signal too
      break
    for future in done:
      trial = running.pop(future)
      try:
        close(trial, future.result())
      except Exception as error:  # its process was killed
        close(trial, reason(error))
  return failed


def _outcome(trial: Trial) -> str:
  result: dict[str, Any] = trial.result or {}
  test = result["test"]
  name = config_lib.quality(trial.config())
  stored = result["parameters"]["overall"]["stored"]
  return (
    f"{name} {test[name]:.4f}, {stored:,} parameters, {result['seconds']:.0f} s"
  )


def _wait_until_free(workdir: str) -> None:
  """Waits a minute for the process of a failed node to release a run directory."""
  for _ in range(60):
    with contextlib.suppress(ConfigError), run_dir.held(workdir):
      return
    time.sleep(1.0)  # no event reports that another host releases a lock
