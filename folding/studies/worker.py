"""One run in a process of its own: `python -m folding.studies.worker`.

So its memory is given back. Its standard input is a pipe from the process that
started it, which writes to it as it beats the claim of the run. When that ends,
however it ends, or is suspended, so does this one, and what it was doing can be
taken over.
"""

import argparse
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from folding import config as config_lib
from folding import schema
from folding.studies.claims import STALE_SECONDS

# Exit status of one whose parent is gone. Nothing here handles that signal.
ABANDONED = -signal.SIGUSR1


def main(argv: Sequence[str] | None = None) -> int:
  """Trains a run, or goes on, and returns the exit status, as `folding` does.

  Args:
    argv: CONFIG.json RUN [--cores=0,1] [--text=SHA256].
  """
  parser = argparse.ArgumentParser()
  parser.add_argument("config")
  parser.add_argument("run")
  parser.add_argument("--cores")
  parser.add_argument("--text", default="")
  args = parser.parse_args(argv)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  if args.cores:  # before JAX counts them
    os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])
  from folding.training import loop

  try:
    loop.run(config_lib.load(args.config), args.run)
  except (schema.ConfigError, schema.TrainingError, OSError) as error:
    print(schema.one_line(error), file=sys.stderr)
    return 1 if isinstance(error, schema.TrainingError) else 2
  except Exception as error:
    traceback.print_exc()
    print(schema.reason(error), file=sys.stderr)  # the last line of the log
    return 1
  return 0


def _end_with_parent() -> None:
  # Well before others take the claim for abandoned.
  while select.select([0], [], [], STALE_SECONDS / 2)[0]:
    if not os.read(0, 1024):  # not sys.stdin, whose lock would hang the exit
      break
  # At once: a run is safe against that, and another may take it over.
  os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
  sys.exit(main())
