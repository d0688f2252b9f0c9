"""What the TPU compiler reports of training steps; no TPU is needed.

    python -m benchmarks.tpu [--longest=65536] [--cache=DIR] [--save] [--json]

It needs `pip install -e '.[tpu]'`. Nothing runs: memory, cycles and collectives
are the compiler's, as `folding estimate` prints them ("Will it fit?" in
docs/how-to/devices.md). Each program takes from ten seconds to minutes of one
CPU core to compile; with --cache a second call compiles only what is missing.

The quickstart has one text per device, so tokens per step grow with the length.
Llama 3 8B has 64 texts of 8,192 tokens. "pruned" has the masks of
FPP beside the dense weights, "folded" has W_Q, W_K and W_V folded as well, and
"linear" attends in linear time.
"""

import importlib.metadata
import json
import pathlib
import time
from typing import Any, NamedTuple

from benchmarks import output
from folding import config as config_lib
from folding import files
from folding.models.shape import shape_of
from folding.training import estimate, sharding
from folding.training.run_dir import source_commit

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
    variant: "dense", "pruned", "folded" or "linear".
    length: Tokens per text.
    program: "step" or "mask update".
  """

  model: str
  variant: str
  length: int
  program: str = STEP

  @property
  def devices(self) -> str:
    """Name of the devices, as `folding estimate` takes it."""
    return {"quickstart": "v5e:2x2", "8b": "v5p:4x4x2"}[self.model]

  @property
  def texts(self) -> int:
    """Texts per step."""
    return {"quickstart": 4, "8b": 64}[self.model]

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


CASES = (
  Case("8b", "pruned", 8192),
  Case("8b", "pruned", 8192, UPDATE),
  Case("quickstart", "dense", 512),
  Case("quickstart", "folded", 512),
  Case("quickstart", "linear", 512),
  Case("quickstart", "dense", 4096),
  Case("quickstart", "folded", 4096),
  Case("quickstart", "linear", 4096),
  Case("quickstart", "dense", 65536),
  Case("quickstart", "folded", 65536),
  Case("quickstart", "linear", 65536),
  Case("8b", "dense", 8192),
  Case("quickstart", "folded", 4096, UPDATE),
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
  return {
    **case._asdict(),
    "devices": case.devices,
    "texts": case.texts,
    "gib": devices.gib,
    "parameters": program.num_parameters,
    **found,
    "commit": source_commit(),
    "compile_seconds": time.monotonic() - start,
  }


def measure_all(
  cache: pathlib.Path | None, longest: int
) -> list[dict[str, Any]]:
  """Returns the figures of the cases up to a length.

  Args:
    cache: Folder of figures that are there already; None: measure all.
    longest: Most tokens per text.
  """
  rows = []
  for case in CASES:
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
    f"{1e3 * one['seconds']:.1f}" if needed else "",
    f"{sum(m['bytes'] for m in collectives.values()) / GIB:.3f}",
    f"{one['gib']:.0f}",
    fits,
  ]


def main() -> None:
  """Compiles, and shows what the compiler reports."""
  parser = output.make_parser(__doc__)
  parser.add_argument(
    "--cache", type=pathlib.Path, help="folder of figures to keep"
  )
  parser.add_argument("--longest", type=int, default=65536, help="tokens")
  args = parser.parse_args()
  rows = measure_all(args.cache, args.longest)
  rows.sort(key=lambda r: (r["parameters"], r["length"]))
  table = output.Table(
    "Per device, by the TPU compiler; nothing was run. GiB of arguments, "
    "scratch memory, results of collectives, and memory",
    [
      *("program", "tokens per text", "arguments", "scratch", "estimate, ms"),
      *("moved", "memory", "fits"),
    ],
    [_row(one) for one in rows],
  )
  series: dict[str, dict[str, dict[float, float]]] = {}
  for label, key, unit in (
    ("scratch memory per device, GiB", "scratch", GIB),
    ("estimate per step, ms", "seconds", 1e-3),
  ):
    for one in rows:
      if one["model"] == "quickstart" and one["program"] == STEP and key in one:
        name = LABELS.get(one["variant"], str(one["variant"]))
        points = series.setdefault(label, {}).setdefault(name, {})
        points[one["length"]] = one[key] / unit
  lines = output.Lines(
    "The quickstart on 4 x v5e, one text per device, as compiled",
    "tokens per text",
    series,
  )
  result = {
    "device": "compiled for TPUs on a CPU; nothing was run",
    "libtpu": importlib.metadata.version("libtpu"),
    "jax": importlib.metadata.version("jax"),
    "rows": rows,
  }
  output.show("tpu", args, result, [table], lines)


if __name__ == "__main__":
  main()
