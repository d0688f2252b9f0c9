r"""Makes a sentence encoder smaller, without labels: `--config=configs/embed.py:PATH`.

PATH is a Hugging Face folder or hub id. Pooling and normalisation are those of its
sentence-transformers files; for an encoder without them, the mean over tokens.
PATH,0.5 makes it 50% smaller instead of 70%. A plan chooses the heads, the groups of
W_Q and W_K, the rank of W_V and W_O, the neurons of each layer and the rank of
the embedding, by how far the vectors move. All tokens stay. Then the model is trained
to return the vectors of the checkpoint on the text.

  folding train --config=configs/embed.py:PATH --workdir=RUN \
    --config.data.path=FILE        (.txt with one text per line, or .jsonl)
  folding encode RUN texts.txt --output=vectors.npy

--config.data.sts=FILE.tsv (columns score, sentence1, sentence2) adds the rank
correlation of cosines and scores to the metrics. Figures: docs/how-to/embed.md.
"""

import dataclasses
import os

from folding import config as c
from folding.errors import ConfigError
from folding.models import hf_weights, sentence
from folding.training.recipe import path_and_saving, recipe, recovery_rate


def get_config(where: str = "") -> c.Config:
  """Returns the configuration for "PATH", or "PATH,SAVING" with a fraction.

  Raises:
    ConfigError: no path is given, or no encoder is there.
  """
  path, saving = path_and_saving(where)
  if not path:
    raise ConfigError("give configs/embed.py:PATH, a checkpoint or hub id")
  if os.path.isdir(os.path.join(path, "checkpoints")):
    raise ConfigError(
      f"{path} is a run; give the checkpoint of the dense encoder"
    )
  folder = hf_weights.find_pretrained(path)
  how = sentence.read(folder)
  described = hf_weights.describe_pretrained(folder)
  if how is None and described.config.causal:
    raise ConfigError(
      f"{path} is a language model, and no {sentence.MODULES} says how it makes a "
      f"vector of a text; configs/pretrained.py:{path} makes it smaller"
    )
  how = how or sentence.Sentence()
  reads = min(described.max_length, how.max_length or described.max_length)
  model = dataclasses.replace(
    how.applied(described.config), dropout=0.0, max_length=reads
  )
  data = c.DataConfig(
    name="",  # the user has to set the data
    tokenizer=str(hf_weights.find_tokenizer(folder)),
    length=min(reads, 128),
    batch_size=32,
    valid_fraction=0.02,
    test_fraction=0.02,
  )
  config = c.Config(
    task="embed",
    preset="paper",
    pretrained=path,
    data=data,
    model=model,
    distill=c.DistillConfig(pairs=1.0, hidden=1.0),
    train=c.TrainConfig(
      steps=2000,
      learning_rate=recovery_rate(model.width),
      weight_decay=0.01,
      eval_every=250,
    ),
  )
  return recipe(config, saving)
