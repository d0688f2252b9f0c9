"""The core of from_scratch.py: six methods, four levels, shorter runs.

Run:     folding study configs/studies/short.py:FOLDER,trec,tiny_shakespeare \
           --workdir=DIR
Expect:  126 runs for two data sets, half a minute each on two cores, and half
         of that for seeds after the first, whose programs are compiled already
"""

from configs.studies import from_scratch
from folding.studies import methods
from folding.studies.study import Study

_METHODS = ("dense", "dense-small", "ours", "fpp", "magnitude", "sparsegpt")


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  found = from_scratch.datasets(where)
  for base in found.values():
    base.data.length //= 2
    base.data.batch_size = min(base.data.batch_size, 32)
    base.train.steps, base.train.eval_every = 200, 40
  return Study(
    datasets=found,
    methods=methods.pick(*_METHODS),
    levels=(0.3, 0.5, 0.7, 0.8),
    seeds=(0, 1, 2),
  )
