"""What a run used, as CodeCarbon estimates it (extra `energy`), offline."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from folding import files
from folding.schema import ConfigError

FILE = "energy.json"


def require_tracker(country: str) -> None:
  """Does nothing where no estimate is asked for, or it can be made.

  Raises:
    ConfigError: CodeCarbon is not installed.
  """
  if country:
    _tracker()


@contextlib.contextmanager
def tracked(workdir: str, country: str) -> Iterator[None]:
  """Adds what is used meanwhile to a run's `energy.json`.

  It is an estimate: of the power of the whole machine, on many machines from
  tables and not from a meter, times the mean carbon intensity of a country.

  Args:
    workdir: The run directory; a run that was resumed adds to what is there.
    country: ISO 3166 code of three letters; "": nothing is estimated.

  Raises:
    ConfigError: CodeCarbon is not installed.
  """
  if not country:
    yield
    return
  codecarbon = _tracker()
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
    kg = tracker.stop() or 0.0
    data = tracker.final_emissions_data
    path = os.path.join(workdir, FILE)
    before = {"kwh": 0.0, "kg_co2e": 0.0}
    if os.path.exists(path):
      before = files.read_json(path, dict)
    used = {
      "kwh": before["kwh"] + data.energy_consumed,
      "kg_co2e": before["kg_co2e"] + kg,
      "country": data.country_name or "unknown, so the mean of the world",
      "by": f"codecarbon {codecarbon.__version__}",
    }
    files.write_file(path, json.dumps(used))


def _tracker() -> Any:
  try:
    import codecarbon  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
      "train.energy is estimated by CodeCarbon; install it with "
      "pip install -e '.[energy]', or leave it empty"
    ) from error
  return codecarbon
