"""Trains: `python train.py --config=configs/quickstart.py --workdir=RUN`."""

import os
import sys
import typing

from absl import app, flags
from ml_collections import config_flags

from folding import cli, schema
from folding import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  help_string="File with get_config(); --config.a.b=v sets a field, all of "
  "which folding/config.py has.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


class _Numbers(flags.ArgumentParser):
  def parse(self, argument):
    return schema.per_layer(argument)


def _parse(argv: list[str]) -> tuple[config_lib.Config, str]:
  """Returns config and workdir; a mistake becomes a ConfigError of one line."""
  fields = schema.fields(config_lib.Config)
  register = config_flags.register_flag_parser_for_type
  register(schema.PerLayer, _Numbers())
  for hint in fields.values():
    if typing.get_origin(hint) is typing.Literal:
      register(hint, flags.EnumParser(list(typing.get_args(hint))))
  for arg in argv:
    if not arg.startswith("-"):
      continue  # the value of the flag before
    name = arg.lstrip("-").removeprefix("no").split("=")[0]
    if name.startswith("config.") and name[7:] not in fields:
      raise schema.ConfigError(schema.no_field("config", name[7:], fields))
  names = [f"--config.{name}" for name in fields]
  joined: list[str] = []
  for arg in argv:  # "--config.a.b None" as "--config.a.b=None"
    if arg == "None" and joined and joined[-1] in names:
      joined[-1] += "=None"
    else:
      joined.append(arg)
  argv = joined
  nones = [f"{name}=None" for name in names]  # which no parser reads
  last = {arg.split("=")[0]: arg for arg in argv}  # the last one counts
  unset = {arg[9:-5]: None for arg in last.values() if arg in nones}
  try:
    rest = flags.FLAGS([arg for arg in argv if arg not in nones])[1:]
  except Exception as error:  # a config file is a program
    message = f"--config fails: {schema.reason(error)}"
    if isinstance(error, flags.Error | ValueError | TypeError):
      # ml_collections wraps what get_config raised, with its traceback.
      message = (str(error).strip().splitlines() or [repr(error)])[-1]
      message = message.removeprefix("folding.schema.ConfigError: ")
    raise schema.ConfigError(message) from error
  if rest or not _WORKDIR.value or not flags.FLAGS["config"].present:
    which = f"; {rest[0]!r} is neither" if rest else ""
    raise schema.ConfigError(f"give --config=FILE and --workdir=DIR{which}")
  config = _CONFIG.value
  if not isinstance(config, config_lib.Config):  # also: no such file
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    there = "is not a file that gives a Config"
    if not os.path.isfile(name):
      there = f"is not there (from {os.getcwd()})"
    raise schema.ConfigError(f"{name} {there}")
  return schema.edited(config, unset), _WORKDIR.value


def _train(argv: list[str]) -> None:
  config, workdir = _parse(argv)
  # After the flags, as these import much.
  from folding.training import distributed, loop

  loop.run(config, workdir)
  if distributed.is_main():
    cli.show_report(workdir)


if __name__ == "__main__":
  app.define_help_flags()
  sys.exit(cli.exit_status(lambda: _train(sys.argv)))
