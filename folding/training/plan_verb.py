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
  verb = verbs.add_parser("plan", help="say what a step takes on devices")
  verb.add_argument(
    "--config",
    metavar="FILE[:ARGUMENT]",
    required=True,
    help="a config file; of the data only a tokenizer is read",
  )
  verb.add_argument(
    "--devices",
    metavar="DEVICES",
    required=True,
    help="cpu-8 (simulated, an estimate), or TPUs: v5p:4x4x2, v5e:2x2, v5p-64",
  )
  verb.add_argument(
    "--set",
    metavar="FIELD=VALUE",
    action="append",
    default=[],
    help="another value of the config, such as mesh.tensor=4",
  )
  verb.add_argument("--json", action="store_true", help="print JSON")
  verb.set_defaults(call=plan)


def plan(args: argparse.Namespace) -> None:
  """Prints what a training step takes on each device, and whether it fits."""
  from folding.training import plan as plan_lib

  config = files.call_in_file(args.config, "get_config")
  schema.require(
    isinstance(config, Config), f"get_config() of {args.config} gives no Config"
  )
  config = edited(config, args.set)
  found = plan_lib.plan(config, plan_lib.find_devices(args.devices))
  print(json.dumps(found) if args.json else plan_lib.table(found))


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
