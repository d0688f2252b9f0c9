"""What the TPU compiler reports of training steps; no TPU is needed.

    python -m benchmarks.tpu [--longest=65536] [--cache=DIR] [--save] [--json]

It needs `pip install -e '.[tpu]'`. Nothing runs: memory, cycles and collectives
are the compiler's, as `folding estimate` prints them ("Will it fit?" in
docs/how-to/devices.md). Each program takes from ten seconds to minutes of one
CPU core to compile; with --cache a second call compiles only what is missing.

The quickstart has one text per device, so tokens per step grow with the length.
Llama 3 8B has 64 texts of 8,192 tokens. "pruned" has the masks of
FPP beside the dense weights, "folded" has W_Q, W_K and W_V folded as well, and
"linear" attends in linear time. The share of the peak counts the FLOP of a step's
products once, also of those that the backward pass repeats.
"""

import importlib.metadata
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import output
from folding import config as config_lib
from folding import files, paths
from folding.models.shape import shape_of
from folding.training import estimate, sharding
from folding.training.run_dir import source_commit
from folding.training.step import Program

GIB = estimate.GIB
STEP, UPDATE = "step", "mask update"
LABELS: dict[Any, str] = {
  "folded": "folded, G = 1",
  "linear": "linear time, G = 1",
}


class Case(NamedTuple):
  """A program to compile.

  Attributes:
    model: "quickstart" or "8b".
    devices: Their name, as `folding estimate` takes it.
    texts: Texts per step.
    variant: "dense", "pruned", "folded" or "linear".
    length: Tokens per text.
    program: "step" or "mask update".
  """

  model: str
  devices: str
  texts: int
  variant: str
  length: int
  program: str = STEP

  def config(self) -> config_lib.Config:
    """Returns the resolved config."""
    path, edits = "configs/quickstart.py", {}
    if self.model != "quickstart":
      path = f"configs/shapes/llama3.py:{self.model}"
    if self.variant == "dense":
      edits["dense"] = "True"
    elif self.variant == "linear":
      edits["model.attention"] = "linear"
    edits["data.length"] = str(self.length)
    edits["data.batch_size"] = str(self.texts)
    return config_lib.resolve(config_lib.read(path, edits))


QUICKSTART, LLAMA = ("quickstart", "v5e:2x2", 4), ("8b", "v5p:4x4x2", 64)
CASES = (
  Case(*LLAMA, "pruned", 8192),
  Case(*LLAMA, "pruned", 8192, UPDATE),
  Case(*QUICKSTART, "dense", 512),
  Case(*QUICKSTART, "folded", 512),
  Case(*QUICKSTART, "linear", 512),
  Case(*QUICKSTART, "dense", 4096),
  Case(*QUICKSTART, "folded", 4096),
  Case(*QUICKSTART, "linear", 4096),
  Case(*QUICKSTART, "dense", 65536),
  Case(*QUICKSTART, "folded", 65536),
  Case(*QUICKSTART, "linear", 65536),
  Case(*LLAMA, "dense", 8192),
  Case(*QUICKSTART, "folded", 4096, UPDATE),
)


def measure(case: Case) -> dict[str, Any]:
  """Returns the figures of `folding.training.estimate.measure`, and more."""
  start = time.monotonic()
  devices = estimate.find_devices(case.devices)
  config = case.config()
  mesh = sharding.make_mesh(config.mesh, devices.devices)
  program = estimate.make_program(shape_of(config), config, mesh)
  found = estimate.measure(
    program, devices, is_mask_update=case.program == UPDATE
  )
  seconds, share = found.get("seconds"), None
  if seconds and devices.peak and case.variant != "linear":
    needed = _needed_flops(program, case) / len(devices.devices)
    share = needed / seconds / devices.peak
  return {
    **case._asdict(),
    "gib": devices.gib,
    "parameters": program.num_parameters,
    **found,
    "share": share,
    "commit": source_commit(),
    "compile_seconds": time.monotonic() - start,
  }


def _needed_flops(program: Program, case: Case) -> float:
  """Returns the FLOP of a step's products, without any that are repeated.

  A parameter of a product takes six per token. Causal attention sees half of the
  keys, in two products forward and four backward.
  """
  shape = program.model.shape
  matrices = [
    x
    for name, x in paths.flatten(program.like.params).items()
    if x.ndim > 1 and (shape.tie_embeddings or not name.startswith("embed/"))
  ]
  attention = sum(
    len(layer.heads) * ((layer.groups or layer.head_dim) + layer.value_dim)
    for layer in shape.layers
  )
  each = 6 * sum(x.size for x in matrices) + 3 * case.length * attention
  return case.texts * case.length * each


def measure_all(
  cases: Sequence[Case], cache: pathlib.Path | None, longest: int
) -> list[dict[str, Any]]:
  """Returns the figures of the cases up to a length.

  Args:
    cases: Programs to compile.
    cache: Folder of figures that are there already; None: measure all.
    longest: Most tokens per text.
  """
  rows = []
  for case in cases:
    if case.length > longest:
      continue
    file = cache and cache / f"{'-'.join(map(str, case))}.json"
    if file and file.exists():
      rows.append(files.read_json(str(file), dict))
      continue
    print(*case, flush=True)
    rows.append(measure(case))
    if file:
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_file(str(file), json.dumps(rows[-1]).encode())
  return rows


def _row(one: dict[str, Any]) -> list[str]:
  needed = one.get("arguments", 0) + one.get("scratch", 0)
  collectives = one.get("collectives", {})
  fits = "yes" if one["fits"] else "no"
  if one.get("missing"):
    fits += f", {one['missing'] / GIB:.1f} missing"
  return [
    f"{one['model']}, {one['variant']}, {one['program']}",
    f"{one['length']:,}",
    f"{one['arguments'] / GIB:.3f}" if needed else "",
    f"{one['scratch'] / GIB:.3f}" if needed else "",
    f"{1e3 * one['seconds']:,.1f}" if one.get("seconds") else "",
    f"{one['share']:.1%}" if one.get("share") else "",
    f"{sum(m['bytes'] for m in collectives.values()) / GIB:.3f}",
    f"{sum(m['times'] for m in collectives.values()):,.0f}",
    f"{one['gib']:.0f}",
    fits,
    f"{one['commit'][:7]}",
  ]


def run(
  kind: str, cases: Sequence[Case], description: str | None, package: str
) -> None:
  """Compiles programs, and shows what the compiler reports.

  Args:
    kind: "TPU" or "GPU".
    cases: Programs to compile.
    description: The docstring of the benchmark.
    package: The package of the compiler.
  """
  parser = output.make_parser(description)
  parser.add_argument(
    "--cache", type=pathlib.Path, help="folder of figures to keep"
  )
  parser.add_argument("--longest", type=int, default=65536, help="tokens")
  args = parser.parse_args()
  rows = measure_all(cases, args.cache, args.longest)
  rows.sort(key=lambda r: (r["parameters"], r["length"]))
  header = (
    *("program", "tokens per text", "arguments", "scratch", "estimate, ms"),
    *("of peak", "moved", "collectives", "memory", "fits", "commit"),
  )
  cells = list(map(_row, rows))
  # Without columns that this compiler leaves empty.
  shown = [n for n in range(len(header)) if any(row[n] for row in cells)]
  table = output.Table(
    f"Per device, by the {kind} compiler; nothing was run. GiB of arguments, "
    "scratch memory, results of collectives, and memory",
    [header[n] for n in shown],
    [[row[n] for n in shown] for row in cells],
  )
  small = [
    one
    for one in rows
    if one["model"] == "quickstart" and one["program"] == STEP
  ]
  series: dict[str, dict[str, dict[float, float]]] = {}
  for label, key, unit in (
    ("scratch memory per device, GiB", "scratch", GIB),
    ("estimate per step, ms", "seconds", 1e-3),
  ):
    for one in small:
      if one.get(key):  # the GPU compiler makes no estimate
        name = LABELS.get(one["variant"], str(one["variant"]))
        points = series.setdefault(label, {}).setdefault(name, {})
        points[one["length"]] = one[key] / unit
  lines = output.Lines(
    f"The quickstart on {small[0]['devices']}, one text per device, as compiled",
    "tokens per text",
    series,
  )
  result = {
    "device": f"compiled for {kind}s on a CPU; nothing was run",
    package: importlib.metadata.version(package),
    "jax": importlib.metadata.version("jax"),
    "rows": rows,
  }
  output.show(kind.lower(), args, result, [table], lines)


if __name__ == "__main__":
  run("TPU", CASES, __doc__, "libtpu")
