"""Compression on a mesh and by two processes equals that on one device.

There the parameters are split before and after.
"""

import sys

import chex
import numpy as np
import pytest

from folding import config as c
from folding import paths
from folding.data.tokenizers import train_tokenizer
from folding.model import Model
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.training import sharding
from folding.training.allocate import Asked
from folding.training.compress_trained import compress_sizes
from folding.training.recipe import recipe
from folding.training.sensitivity import sensitivities
from tests.training.test_distributed import free_address, start

pytestmark = pytest.mark.slow
V, L = 32, 8
MODELS = {"bert": ("classify", c.bert), "llama": ("lm", c.llama)}


def _config(kind):
  """Returns a config whose compression runs every device program."""
  task, model = MODELS[kind]
  config = c.Config(
    task=task,
    pretrained="RUN",
    data=c.DataConfig(length=L),
    model=model(num_layers=2, width=16, num_heads=2, mlp_width=24),
  )
  config = c.edited(recipe(config, 0.4), {"compress.prune": "sparsegpt"})
  return c.resolve(c.edited(config, {"compress.fit_steps": 20}))


def _trained(config):
  """Returns random parameters of the dense baseline."""
  model = make_model(shape_of(config).dense(), V, num_classes=3)
  rng = np.random.default_rng(0)

  def value(name, w):
    if len(w.shape) < 2:
      return np.full(w.shape, name.endswith("scale"), np.float32)
    return rng.normal(scale=2 * w.shape[0] ** -0.5, size=w.shape).astype("f4")

  return paths.map_named(value, param_shapes(model))


def _batches():
  """Returns padded texts; the rows of the last batch divide no mesh."""
  rng = np.random.default_rng(1)
  return [
    {
      "tokens": rng.integers(0, V, (rows, L)).astype(np.int32),
      "mask": np.arange(L) < rng.integers(2, L + 1, (rows, 1)),
    }
    for rows in (16, 16, 10)
  ]


def compressed(kind, mesh=None):
  """Returns a model compressed on a mesh, or on one device."""
  config = _config(kind)
  asked = Asked(shape_of(config), config.fpp, config.compress)
  batches, params = _batches(), _trained(config)
  if mesh is not None:
    batches = [sharding.put_rows(mesh, batch) for batch in batches]
    params = sharding.put_params(mesh, params)
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])  # not read
  model = Model.of(config, params, tokenizer)
  [found] = compress_sizes([asked], model, batches)
  return found


def described(model, report):
  """Returns the plan of a compressed model, and its report, as text."""
  rounded = [
    {k: round(x, 3) if isinstance(x, float) else x for k, x in row.items()}
    for row in report
  ]
  return repr((model.shape, model.targets, rounded))


@pytest.fixture(scope="module")
def one():
  """Returns {kind: a model compressed on one device}."""
  return {kind: compressed(kind) for kind in MODELS}


def require_close(found, expected):
  """Checks that two models are equal, without the biases of keys.

  These change no attention weight, so that their gradients are rounding errors.
  """
  trees = [
    {n: w for n, w in paths.flatten(x).items() if not n.endswith("k/bias")}
    for x in (found, expected)
  ]
  chex.assert_trees_all_close(*trees, rtol=1e-3, atol=1e-4)


def whole_arrays(params):
  """Returns the names of kernels and embeddings that each device has whole."""
  return [
    name
    for name, w in paths.flatten(params).items()
    if name.endswith(("kernel", "embedding")) and w.sharding.is_fully_replicated
  ]


@pytest.mark.parametrize("kind", MODELS)
def test_mesh_compresses_as_one_device(kind, one, monkeypatch):
  monkeypatch.setattr(sharding, "_SMALLEST", 1)  # small arrays are split, too
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=4))
  found = compressed(kind, mesh)
  assert described(*found) == described(*one[kind])
  require_close(found[0].params, one[kind][0].params)
  assert not whole_arrays(found[0].params)


def test_sensitivities_are_split_over_the_mesh(monkeypatch):
  monkeypatch.setattr(sharding, "_SMALLEST", 1)
  config, batches = _config("llama"), _batches()
  expected = sensitivities(shape_of(config), _trained(config), batches)
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
  batches = [sharding.put_rows(mesh, batch) for batch in batches]
  params = sharding.put_params(mesh, _trained(config))
  found = sensitivities(shape_of(config), params, batches)
  shapes = {k: w.sharding.shard_shape(w.shape) for k, w in found.items()}
  assert shapes.pop("embed") == (8, 16)
  assert set(shapes.values()) == {(8, 8)}
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


# Compresses as one of two processes, and writes what it found.
PROCESS = """
import sys
import numpy as np
from folding import config, paths
from folding.training import distributed, sharding
from tests.training import test_compress_mesh as t
address, out = sys.argv[1:]
distributed.join(address)
sharding._SMALLEST = 1
mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=4))
for kind in t.MODELS:
  found = t.compressed(kind, mesh)
  assert not t.whole_arrays(found[0].params)
  arrays = paths.flatten(distributed.to_host(found[0].params))
  np.savez(f"{out}-{kind}.npz", described=t.described(*found), **arrays)
"""


def test_two_processes_compress_as_one_device(one, tmp_path):
  address = free_address()
  processes = [
    start(
      [
        sys.executable,
        "-c",
        PROCESS,
        f"{address},{n},2",
        str(tmp_path / str(n)),
      ]
    )
    for n in range(2)
  ]
  for process in processes:
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
  for kind, expected in one.items():
    both = [dict(np.load(tmp_path / f"{n}-{kind}.npz")) for n in range(2)]
    chex.assert_trees_all_equal(*both)  # without communication
    assert both[0].pop("described") == described(*expected)
    require_close(both[0], expected[0].params)
