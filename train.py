"""Trains: `python train.py --config=configs/quickstart.py --workdir=RUN`.

The same as `folding train`.
"""

import sys

from folding import cli

if __name__ == "__main__":
  cli.leave_first_folder()
  sys.exit(cli.main(["train", *sys.argv[1:]]))
