"""`folding estimate`: the compiler's report against real allocations."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from folding import cli, errors, files, paths
from folding import config as c
from folding.compression.fpp import fpp
from folding.compression.sites import Rule
from folding.models.shape import shape_of
from folding.training import devices as devices_lib
from folding.training import estimate, hlo, sharding
from folding.training import step as step_lib
from folding.training.step import Program
from folding.typed import edited
from tests.models import checkpoints
from tests.training import tiny

CONFIG_FILE = """
from folding import config as c

def get_config(width="32"):
  return c.Config(
    data=c.DataConfig(vocab_size=128, length=8, batch_size=16),
    model=c.ModelConfig(num_layers=1, width=int(width), num_heads=4),
    fpp=c.FPPConfig(linear=0.7, embedding=0.7, begin=0.0, end=0.75, checks=3),
    mesh=c.MeshConfig(data=2, fsdp=4),
    train=c.TrainConfig(steps=8),
  )
"""
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None
HAS_GPU_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None
HAS_CUDNN = (
  HAS_GPU_COMPILER and importlib.util.find_spec("nvidia.cudnn") is not None
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("estimate") / "small.py"
  file.write_text(CONFIG_FILE, encoding="utf-8")
  return str(file)


@pytest.fixture(scope="module")
def config(config_file):
  return c.resolve(files.call_in_file(config_file, "get_config"))


@pytest.fixture(scope="module")
def found(config):
  """Returns the estimate of eight simulated devices."""
  return estimate.estimate(
    shape_of(config), config, estimate.find_devices("cpu-8")
  )


def _on_device(tree):
  """Returns the bytes of a tree on the first device."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_arguments_are_state_and_batch_of_one_device(config, found):
  run = tiny.make(config)
  state = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(run.init)
  )
  mesh = sharding.make_mesh(config.mesh)
  held = _on_device(jax.device_put(state, sharding.tree_shardings(mesh, state)))
  batch = 3 * 4 * 16 * 8 // 8  # three arrays of 16 texts of 8 tokens
  for program in ("step", "mask update"):
    arguments = found["compressed"][program]["arguments"]
    # XLA pads arrays to whole cache lines. A mask update replaces `zeroed`,
    # 4 bytes, without reading it.
    assert held + batch - 4 <= arguments <= 1.1 * (held + batch)
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  assert arguments < 0.6 * whole
  assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


def test_flops_of_a_step_are_those_of_its_products(config, found):
  dense = tiny.shapes(c.dense_baseline(config))
  tokens = 16 * 8 / 8  # per device
  products = sum(w.size for n, w in paths.flatten(dense).items() if w.ndim > 1)
  # Forward, and backward to inputs and weights: 6 per weight and token.
  assert 6 * tokens * products <= found["dense"]["step"]["flops"]
  assert found["dense"]["step"]["flops"] <= 2 * 6 * tokens * products
  step, update = (found["compressed"][p] for p in ("step", "mask update"))
  assert step["flops"] < update["flops"]
  assert step["scratch"] > 0
  assert "mask update" not in found["dense"]


def test_stored_parameters_are_those_left_by_the_targets(config, found):
  total = sum(x.size for x in jax.tree.leaves(tiny.shapes(config)))
  pruned = [128 * 32, 32 * 32, 32 * 128, 128 * 32]
  kept = total - sum(int(0.7 * size) for size in pruned)
  assert found["compressed"]["parameters"] == total
  assert found["compressed"]["stored"] == kept
  dense = found["dense"]
  assert dense["stored"] == dense["parameters"]


def test_teacher_adds_two_bytes_per_dense_parameter(config, found):
  taught = dataclasses.replace(
    config, pretrained="DENSE", distill=c.DistillConfig(logits=0.5)
  )
  mesh = sharding.make_mesh(config.mesh)
  program = estimate.make_program(shape_of(taught), taught, mesh)
  step = estimate.measure(program, estimate.find_devices("cpu-8"))
  params = tiny.shapes(c.dense_baseline(config))
  places = sharding.tree_shardings(mesh, params)
  shapes = [
    where.shard_shape(w.shape)
    for w, where in zip(
      jax.tree.leaves(params), jax.tree.leaves(places), strict=True
    )
  ]
  expected = sum(2 * math.prod(shape) for shape in shapes)
  without = found["compressed"]["step"]["arguments"]
  assert expected <= step["arguments"] - without <= 1.5 * expected
  assert not c.dense_baseline(taught).distill.is_used


class _Compiled:
  """A compiled program with a report."""

  def memory_analysis(self):
    return types.SimpleNamespace(
      argument_size_in_bytes=100,
      temp_size_in_bytes=10,
      output_size_in_bytes=62,
      alias_size_in_bytes=60,
    )

  def cost_analysis(self):
    return {"flops": 7.0, "bytes accessed": 8.0}

  def as_text(self):
    return ""


@pytest.fixture
def compiled(monkeypatch):
  """Traces programs, but compiles none."""
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: _Compiled())


def test_classifier_with_rows_to_prune_has_a_plan(config, compiled):
  classifier = dataclasses.replace(
    config,
    task="classify",
    model=c.bert(num_layers=1, width=32, num_heads=4),
    fpp=dataclasses.replace(
      config.fpp, embedding_granularity="row", score="magnitude"
    ),
    train=dataclasses.replace(config.train, accumulate=4),
  )
  classifier = c.resolve(classifier)
  found = estimate.estimate(
    shape_of(classifier), classifier, estimate.find_devices("cpu-8")
  )
  assert found["compressed"]["mask update"]["fits"]
  assert "4 rows" in found["unsplit"][-1]  # of a micro-batch, over 8 devices
  compressed = found["compressed"]
  weights = [32 * 32, 32 * 128, 128 * 32]
  zero = int(0.7 * 128) * 32 + sum(int(0.7 * size) for size in weights)
  assert compressed["parameters"] - compressed["stored"] == zero


def test_encoder_of_sentences_has_a_plan(config, compiled):
  fields = {
    "task": "embed",
    "model": c.bert(num_layers=1, width=32, num_heads=4),
    "pretrained": "DENSE",
    "distill": c.DistillConfig(pairs=1.0, hidden=1.0),
  }
  encoder = c.resolve(dataclasses.replace(config, **fields))
  found = estimate.estimate(
    shape_of(encoder), encoder, estimate.find_devices("cpu-8")
  )
  assert found["dense"]["step"]["fits"]
  assert found["compressed"]["mask update"]["fits"]
  shapes = tiny.shapes(encoder)
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert "head" not in shapes
  assert found["compressed"]["parameters"] == total


def test_scratch_memory_leaves_out_the_donated_state(config, compiled):
  devices = estimate.find_devices("cpu-8")
  for size, missing in ((112, 0), (111, 1)):
    here = devices._replace(gib=size / estimate.GIB)
    dense = c.dense_baseline(config)
    found = estimate.estimate(shape_of(dense), dense, here)["dense"]["step"]
    assert found == {
      "fits": not missing,
      "missing": missing,
      "arguments": 100,
      "scratch": 12,
      "flops": 7.0,
      "bytes": 8.0,
      "seconds": None,  # no estimate for CPUs
      "kernel_seconds": None,
      "collectives": {},
    }


@pytest.mark.parametrize(
  ("reason", "missing"),
  [
    ("the total (44.74G) exceeds available HBM (15.75G).", 44.74 - 15.75),
    ("The program needs 2048.5M.", 1.0005),  # of 1 GiB
    ("Try again.", None),
  ],
)
def test_missing_memory_is_read_from_the_reason(reason, missing):
  found = estimate._missing(reason, 1.0)
  if missing is not None:
    missing = pytest.approx(missing * estimate.GIB, rel=1e-3)
  assert found == missing


def test_compiler_out_of_memory_is_an_answer(config, monkeypatch):
  reason = "Used 17G of 15.75G hbm. Exceeded hbm capacity by 1.25G."

  def compile(self):
    raise jax.errors.JaxRuntimeError(
      f"RESOURCE_EXHAUSTED: {reason}\nA trace of 3.5G"
    )

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
  devices = estimate.find_devices("cpu-8")._replace(gib=1.0)
  dense = c.dense_baseline(config)
  found = estimate.estimate(shape_of(dense), dense, devices)
  step = found["dense"]["step"]
  assert (step["fits"], step["error"]) == (False, reason)
  assert step["missing"] == pytest.approx(1.25 * estimate.GIB, rel=1e-3)
  assert "1.2 GiB missing" in estimate.table(found)


def compiled_step(config, devices):
  """Returns the optimised program of a step without a mask update."""
  mesh = sharding.make_mesh(config.mesh, devices.devices)
  program = estimate.make_program(shape_of(config), config, mesh)
  batch, constants = estimate._inputs(program, None)
  step = program.step(is_mask_update=False)
  return step.lower(program.like, batch, **constants).compile().as_text()


def alike(config, num_layers, **fields):
  """Returns a config of layers that are alike, none of them large."""
  model = c.llama(num_layers=num_layers, width=32, num_heads=4, mlp_width=64)
  fpp = c.FPPConfig(saving=0.5, begin=0.0, end=0.75, checks=3)
  values = {"model": model, "fpp": fpp, "preset": "none"} | fields
  return c.resolve(dataclasses.replace(config, **values))


@pytest.mark.slow
def test_calibration_holds_a_layer_its_moments_the_texts_and_split_models(
  config,
):
  config = alike(config, 2, pretrained="DENSE")
  config = edited(config, {"compress.calibration": 160})
  devices = estimate.find_devices("cpu-8")
  found = estimate.estimate(shape_of(config), config, devices)
  calibration = found["compressed"]["calibration"]
  size = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)  # a dense layer
  size += 4 * 5 * 32 * 32  # sensitivities, too small to be split
  texts = 160 * 8 // 8 * 4 * (5 * 32 + 64)  # per device
  mesh = sharding.make_mesh(config.mesh)
  dense = estimate.make_program(shape_of(config).dense(), config, mesh)
  size += 2 * sum(  # the dense and the folded model
    4 * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(dense.like.params)
  )
  assert size + texts <= calibration["arguments"] <= 1.2 * (size + texts)
  assert calibration["scratch"] >= 2 * 4 * 64 * 64  # moments of each half
  assert "compressed calibration" in estimate.table(found)
  plain = edited(config, {"pretrained": None})
  plain = estimate.estimate(shape_of(plain), plain, devices)
  assert "calibration" not in plain["compressed"]


def test_layers_that_are_alike_are_extrapolated(config, monkeypatch):
  compiled = []

  def figures(program, devices, is_mask_update):
    count = program.model.shape.num_layers
    targets = {r.pattern: r.target for r in program.rules}
    compiled.append((count, targets))
    return {
      "arguments": 5 + 2 * count,
      "scratch": 9 - count,  # would be negative for many layers
      "flops": 1.5 * count,
      "seconds": None,
      "collectives": {"all-gather": {"times": count, "bytes": 3 * count}}
      | ({"all-to-all": {"times": 1, "bytes": 2}} if count > 2 else {}),
    }

  monkeypatch.setattr(estimate, "_compiled", figures)
  config = alike(config, 8)
  mesh = sharding.make_mesh(config.mesh)
  program = Program(
    shape_of(config), config, mesh, vocab_size=128, num_classes=0
  )
  devices = estimate.find_devices("cpu-8")
  assert estimate.measure(program, devices) == {
    "fits": True,
    "missing": 0,
    "arguments": 5 + 2 * 8,
    "scratch": 7,
    "flops": 1.5 * 8,
    "seconds": None,
    "collectives": {
      "all-gather": {"times": 8, "bytes": 3 * 8},
      "all-to-all": {"times": 3, "bytes": 6},
    },
  }
  whole = {rule.pattern: rule.target for rule in program.rules}
  assert [count for count, _ in compiled] == [2, 4]
  for count, targets in compiled:
    assert targets == {
      name: target
      for name, target in whole.items()
      if not any(f"blocks_{n}" in name for n in range(count, 8))
    }
  program.order = edited(config, {"fpp.linear_layers": (0.5,) * 7 + (0.6,)})
  assert estimate.measure(program, devices)["arguments"] == 5 + 2 * 8
  config = edited(config, {"model.scan_layers": True})
  program = Program(
    shape_of(config), config, mesh, vocab_size=128, num_classes=0
  )
  assert estimate.measure(program, devices)["arguments"] == 5 + 2 * 8
  assert [count for count, _ in compiled] == [2, 4, 8, 8]


def test_collectives_that_few_layers_lack_are_extrapolated(config, monkeypatch):
  def report(program, devices, is_mask_update):
    moves = {"all-to-all": {"times": 1, "bytes": 2}}
    is_few = program.model.shape.num_layers == 2
    sizes = {"arguments": 1, "scratch": 1}
    return sizes | {"collectives": {} if is_few else moves}

  monkeypatch.setattr(estimate, "_compiled", report)
  config = alike(config, 8)
  mesh = sharding.make_mesh(config.mesh)
  program = Program(
    shape_of(config), config, mesh, vocab_size=128, num_classes=0
  )
  found = estimate.measure(program, estimate.find_devices("cpu-8"))
  assert found["collectives"] == {"all-to-all": {"times": 3, "bytes": 6}}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("is_mask_update", "scans"), [(False, False), (True, False), (True, True)]
)
def test_extrapolation_agrees_with_the_whole_model(
  is_mask_update, scans, config, monkeypatch
):
  data = c.DataConfig(length=16, batch_size=16, vocab_size=128)
  config = alike(config, 7, data=data)
  config = edited(config, {"model.scan_layers": scans})
  mesh = sharding.make_mesh(config.mesh)
  program = Program(
    shape_of(config), config, mesh, vocab_size=128, num_classes=0
  )
  devices = estimate.find_devices("cpu-8")
  found = []
  for many in (7, 8):
    monkeypatch.setitem(estimate._MANY, scans, (many, (2, 4)))
    found.append(
      estimate.measure(program, devices, is_mask_update=is_mask_update)
    )
  few, whole = (jax.tree.leaves_with_path(one) for one in found)
  assert len(few) > 8
  for (name, value), (_, expected) in zip(few, whole, strict=True):
    assert value == pytest.approx(expected, rel=0.05), name


def test_cpus_share_the_memory_of_the_machine():
  one, eight = (estimate.find_devices(f"cpu-{n}").gib for n in (1, 8))
  assert one == pytest.approx(8 * eight)


@pytest.mark.parametrize(
  ("slice_name", "topology"),
  [
    ("v5p-8", [2, 2, 1]),
    ("v5p-64", [2, 4, 4]),
    ("v5p-256", [4, 4, 8]),
    ("v5e-1", [1, 1]),
    ("v5e-8", [2, 4]),
    ("v6e-256", [16, 16]),
    ("v5p-1", None),  # a chip has two cores
    ("v5p-3", None),
    ("v5e-12", None),
  ],
)
def test_topology_of_a_slice_is_the_one_that_google_names(slice_name, topology):
  generation, number = slice_name.split("-")
  assert devices_lib.topology_of(generation, int(number)) == topology


@pytest.mark.parametrize(
  ("generation", "shape", "wraps"),
  [
    ("v5p", [4, 4, 2], [False, False, False]),
    ("v5p", [4, 4, 8], [True, True, True]),
    ("v5e", [4, 4], [False, False, False]),
    ("v5e", [8, 16], [False, True, False]),
    ("v6e", [16, 16], [True, True, False]),
  ],
)
def test_chips_form_rings_in_cubes_and_along_16(generation, shape, wraps):
  assert devices_lib._wraps(generation, shape) == wraps


@pytest.mark.slow
def test_planned_step_looks_for_thresholds_as_on_several_devices():
  # Here JAX has started with eight devices.
  code = (
    "import jax; from folding.training import devices; "
    "devices._start_on_cpus(8); print(jax.device_count())"
  )
  one = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", code], env=os.environ | one, capture_output=True
  )
  assert int(done.stdout) > 1, done.stderr


@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="libtpu is not installed")
def test_tpu_compiler_plans_a_slice(config):
  devices = estimate.find_devices("v5e:4x2")
  assert (len(devices.devices), devices.gib) == (8, 16)
  found = estimate.estimate(shape_of(config), config, devices)
  assert found["compressed"]["mask update"]["fits"]
  assert not found["devices"]["is_estimate"]


@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="libtpu is not installed")
@pytest.mark.parametrize("scans", [False, True])
def test_tpu_compiler_stores_no_logits_of_a_kernel(scans, config):
  length = 1024
  config = alike(
    config,
    2,
    data=c.DataConfig(length=length, batch_size=4, vocab_size=128),
    mesh=c.MeshConfig(data=1, fsdp=2, tensor=2),
  )
  config = edited(
    config,
    {
      "model.width": 256,
      "model.head_dim": 64,
      "model.scan_layers": scans,
      "model.remat": scans,
    },
  )
  devices = estimate.find_devices("v5e:2x2")

  def compiled(config):
    """Returns kernels, whether an array has all logits, and the kernels' FLOP."""
    text = compiled_step(config, devices)
    square = f"{length},{length}]"
    count = text.count('custom_call_target="tpu_custom_call"')
    return count, square in text, hlo.read(text).kernel_flops

  # Of two texts and two heads per device, whose channels are padded to 128.
  product = 2 * (2 * 2) * length**2 * 128
  # Forward two products, twice with remat, and backward three and four.
  products = 2 * (2 + 3 + 4) + scans * 2 * 2
  assert compiled(config) == (4 if scans else 6, False, products * product)
  off = edited(config, {"mesh.attention_kernel": False})
  assert compiled(off) == (0, False, 0)


@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="libtpu is not installed")
def test_tpu_compiler_gathers_a_weight_once_for_a_product():
  devices = estimate.find_devices("v5p:4x4x2").devices
  mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=32), devices)

  def array(shape, *spec):
    where = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

  x = array((64, 512, 4096), "fsdp")
  w = array((4096, 14336), None, "fsdp")

  def moves(options):
    product = jax.jit(jnp.matmul, compiler_options=options)
    return set(hlo.read(product.lower(x, w).compile().as_text()).moved)

  assert moves(None) == {"collective-permute"}
  assert moves(step_lib._compiler_options(mesh)) == {"all-gather"}


@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="libtpu is not installed")
def test_tpu_compiler_gathers_over_the_rings_of_64_chips():
  devices = estimate.find_devices("v5p:4x4x4").devices
  mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=64), devices)
  like = jax.ShapeDtypeStruct(
    (8192, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp"))
  )
  gather = jax.jit(lambda x: x, out_shardings=sharding.whole(mesh))
  # Between chips in a line it sums arrays of zeros, each with one part filled.
  text = gather.lower(like).compile().as_text()
  assert set(hlo.read(text).moved) == {"all-gather"}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("cpu-8", id="cpu"),
    pytest.param(
      "v5e:4x2",
      id="tpu_compiler",
      marks=pytest.mark.skipif(
        not HAS_TPU_COMPILER, reason="libtpu is not installed"
      ),
    ),
    pytest.param(
      "h100:8",
      id="gpu_compiler",
      marks=pytest.mark.skipif(
        not HAS_GPU_COMPILER, reason="jax-cuda12-plugin is not installed"
      ),
    ),
  ],
)
def test_compiled_state_of_fpp_lies_like_parameters_on_explicit_axes(name):
  devices = estimate.find_devices(name).devices
  kinds = (AxisType.Explicit,) * 2
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), kinds, devices=devices)
  rules = [Rule("w", 0.5), Rule("v", 0.5, score="saliency")]
  tx = fpp(optax.adam(0.1), rules, begin=0, end=4, every=2, warn=False)

  def update(params):
    stats = {"w": jnp.ones(256)}
    return tx.update(params, tx.init(params), params, stats=stats)[1]

  with jax.set_mesh(mesh):
    spec = P("fsdp", "tensor")
    param = jax.ShapeDtypeStruct(
      (256, 512), jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    program = jax.jit(update).lower({"w": param, "v": param}).compile()
  state = program.output_shardings
  # float32 averages and moments, and one bit per weight
  for found, expected in (
    (state.averages["w"], P("fsdp")),
    (state.averages["v"], spec),
    (state.suspected["w"], P(None, *spec)),
    (state.suspected["v"], P(None, *spec)),
    (state.inner[0].mu["v"], spec),
  ):
    where = NamedSharding(mesh, expected)
    assert found.is_equivalent_to(where, len(expected))


@pytest.mark.skipif(HAS_TPU_COMPILER, reason="libtpu is installed")
def test_missing_tpu_compiler_is_one_line():
  with pytest.raises(errors.ConfigError, match=r"pip install .*\[tpu\]"):
    estimate.find_devices("v5p-64")


@pytest.mark.slow
@pytest.mark.skipif(
  not HAS_GPU_COMPILER, reason="jax-cuda12-plugin is not installed"
)
def test_gpu_compiler_plans_two_hosts(config, found):
  devices = estimate.find_devices("h100:2x4")
  assert (len(devices.devices), round(devices.gib, 1)) == (8, 79.1)
  gpu = estimate.estimate(shape_of(config), config, devices)["compressed"][
    "step"
  ]
  cpu = found["compressed"]["step"]
  assert gpu["fits"]
  # Parameters, optimizer state and batch are the same arrays.
  assert gpu["arguments"] == pytest.approx(cpu["arguments"], rel=0.1)
  # Counted before and after the compiler splits the program.
  assert gpu["flops"] == pytest.approx(cpu["flops"], rel=0.3)
  assert gpu["collectives"].keys() & {"all-reduce", "reduce-scatter"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDNN, reason="cuDNN is not installed")
def test_gpu_compiler_attends_by_cudnn(config):
  config = alike(
    config,
    2,
    data=c.DataConfig(length=1024, batch_size=4, vocab_size=128),
    mesh=c.MeshConfig(data=1, fsdp=2, tensor=2),
  )
  config = edited(config, {"model.dtype": "bfloat16"})
  devices = estimate.find_devices("h100:4")

  def compiled(config):
    """Returns how many kernels are cuDNN's."""
    text = compiled_step(config, devices)
    return text.count('custom_call_target="__cudnn$fmha')

  # Two layers, forward and backward
  assert compiled(config) == 4
  off = edited(config, {"mesh.attention_kernel": False})
  assert compiled(off) == 0


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="jax-cuda12-plugin is installed")
def test_missing_gpu_compiler_is_one_line():
  with pytest.raises(
    errors.ConfigError, match=r"pip install .*\[gpu-estimate\]"
  ):
    estimate.find_devices("h100:8")


@pytest.mark.parametrize("name", ["h100:1x2x3", "h100", "gtx:8", "h100:0"])
def test_names_of_gpus_that_are_not_valid_are_refused(name):
  with pytest.raises(errors.ConfigError, match="h100:4x8"):
    estimate.find_devices(name)


def test_verb_prints_a_table_or_json(config_file, capsys, compiled):
  words = ["estimate", f"--config={config_file}:64", "--devices=cpu-8"]
  words += [
    "--config.dense=True",
    "--config.mesh.data=8",
    "--config.mesh.fsdp=1",
  ]
  assert cli.main([*words, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
  assert cli.main(words) == 0
  text = capsys.readouterr().out
  assert f"{found['dense']['parameters']:,} parameters" in text
  assert "estimate" in text


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config=nowhere.py", "--devices=cpu-1"], "nowhere.py"),
    (["--config={file}", "--devices=h100-8"], "h100-8 is not valid"),
    (["--config={file}", "--devices=cpu-99999999999"], "is not valid"),
    (["--config={file}", "--devices=v9:2x2"], "v9:2x2 is not valid"),
    (["--config={file}", "--devices=cpu-9999"], "started with 8"),
    (["--config={file}", "--devices=cpu-1"], "does not multiply"),
    (["--config={file}", "--devices=cpu-8", "--config.a.b=1"], "a.b"),
  ],
)
def test_verb_reports_mistakes_in_one_line(flags, message, config_file, capsys):
  flags = [flag.format(file=config_file) for flag in flags]
  assert cli.main(["estimate", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert message in error


def test_vocabulary_is_that_of_the_tokenizer(config, tmp_path, compiled):
  path = tmp_path / "tokenizer.json"
  words = [f"w{i}" for i in range(300)]
  checkpoints.write_tokenizer(path, [*checkpoints.WORDS, *words])
  named = dataclasses.replace(
    config, data=dataclasses.replace(config.data, tokenizer=str(path))
  )
  named = c.dense_baseline(named)
  found = estimate.estimate(
    shape_of(named), named, estimate.find_devices("cpu-8")
  )
  without = sum(
    w.size
    for name, w in paths.flatten(tiny.shapes(c.dense_baseline(config))).items()
    if name != "embed/embedding"
  )
  assert found["dense"]["parameters"] == without + 310 * 32


def test_verb_has_its_earlier_name(config_file, capsys):
  flags = [f"--config={config_file}", "--devices=v9:2x2"]
  assert cli.main(["plan", *flags]) == 2
  assert "v9:2x2 is not valid" in capsys.readouterr().err
