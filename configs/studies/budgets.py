r"""Ours at 70% against dense, with budgets that double.

Runs have 200, 400 and 800 steps; those of language models also 1,600.
ARGUMENT is as in from_scratch.py. Models are those of short.py.

Command: folding study configs/studies/budgets.py:FOLDER,trec,wikitext2 \
           --workdir=DIR
Time:    per seed 10 minutes for a classifier and half an hour for a language
         model, on one core
Expect:  docs/measured.md, "Longer runs"
"""

from configs.studies import short
from folding.config import edited
from folding.studies import methods
from folding.studies.grid import Study


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  found = {}
  for steps in (200, 400, 800, 1600):
    for name, base in short.datasets(where).items():
      if steps <= 800 or base.task == "lm":
        every = steps // (4 if base.task == "lm" else 10)
        found[f"{name}-{steps}"] = edited(
          base, {"train.steps": steps, "train.eval_every": every}
        )
  return Study(
    datasets=found,
    methods=methods.pick("dense", "ours", "fold"),
    savings=(0.7,),
  )
