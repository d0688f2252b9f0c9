"""Memory and work of a training step per device, as the compiler reports them.

The step of a run, plain and with a mask update, is compiled for devices that
need not exist, see `devices`. No data is read and no array is allocated.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from folding import paths
from folding.compression.sites import make_sites
from folding.config import MeshConfig, Order
from folding.data.labels import blank
from folding.data.tokenizers import vocab_size
from folding.model import Targets
from folding.models.shape import Shape
from folding.models.transformer import Transformer, make_model, param_shapes
from folding.tasks import Task, task_of
from folding.training import hlo, sensitivity, sharding, stream
from folding.training.devices import GIB, Devices
from folding.training.devices import find_devices as find_devices
from folding.training.progress import aligned
from folding.training.step import Program

# {model.scan_layers: (fewest layers to extrapolate, numbers of layers to compile)},
# if all layers are alike. A single layer is not enough: the TPU compiler has no
# other layer to overlap it with.
_MANY = {False: (7, (2, 4)), True: (40, (8, 16))}
KERNEL_SHARE = 0.6  # of peak, at which an attention kernel is taken to run


def estimate(shape: Shape, order: Order, devices: Devices) -> dict[str, Any]:
  """Returns the memory, work and traffic of a training step on each device.

  Seven layers or more that are alike are extrapolated from two and four layers.
  Scanned layers are extrapolated from eight and 16, if they are 40 or more.

  Args:
    shape: Shape of the model.
    order: Resolved.
    devices: What to compile for.

  Returns:
    {"devices": {"name", "count", "gib", "is_estimate"}, "mesh": {axis: size},
    "layers": {"model", "compiled": [numbers of layers]}, "dense" and
    "compressed": {"parameters": allocated, "stored": nonzero after the last mask
    update, "step" and, if anything is pruned, "mask update": see `measure`; with
    `pretrained` also "calibration", the same of the compression program that
    needs most memory}, "unsplit": lines about arrays that the mesh does not
    split}.

  Raises:
    ConfigError: the mesh does not fit the devices or the parameters.
  """
  data = dataclasses.replace(order.data, vocab_size=vocab_size(order.data))
  order = dataclasses.replace(order, data=data)
  mesh = sharding.make_mesh(order.mesh, devices.devices)
  found: dict[str, Any] = {
    "devices": {
      "name": devices.name,
      "count": len(devices.devices),
      "gib": devices.gib,
      "is_estimate": devices.name.startswith("cpu"),
    },
    "mesh": dict(mesh.shape),
    "layers": {
      "model": shape.num_layers,
      "compiled": _counts(shape, order.fpp.linear_layers) or [shape.num_layers],
    },
  }
  for name, model, asked in (
    ("dense", shape.dense(), order.uncompressed()),
    ("compressed", shape, order),
  ):
    program = make_program(model, asked, mesh)
    total = program.num_parameters
    found[name] = {"parameters": total, "stored": total - _zeros(program)}
    found[name]["step"] = measure(program, devices)
    if program.rules:
      found[name]["mask update"] = measure(
        program, devices, is_mask_update=True
      )
    found["unsplit"] = program.unsplit
  if order.pretrained and not order.dense:
    found["compressed"]["calibration"] = _calibration(
      shape.dense(), order, mesh, devices
    )
  return found


def make_program(
  shape: Shape, order: Order, mesh: Mesh, targets: Targets | None = None
) -> Program:
  """Returns the program of an order whose vocabulary size is stated."""
  return Program(
    shape,
    order,
    mesh,
    vocab_size=order.data.vocab_size,
    num_classes=_num_outputs(task_of(order)),
    targets=targets,
  )


def _counts(shape: Shape, targets: Sequence[float] | None) -> list[int]:
  """Returns the numbers of layers to compile; none if all layers are."""
  many, few = _MANY[shape.scan_layers]
  is_alike = len(set(shape.layers)) == 1 and len(set(targets or ())) <= 1
  return list(few) if is_alike and shape.num_layers >= many else []


def _shortened(program: Program, count: int) -> Program:
  """Returns the program of the first layers, pruned to the same targets."""
  shape = program.model.shape
  target = {"blocks_0": 0.0, "head": 0.0, "embed": 0.0}
  for site in make_sites(program.rules, program.like.params):
    part = site.name.split("/")[0]
    if part in target:
      target[part] = program.rules[site.rule].target
  return make_program(
    dataclasses.replace(shape, layers=shape.layers[:count]),
    program.order,
    program.mesh,
    Targets((target["blocks_0"],) * count, target["head"], target["embed"]),
  )


def _num_outputs(task: Task) -> int:
  """Returns the width of a head, as far as it is known without the data."""
  form = task.labels
  return 1 if form and form.kind == "score" else 2


def _zeros(program: Program) -> int:
  """Returns how many parameters are zero after the last mask update."""
  leaves = paths.flatten(program.like.params)
  zero = 0
  for site in make_sites(program.rules, program.like.params):
    units = math.prod(site.shape)
    zeroed = int(program.rules[site.rule].target * units)
    zero += sum(zeroed * leaves[name].size // units for name in site.members)
  return zero


def _inputs(
  program: Program, teacher: Transformer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the shapes of a batch and of the keyword arguments of a step."""
  shape, mesh = program.model.shape, program.mesh
  B, L = program.order.data.batch_size, program.order.data.length
  rows, whole = sharding.batch_sharding(mesh, B), sharding.whole(mesh)

  def array(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  batch = {"tokens": array((B, L), jnp.int32, rows)}
  task = program.task
  if task.predicts_tokens:
    batch["targets"] = array((B, L), jnp.int32, rows)
    batch["weights"] = array((B, L), jnp.float32, rows)
  else:
    batch["mask"] = array((B, L), jnp.bool_, rows)
    if task.labels:
      labels = blank(task.labels, B, _num_outputs(task))
      batch["labels"] = array(labels.shape, labels.dtype, rows)
    if shape.segments:
      batch["segments"] = array((B, L), jnp.int32, rows)
    batch["weights"] = array((B,), jnp.float32, rows)
  constants = {"seed": array((), jnp.uint32, whole)}
  if program.prunes_tokens:
    size = program.like.params["embed"]["embedding"].shape[0]
    constants["usage"] = array((size,), jnp.float32, whole)
  if teacher is not None:
    params = param_shapes(teacher)
    constants["teacher_params"] = jax.tree.map(
      lambda x, where: array(x.shape, jnp.bfloat16, where),
      params,
      sharding.tree_shardings(mesh, params),
    )
  return batch, constants


def measure(
  program: Program, devices: Devices, *, is_mask_update: bool = False
) -> dict[str, Any]:
  """Returns the compiler's report on a training step, per device.

  Args:
    program: Model and optimizer, of any number of layers.
    devices: What to compile for.
    is_mask_update: Whether the step updates the masks of FPP.

  Returns:
    {"fits", "missing", "arguments" and "scratch": bytes, "flops", "bytes":
    accessed, "seconds": the compiler's estimate without communication, None if
    it makes none, "kernel_seconds": of these, attention kernels by their FLOP,
    "collectives": {kind: {"times", "bytes"}}}. If the step runs
    out of memory: {"fits": False, "missing": bytes, at least, "error": the
    reason}.
  """
  shape = program.model.shape
  counts = _counts(shape, program.order.fpp.linear_layers)
  few = [
    _compiled(_shortened(program, n), devices, is_mask_update) for n in counts
  ] or [_compiled(program, devices, is_mask_update)]
  found = next((one for one in few if "error" in one), few[0])
  if "error" not in found and counts:
    found = _extrapolated(few, counts, shape.num_layers)
  return _fits(found, devices)


def _fits(found: dict[str, Any], devices: Devices) -> dict[str, Any]:
  """Returns a report with "fits" and "missing"."""
  if "error" not in found:
    needed = found["arguments"] + found["scratch"]
    found["missing"] = max(needed - devices.gib * GIB, 0)
  return {"fits": found["missing"] == 0, **found}


_NO_MOVES = {"times": 0, "bytes": 0}  # of a kind of collective


def _extrapolated(few: Sequence[Any], counts: Sequence[int], count: int) -> Any:
  """Returns the report on many layers from those on two numbers of layers."""
  low, high = few
  if low is None:  # the compiler makes no estimate
    return None
  if isinstance(low, dict):
    pairs = {k: [one.get(k, _NO_MOVES) for one in few] for k in {**low, **high}}
    return {k: _extrapolated(pair, counts, count) for k, pair in pairs.items()}
  turns = (count - counts[0]) / (counts[1] - counts[0])
  return low + turns * max(high - low, 0)


def _compiled(
  program: Program, devices: Devices, is_mask_update: bool
) -> dict[str, Any]:
  """Returns the report of `measure` on a whole program, without "fits"."""
  teacher = _teacher(program)
  step = program.step(is_mask_update=is_mask_update, teacher=teacher)
  batch, constants = _inputs(program, teacher)
  found = _report(step.lower(program.like, batch, **constants), devices)
  if found.get("flops", 0) is None:
    found |= _global_cost(program, is_mask_update)
  return found


def _report(lowered: jax.stages.Lowered, devices: Devices) -> dict[str, Any]:
  """Returns the compiler's report on a program, with "flops" of None without."""
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    kind, _, reason = str(error).partition(": ")
    if kind != "RESOURCE_EXHAUSTED":
      raise
    reason = reason.splitlines()[0]
    return {"missing": _missing(reason, devices.gib), "error": reason}
  memory: Any = compiled.memory_analysis()
  # The compiler for GPUs makes none.
  cost: Any = compiled.cost_analysis() or {}
  work = hlo.read(compiled.as_text() or "")
  scratch = memory.temp_size_in_bytes + memory.output_size_in_bytes
  scratch -= memory.alias_size_in_bytes
  seconds = kernels = None
  if devices.hertz and devices.peak:
    # A kernel meets too few bytes per FLOP for the memory to matter.
    kernels = work.kernel_flops / (KERNEL_SHARE * devices.peak)
    seconds = work.cycles / devices.hertz + kernels
  return {
    "arguments": memory.argument_size_in_bytes,
    "scratch": scratch,
    "flops": cost.get("flops"),
    "bytes": cost.get("bytes accessed"),
    "seconds": seconds,
    "kernel_seconds": kernels,
    "collectives": {kind: m._asdict() for kind, m in work.moved.items()},
  }


def _calibration(
  shape: Shape, order: Order, mesh: Mesh, devices: Devices
) -> dict[str, Any]:
  """Returns the report on the program of compression that needs most memory.

  A layer of the dense model is whole on each device while it is measured. The
  dense and the folded model, the teacher, the sensitivities and the calibration
  texts are split.
  Arrays that wait for other programs are counted as arguments.
  """
  model = make_model(shape, order.data.vocab_size, _num_outputs(task_of(order)))
  whole = sharding.whole(mesh)
  params = jax.tree.map(
    lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=whole),
    param_shapes(model),
  )
  B, L, D = order.data.batch_size, order.data.length, shape.width
  rows = sharding.batch_sharding(mesh, B)
  x = jax.ShapeDtypeStruct((B, L, D), jnp.float32, sharding=rows)
  mask = jax.ShapeDtypeStruct((B, L), jnp.bool_, sharding=rows)
  dense = _split_bytes(mesh, params)
  teacher = 0
  if task_of(order).makes_vectors:
    teacher = dense
  elif order.distill.is_used:
    teacher = dense // 2  # it is bfloat16
  channel = 4 * math.prod(rows.shard_shape((B, L)))  # bytes of a batch
  # Each text has five streams of width D (before, inside and after the dense layer,
  # and before and inside the folded one) and the input of W_down.
  num_batches = -(-order.compress.calibration // B)
  texts = num_batches * (5 * D + shape.layers[0].mlp_width) * channel
  block, layer = stream.make_block(shape, 0), params["blocks_0"]
  grams = stream.lowered_grams(block, layer, x, mask)
  measured = _split_bytes(mesh, sensitivity.shapes(shape)) + teacher
  programs = [(grams, texts + 2 * dense + measured)]
  waits = shape.num_layers * D * channel + dense + measured  # inputs of layers
  for program in sensitivity.lowered(model, params, x, mask):
    programs.append((program, waits))
  found = []
  for program, waits in programs:
    report = _report(program, devices)
    if "error" in report:
      return _fits(report, devices)
    report["arguments"] += waits
    found.append(_fits(report, devices))
  return max(found, key=lambda one: one["arguments"] + one["scratch"])


def _split_bytes(mesh: Mesh, params: Any) -> int:
  """Returns the bytes per device of parameters that are split over a mesh."""
  placed = sharding.tree_shardings(mesh, params)
  sizes = jax.tree.map(
    lambda w, where: math.prod(where.shard_shape(w.shape)) * w.dtype.itemsize,
    params,
    placed,
  )
  return sum(jax.tree.leaves(sizes))


def _global_cost(program: Program, is_mask_update: bool) -> dict[str, float]:
  """Returns the "flops" per device of the program before it is split."""
  order = dataclasses.replace(program.order, mesh=MeshConfig())
  mesh = sharding.make_mesh(order.mesh, jax.devices("cpu")[:1])
  shape, targets = program.model.shape, program.targets
  whole, teacher = make_program(shape, order, mesh, targets), _teacher(program)
  step = whole.step(is_mask_update=is_mask_update, teacher=teacher)
  batch, constants = _inputs(whole, teacher)
  cost: Any = step.lower(whole.like, batch, **constants).cost_analysis()
  return {"flops": cost["flops"] / program.mesh.size}


def _teacher(program: Program) -> Transformer | None:
  """Returns the teacher of a run, as far as it is known without the data."""
  if not (program.order.distill.is_used or program.task.makes_vectors):
    return None
  return make_model(
    program.model.shape.dense(),
    program.order.data.vocab_size,
    _num_outputs(program.task),
  )


def _missing(reason: str, gib: float) -> float | None:
  """Returns how many bytes were missing; None: the compiler does not say."""
  sizes = [
    float(number) * 2 ** (10 * "KMGT".index(unit) + 10)
    for number, unit in re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", reason)
  ]
  if not sizes:
    return None
  needed, available = (*sizes, gib * GIB)[:2]
  return max(needed - available, 0)


def table(found: dict[str, Any]) -> str:
  """Returns an estimate as text.

  Args:
    found: From `estimate`.
  """
  programs = {
    f"{name} {program}": found[name][program]
    for name in ("dense", "compressed")
    for program in ("step", "mask update", "calibration")
    if program in found[name]
  }
  rows = [["per device", *programs]]
  for label, key, unit in (
    ("arguments, GiB", "arguments", GIB),
    ("scratch memory, GiB", "scratch", GIB),
    ("computed, GFLOP", "flops", 1e9),
    ("moved, GiB", "bytes", GIB),
    ("estimate, ms", "seconds", 1e-3),
    ("of it kernels, ms", "kernel_seconds", 1e-3),
  ):
    values = [one.get(key) for one in programs.values()]
    if any(values):
      rows.append([label, *(_shown(value, unit) for value in values)])
  moved = [one.get("collectives", {}) for one in programs.values()]
  for kind in sorted({kind for kinds in moved for kind in kinds}):
    rows.append([f"{kind}, GiB", *(_shown_moves(x.get(kind)) for x in moved)])
  devices = found["devices"]
  verdicts = [_verdict(one) for one in programs.values()]
  rows.append([f"fits in {devices['gib']:.1f} GiB", *verdicts])
  mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
  total, kept = found["dense"]["parameters"], found["compressed"]["stored"]
  notes = [
    f"{name}: {one['error']}"
    for name, one in programs.items()
    if "error" in one
  ]
  layers = found["layers"]
  if layers["compiled"] != [layers["model"]]:
    few = " and ".join(map(str, layers["compiled"]))
    notes.append(f"{layers['model']} layers, extrapolated from {few}")
  if any(one.get("kernel_seconds") for one in programs.values()):
    notes.append(f"attention kernels: their FLOP at {KERNEL_SHARE:.0%} of peak")
  if devices["is_estimate"]:
    notes.append("compiled for CPU; an estimate for other devices")
  return "\n".join(
    [
      f"{devices['count']} devices ({devices['name']}), mesh {mesh}",
      *aligned(rows, num_text=1),
      f"{total:,} parameters in the dense baseline, {kept:,} stored after "
      f"compression ({kept / total:.1%})",
      *notes,
      *(f"mesh: {line}" for line in found["unsplit"]),
    ]
  )


def _shown(value: Any, unit: float | int) -> str:
  return "-" if value is None else f"{value / unit:,.3f}"


def _shown_moves(moves: dict[str, Any] | None) -> str:
  if moves is None:
    return "-"
  return f"{_shown(moves['bytes'], GIB)} ({moves['times']:,.0f})"


def _verdict(one: dict[str, Any]) -> str:
  if one["fits"]:
    return "yes"
  if one["missing"] is None:
    return "no"
  return f"no, {one['missing'] / GIB:,.1f} GiB missing"
