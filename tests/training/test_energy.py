"""Energy of a run, summed over its resumptions."""

import json
import sys

import pytest

from folding.errors import ConfigError
from folding.reporting import report
from folding.training import energy, loop
from tests.training.conftest import tiny_config


@pytest.fixture
def codecarbon():
  """Returns the package, or skips."""
  return pytest.importorskip(
    "codecarbon", reason="the extra energy is not installed"
  )


def _used(folder):
  return json.loads((folder / energy.FILE).read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # by CodeCarbon, of the machine
def test_energy_is_summed_over_resumptions(codecarbon, text_file, tmp_path):
  config = tiny_config(text_file, energy="SWE")
  loop.run(config, str(tmp_path))
  first = _used(tmp_path)
  assert first["kwh"] > 0
  assert first["country"] == "Sweden"
  # Its table has about 20 g per kWh for Sweden, and 300 for Germany.
  assert 0 < first["kg_co2e"] / first["kwh"] < 0.1
  with energy.tracked(str(tmp_path), "DEU"):
    pass
  second = _used(tmp_path)
  assert second["kwh"] > first["kwh"]
  added = {n: second[n] - first[n] for n in ("kwh", "kg_co2e")}
  assert 0.2 < added["kg_co2e"] / added["kwh"] < 0.6
  assert report.write_report(str(tmp_path))["energy"] == second
  # Without an estimate it is the same run.
  loop.run(tiny_config(text_file), str(tmp_path))
  assert _used(tmp_path) == second


@pytest.mark.parametrize(
  ("country", "message"),
  [("SWE", "install"), ("Sweden", "such as DEU"), ("swe", "such as DEU")],
)
def test_energy_without_codecarbon_or_a_code_is_refused(
  text_file, tmp_path, monkeypatch, country, message
):
  monkeypatch.setitem(sys.modules, "codecarbon", None)
  with pytest.raises(ConfigError, match=message):
    loop.run(tiny_config(text_file, energy=country), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
