"""Language modelling: `--config=configs/lm.py:NAME`.

NAME is python_stdlib, tiny_shakespeare, lm1b, wiki40b, any other TFDS name
with a text field, or the path of a .txt file or of a folder with
{train,valid,test}.txt. TFDS needs `pip install tensorflow` to prepare any data
set but python_stdlib (and apache-beam for wiki40b).

Run:     folding train --config=configs/lm.py:my.txt --workdir=RUN
Result:  70% smaller than its dense baseline
Less:    add --config.preset=moderate (30% smaller), or --config.dense=True
"""

from folding import config as c

_TFDS = {"wiki40b": "wiki40b/en"}


def get_config(name: str = "python_stdlib") -> c.Config:
  """Returns the configuration for a data set."""
  name = _TFDS.get(name, name)
  data = c.data_at(name, vocab_size=1024, length=128, batch_size=32)
  return c.Config(
    task="lm",
    data=data,
    model=c.ModelConfig(num_layers=4, width=128, num_heads=16),
    fpp=c.FPPConfig(granularity="neuron", score="saliency"),
    train=c.TrainConfig(
      steps=2000,
      eval_every=200,
      eval_batches=20,
      # Ablation: docs/experiments.md, "Learning rates of folded weights".
      qk_rate=0.3,
      v_rate=5.0,
      slope_rate=30.0,
    ),
  )
