"""What a run used, as CodeCarbon estimates it (extra `energy`), offline."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from folding.reporting import runs
from folding.schema import ConfigError
from folding.training.result import is_finished, read_result


@contextlib.contextmanager
def tracked(workdir: str, country: str) -> Iterator[None]:
  """Adds "energy" to a run's `result.json`, over all times it was resumed.

  It is an estimate: of the power of the whole machine, on many machines from
  tables and not from a meter, times the mean carbon intensity of a country.

  Args:
    workdir: The run directory.
    country: ISO 3166 code of three letters.

  Raises:
    ConfigError: CodeCarbon is not installed.
  """
  try:
    import codecarbon  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
      "energy is estimated by CodeCarbon; install it with "
      "pip install 'folding[energy]'"
    ) from error
  tracker = codecarbon.OfflineEmissionsTracker(
    country_iso_code=country,
    save_to_file=False,
    log_level="error",
    allow_multiple_runs=True,
  )
  tracker.start()
  try:
    yield
  finally:
    kg = tracker.stop()
    path = os.path.join(workdir, "energy.json")
    data = tracker.final_emissions_data
    used = {"kwh": data.energy_consumed, "kg_co2e": kg, "is_estimate": True}
    used["country"] = data.country_name or "unknown, so the mean of the world"
    used["by"] = f"codecarbon {codecarbon.__version__}"
    if os.path.isdir(workdir):
      _add(path, used)
      if is_finished(workdir):
        values = read_result(workdir) | {"energy": _read(path)}
        target = os.path.join(workdir, "result.json")
        runs.write_file(target, json.dumps(values, indent=1))


def _add(path: str, used: dict[str, Any]) -> None:
  none = {"kwh": 0.0, "kg_co2e": 0.0}
  before = _read(path) if os.path.exists(path) else none
  for name in ("kwh", "kg_co2e"):
    used[name] = before[name] + (used[name] or 0.0)
  runs.write_file(path, json.dumps(used))


def _read(path: str) -> dict[str, Any]:
  with open(path, encoding="utf-8") as file:
    return json.load(file)
