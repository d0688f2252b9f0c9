"""Trains: `python train.py --config=configs/quickstart.py --workdir=RUN`.

The same as `folding train`.
"""

import sys

from folding import cli

if __name__ == "__main__":
  cli.leave_first_folder()
  cli.run(["train", *sys.argv[1:]])
