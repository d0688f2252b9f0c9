"""The core of from_scratch.py: eight methods, four levels, shorter runs.

Run:     folding study configs/studies/short.py:FOLDER,trec,tiny_shakespeare \
           --workdir=DIR
Expect:  180 runs for two data sets, 6 of them the dense part that sparsegpt
         starts from; half a minute each on two cores, and half of that for seeds
         after the first, whose programs are compiled already
"""

from configs.studies import from_scratch
from folding.config import Config
from folding.studies import methods
from folding.studies.study import Study

_METHODS = (
  *("dense", "dense-small", "ours", "ours-weight", "ours-v"),
  *("fpp", "magnitude", "sparsegpt"),
)


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  return Study(datasets=datasets(where), methods=methods.pick(*_METHODS))


def datasets(where: str) -> dict[str, Config]:
  """Returns the data sets of from_scratch.py, each to be trained shorter."""
  found = from_scratch.datasets(where)
  for base in found.values():
    base.data.length //= 2
    base.data.batch_size = min(base.data.batch_size, 32)
    base.train.steps, base.train.eval_every = 200, 40
  return found
