r"""Makes a trained model smaller and recovers it: `--config=configs/pretrained.py:PATH`.

PATH is a Hugging Face folder or hub id (families: docs/how-to/pretrained.md), or a
dense run. PATH,0.3 makes it 30% smaller instead of 70%. Arrays are smaller from the
first step: a plan chooses the heads, the groups of W_Q and W_K, the rank of W_V and
W_O and the neurons of each layer, and the rank of the embedding. A language model
loses more with fewer neurons, so FPP prunes its single weights while it recovers.

Fine-tune:  folding train --config=configs/pretrained.py:PATH --workdir=DENSE \
              --config.data.path=FOLDER --config.dense=True
            for scores add --config.task=regress, for several labels multilabel
Compress:   folding train --config=configs/pretrained.py:DENSE --workdir=RUN
            the dense run is the teacher (figures: README)
In one run: the first command without --config.dense=True. Use it for a language
            model: its teacher is the checkpoint. A classifier then has no teacher
            and is less accurate
"""

import dataclasses
import os

from folding import config as c
from folding.errors import ConfigError
from folding.models import hf_weights
from folding.models.shape import shape_of
from folding.training.recipe import path_and_saving, recipe, taught


def get_config(where: str = "") -> c.Config:
  """Returns the configuration for "PATH", or "PATH,SAVING" with a fraction.

  Raises:
    ConfigError: no path is given, or no model is there.
  """
  path, saving = path_and_saving(where)
  if not path:
    raise ConfigError(
      "give configs/pretrained.py:PATH, a checkpoint folder, hub id or dense run"
    )
  is_run = os.path.isdir(os.path.join(path, "checkpoints"))
  if is_run:
    found = c.load(os.path.join(path, "config.json"))
    task, model = found.task, found.model
    max_length = shape_of(found).max_length
    data = dataclasses.replace(
      found.data,
      tokenizer=os.path.join(path, "tokenizer.json"),
      # Reads on where the run stopped.
      first_batch=found.data.first_batch + found.train.steps,
    )
  else:
    folder = hf_weights.find_pretrained(path)
    described = hf_weights.describe_pretrained(folder)
    model, max_length = described.config, described.max_length
    is_lm = model.causal and not described.num_classes
    task = "lm" if is_lm else described.task
    data = c.DataConfig(
      name="",  # the user has to set the data
      tokenizer=str(hf_weights.find_tokenizer(folder)),
      length=min(max_length, 128 if is_lm else 64),
      batch_size=16,
    )
  config = c.Config(
    task=task,
    preset="paper",
    pretrained=path,
    data=data,
    model=dataclasses.replace(model, max_length=max_length, dropout=0.1),
    train=c.TrainConfig(
      steps=500,
      learning_rate=1e-4,
      weight_decay=0.01,
      eval_every=250,
    ),
  )
  # An encoder learns the task, as its head may be for other classes.
  if is_run or task == "lm":
    config = taught(config, saving)
  return recipe(config, saving)
