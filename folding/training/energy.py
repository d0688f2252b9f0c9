"""Energy and emissions of a run, estimated by CodeCarbon (extra `energy`)."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from folding import files
from folding.errors import ConfigError

FILE = "energy.json"


@contextlib.contextmanager
def tracked(workdir: str, country: str) -> Iterator[None]:
  """Adds the consumption during a block to the `energy.json` of a run.

  The estimate needs no network. It is the power of the whole machine (on many
  machines from tables, not from a meter), times the mean carbon intensity of the
  country.

  Args:
    workdir: The run directory.
    country: ISO 3166 code of three letters; "": no estimate.

  Raises:
    ConfigError: the code is not valid, CodeCarbon is not installed, or the file is
      damaged.
  """
  if not country:
    yield
    return
  codecarbon = require_codecarbon(country)
  before = read(workdir) or {"kwh": 0.0, "kg_co2e": 0.0}
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
    total = {
      "kwh": before["kwh"] + data.energy_consumed,
      "kg_co2e": before["kg_co2e"] + kg,
      "country": data.country_name or "unknown: world average",
      "by": f"codecarbon {codecarbon.__version__}",
    }
    files.write_file(os.path.join(workdir, FILE), json.dumps(total))


def read(workdir: str) -> dict[str, Any] | None:
  """Returns the content of `energy.json`; None without it.

  Raises:
    ConfigError: it is damaged.
  """
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    return None
  found = files.read_json(path, dict)
  kinds = {"kwh": float, "kg_co2e": float, "country": str, "by": str}
  for name, kind in kinds.items():
    if not isinstance(found.get(name), kind):
      raise ConfigError(f"{path} is damaged: {name} is {found.get(name)!r}")
  return found


def require_codecarbon(country: str) -> Any:
  """Returns the package `codecarbon`.

  Raises:
    ConfigError: it is not installed, or the country is not a code of three letters.
  """
  if not re.fullmatch("[A-Z]{3}", country):
    raise ConfigError(
      "train.energy is the ISO 3166 code of a country, three capital letters such "
      f"as DEU; it is {country!r}"
    )
  try:
    import codecarbon  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
      "train.energy needs CodeCarbon: pip install 'folding-jax[energy]', or leave "
      "it empty"
    ) from error
  return codecarbon
