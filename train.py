"""Trains a run: `python train.py --config=configs/quickstart.py --workdir=RUN`.

Flags only: what is done is in `folding.training.loop`, and what is said about
it in `folding.reporting`.
"""

import sys
import typing

from absl import app, flags
from ml_collections import config_flags

from folding import cli, schema
from folding import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="File with get_config(); override with --config.a.b=v."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


def _parse(argv: list[str]) -> tuple[config_lib.Config, str]:
  """Returns config and workdir; every mistake becomes a ConfigError of one line."""
  fields = schema.fields(config_lib.Config)
  for hint in fields.values():
    if typing.get_origin(hint) is typing.Literal:
      config_flags.register_flag_parser_for_type(
        hint, flags.EnumParser(list(typing.get_args(hint)))
      )
  for arg in argv:
    name = arg.removeprefix("--").removeprefix("no").split("=")[0]
    if name.startswith("config.") and name[7:] not in fields:
      raise schema.ConfigError(
        f"config has no field {name[7:]!r}; its fields are {', '.join(fields)}"
      )
  try:
    rest = flags.FLAGS(argv)[1:]
  except (flags.Error, ValueError, TypeError) as error:
    # ml_collections wraps what get_config raised, with its traceback.
    message = (str(error).strip().splitlines() or [repr(error)])[-1]
    message = message.removeprefix("folding.schema.ConfigError: ")
    raise schema.ConfigError(message) from error
  if rest or not _WORKDIR.value or not flags.FLAGS["config"].present:
    raise schema.ConfigError(
      "give --config=FILE (see configs/) and --workdir=DIRECTORY"
      + (f"; {rest[0]!r} is neither" if rest else "")
    )
  config = _CONFIG.value
  if not isinstance(config, config_lib.Config):  # also: no such file
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    raise schema.ConfigError(f"{filename} is not a file that gives a Config")
  return config, _WORKDIR.value


def _train(argv: list[str]) -> None:
  config, workdir = _parse(argv)
  from folding.training import loop  # after the flags, as it imports much

  loop.run(config, workdir)
  cli.show_report(workdir)


if __name__ == "__main__":
  app.define_help_flags()
  sys.exit(cli.exit_status(lambda: _train(sys.argv)))
