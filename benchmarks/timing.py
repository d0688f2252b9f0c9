"""Times alternatives in turn, so that drifts of the machine hit all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def time_in_turn(
  calls: Mapping[str, Callable[[], object]],
  rounds: int,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Returns the seconds of each call in each round, after one warm-up.

  The order is reversed every other round, so that no call always comes first.

  Args:
    calls: Functions to time.
    rounds: How often each is timed.
    clock: Returns seconds. `time.process_time` sums those of all cores, and
      hardly depends on what else runs on the machine.
  """
  for call in calls.values():
    call()
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for index in range(rounds):
    for name in sorted(calls, reverse=bool(index % 2)):
      start = clock()
      calls[name]()
      seconds[name].append(clock() - start)
  return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict:
  """Returns the median and quartiles of the ratio within each round."""
  low, middle, high = quartiles(
    [a / b for a, b in zip(numerator, denominator, strict=True)]
  )
  return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def quartiles(values: Sequence[float]) -> list[float]:
  """Returns the lower quartile, the median and the upper quartile."""
  if len(values) == 1:
    return [*values] * 3
  return statistics.quantiles(values, n=4)
