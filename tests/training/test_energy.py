"""Energy of a run: what CodeCarbon estimates, added up over resumed times."""

import json
import sys

import pytest

from folding.reporting import report
from folding.schema import ConfigError
from folding.training import energy, loop
from tests.training.conftest import tiny_config


@pytest.fixture
def codecarbon():
  """Returns the package; the suite runs without it too."""
  return pytest.importorskip(
    "codecarbon", reason="the extra energy is not installed"
  )


def _used(folder):
  return json.loads((folder / energy.FILE).read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # by CodeCarbon, of the machine
def test_a_run_says_what_it_used(codecarbon, text_file, tmp_path):
  config = tiny_config(text_file, energy="SWE")
  loop.run(config, str(tmp_path))
  first = _used(tmp_path)
  assert first["kwh"] > 0
  assert first["country"] == "Sweden"
  # Its table has some 20 g a kWh there, and some 300 for Germany.
  assert 0 < first["kg_co2e"] / first["kwh"] < 0.1
  with energy.tracked(str(tmp_path), "DEU"):
    pass
  second = _used(tmp_path)
  assert second["kwh"] > first["kwh"]
  added = {n: second[n] - first[n] for n in ("kwh", "kg_co2e")}
  assert 0.2 < added["kg_co2e"] / added["kwh"] < 0.6
  assert report.write_report(str(tmp_path))["energy"] == second
  text = (tmp_path / "report.md").read_text()
  assert f"{second['kwh']:.3g} kWh (estimated by codecarbon" in text
  # Not another config: the same run, without an estimate.
  loop.run(tiny_config(text_file), str(tmp_path))
  assert _used(tmp_path) == second


def test_without_the_package_nothing_is_written(
  text_file, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "codecarbon", None)
  with pytest.raises(
    ConfigError, match=r"install it with pip install -e '\.\[energy\]'"
  ):
    loop.run(tiny_config(text_file, energy="SWE"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_nothing_is_estimated_unless_asked_for(text_file, tmp_path):
  loop.run(tiny_config(text_file, steps=5), str(tmp_path))
  assert not (tmp_path / energy.FILE).exists()
  assert report.write_report(str(tmp_path))["energy"] is None
