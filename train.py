"""Trains a run: `python train.py --config=configs/quickstart.py --workdir=RUN`.

Flags only: what is done is in `folding.training.loop`, what is said about it
in `folding.reporting.report`.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from folding.schema import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File that returns the configuration.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise ConfigError(f"what is {argv[1]!r}? Flags start with --")
  if not isinstance(_CONFIG.value, config_lib.Config) or not _WORKDIR.value:
    raise ConfigError(
      "need --config=FILE (see configs/) and --workdir=DIRECTORY"
    )
  loop.run(_CONFIG.value, _WORKDIR.value)
  summary = report.write_report(_WORKDIR.value)


if __name__ == "__main__":
  app.run(main)
