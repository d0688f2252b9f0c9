"""`python -m folding` is the command `folding`."""

import sys

from folding import cli

if __name__ == "__main__":
  cli.leave_first_folder()
  sys.exit(cli.main())
