"""`python -m folding` is the command `folding`."""

from folding import cli

if __name__ == "__main__":
  cli.leave_first_folder()
  cli.run()
