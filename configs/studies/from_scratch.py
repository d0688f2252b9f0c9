"""26 methods from scratch: `folding study configs/studies/from_scratch.py`.

With `:FOLDER`, the data sets are the folders in it that have train.tsv
(classification) or train.txt (language modelling), or those named:
`from_scratch.py:FOLDER,trec,subj`. Without, they are the three and eight TFDS
names of lm.py and classify.py, which are downloaded and prepared by TensorFlow.

Run:     folding study configs/studies/from_scratch.py:FOLDER --workdir=DIR
Part:    add --shard=1/2 here and --shard=2/2 on another machine with the same
         DIR; --jobs=2 for two runs at a time, each on half of the cores
"""

import os

from folding import config as c
from folding.schema import require
from folding.studies import methods
from folding.studies.study import Study

_LM = ("tiny_shakespeare", "lm1b", "wiki40b")
_CLASSIFY = (
  *("trec", "ag_news_subset", "imdb_reviews", "yelp_polarity_reviews"),
  *("glue/sst2", "glue/cola", "sentiment140", "clinc_oos"),
)
METHODS = (
  *("dense", "dense-again", "dense-small"),
  *("ours", "ours-forward", "ours-weight", "ours-v", "fold"),
  *("fpp", "fpp-all", "low-rank-qk"),
  *("random", "magnitude", "movement", "saliency"),
  *("activation", "relative", "neuron", "heads"),
  *("magnitude-after", "wanda", "sparsegpt"),
)


def get_study(where: str = "") -> Study:
  """Returns the study of folders of data, or of data sets of TFDS."""
  return Study(datasets=datasets(where), methods=methods.pick(*METHODS))


def datasets(where: str) -> dict[str, c.Config]:
  """Returns {name: base config}; see the head of this file for `where`.

  Raises:
    ConfigError: there is no such folder, or no data in one that is named.
  """
  if not where:
    found = {name: language_model(name) for name in _LM}
    return found | {n.split("/")[-1]: classifier(n) for n in _CLASSIFY}
  folder, *names = where.split(",")
  require(os.path.isdir(folder), f"there is no folder {folder!r}")
  found = {}
  for name in names or sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    if os.path.isfile(os.path.join(path, "train.tsv")):
      found[name] = classifier(path)
    elif os.path.isfile(os.path.join(path, "train.txt")):
      found[name] = language_model(path)
    else:
      require(not names, f"{path!r} has neither train.tsv nor train.txt")
  return found


def classifier(name: str) -> c.Config:
  """Returns a classifier of two layers; as configs/classify.py, shorter."""
  from configs import classify

  base = classify.get_config(name)
  base.train.steps, base.train.eval_every = 300, 50
  base.train.learning_rate = 1.5e-3
  base.train.tensorboard = False
  return base


def language_model(name: str) -> c.Config:
  """Returns a language model of three layers; as configs/lm.py, shorter."""
  from configs import lm

  base = lm.get_config(name)
  base.data.batch_size, base.model.num_layers = 16, 3
  base.data.max_bytes = 2_000_000
  base.train.steps, base.train.eval_every = 400, 100
  base.train.learning_rate = 6e-3
  base.train.eval_batches = 10
  base.train.tensorboard = False
  return base
