"""Trains a language model on 8,192 tokens of context, in linear time.

Run:     folding train --config=configs/long_lm.py --workdir=runs/long
Time:    34 minutes of CPU time beside other work; alone a step takes 0.9 s per
         sequence, and 6.0 s in the dense baseline
Result:  70% smaller, 1.866 test bits per byte (71a1c98)
Dense:   add --config.dense=True (and another --workdir): the baseline, exact

The shape and the text of configs/quickstart.py; sequences are 64 times as long.
"""

from configs import quickstart
from folding import config as c


def get_config() -> c.Config:
  """Returns the configuration."""
  return c.edited(
    quickstart.get_config(),
    {
      "data.length": 8192,
      "data.batch_size": 2,
      "data.eval_batch_size": 2,
      "model.attention": "linear",
      "train.steps": 600,
      "train.eval_every": 150,
    },
  )
