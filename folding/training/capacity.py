"""What a run takes on each device, found without allocating any of it.

Sizes come from shapes alone (`jax.eval_shape`) and from where a mesh places
them; on simulated devices also from XLA's analysis of the compiled step.
"""

import dataclasses
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from folding import config as config_lib
from folding import paths
from folding.compression.rules import make_sites
from folding.config import Config
from folding.data.batches import vocab_size
from folding.models.transformer import make_model, param_shapes
from folding.schema import ConfigError, require
from folding.training import losses, sharding
from folding.training import optimizer as optimizer_lib
from folding.training.step import init_state, state_shapes, train_step

GIB = 2**30
# {name: (GiB a device, of how many in the name one device is made)}: the TPUs
# v4 and v5p are named by their cores, of which two are one device.
KINDS = {
  "v4": (32.0, 2),
  "v5e": (16.0, 1),
  "v5p": (95.0, 2),
  "v6e": (32.0, 1),
  "a100": (80.0, 1),
  "h100": (80.0, 1),
  "h200": (141.0, 1),
}


@dataclasses.dataclass(frozen=True)
class Devices:
  """Devices of one kind; `gib` is the memory of each."""

  name: str
  count: int
  gib: float


def parse_devices(text: str) -> Devices:
  """Reads "v5p-64", "h100-8", "cpu-8" or "NAME:COUNTxGIB".

  Raises:
    ConfigError: it is none of these.

  Example:
    >>> parse_devices("v5p-64")
    Devices(name='v5p', count=32, gib=95.0)
    >>> parse_devices("mine:4x24")
    Devices(name='mine', count=4, gib=24.0)
  """
  custom = re.fullmatch(r"([\w-]+):([1-9]\d*)x(\d+(?:\.\d+)?)", text)
  if custom:
    return Devices(custom[1], int(custom[2]), float(custom[3]))
  name, _, number = text.rpartition("-")
  if re.fullmatch(r"[1-9]\d*", number):
    if name == "cpu":
      memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
      return Devices(name, int(number), memory / GIB / int(number))
    gib, cores = KINDS.get(name, (0.0, 1))
    if gib and int(number) % cores == 0:
      return Devices(name, int(number) // cores, gib)
  raise ConfigError(
    f"--devices is one of {', '.join(KINDS)} or cpu and a number, such as "
    f"v5p-64, or NAME:COUNTxGIB, such as mine:8x24; it is {text!r}"
  )


def plan(
  config: Config, devices: Devices, compiles: bool = False
) -> dict[str, Any]:
  """Returns what training takes on each device, dense and compressed.

  Args:
    config: Resolved.
    devices: What there is to be.
    compiles: Whether to ask XLA too; see `compiled_bytes`.

  Raises:
    ConfigError: the mesh cannot place the parameters.
  """
  # Read once, whatever the tokenizer.
  data = dataclasses.replace(config.data, vocab_size=vocab_size(config.data))
  config = dataclasses.replace(config, data=data)
  sizes = sharding.require_sizes(config.mesh, devices.count)
  mesh = AbstractMesh(tuple(sizes), sharding.AXES)
  found: dict[str, Any] = {
    "devices": dataclasses.asdict(devices),
    "mesh": dict(mesh.shape),
  }
  of = {"dense": config_lib.dense_twin(config), "compressed": config}
  for name, each in of.items():
    parts = needs(each, mesh)
    total = sum(parts.values())
    parameters, kept = stored(each)
    found[name] = {
      "bytes": parts,
      "total": total,
      "fits": total <= devices.gib * GIB,
      "parameters": parameters,
      "stored": kept,
    }
    if compiles:
      found[name]["xla"] = compiled_bytes(each, devices.count)
  shapes = _build(config)[-1].params
  rows = config.data.batch_size // config.train.accumulate
  found["unsplit"] = [
    *sharding.unsplit(mesh, shapes, config.mesh.rules),
    *sharding.undivided(mesh, rows),
  ]
  return found


def needs(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
  """Returns {part: bytes on each device} of training.

  Args:
    config: Resolved. The vocabulary is `data.vocab_size`.
    mesh: Where arrays lie.
  """
  model, _, _, state = _build(config)
  places = sharding.tree_shardings(mesh, state, rules=config.mesh.rules)

  def size(tree, where):
    return sum(
      math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
      for x, s in zip(
        jax.tree.leaves(tree), jax.tree.leaves(where), strict=True
      )
    )

  parameters = size(state.params, places.params)
  now, where = state.opt_state, places.opt_state
  return {
    "parameters": parameters,
    "gradients": parameters,
    "optimizer": size(now.inner, where.inner),
    "fpp bits": size(now.suspected, where.suspected),
    "fpp averages": size(now.averages, where.averages),
    "activations": _activations(config, model, state.params, mesh),
    **_teacher(config, mesh),
  }


def _teacher(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
  """Returns {"teacher": bytes on each device} of its parameters, if there is.

  They are kept in bfloat16; what it computes is not counted.
  """
  if not (config.distill.logits or config.distill.hidden):
    return {}
  params = _build(config_lib.dense_twin(config))[-1].params
  places = sharding.tree_shardings(mesh, params)  # as `Run.constants`
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
  return {
    "teacher": sum(2 * math.prod(s.shard_shape(x.shape)) for x, s in pairs)
  }


def stored(config: Config) -> tuple[int, int]:
  """Returns (parameters, those that are not zero at the end) of a config."""
  _, _, rules, state = _build(config)
  leaves = paths.flatten(state.params)
  total = sum(math.prod(x.shape) for x in leaves.values())
  zero = 0
  for site in make_sites(rules, state.params):
    share = rules[site.rule].target
    for name, axis in site.members.items():
      shape = leaves[name].shape
      units = math.prod(shape) if axis is None else shape[axis]
      zero += int(share * units) * (math.prod(shape) // units)
  return total, total - zero


def compiled_bytes(config: Config, count: int) -> dict[str, int]:
  """Returns XLA's {"state", "scratch"} bytes a device of a compiled step.

  On so many simulated CPU devices; a step with a check. To compile quickly,
  models of one and of two layers are, and what the second adds is taken to be
  what every further one adds.

  Raises:
    ConfigError: there are fewer devices.
  """
  require(
    len(jax.devices()) >= count,
    f"{count} devices cannot be simulated here: there are {len(jax.devices())}",
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:count])
  if config.model.num_layers == 1:  # what is by layer has no second value
    return _compiled(config, mesh)
  one, two = (_compiled(_with_layers(config, n), mesh) for n in (1, 2))
  more = config.model.num_layers - 1
  return {name: one[name] + more * (two[name] - one[name]) for name in one}


def _with_layers(config: Config, count: int) -> Config:
  """Returns the config with the first layers alone."""

  def cut(holder, *names):
    of_layers = {name: getattr(holder, name) for name in names}
    return {
      name: value[:count]
      for name, value in of_layers.items()
      if isinstance(value, tuple)
    }

  m, f = config.model, config.fold
  fpp = dataclasses.replace(config.fpp, **cut(config.fpp, "linear_layers"))
  if fpp.overall is not None:
    # Fewer layers may not reach it. How much is pruned takes no memory.
    part = fpp.overall if fpp.embedding_share else 0.0
    fpp.linear, fpp.embedding, fpp.overall = fpp.overall, part, None
  names = ("mlp_width", "dense_mlp_width", "heads")
  found = dataclasses.replace(
    config,
    model=dataclasses.replace(m, num_layers=count, **cut(m, *names)),
    fold=dataclasses.replace(f, **cut(f, "groups", "v_block")),
    fpp=fpp,
  )
  # Patterns may be of other layers alone.
  model = make_model(found, config.data.vocab_size, num_classes=2)
  there = paths.flatten(param_shapes(model))

  def matches(pattern):
    return any(re.fullmatch(pattern, name) for name in there)

  if fpp.exclude is not None and not matches(fpp.exclude):
    fpp.exclude = None
  rules = config.mesh.rules.split()
  kept = [rule for rule in rules if matches(rule.rpartition("=")[0])]
  found.mesh = dataclasses.replace(config.mesh, rules=" ".join(kept))
  return found


def _compiled(config: Config, mesh: Mesh) -> dict[str, int]:
  model, tx, rules, state = _build(config)
  where = sharding.tree_shardings(mesh, state, rules=config.mesh.rules)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    where,
  )
  rows = sharding.batch_sharding(mesh, config.data.batch_size)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in _batch(config, config.data.batch_size).items()
  }
  step = jax.jit(
    functools.partial(
      train_step,
      model=model,
      tx=tx,
      rules=rules,
      label_smoothing=config.train.label_smoothing,
      is_check=bool(rules),
      accumulate=config.train.accumulate,
      mesh=mesh,
    ),
    donate_argnums=0,
    out_shardings=(where, sharding.whole(mesh)),
  )
  found = step.lower(placed, batch).compile().memory_analysis()
  assert found is not None
  return {
    "state": found.argument_size_in_bytes,
    "scratch": found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes,
  }


def _build(config: Config) -> tuple[Any, Any, list[Any], Any]:
  """Returns (model, optimizer, rules, shapes of the training state)."""

  def model_of(config):
    return make_model(config, config.data.vocab_size, num_classes=2)

  def shapes(config):
    return param_shapes(model_of(config))

  dense = shapes(config_lib.dense_twin(config))
  rules = optimizer_lib.make_rules(config, shapes(config), dense)
  tx = optimizer_lib.make_optimizer(config, rules)
  model = model_of(config)
  init = functools.partial(init_state, model, tx, config.data.length)
  return model, tx, rules, state_shapes(init)


def _batch(config: Config, rows: int) -> dict[str, Any]:
  """Returns the shapes of a batch of texts of the full length."""
  tokens = jax.ShapeDtypeStruct((rows, config.data.length), jnp.int32)
  weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
  if config.task == "lm":
    return {"tokens": tokens, "targets": tokens, "weights": weights}
  one = jax.ShapeDtypeStruct((rows,), jnp.int32)
  return {
    "tokens": tokens,
    "mask": jax.ShapeDtypeStruct(tokens.shape, jnp.bool_),
    "labels": one,
    "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
  }


def _activations(config: Config, model: Any, params: Any, mesh: Any) -> int:
  """Returns the bytes a device keeps for the backward pass.

  Those of the rows that it has of a batch (or of a part of it), each text of
  the full length. What the axis "tensor" splits is counted whole.
  """
  groups = sharding.row_parts(mesh)
  rows = config.data.batch_size // config.train.accumulate
  if rows % groups == 0:  # else each device has all rows, see `put_batch`
    rows //= groups

  def kept(params, batch):
    def loss(params):
      logits = model.apply(
        {"params": params},
        batch["tokens"],
        batch.get("mask"),
        False,
        rngs={"dropout": jax.random.key(0)},
      )
      return losses.summed_loss(logits, batch)["loss"]

    _, backward = jax.vjp(loss, params)
    there = {id(x) for x in jax.tree.leaves((params, batch))}
    found = {id(x): x for x in jax.tree.leaves(backward)}
    return [x for key, x in found.items() if key not in there]

  shapes = jax.eval_shape(kept, params, _batch(config, rows))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
