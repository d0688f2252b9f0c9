"""What the GPU compiler reports of training steps; no GPU is needed.

    python -m benchmarks.gpu [--longest=8192] [--cache=DIR] [--save] [--json]

It needs `pip install -e '.[gpu-estimate]'`. It compiles programs of
`benchmarks.tpu`: the quickstart for eight H100 of one host, and Llama 3 8B for 32
of four hosts. This compiler makes no estimate of time.
"""

from benchmarks.tpu import UPDATE, Case, run

QUICKSTART, LLAMA = ("quickstart", "h100:8", 8), ("8b", "h100:4x8", 64)
CASES = (
  Case(*LLAMA, "pruned", 8192),
  Case(*LLAMA, "pruned", 8192, UPDATE),
  Case(*LLAMA, "dense", 8192),
  Case(*QUICKSTART, "dense", 512),
  Case(*QUICKSTART, "folded", 512),
  Case(*QUICKSTART, "folded", 512, UPDATE),
  Case(*QUICKSTART, "dense", 8192),
  Case(*QUICKSTART, "folded", 8192),
)

if __name__ == "__main__":
  run("GPU", CASES, __doc__, "jax-cuda12-plugin")
