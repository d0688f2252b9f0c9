"""Classes of texts or pairs: `--config=configs/classify.py:NAME`.

NAME is python_stdlib, trec, ag_news_subset, imdb_reviews,
yelp_polarity_reviews, glue/sst2, glue/cola, sentiment140, clinc_oos, any other
TFDS name with a text and a label, or the path of a .tsv, .csv, .jsonl or .parquet
file or of a folder with {train,valid,test} of these. TFDS needs
`pip install tensorflow` to prepare any data set but python_stdlib.

Run:     folding train --config=configs/classify.py:FOLDER --workdir=RUN
Result:  70% smaller than its dense baseline
Scores:  add --config.task=regress; several labels: --config.task=multilabel
Less:    add --config.preset=moderate (30% smaller), or --config.dense=True
"""

from folding import config as c

# Columns of data sets whose first text or column "label" is not the right one.
_FIELDS = {
  "ag_news_subset": {"text_field": "description"},  # not the title alone
  "clinc_oos": {"label_field": "intent"},  # 151 classes, not the 10 domains
}


def get_config(name: str = "python_stdlib") -> c.Config:
  """Returns the configuration for a data set."""
  fields = _FIELDS.get(name, {})
  data = c.data_at(name, vocab_size=4096, length=64, batch_size=64, **fields)
  return c.Config(
    task="classify",
    data=data,
    model=c.ModelConfig(
      num_layers=2, width=128, num_heads=16, causal=False, dropout=0.2
    ),
    fpp=c.FPPConfig(granularity="neuron", score="saliency"),
    train=c.TrainConfig(
      steps=600, learning_rate=1e-3, eval_every=60, weight_decay=0.1
    ),
  )
