"""The verb `folding plan`."""

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from folding import checks, files, schema
from folding import config as config_lib
from folding.config import Config


def add_to(verbs: Any) -> None:
  """Adds the verb to the subparsers of the command line."""
  verb = verbs.add_parser("plan", help="say what a config takes on devices")
  verb.add_argument(
    "--config",
    metavar="FILE[:ARGUMENT]",
    required=True,
    help="as train.py takes it; nothing is read but the file and a tokenizer",
  )
  verb.add_argument(
    "--devices",
    metavar="DEVICES",
    required=True,
    help="v4-N, v5e-N, v5p-N, v6e-N, a100-N, h100-N, h200-N, cpu-N, or "
    "NAME:COUNTxGIB",
  )
  verb.add_argument(
    "--set",
    metavar="FIELD=VALUE",
    action="append",
    default=[],
    help="another value of the config, such as mesh.tensor=4",
  )
  verb.add_argument(
    "--compile",
    action="store_true",
    help="compile the step for so many simulated devices and ask XLA as well",
  )
  verb.add_argument("--json", action="store_true", help="print JSON")
  verb.set_defaults(call=plan)


def plan(args: argparse.Namespace) -> None:
  """Prints what training takes on each device, and whether it fits."""
  import jax

  from folding.training import capacity

  devices = capacity.parse_devices(args.devices)
  config = files.call_in_file(args.config, "get_config")
  schema.require(
    isinstance(config, Config), f"get_config() of {args.config} gives no Config"
  )
  config = edited(config, args.set)
  if args.compile:  # before jax starts
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices.count)
  found = capacity.plan(config, devices, compiles=args.compile)
  print(json.dumps(found) if args.json else table(found))


def edited(config: Config, edits: Sequence[str]) -> Config:
  """Returns a resolved config with other values, given as "FIELD=VALUE".

  Raises:
    ConfigError: there is no such field, the value does not fit it, or a run
      would pass it over.
  """
  given: dict[str, Any] = {}
  for edit in edits:
    name, _, text = edit.partition("=")
    given[name] = _value(text)
  asked = schema.edited(config, given)
  config = config_lib.resolve(asked)
  checks.check_used(config, asked)  # as a run would
  return config


def _value(text: str) -> Any:
  """Returns a value as a flag of train.py or JSON would have it."""
  words = {"True": True, "False": False, "None": None}
  if text in words:
    return words[text]
  for form in (text, f"[{text}]"):  # the second: 4,2,1
    with contextlib.suppress(ValueError):
      return json.loads(form)
  return text


def table(found: dict[str, Any]) -> str:
  """Returns a plan as text."""
  devices, columns = found["devices"], ("dense", "compressed")
  rows = [["GiB a device", *columns]]

  def add(name, *values):
    rows.append([name, *(f"{value / 2**30:,.2f}" for value in values)])

  sizes = [found[column]["bytes"] for column in columns]
  for part in dict.fromkeys([*sizes[0], *sizes[1]]):
    add(part, *(size.get(part, 0) for size in sizes))
  add("total", *(found[column]["total"] for column in columns))
  for what in found["dense"].get("xla", ()):
    add(f"XLA: {what}", *(found[column]["xla"][what] for column in columns))
  verdicts = ["fits" if found[c]["fits"] else "does not fit" for c in columns]
  rows.append([f"in {devices['gib']:,.1f}", *verdicts])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
    for row in rows
  ]
  dense, kept = found["dense"]["parameters"], found["compressed"]["stored"]
  mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
  return "\n".join(
    [
      f"{devices['count']} x {devices['name']}, mesh {mesh}",
      *lines,
      f"{dense:,} parameters dense, {kept:,} stored in the end "
      f"({kept / dense:.1%})",
      *(f"mesh: {line}" for line in found["unsplit"]),
    ]
  )
