"""Compaction: removes neurons and heads that FPP holds at 0 from a training state.

`folding shrink` compacts the checkpoints of a run, `train.compact` a run while it
trains. Losses and updates stay equal up to rounding.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from folding import paths
from folding.compression.fpp import member_masks
from folding.compression.shrink import Cut, dead_units, make_cut
from folding.compression.sites import Rule, make_sites
from folding.models.shape import Shape
from folding.models.shrink import shrink, shrunk_shape
from folding.training import sharding
from folding.training.step import Program, TrainState

_MULTIPLE = 8  # of neurons: a byte of mask bits, and a width of vector units
# Smallest share after the last mask update, since nothing is removed later.
_LAST = 0.1


def held_zero(rules: Sequence[Rule], state: TrainState, is_over: bool) -> Any:
  """Returns which parameters FPP holds at 0, as bools shaped like params.

  Before the last mask update these are whole units only. Single weights stay,
  because the next update ranks them among all weights of their array.

  Args:
    rules: From `make_rules`.
    state: The training state.
    is_over: See `is_pruning_over`.
  """
  leaves = paths.flatten(state.params)
  sites = [
    site
    for site in make_sites(rules, state.params)
    if is_over or not site.is_by_weight
  ]
  is_held = member_masks(sites, state.opt_state.mask_bits, leaves)
  return paths.map_named(
    lambda name, w: jnp.logical_and(is_held.get(name, False), w == 0),
    state.params,
  )


def is_pruning_over(mask_updates: range, step: int) -> bool:
  """Returns whether the last mask update is one of the first `step` updates."""
  return step > max(mask_updates, default=-1)


def shrink_state(
  shape: Shape,
  rules: Sequence[Rule],
  state: TrainState,
  is_zero: Any,
  *,
  multiple: int = 1,
  absorb: bool = False,
) -> tuple[Shape, TrainState, Cut]:
  """Returns the shape and state of a smaller model that trains the same.

  Losses and updates are equal up to rounding: only units that FPP holds at 0
  are removed, and moments, averages and mask bits are cut alike. (The score
  "random" draws other numbers at later mask updates.)

  Args:
    shape: Shape of the model.
    rules: From `make_rules`.
    state: The state before; its arrays do not change.
    is_zero: Elements that may be removed, from `held_zero`. After the last step
      all zeros may be.
    multiple: See `folding.shrink`.
    absorb: See `folding.shrink`; only after the last step.

  Raises:
    ValueError: see `folding.shrink`.
  """
  small = shrink(
    shape, state.params, multiple=multiple, absorb=absorb, is_zero=is_zero
  )
  # One program, instead of one for each operation and shape.
  take = jax.jit(functools.partial(cut_state, small.cut, rules))
  return small.shape, take(state, small.params), small.cut


def cut_state(
  cut: Cut, rules: Sequence[Rule], state: TrainState, params: Any
) -> TrainState:
  """Returns the state of smaller parameters.

  Args:
    cut: The cut that makes them smaller.
    rules: From `make_rules`.
    state: The state before.
    params: The smaller parameters.
  """
  sites = make_sites(rules, state.params)
  return TrainState(state.step, params, cut.fpp_state(state.opt_state, sites))


class Compactor:
  """Finds zero neurons and heads that may leave the state of one program.

  Only one flag per unit leaves the devices, so this works on any mesh and in
  several processes.
  """

  def __init__(self, program: Program):
    self._program = program

    def dead(state, is_over):
      zeros = held_zero(program.rules, state, is_over)
      return dead_units(paths.flatten(zeros))

    self._dead = jax.jit(
      dead, static_argnums=1, out_shardings=sharding.whole(program.mesh)
    )

  def find(self, state: TrainState, step: int) -> tuple[Shape, Cut] | None:
    """Returns the shape of a smaller model and the cut that leads to it.

    None if the cut would remove a smaller share of the layers' parameters than
    `train.compact`: compiling the smaller program would not pay yet.

    Args:
      state: After a mask update; this blocks until it is computed.
      step: Updates applied so far.
    """
    program = self._program
    is_over = is_pruning_over(program.mask_updates, step)
    tensor = program.mesh.shape["tensor"]  # splits neurons and heads
    before = program.like.params
    cut = make_cut(
      before,
      jax.device_get(self._dead(state, is_over)),
      neurons=math.lcm(_MULTIPLE, tensor),
      heads=tensor,
    )
    after = jax.eval_shape(cut, before)
    removed = 1 - _layer_size(after) / _layer_size(before)
    least = program.order.train.compact
    if removed < (min(least, _LAST) if is_over else least):
      return None
    return shrunk_shape(program.model.shape, cut), cut


def _layer_size(params: Any) -> int:
  """Returns the number of parameters of all layers."""
  return sum(
    x.size
    for name, x in paths.flatten(params).items()
    if name.startswith("blocks_")
  )
