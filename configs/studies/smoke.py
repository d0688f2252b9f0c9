"""Four tiny runs on a text file, as a check that studies work.

Command: folding study configs/studies/smoke.py:FILE.txt --workdir=DIR
Time:    less than a minute on two cores
Expect:  two runs of `dense` and two of `ours`; the figures mean nothing
"""

from folding import config as c
from folding.studies import methods
from folding.studies.grid import Study


def get_study(path: str) -> Study:
  """Returns the study of a text file."""
  base = c.Config(
    data=c.DataConfig(
      path=path,
      tokenizer="bytes",
      length=16,
      batch_size=8,
      eval_batch_size=8,
      max_bytes=20_000,
    ),
    model=c.ModelConfig(num_layers=1, width=16, num_heads=4, mlp_width=32),
    fpp=c.FPPConfig(checks=3),
    train=c.TrainConfig(
      steps=10, eval_every=5, log_every=1, tensorboard=False, learning_rate=1e-2
    ),
  )
  return Study(
    datasets={"text": base},
    methods=methods.pick("dense", "ours"),
    savings=(0.5,),
    seeds=(0, 1),
  )
