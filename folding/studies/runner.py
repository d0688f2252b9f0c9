"""Runs a study: each run once, in a process of its own, on any number of hosts.

A study directory has `runs/` (run directories), `plans/` (their configs),
`claims/`, `failed/` and `logs/`, all by the name of the run.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import rich.console

from folding import config as config_lib
from folding import files
from folding.reporting import runs
from folding.schema import ConfigError, differences, require
from folding.studies import worker
from folding.studies.board import Board, Show, failure_path
from folding.studies.claims import Claim, Claims
from folding.studies.study import Study, Trial
from folding.training.run_dir import is_finished

_POLL_SECONDS = 0.5
_SHOW_SECONDS = 2.0  # between looks at what others do
_END_SECONDS = 120.0  # for a run to save when the study is stopped


@dataclasses.dataclass(frozen=True)
class Options:
  """How a study is run.

  Attributes:
    shard: (i, n): this is machine i of n, from 1. Its own part of the runs
      comes first; then it helps with the others'.
    jobs: Runs at a time; on a CPU each has its share of the cores.
    energy: Country (ISO 3166, three letters) for estimates of what was used;
      None: it is not measured.
    retry: Whether what failed is tried again.
  """

  shard: tuple[int, int] = (1, 1)
  jobs: int = 1
  energy: str | None = None
  retry: bool = False

  def __post_init__(self):
    i, n = self.shard
    require(1 <= i <= n, f"a shard is 1/n to n/n; it is {i}/{n}")
    require(self.jobs >= 1, f"jobs must be at least 1; it is {self.jobs}")


@dataclasses.dataclass
class _Job:
  trial: Trial
  claim: Claim
  process: subprocess.Popen
  log: IO[bytes]
  slot: int

  def beat(self) -> bool:
    """Beats the claim, and while it is held the process; see `worker`."""
    is_held = self.claim.beat()
    if is_held:
      assert self.process.stdin is not None
      with contextlib.suppress(BrokenPipeError):  # it has just ended
        self.process.stdin.write(b".")
    return is_held

  def close(self) -> None:
    """Closes the files of a process that has ended."""
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.log.close()


def run_study(
  study: Study,
  workdir: str,
  options: Options,
  console: rich.console.Console,
) -> bool:
  """Runs what is not over yet; returns whether all is over now.

  It waits for runs of other machines, and takes over those whose machine is
  gone. SIGTERM or Ctrl-C saves what runs, and lets others, or this command
  again, go on with it.

  Args:
    study: What to run.
    workdir: Shared by all machines under one path; made if need be.
    options: How.
    console: For the table, or lines.
  """
  for folder in ("runs", "plans", "failed", "logs"):
    os.makedirs(os.path.join(workdir, folder), exist_ok=True)
  trials = study.trials(workdir)
  if options.retry:
    for trial in trials:
      with contextlib.suppress(FileNotFoundError):
        os.remove(failure_path(trial))
  board = Board(trials)
  claims = Claims(os.path.join(workdir, "claims"))
  with (
    Show(board, console) as show,
    _terminated() as stopped,
    # Of this machine: programs are of its kind of processor.
    tempfile.TemporaryDirectory() as compiled,
  ):
    group = _Group(workdir, options, board, claims, show, compiled)
    try:
      while (board.open_trials() or group.is_busy) and not stopped():
        group.collect()
        group.fill()
        group.look()
        time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
      pass
    finally:
      group.stop()
  return not board.open_trials()


def require_same(study: Study, workdir: str) -> None:
  """Does nothing if what is finished in a directory belongs to the study.

  Raises:
    ConfigError: a run of that name had another config.
  """
  for trial in study.trials(workdir):
    plan = os.path.join(workdir, "plans", f"{trial.name}.json")
    if is_finished(trial.run):
      require(
        os.path.exists(plan),
        f"{workdir} has no {plan}, which says what {trial.name} was; put it back, "
        "or choose another --workdir",
      )
      before, now = config_lib.load(plan), trial.config()
      found = differences(before, now)
      # What starts from a run of the study names its place, which may change,
      # as may that of a tokenizer which came with a checkpoint.
      ignored = ["train.energy:", *(["pretrained:"] if trial.needs else [])]
      if not {before.data.tokenizer, now.data.tokenizer} & {"bytes", "bpe"}:
        ignored.append("data.tokenizer:")
      found = [line for line in found if not line.startswith(tuple(ignored))]
      require(
        not found,
        f"{workdir} holds {trial.name} of another study ({'; '.join(found)}); "
        "choose another --workdir",
      )


class _Group:
  """The runs of this process: started, watched, and collected."""

  def __init__(self, workdir, options, board, claims, show, compiled):
    self._workdir, self._options = workdir, options
    # Runs that differ by their seed share what is compiled.
    self._environ = {"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ}
    self._board: Board = board
    self._claims: Claims = claims
    self._show: Show = show
    self._jobs: list[_Job] = []
    self._looked = -_SHOW_SECONDS
    i, n = options.shard
    own = [t for k, t in enumerate(board.trials) if k % n == i - 1]
    rest = [t for k, t in enumerate(board.trials) if k % n != i - 1]
    # Not from the front, where the others are at work.
    self._order = own + rest[::-1]

  @property
  def is_busy(self) -> bool:
    """Whether a run of this process has not been collected yet."""
    return bool(self._jobs)

  def fill(self) -> None:
    """Starts what can be started, up to the number of jobs."""
    for trial in self._order:
      if len(self._jobs) == self._options.jobs:
        return
      if self._board.is_over(trial) or any(
        job.trial is trial for job in self._jobs
      ):
        continue
      if trial.needs is not None:
        if trial.needs.name in self._board.errors:
          self._board.refresh()  # it may have been tried again elsewhere
        if error := self._board.errors.get(trial.needs.name):
          reason = f"it starts from {trial.needs.name}, which failed: {error}"
          self._fail(trial, reason)
        if trial.needs.name not in self._board.seconds:
          continue
      claim = self._claims.take(trial.name)
      if claim is None:
        continue
      self._board.refresh()  # it may be over since it was looked at
      if self._board.is_over(trial):
        claim.release()
        continue
      self._start(trial, claim)

  def collect(self) -> None:
    """Beats the claims, and takes note of what has ended."""
    for job in list(self._jobs):
      status = job.process.poll()
      if status is None:
        if not job.beat():  # another has it: this machine was away
          job.process.kill()
        continue
      self._jobs.remove(job)
      job.close()
      if is_finished(job.trial.run):
        self._board.refresh()
        line = self._board.line(len(self._claims.held()))
        self._show.say(f"{job.trial.name}  {_outcome(job.trial)}  ({line})")
      elif status not in (0, worker.ABANDONED) and job.claim.beat():
        self._fail(job.trial, _error(job.log.name, status))
      job.claim.release()

  def look(self) -> None:
    """Looks at what others did, and shows the table, every now and then."""
    if time.monotonic() - self._looked > _SHOW_SECONDS:
      self._looked = time.monotonic()
      self._board.refresh()
      self._show.update(self._claims.held())

  def stop(self) -> None:
    """Ends all runs of this process; each saves where it is."""
    for job in self._jobs:
      job.process.terminate()
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end and any(
      job.process.poll() is None for job in self._jobs
    ):
      for job in self._jobs:
        job.beat()  # or another machine would take it over meanwhile
      time.sleep(_POLL_SECONDS)
    for job in self._jobs:
      job.process.kill()  # does nothing to what has ended
      job.process.wait()
      job.close()
      job.claim.release()
    self._jobs = []
    self._board.refresh()

  def _start(self, trial: Trial, claim: Claim) -> None:
    plan = os.path.join(self._workdir, "plans", f"{trial.name}.json")
    try:
      config = trial.config()
      config.train.energy = self._options.energy or ""
      config_lib.resolve(config)
    except ConfigError as error:
      self._fail(trial, str(error))
      claim.release()
      return
    config_lib.save(config, plan)
    slot = min(set(range(self._options.jobs)) - {j.slot for j in self._jobs})
    command = [sys.executable, "-m", "folding.studies.worker", plan, trial.run]
    environ = self._environ
    if cores := _cores(slot, self._options.jobs):
      command.append(f"--cores={','.join(cores)}")
      # NumPy has its threads before the run has its cores, and threads without a
      # core of their own wait for each other, ten times as long.
      environ = {"OMP_NUM_THREADS": str(len(cores)), **environ}
    if digest := self._digest_of(trial.dataset):
      command.append(f"--text={digest}")
    log = open(os.path.join(self._workdir, "logs", f"{trial.name}.log"), "ab")
    process = subprocess.Popen(
      command,
      env=environ,
      bufsize=0,
      stdin=subprocess.PIPE,  # closes when this process ends
      stdout=log,
      stderr=log,
      start_new_session=True,  # a Ctrl-C is for this process alone
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)  # where it is suspended
    self._jobs.append(_Job(trial, claim, process, log, slot))

  def _digest_of(self, dataset: str) -> str | None:
    """Returns the SHA-256 of the text of what is finished, None without."""
    for trial in self._board.trials:
      if trial.dataset == dataset and trial.name in self._board.seconds:
        return runs.text_digest(trial.run)
    return None

  def _fail(self, trial: Trial, error: str) -> None:
    record = {"error": error, "host": socket.gethostname()}
    files.write_file(failure_path(trial), json.dumps(record) + "\n")
    self._board.refresh()
    self._show.say(f"{trial.name}  failed: {error}")


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether SIGTERM has arrived."""
  arrived = []
  before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(True))
  try:
    yield lambda: bool(arrived)
  finally:
    signal.signal(signal.SIGTERM, before)


def _cores(slot: int, jobs: int) -> list[str]:
  """Returns a job's share of the cores, [] for all of them."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return []
  return list(map(str, sorted(os.sched_getaffinity(0))[slot::jobs]))


def _outcome(trial: Trial) -> str:
  run = runs.load_run(trial.run)
  stored = run.result.parameters.overall.stored
  figure = ""
  if isinstance(run.test, runs.ClassifyTest):
    figure = f"accuracy {run.test.accuracy:.2%}"
  elif run.test is not None:
    figure = f"bits per byte {run.test.bits_per_byte:.3f}"
  return f"{figure}, {stored:,} parameters, {run.result.seconds:.0f} s"


def _error(log: str, status: int) -> str:
  """Returns why a process ended, as its last line tells."""
  if status < 0:
    return f"killed by {signal.Signals(-status).name}"
  with open(log, encoding="utf-8", errors="replace") as file:
    lines = [line.strip() for line in file if line.strip()]
  return lines[-1][:500] if lines else f"exit status {status}"
