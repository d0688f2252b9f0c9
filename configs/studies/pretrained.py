r"""Methods that start from a trained checkpoint.

A dense model is tuned for 60% of the steps; each method starts from it and
recovers with it as teacher for the rest. The dense reference is tuned for all
of them; dense-again goes on like the methods, and nothing is removed.
CHECKPOINT is as in configs/pretrained.py; data sets are the folders in FOLDER of
the checkpoint's task, or those named.

Run:     folding study \
           configs/studies/pretrained.py:CHECKPOINT,FOLDER,trec,subj,mr,sst2 \
           --workdir=DIR
Expect:  69 runs a data set, 3 of them the dense part; of MiniLM (22.7 million
         parameters) two to six minutes each on two cores
"""

import dataclasses

from configs import pretrained
from configs.studies import from_scratch
from folding import config as c
from folding.config import Config
from folding.schema import require
from folding.studies import methods
from folding.studies.methods import Edits, Method
from folding.studies.study import DENSE, OURS, Study

_METHODS = (
  *("dense", "dense-again"),
  *("ours", "fpp-all", "magnitude", "neuron", "sparsegpt"),
)
# As configs/pretrained.py recovers a model that knows its task.
_RECOVERY: Edits = {
  "model.dropout": 0.0,
  "distill.logits": 0.7,
  "distill.hidden": 10.0,
}


def get_study(where: str = "") -> Study:
  """Returns the study of a checkpoint and folders of data.

  Raises:
    ConfigError: there is no checkpoint, or no folder of its task.
  """
  checkpoint, comma, folders = where.partition(",")
  require(bool(comma), "give configs/studies/pretrained.py:CHECKPOINT,FOLDER")
  found = {}
  for name, scratch in from_scratch.datasets(folders).items():
    base = pretrained.get_config(checkpoint)
    if base.task == scratch.task:
      found[name] = _base(base, scratch)
  require(bool(found), f"{folders!r} has no data of {checkpoint!r}'s task")
  return Study(
    datasets=found,
    methods={
      name: method if name == DENSE else _recovered(name, method)
      for name, method in methods.pick(*_METHODS).items()
    },
  )


def _base(base: Config, scratch: Config) -> Config:
  base.data.path = scratch.data.path
  base.distill = c.DistillConfig()  # only what recovers has a teacher
  base.train.learning_rate = 1e-4
  base.data.length = min(base.data.length, 48)
  base.train.steps, base.train.eval_every = 400, 80
  base.train.tensorboard = False
  return base


def _recovered(name: str, method: Method) -> Method:
  """Returns a method that starts from the tuned dense model."""
  about = method.about
  # The better of the two for ours and for SparseGPT, in validation on TREC at 70%:
  # what is pruned at once has more to mend. The others are gradual, as ours is;
  # what is not pruned goes on as `recovery` has it where little is.
  peak = {"sparsegpt": 5e-4, "dense-again": 1e-4}.get(name, 2e-4)
  if name == OURS:
    about = (
      "folding and FPP: above 50% W_V diagonal, above 40% W_Q and W_K at the G of "
      "configs/pretrained.py, the rest by FPP, of feed-forward layers whole "
      "neurons"
    )

  def edits(base: Config, level: float | None) -> Edits:
    own = method.edits
    own = own(base, level) if callable(own) else own
    recovery = pretrained.recovery(level, base.task) if level else {}
    if name != OURS:
      recovery = {k: v for k, v in recovery.items() if k.startswith("train.")}
    return {"train.learning_rate": peak, **_RECOVERY, **own, **recovery}

  return dataclasses.replace(method, about=about, edits=edits, after=True)
