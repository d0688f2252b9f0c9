r"""Fourteen methods from scratch, at four savings, with three seeds.

ARGUMENT is FOLDER, whose data sets are the folders in it with train.tsv
(classification) or train.txt (language modelling), or FOLDER,NAME,... for those
named; python_stdlib needs no data in it. Without ARGUMENT they are the three and
eight TFDS names of lm.py and classify.py, which TFDS downloads and prepares.

Command: folding study configs/studies/from_scratch.py:FOLDER --workdir=DIR
Time:    153 runs per data set, about a minute each on two cores
Expect:  at 70% `ours` has the least perplexity of all methods; classifiers
         differ by less than seeds do, except `random`, `wanda` and `sparsegpt`
         (docs/measured.md)
"""

import os

from folding import config as c
from folding.errors import ConfigError
from folding.studies import methods
from folding.studies.grid import Study

_LM = ("tiny_shakespeare", "lm1b", "wiki40b")
_CLASSIFY = (
  "trec",
  "ag_news_subset",
  "imdb_reviews",
  "yelp_polarity_reviews",
  "glue/sst2",
  "glue/cola",
  "sentiment140",
  "clinc_oos",
)


def get_study(where: str = "") -> Study:
  """Returns the study; see the head of this file for `where`."""
  return Study(datasets=datasets(where), methods=methods.METHODS)


def datasets(where: str) -> dict[str, c.Config]:
  """Returns {name: base config}; see the head of this file for `where`.

  Raises:
    ConfigError: there is no such folder, or no data in one that is named.
  """
  if not where:
    found = {name: language_model(name) for name in _LM}
    return found | {n.split("/")[-1]: classifier(n) for n in _CLASSIFY}
  folder, *names = where.split(",")
  if not os.path.isdir(folder):
    raise ConfigError(f"there is no folder {folder!r}")
  found = {}
  for name in names or sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    if os.path.isfile(os.path.join(path, "train.tsv")):
      found[name] = classifier(path)
    elif os.path.isfile(os.path.join(path, "train.txt")):
      found[name] = language_model(path)
    elif name == "python_stdlib":
      found[name] = language_model(name)
    elif names:
      raise ConfigError(f"{path!r} has neither train.tsv nor train.txt")
  if not found:
    raise ConfigError(f"no folder in {folder!r} has train.tsv or train.txt")
  return found


def classifier(name: str) -> c.Config:
  """Returns a classifier of two layers: configs/classify.py with fewer steps."""
  from configs import classify

  return c.edited(
    classify.get_config(name),
    {
      "train.steps": 300,
      "train.eval_every": 50,
      "train.learning_rate": 1.5e-3,
      "train.tensorboard": False,
    },
  )


def language_model(name: str) -> c.Config:
  """Returns a language model of three layers: configs/lm.py, shorter."""
  from configs import lm

  return c.edited(
    lm.get_config(name),
    {
      "data.batch_size": 16,
      "model.num_layers": 3,
      "data.max_bytes": 2_000_000,
      "train.steps": 400,
      "train.eval_every": 100,
      "train.learning_rate": 6e-3,
      "train.eval_batches": 10,
      "train.tensorboard": False,
    },
  )
