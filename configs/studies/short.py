r"""Seven methods of from_scratch.py, in shorter runs.

ARGUMENT is as in from_scratch.py.

Command: folding study configs/studies/short.py:FOLDER,trec,tiny_shakespeare \
           --workdir=DIR
Time:    78 runs per data set, half a minute each on two cores
Expect:  the main rows of the first tables of docs/measured.md
"""

from configs.studies import from_scratch
from folding.config import Config, edited
from folding.studies import methods
from folding.studies.grid import Study

_METHODS = (
  "dense",
  "dense-small",
  "ours",
  "ours-weight",
  "fpp",
  "magnitude",
  "sparsegpt",
)


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  return Study(datasets=datasets(where), methods=methods.pick(*_METHODS))


def datasets(where: str) -> dict[str, Config]:
  """Returns the data sets of from_scratch.py with shorter texts and fewer steps."""
  return {
    name: edited(
      base,
      {
        "data.length": base.data.length // 2,
        "data.batch_size": min(base.data.batch_size, 32),
        "train.steps": 200,
        "train.eval_every": 40,
      },
    )
    for name, base in from_scratch.datasets(where).items()
  }
