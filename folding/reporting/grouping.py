"""Runs grouped by configuration, and the figures of a group.

Runs that differ only in their seed are one column of a comparison. The first
column is the reference of the others.
"""

import dataclasses
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence

from folding import schema
from folding.reporting import runs

Figure = Callable[[runs.Run], float | None]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean and sample standard deviation of a figure over `n` runs."""

  mean: float | None  # None: no run has the figure
  sd: float | None  # None: fewer than two runs have it
  n: int


@dataclasses.dataclass(frozen=True)
class Column:
  """One configuration: a run, or several that differ only in the seed."""

  name: str
  members: list[runs.Run]

  @property
  def first(self) -> runs.Run:
    """The run that stands for what all members share."""
    return self.members[0]

  def spread(self, figure: Figure) -> Spread:
    """Returns a figure over those members that have it."""
    found = [figure(member) for member in self.members]
    values = [value for value in found if value is not None]
    return Spread(
      mean=statistics.fmean(values) if values else None,
      sd=statistics.stdev(values) if len(values) > 1 else None,
      n=len(values),
    )


def columns(workdirs: Sequence[str]) -> list[Column]:
  """Returns runs grouped by their configuration, in the order given.

  Raises:
    schema.ConfigError: a folder is not a run or is given twice, or the tasks
      are not the same.
  """
  schema.require(len(workdirs) > 0, "there is no run to compare")
  paths = [os.path.realpath(workdir) for workdir in workdirs]
  for i, path in enumerate(paths):
    schema.require(
      path not in paths[:i], f"the run {workdirs[i]!r} is given twice"
    )
  loaded = [runs.load_run(workdir) for workdir in workdirs]
  for run in loaded:
    schema.require(
      run.config.task == loaded[0].config.task,
      f"{loaded[0].workdir!r} has task {loaded[0].config.task!r} and "
      f"{run.workdir!r} has task {run.config.task!r}; their test figures "
      "cannot be compared",
    )
  grouped: list[list[runs.Run]] = []
  for run in loaded:
    for members in grouped:
      if all(_only_seed_differs(run, member) for member in members):
        members.append(run)
        break
    else:
      grouped.append([run])
  names = [_name(members) for members in grouped]
  depth = 1
  while len(set(names)) < len(names):  # paths differ, so this ends
    depth += 1
    names = [_longer_name(members, depth) for members in grouped]
  return [Column(n, m) for n, m in zip(names, grouped, strict=True)]


def quality(run: runs.Run) -> float | None:
  """Returns the test figure that stands for a run; None before the end."""
  if isinstance(run.test, runs.LmTest):
    return run.test.bits_per_byte
  if isinstance(run.test, runs.ClassifyTest):
    return run.test.accuracy
  return None


def perplexity(run: runs.Run) -> float | None:
  """Returns the test perplexity of a language model."""
  return run.test.perplexity if isinstance(run.test, runs.LmTest) else None


def stored_parameters(run: runs.Run) -> int:
  """Returns how many parameters a run stores."""
  return run.result.parameters.overall.stored


def stored_bytes(run: runs.Run) -> int:
  """Returns how many bytes a run stores, masks included."""
  return run.result.bytes.overall.stored + run.result.bytes.overall.masks


def compression(group: str) -> Figure:
  """Returns the figure: compression of the parameters of a group."""
  return lambda run: getattr(run.result.parameters, group).compression


def relative(found: list[Column]) -> list[float | None]:
  """Returns (mean - reference) / reference of the test figure, by column."""
  means = [column.spread(quality).mean for column in found]
  reference = means[0]
  return [
    None if mean is None or not reference else mean / reference - 1
    for mean in means
  ]


def differences(a: Column, b: Column) -> list[str]:
  """Returns "name: value in a -> value in b", the seed left out."""
  found = schema.differences(a.first.config, b.first.config)
  return [line for line in found if not line.startswith("seed: ")]


def _only_seed_differs(a: runs.Run, b: runs.Run) -> bool:
  """Two runs of one seed are no independent sample, so not one column."""
  found = schema.differences(a.config, b.config)
  return (
    len(found) == 1
    and found[0].startswith("seed: ")
    and a.result.finished == b.result.finished
    and (a.digest == b.digest or None in (a.digest, b.digest))
  )


def _name(members: list[runs.Run]) -> str:
  """Returns the name of a run, or what the names of several begin with."""
  if len(members) == 1:
    return members[0].name
  common = os.path.commonprefix([run.name for run in members])
  # "lm-seed1", "lm-seed2": what remains of the seed is no part of the name.
  common = re.sub(r"([-_. ]+(seed|s)?[-_. ]*\d*|\d+)$", "", common)
  return common or members[0].name


def _longer_name(members: list[runs.Run], depth: int) -> str:
  return "/".join(pathlib.Path(members[0].workdir).absolute().parts[-depth:])
