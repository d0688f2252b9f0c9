"""A model without data: its optimizer, its state, and batches of noise."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from folding import config as c
from folding.compression.sites import make_sites
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.tasks import task_of
from folding.training import optimizer
from folding.training.step import (
  StepOptions,
  TrainState,
  init_state,
  train_step,
)

VOCAB = 128
LENGTH = 8


def config(**fields: Any) -> c.Config:
  """Returns a resolved config: one layer, mask updates at 0, 2, 4, 6."""
  values = {
    "data": c.DataConfig(length=LENGTH),
    "model": c.ModelConfig(num_layers=1, width=32, num_heads=4),
    "fpp": c.FPPConfig(
      linear=0.7, embedding=0.7, begin=0.0, end=0.75, checks=3
    ),
    "train": c.TrainConfig(steps=8, learning_rate=1e-2, warmup=0.0),
  }
  return c.resolve(c.Config(**(values | fields)))


# All seeds share the program.
_init_state = jax.jit(init_state, static_argnums=(0, 1, 2))


class Tiny(NamedTuple):
  """The parts of a run, without its data."""

  config: c.Config
  model: Any
  rules: list
  tx: Any

  def init(self, seed: int = 0) -> TrainState:
    return _init_state(self.model, self.tx, LENGTH, seed)

  def step(self, is_mask_update: bool, **options: Any):
    """Returns the jitted training step."""
    task = task_of(self.config)
    values = {"model": self.model, "tx": self.tx, "task": task}
    static = StepOptions(**(values | {"rules": self.rules} | options))
    return jax.jit(
      functools.partial(
        train_step, options=static, is_mask_update=is_mask_update
      )
    )


def make(values: c.Config) -> Tiny:
  """Builds the model, the rules and the optimizer of a config."""
  model = make_model(shape_of(values), VOCAB, num_classes=3)
  params, dense = shapes(values), shapes(c.dense_baseline(values))
  rules = optimizer.make_rules(shape_of(values), values.fpp, params, dense)
  layers = shape_of(values).layers
  tx = optimizer.make_optimizer(values, layers, rules)
  return Tiny(values, model, rules, tx)


def shapes(values: c.Config) -> Any:
  """Returns the shapes of a model's parameters."""
  return param_shapes(make_model(shape_of(values), VOCAB, num_classes=3))


def rules_of(values: c.Config) -> dict[str, tuple[float, str]]:
  """Returns {matched parameter: (target, granularity)}."""
  params = shapes(values)
  dense = shapes(c.dense_baseline(values))
  rules = optimizer.make_rules(shape_of(values), values.fpp, params, dense)
  return {
    site.name: (rules[site.rule].target, rules[site.rule].granularity)
    for site in make_sites(rules, params)
  }


def noise(tree: Any, seed: int = 0) -> Any:
  """Returns an array of nonzero numbers for each shape of a tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), tree
  )


def batch(seed: int, size: int = 16) -> dict[str, Any]:
  """Returns a batch of next-token prediction, a third of it padding."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, VOCAB, (size, LENGTH + 1)).astype(np.int32)
  return {
    "tokens": ids[:, :-1],
    "targets": ids[:, 1:],
    "weights": (rng.uniform(size=(size, LENGTH)) < 2 / 3).astype(np.float32),
  }
