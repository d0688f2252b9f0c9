"""Traffic between devices, read from compiled programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from folding import config as c
from folding import paths
from folding.compression.fpp import fpp
from folding.compression.sites import Rule
from folding.models import block_attention, linear_attention
from folding.training import hlo, losses, sharding
from tests.training import tiny

_MOVES = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
MESHES = {
  "fsdp=8": c.MeshConfig(1, 8),
  "data=2,fsdp=2,tensor=2": c.MeshConfig(2, 2, 2),
}


def moved(text):
  """Returns [(collective, elements of its largest result)] of a program."""
  found = []
  for line in text.splitlines():
    match = re.search(rf"= (.*?) ({_MOVES})(-start)?\(", line)
    if match:
      sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"\[([\d,]*)\]", match[1])
      ]
      found.append((match[2], max(sizes)))
  return found


def placed(mesh, tree, params):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.tree_shardings(mesh, tree, params),
  )


def compiled_update(mesh, score, granularity="weight"):
  """Returns the program of FPP and AdamW without the model around it."""
  fpp = c.FPPConfig(
    score=score, granularity=granularity, begin=0.0, end=0.75, checks=3
  )
  run = tiny.make(tiny.config(fpp=fpp))
  state = jax.eval_shape(run.init)
  params = placed(mesh, state.params, state.params)
  opt_state = placed(mesh, state.opt_state, state.params)
  stats = {
    name: jax.ShapeDtypeStruct(w.shape[:-1], jnp.float32)
    for name, w in paths.flatten(state.params).items()
  }
  out = jax.tree.map(lambda x: x.sharding, (params, opt_state))
  update = jax.jit(
    lambda grads, opt_state, params, stats: run.tx.update(
      grads, opt_state, params, stats=stats, value=jnp.float32(0)
    ),
    out_shardings=out,
  )
  return update.lower(params, opt_state, params, stats).compile()


@pytest.mark.parametrize(
  ("mesh", "score", "granularity"),
  [
    ("data=2,fsdp=2,tensor=2", "relative", "weight"),
    ("fsdp=8", "activation", "neuron"),
  ],
)
def test_mask_update_gathers_no_parameter(mesh, score, granularity):
  mesh = sharding.make_mesh(MESHES[mesh])
  moves = moved(compiled_update(mesh, score, granularity).as_text())
  # Counts, norms, means of rows and columns; the smallest matrix that is split
  # has 4,096 elements.
  assert max(size for _, size in moves) <= 128, moves
  kinds = {kind for kind, _ in moves}
  gathered = {"all-gather"} if granularity == "neuron" else set()  # mask bits
  assert kinds <= {"all-reduce"} | gathered, moves


@pytest.mark.slow
def test_mask_update_of_stacked_layers_gathers_no_parameter():
  mesh = sharding.make_mesh(MESHES["fsdp=8"])
  params = {
    name: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    for name, shape, spec in (
      ("up", (64, 3, 128), P("fsdp")),
      ("down", (128, 3, 64), P(None, None, "fsdp")),
    )
  }
  rules = [Rule("up|down", 0.5, layers=1)]
  tx = fpp(optax.adam(0.1), rules, begin=0, end=4, every=1)
  state = jax.eval_shape(tx.init, params)
  where = sharding.shardings_like(state, params)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    where,
  )
  stats = {
    name: jax.ShapeDtypeStruct((3, w.shape[0]), jnp.float32)
    for name, w in params.items()
  }
  update = jax.jit(
    lambda grads, state, params, stats: tx.update(
      grads, state, params, stats=stats, is_due=True
    ),
    out_shardings=(jax.tree.map(lambda x: x.sharding, params), where),
  )
  program = update.lower(params, state, params, stats).compile()
  moves = moved(program.as_text())
  # Counts, and means of rows and columns: 3 layers of at most 128.
  assert max(size for _, size in moves) <= 3 * 128, moves
  assert {kind for kind, _ in moves} <= {"all-reduce"}, moves


def test_count_detects_a_gather():
  mesh = sharding.make_mesh(MESHES["fsdp=8"])
  w = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
  x = placed(mesh, w, w)["w"]
  sort = jax.jit(lambda x: x < jnp.sort(x.ravel())[4000])
  moves = moved(sort.lower(x).compile().as_text())
  assert ("all-gather", 64 * 128) in moves


def compiled_step(mesh, **fields):
  """Returns the text of a training step without a mask update."""
  run = tiny.make(tiny.config(fpp=c.FPPConfig(), **fields))
  state = jax.eval_shape(run.init)
  state = placed(mesh, state, state.params)
  rows = sharding.batch_sharding(mesh, 16)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
    for name, x in tiny.batch(0).items()
  }
  return run.step(False, mesh=mesh).lower(state, batch).compile().as_text()


@pytest.mark.slow
def test_attention_in_blocks_moves_no_more_than_the_whole(monkeypatch):
  mesh = sharding.make_mesh(MESHES["data=2,fsdp=2,tensor=2"])
  whole = compiled_step(mesh)
  monkeypatch.setattr(block_attention, "SIZES", {"default": tiny.LENGTH // 2})
  cut = compiled_step(mesh)
  assert cut.count(" while(") > whole.count(" while(")
  largest, largest_cut = (dict(sorted(moved(text))) for text in (whole, cut))
  assert largest_cut.keys() <= largest.keys()
  for kind, size in largest_cut.items():
    assert size <= largest[kind], kind
  gathers, gathers_cut = (
    sorted(size for kind, size in moved(text) if kind == "all-gather")
    for text in (whole, cut)
  )
  assert gathers_cut == gathers
  # No all-reduce in a loop over blocks.
  reduced, reduced_cut = (
    hlo.read(text).moved["all-reduce"] for text in (whole, cut)
  )
  assert reduced_cut.times <= reduced.times


def test_loss_in_blocks_moves_the_output_layer_and_its_gradient_once():
  mesh = sharding.make_mesh(MESHES["fsdp=8"])
  shape, rows = (64, 256), sharding.batch_sharding(mesh, 8)
  weights = {"head": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
  weights = placed(mesh, weights, weights)
  batch = {"x": jax.ShapeDtypeStruct((8, 16, 64), jnp.float32, sharding=rows)}

  def loss(weights, batch):
    return losses.sum_over_blocks(
      lambda w, x: {"loss": jnp.square(x["x"] @ w["head"]["kernel"]).sum()},
      weights,
      batch,
      count=4,
      mesh=mesh,
    )["loss"]

  program = jax.jit(jax.grad(loss)).lower(weights, batch).compile()
  size, moves = 4 * 64 * 256, hlo.read(program.as_text()).moved
  # Both passes have four iterations.
  assert moves["all-gather"].bytes == size
  sums = [m.bytes for kind, m in moves.items() if kind != "all-gather"]
  assert sums == [size], moves


@pytest.mark.slow
def test_scanned_layers_move_what_others_do():
  mesh = sharding.make_mesh(MESHES["fsdp=8"])
  shape = {"num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 256}
  plain, scanned = (
    compiled_step(mesh, model=c.llama(**shape, remat=True, scan_layers=scans))
    for scans in (False, True)
  )
  assert scanned.count(" while(") == plain.count(" while(") + 2
  # No stack is gathered, and each layer moves as much as an unscanned one.
  largest, largest_scanned = (
    max(size for _, size in moved(text)) for text in (plain, scanned)
  )
  assert largest_scanned == largest
  moves, moves_scanned = (hlo.read(text).moved for text in (plain, scanned))
  assert {kind: m.bytes for kind, m in moves_scanned.items()} == {
    kind: m.bytes for kind, m in moves.items()
  }


def test_linear_attention_moves_nothing_in_its_loop(monkeypatch):
  layout = linear_attention._Layout(chunk=8, block=8, is_turned=True)
  monkeypatch.setattr(linear_attention, "_LAYOUTS", {"default": layout})
  mesh = sharding.make_mesh(MESHES["fsdp=8"])
  rows = sharding.batch_sharding(mesh, 8)

  def times(length):
    shapes = [(8, length, 1), (8, length, 1), (8, length, 1, 4)]
    heads = [
      jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows) for s in shapes
    ]

    def loss(slopes, *heads):
      x = linear_attention.Inputs(*heads, slopes)
      out = linear_attention.attend_linear(x, causal=True, num_nodes=16)
      return (out**2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    text = gradient.lower(jnp.ones(1), *heads).compile().as_text()
    assert " while(" in text
    return hlo.read(text).moved["all-reduce"].times

  assert times(64) == times(32)
