"""What a study is: data sets, methods, levels and seeds, and so its runs."""

import dataclasses
import os
import re
from collections.abc import Mapping

from folding import files
from folding.config import Config
from folding.schema import edited, require
from folding.studies.methods import Method

DENSE = "dense"  # the method that all others are compared with
DENSE_PART = "dense-part"  # what methods after training start from
OURS = "ours"  # the method that the paper's claims are held against


@dataclasses.dataclass(frozen=True)
class Study:
  """A grid of runs. A study file has `get_study()`, which returns one.

  Attributes:
    datasets: {name: base config}; task, data, model, steps and all that the
      methods leave alone.
    methods: {name: method}, one of them "dense"; see `methods.pick`.
    levels: Fractions of the dense twin's parameters to save.
    seeds: Each is a run.
    pretrain: Share of the steps that a method after training trains densely.

  Example:
    >>> from folding.studies.methods import pick
    >>> study = Study({"text": Config()}, pick("dense", "ours"), (0.7,), (0, 1))
    >>> [trial.name for trial in study.trials("DIR")]
    ['text--dense--s0', 'text--ours--70--s0', 'text--dense--s1', \
'text--ours--70--s1']
  """

  datasets: Mapping[str, Config]
  methods: Mapping[str, Method]
  levels: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8)
  seeds: tuple[int, ...] = (0, 1, 2)
  pretrain: float = 0.6

  def __post_init__(self):
    require(DENSE in self.methods, f"a study needs the method {DENSE!r}")
    for name in (*self.datasets, *self.methods):
      require(
        bool(re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", name)),
        f"the name {name!r} is no part of a file name; use letters, digits and "
        "single -, _ or .",
      )
    require(
      DENSE_PART not in self.methods,
      f"{DENSE_PART!r} is what methods after training start from; name the "
      "method otherwise",
    )
    for level in self.levels:
      require(
        isinstance(level, float) and 0 < float(level) < 1,
        f"a level is a fraction to save; it is {level!r}",
      )
    for seed in self.seeds:
      require(type(seed) is int, f"a seed is a whole number; it is {seed!r}")
    # NumPy's are floats too, but not as a configuration has them.
    levels = tuple(float(level) for level in self.levels)
    object.__setattr__(self, "levels", levels)
    require(
      0 < self.pretrain < 1, f"pretrain is a fraction; it is {self.pretrain}"
    )
    shown = [f"{100 * level:g}" for level in self.levels]
    require(
      len(set(shown)) == len(shown),
      f"two levels are called alike: {', '.join(shown)}%",
    )
    require(
      bool(self.datasets) and bool(self.seeds),
      "a study needs a data set and a seed",
    )

  def trials(self, workdir: str) -> list["Trial"]:
    """Returns the runs, all of one seed before those of the next.

    Args:
      workdir: Of the study.
    """
    found: dict[str, Trial] = {}
    for seed in self.seeds:
      for dataset in self.datasets:
        for name, method in self.methods.items():
          leveled = method.kind != "fixed"
          for level in self.levels if leveled else (None,):
            if method.kind == "small" and self.datasets[dataset].pretrained:
              continue  # no checkpoint has that shape
            needs = None
            if method.after:
              needs = Trial(self, workdir, dataset, None, None, seed, None)
              found.setdefault(needs.name, needs)
            trial = Trial(self, workdir, dataset, name, level, seed, needs)
            found[trial.name] = trial
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a study.

  Attributes:
    study: It belongs to.
    workdir: Of the study.
    dataset: Name.
    method: Name; None: the dense part that methods after training start from.
    level: Fraction to save; None where a method has one size.
    seed: Of the run.
    needs: What must be finished before.
  """

  study: Study
  workdir: str
  dataset: str
  method: str | None
  level: float | None
  seed: int
  needs: "Trial | None" = None

  @property
  def name(self) -> str:
    """Names the run and its folder."""
    parts = [self.dataset, self.method or DENSE_PART, f"s{self.seed}"]
    if self.level is not None:
      parts.insert(2, f"{100 * self.level:g}")
    return "--".join(parts)

  @property
  def run(self) -> str:
    """The run directory, absolute, as it is part of other runs' configs."""
    return os.path.join(os.path.abspath(self.workdir), "runs", self.name)

  def config(self) -> Config:
    """Returns the config of the run.

    Raises:
      ConfigError: see `Method.config`.
    """
    base = self.study.datasets[self.dataset]
    steps = base.train.steps
    part = max(1, round(self.study.pretrain * steps))
    if self.method is None:
      edits = {"dense": True, "seed": self.seed, "train.steps": part}
      return edited(base, edits)
    method = self.study.methods[self.method]
    if self.needs is not None:
      edits = {"train.steps": max(1, steps - part)}
      # Reads on: what was read before is learned by heart if it comes again.
      edits |= {"data.first_batch": base.data.first_batch + part}
      base = edited(base, edits)
    start = self.needs.run if self.needs else ""
    return method.config(base, self.level, self.seed, start)


def load_study(where: str) -> Study:
  """Returns what a study file gives.

  Args:
    where: "FILE.py", or "FILE.py:ARGUMENT" to call get_study(ARGUMENT).

  Raises:
    ConfigError: there is no such file, or it gives no `Study`.
  """
  study = files.call_in_file(where, "get_study")
  require(isinstance(study, Study), f"get_study() of {where!r} gives no Study")
  return study
