"""What a run directory stands for: config, data, model, optimizer, shapes."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding.compression.accounting import account
from folding.compression.fpp import fpp_counts
from folding.config import Config
from folding.data.batches import Data
from folding.models.transformer import make_model, param_shapes
from folding.training import distributed, sharding
from folding.training import optimizer as optimizer_lib
from folding.training.evaluate import evaluate, make_eval_step
from folding.training.result import write_result
from folding.training.step import TrainState, init_state, state_shapes
from folding.training.trim import token_usage


class Run:
  """What a run directory stands for: its config, data, model and optimizer.

  Attributes:
    config: Resolved.
    data: Batches, tokenizer, labels.
    mesh: Where arrays lie.
    model: The Linen model.
    tx: The optimizer, FPP included.
    rules: What FPP prunes.
    like: Shapes and shardings of the training state.
    unsplit: A line for each parameter, and for a batch, that the mesh does not
      divide.
    dense_params: Shapes of the dense twin's parameters.
    teacher: The dense model to learn from and its parameters, None without.
  """

  def __init__(self, config: Config, data: Data, start: Any = None):
    self.config, self.data = config, data
    self.mesh = sharding.make_mesh(config.mesh)
    for rows in (config.data.batch_size, config.data.eval_batch_size):
      sharding.require_divides(self.mesh, rows)
    make = functools.partial(make_model, num_classes=data.num_classes)
    self.model = make(config, data.tokenizer.vocab_size)
    before = data.tokenizer.plain_size  # tokens may have been removed
    self.dense_params = param_shapes(
      make(config_lib.dense_twin(config), before)
    )
    unshrunk = param_shapes(make(config_lib.unshrunk(config), before))
    self.rules = optimizer_lib.make_rules(config, unshrunk, self.dense_params)
    removed = optimizer_lib.removed_units(
      self.rules, unshrunk, param_shapes(self.model)
    )
    self.tx = optimizer_lib.make_optimizer(config, self.rules, removed)
    self._eval_step = make_eval_step(self.model)
    self._init = functools.partial(
      init_state, self.model, self.tx, config.data.length
    )
    self._seed = np.uint32(config.seed % 2**32)
    self._start = start  # parameters; None: drawn by the seed
    self.teacher: tuple[Any, Any] | None = None
    state = state_shapes(self._init)
    rules = config.mesh.rules
    rows = config.data.batch_size // config.train.accumulate
    self.unsplit = [
      *sharding.unsplit(self.mesh, state.params, rules),
      *sharding.undivided(self.mesh, rows),
    ]
    self.like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      sharding.tree_shardings(self.mesh, state, rules=rules),
    )

  @property
  def num_parameters(self) -> int:
    """Number of parameters, zeros included."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(self.like.params))

  @property
  def state_shardings(self) -> TrainState:
    """Shardings of the training state."""
    return jax.tree.map(lambda x: x.sharding, self.like)

  def init(self) -> TrainState:
    """Returns the state before the first step, placed on the mesh."""
    if self._start is None:
      return jax.jit(self._init, out_shardings=self.state_shardings)(self._seed)
    where = self.state_shardings
    return jax.jit(
      lambda params: TrainState(
        jnp.zeros([], jnp.int32), params, self.tx.init(params)
      ),
      out_shardings=where,
    )(jax.device_put(self._start, where.params))

  def counts(self, state: TrainState | None) -> dict[str, float]:
    """Returns `fpp_counts` as numbers, {} where nothing is pruned.

    None stands for a state before the first check, of which all is trainable.
    """
    if not self.rules:
      return {}
    if state is None:
      return {"selected": 1.0, "frozen": 0.0, "zero": 0.0}
    count = jax.jit(
      functools.partial(fpp_counts, self.rules),
      out_shardings=sharding.whole(self.mesh),
    )
    found = jax.device_get(count(state.opt_state, state.params))
    return {name: float(x) for name, x in found.items()}

  def constants(self) -> dict[str, Any]:
    """Returns the arrays that each step needs beside its batch, on the mesh."""
    found: dict[str, Any] = {"seed": self._seed}
    f = self.config.fpp
    if f.embedding_granularity != "weight" and self.rules:
      size = self.like.params["embed"]["embedding"].shape[0]
      found["usage"] = token_usage(self.data, size)
    found = jax.device_put(found, sharding.whole(self.mesh))
    if self.teacher is not None:
      params = self.teacher[1]
      places = sharding.tree_shardings(self.mesh, params)
      found["teacher_params"] = jax.device_put(params, places)
    return found

  def evaluate(self, params: Any, split: str, limit: int | None = None) -> dict:
    """Returns the figures of a split ("valid" or "test").

    With a limit, those of its first batches, whose bytes are taken to be the
    same share of the split's.
    """
    data = self.data
    batches, share = data.eval_batches(split), 1.0
    if limit is not None:
      batches = itertools.islice(batches, limit)
      seen = limit * self.config.data.eval_batch_size
      share = min(1.0, seen / data.num_examples[split])
    num_bytes = None
    if self.config.task == "lm":
      num_bytes = share * data.num_bytes[split]
    return evaluate(
      self._eval_step, params, batches, self.mesh, num_bytes=num_bytes
    )

  def write_result(
    self,
    workdir: str,
    state: TrainState,
    seconds: float,
    speed: float | None,
    step: int,
    test: dict[str, Any] | None = None,
  ) -> None:
    """Measures the parameters and writes `result.json`."""
    params = distributed.to_host(state.params)
    result = {
      "finished": test is not None,
      "steps": step,
      "total_steps": self.config.train.steps,
      "seconds": seconds,
      "tokens_per_second": speed,
      "test": test,
      **account(params, self.dense_params),
    }
    with distributed.together("another process cannot write, and says why"):
      if distributed.is_main():
        write_result(workdir, result)
