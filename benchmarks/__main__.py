"""Runs benchmarks one after the other, into `benchmarks/results/`.

    python -m benchmarks [NAME...]

Each runs in a process of its own, because each configures JAX differently.
`one_model`, `embeddings` and `generation` need models and are called directly:
`python -m benchmarks.one_model RUN...`.
"""

import argparse
import subprocess
import sys

CALLS = {
  "attention": ["--rounds=10"],
  "compact": ["--steps=1000"],
  "compress": [],
  "decode": [],
  "fpp_step": ["--rounds=30"],
  "fpp_step_8": ["--rounds=30", "--devices=8"],
  "shrink": ["--rounds=10"],
}


def main() -> int:
  """Runs them and returns the exit status, 1 if one fails."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CALLS))
  args = parser.parse_args()
  if unknown := sorted(set(args.names) - set(CALLS)):
    parser.error(f"there is no benchmark {unknown[0]!r}")
  failed = []
  for name in args.names or CALLS:
    flags = CALLS[name]
    module = "fpp_step" if name.startswith("fpp_step") else name
    command = [sys.executable, "-m", f"benchmarks.{module}", "--save", *flags]
    print(" ".join(command[1:]), flush=True)
    if subprocess.run(command).returncode:
      failed.append(name)
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main())
