"""Work of a compiled program and its traffic between devices, from its HLO.

XLA's own cost analysis counts the body of a loop once. Here it counts once per
iteration.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from folding.models import attention_kernel

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
  r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|"
  r"reduce-scatter)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ITERATIONS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Spans three lines.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*\n\}")
_BOUND = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")


class Moved(NamedTuple):
  """Collectives of one kind, per device.

  Attributes:
    times: How often they run.
    bytes: Size of their results.
  """

  times: float
  bytes: float


class Work(NamedTuple):
  """What a program does, per device.

  Attributes:
    cycles: The compiler's estimate for everything but collectives; 0 if it makes
      none, as for CPUs.
    moved: {kind of collective: its runs and bytes}.
    kernel_flops: FLOP of attention kernels, whose cycles the compiler leaves out.
  """

  cycles: float
  moved: Mapping[str, Moved]
  kernel_flops: float = 0

  def plus(self, other: "Work", times: float = 1) -> "Work":
    """Returns the sum of this work and several times another."""
    moved = dict(self.moved)
    for kind, (number, size) in other.moved.items():
      old = moved.get(kind, Moved(0, 0))
      moved[kind] = Moved(old.times + times * number, old.bytes + times * size)
    return Work(
      self.cycles + times * other.cycles,
      moved,
      self.kernel_flops + times * other.kernel_flops,
    )


def read(text: str) -> Work:
  """Returns the work of a program.

  - A loop counts once per iteration. If their number is decided at run time, a
    loop inside a loop of N iterations counts (N + 1) / 2 times: causal attention
    loops over the blocks of keys that a block of queries attends to. Any other
    such loop counts once.
  - Of two branches, the more expensive one counts.
  - Of more branches, the cheapest counts: `attention=linear` has branches for
    different errors, and exact attention as a fallback.

  Args:
    text: From `jax.stages.Compiled.as_text`.
  """
  computations: dict[str, list[str]] = {}
  lines: list[str] = []
  entry = ""
  for line in _KERNEL_METADATA.sub("kernel_metadata={}", text).splitlines():
    if found := _COMPUTATION.match(line):
      lines = computations[found[2]] = []
      entry = found[2] if found[1] else entry
    elif line.startswith("  "):
      lines.append(line)
  return _read(entry, computations, iterations=1.0)


def _read(
  name: str, computations: Mapping[str, Sequence[str]], iterations: float
) -> Work:
  """Returns the work of one run of a computation, in a loop of iterations."""
  work = Work(0, {})
  for line in computations.get(name, ()):
    if found := _CYCLES.search(line):
      work = work._replace(cycles=work.cycles + int(found[1]))
    if flops := attention_kernel.flops_of(line):
      work = work._replace(kernel_flops=work.kernel_flops + flops)
    if found := _COLLECTIVE.search(line):
      kind, size = found[2], _size(found[1], is_start=bool(found[3]))
      work = work.plus(Work(0, {kind: Moved(1, size)}))
    elif " while(" in line:
      body, condition = _called("body", line)[0], _called("condition", line)[0]
      known = _iterations(line, computations.get(condition, ()))
      count = (iterations + 1) / 2 if known is None else known
      inside = _read(body, computations, 1.0 if known is None else known)
      work = work.plus(inside, count)
    elif " conditional(" in line:
      branches = _called("branch_computations", line)
      branches += _called("true_computation", line)
      branches += _called("false_computation", line)
      each = [_read(branch, computations, iterations) for branch in branches]
      pick = max if len(each) == 2 else min
      work = work.plus(pick(each, key=lambda w: w.cycles))
    elif " fusion(" in line or "-start(" in line:  # its cycles are on the line
      for called in _called("calls", line):
        inside = _read(called, computations, iterations)
        work = work.plus(inside._replace(cycles=0))
    elif " call(" in line:
      for called in _called("to_apply", line):
        work = work.plus(_read(called, computations, iterations))
  return work


def _called(attribute: str, line: str) -> list[str]:
  """Returns the names of computations that an instruction calls."""
  found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", line)
  return re.findall(r"[\w.\-]+", found[1]) if found else []


def _iterations(line: str, condition: Sequence[str]) -> float | None:
  """Returns the iterations of a loop from 0; None: decided at run time."""
  if found := _ITERATIONS.search(line):
    return float(found[1])
  bounds = [m[1] for each in condition if (m := _BOUND.search(each))]
  is_below = any("ROOT" in x and "direction=LT" in x for x in condition)
  return float(bounds[0]) if is_below and len(bounds) == 1 else None


def _size(shape: str, *, is_start: bool) -> int:
  """Returns the bytes of the result of a collective."""
  sizes = [
    math.prod(int(n) for n in dims.split(",") if n) * _bits(kind) // 8
    for kind, dims in _ARRAY.findall(shape)
  ]
  # The start of an asynchronous one also has its operand and flags.
  return max(sizes) if is_start else sum(sizes)


def _bits(kind: str) -> int:
  return 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
