"""Language modelling with a model that is small from the start.

Attention is folded as in configs/lm.py, whose NAME this takes, too. A width of
96 instead of 128 and fewer neurons save the rest, and FPP prunes nothing.

Run:     folding train --config=configs/small_lm.py:my.txt --workdir=RUN
Result:  277,104 parameters from the first step, as many as configs/lm.py leaves
         (its report compares them with a dense model of its own width)
Figures: with three layers, in docs/experiments.md, "At equal cost"
"""

from configs import lm
from folding import config as c


def get_config(name: str = "python_stdlib") -> c.Config:
  """Returns the configuration for a data set."""
  return c.edited(
    lm.get_config(name),
    {
      # Heads keep 8 channels. Ablation: docs/experiments.md, "At equal cost".
      "model.width": 96,
      "model.num_heads": 12,
      "model.mlp_width": 168,
      "fpp.linear": 0.0,
      "fpp.embedding": 0.0,
    },
  )
