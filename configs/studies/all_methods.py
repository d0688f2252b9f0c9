r"""All 26 methods of from_scratch.py, at four levels, in the runs of short.py.

Run:     folding study \
           configs/studies/all_methods.py:FOLDER,trec,tiny_shakespeare --workdir=DIR
Expect:  279 runs a data set, 3 of them the dense part that others start from;
         about half a minute each of a classifier on two cores, with --jobs=2,
         and a minute of a language model
"""

from configs.studies import from_scratch, short
from folding.studies import methods
from folding.studies.study import Study


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  return Study(
    datasets=short.datasets(where), methods=methods.pick(*from_scratch.METHODS)
  )
