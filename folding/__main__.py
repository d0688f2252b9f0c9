"""`python -m folding` is the command `folding`."""

import sys

from folding.cli import main

if __name__ == "__main__":
  sys.exit(main())
