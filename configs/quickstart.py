"""Folds and prunes while training on the source of Python's own library.

Run:     folding train --config=configs/quickstart.py --workdir=runs/quickstart
Time:    three minutes on two idle CPU cores with AVX-512
Result:  218,344 stored parameters, 1.902 bits per byte
Dense:   add --config.dense=True (and another --workdir): the baseline
Small:   add --config.dense=True --config.model.width=64: a dense model of about
         the size that the quickstart stores
"""

from folding import config as c


def get_config() -> c.Config:
  """Returns the configuration."""
  return c.Config(
    task="lm",
    preset="paper",
    data=c.DataConfig(name="python_stdlib", vocab_size=1024, length=128),
    model=c.ModelConfig(num_layers=3, width=128, num_heads=16),
    fpp=c.FPPConfig(granularity="neuron", score="saliency"),
    train=c.TrainConfig(
      steps=550,
      learning_rate=6e-3,
      qk_rate=0.3,
      v_rate=5.0,
      slope_rate=30.0,
      eval_every=110,
      eval_batches=10,
    ),
  )
