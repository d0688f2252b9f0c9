"""Recipe of compression for `folding.compress`, configs/pretrained and embed."""

import dataclasses
import re

from folding.config import (
  CompressConfig,
  Config,
  DistillConfig,
  FoldConfig,
  FPPConfig,
  ModelConfig,
)
from folding.errors import ConfigError
from folding.models import hf_config
from folding.tasks import task_of


def recipe(
  config: Config,
  saving: float | None = None,
  *,
  structured: bool | None = None,
  uniform: bool = False,
  kept: float | None = None,
) -> Config:
  """Returns the config that compresses a trained model.

  Arrays of an encoder are small before training begins. For a language model
  FPP by default zeroes single weights while training: stories260K at half its size
  has perplexity 8.1, and 10.7 if it is structured (one seed, the same 300 steps).

  Args:
    config: Config of a dense model; its sections `fold`, `fpp` and `compress`
      are replaced.
    saving: Fraction of the parameters to save; None: that of the preset.
    structured: Whether neurons, heads and ranks leave the arrays, not single
      weights; None: unless it is a language model.
    uniform: Whether all layers get one size, see `CompressConfig.uniform`;
      implies `structured`.
    kept: Fraction of the tokens to keep, those that the text uses most; None: all.

  Raises:
    ConfigError: tokens would leave arrays that keep their size.
  """
  task, m = task_of(config), config.model
  by_weight = task.predicts_tokens if structured is None else not structured
  by_weight = by_weight and not uniform
  # A low rank would not make an output layer smaller.
  keeps_embedding = not by_weight and task.predicts_tokens and m.tie_embeddings
  # DeBERTa-v2 is a BERT with an embedding of low rank.
  low = dataclasses.replace(m, embed_width=1, project_first=True)
  is_fit = hf_config.misfit(low, "deberta-v2") is None
  is_shared = uniform and is_fit and not m.embed_width
  keeps_embedding |= uniform and not is_shared
  granularity = "weight" if by_weight or keeps_embedding else "rank"
  if kept is not None:
    if by_weight:
      raise ConfigError(
        "a smaller vocabulary needs smaller arrays; add --structured or --uniform "
        "(in Python structured=True)"
      )
    granularity = "trim"
  # A plan that prunes single weights may choose a diagonal W_V, if heads share out
  # the width and a bias of W_O can replace that of W_V.
  shares_width = m.num_heads * _head_dim(m) == m.width
  has_place = bool(m.use_bias) or not m.qkv_bias
  is_free = by_weight and shares_width and has_place
  fold = FoldConfig(
    groups=0 if m.qk_norm or uniform else _groups(m),  # 0: cannot be folded
    rope="pairs" if m.positions == "rope" else "copy",
    values="diagonal" if is_free else "dense",
    embedding_shared=is_shared,
  )
  fpp = FPPConfig(
    granularity="weight" if by_weight else "neuron",
    attention="output" if by_weight else "none",  # of low rank instead
    embedding_granularity=granularity,
    # For language models too: with 0.2 stories260K has perplexity 9.8.
    embedding_share=0.0 if keeps_embedding else 1.0,
    embedding=None if kept is None else 1 - kept,
    saving=saving,
    # Early, so that most of the training is recovery from pruning.
    begin=0.02,
    end=0.3,
  )
  compress = CompressConfig(
    plan="auto",
    uniform=uniform,
    prune="none" if by_weight else "sparsegpt",
    # Vectors of MiniLM at 70% keep 0.95 of Spearman's correlation on SICK by
    # errors, 0.93 by share. Classifiers are as accurate by share, and faster.
    embedding="errors" if task.makes_vectors else "share",
  )
  return dataclasses.replace(
    config, preset="paper", fold=fold, fpp=fpp, compress=compress
  )


def taught(config: Config, saving: float | None = None) -> Config:
  """Returns the config of a model that knows its task, and teaches the smaller one.

  Args:
    config: Of a dense classifier or language model.
    saving: As for `recipe`.
  """
  # Up to half of a classifier there is less to recover (docs/experiments.md).
  is_mild = config.task != "lm" and saving is not None and saving <= 0.5
  m = config.model
  rate = 1e-4 if is_mild else recovery_rate(m.width)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(m, dropout=0.0),
    distill=DistillConfig(logits=0.7, hidden=10.0),
    train=dataclasses.replace(config.train, learning_rate=rate),
  )


def _head_dim(m: ModelConfig) -> int:
  return m.head_dim or max(1, m.width // m.num_heads)


def _groups(m: ModelConfig) -> int:
  """Returns about a quarter of a head, for plans that fold all layers alike."""
  K = _head_dim(m)
  if m.positions == "rope":  # by whole pairs, which need not divide it
    return max(2, K // 8 * 2)
  return max(G for G in range(1, max(2, K // 4 + 1)) if K % G == 0)


def recovery_rate(width: int) -> float:
  """Returns a learning rate for a compressed model of width D.

  It falls with the width, as the best rates of matrices do (Yang et al. 2022):
  5e-4 for MiniLM, 3e-3 for stories260K (docs/experiments.md).
  """
  return min(3e-3, 0.192 / width)


def path_and_saving(where: str) -> tuple[str, float | None]:
  """Returns the parts of "PATH,SAVING"; the saving is None in "PATH".

  Raises:
    ConfigError: the saving is not a fraction between 0 and 1.
  """
  found = re.fullmatch(r"(.*),(\d*\.?\d+)%?", where)
  path, saving = (found[1], float(found[2])) if found else (where, None)
  if saving is not None and (where.endswith("%") or not 0 < saving < 1):
    raise ConfigError(
      f"{where!r}: the saving is a fraction between 0 and 1, such as PATH,0.3"
    )
  return path, saving
