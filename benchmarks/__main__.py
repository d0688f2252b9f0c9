"""The benchmarks, one after the other, into `benchmarks/results/`.

    python -m benchmarks [NAME...] [--folders FOLDER...]

Each in a process of its own, as it starts JAX in its own way. FOLDERs are for
fold_minilm, which is left out without them. `fold_lm`, `peers` and `tokens` need a
model or runs, as in `python -m benchmarks.tokens RUN...`, and are called by
themselves.
"""

import argparse
import subprocess
import sys

CALLS = {
  "attention": ["--rounds=10"],
  "decode": [],
  "fold_minilm": [],
  "fpp_step": ["--rounds=30"],
  "fpp_step_8": ["--rounds=30", "--devices=8"],
  "mask_update": ["--sizes=1,4,16,64"],
  "minilm": ["--rounds=10"],
  "shrink": ["--rounds=10"],
}


def main() -> int:
  """Runs them; the exit status is 1 if one fails."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CALLS))
  parser.add_argument("--folders", nargs="+", default=[])
  args = parser.parse_args()
  if unknown := sorted(set(args.names) - set(CALLS)):
    parser.error(f"there is no benchmark {unknown[0]!r}")
  failed = []
  for name in args.names or CALLS:
    flags = CALLS[name]
    if name == "fold_minilm":
      if not args.folders:
        print("fold_minilm is left out, as it needs --folders")
        continue
      flags = args.folders
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
