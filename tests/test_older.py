"""Runs and exports that commit 273e708 wrote are read as it read them."""

import pathlib
import zipfile

import numpy as np
import pytest

import folding
from folding import cli
from folding.training import loop

ARCHIVE = pathlib.Path(__file__).with_name("written_by_273e708.zip")


@pytest.fixture
def older(tmp_path, monkeypatch):
  """Unpacks `lm`, a run that compacted itself, `export` and the text of `lm`."""
  with zipfile.ZipFile(ARCHIVE) as archive:
    archive.extractall(tmp_path)
  monkeypatch.chdir(tmp_path)  # the config of the run has a relative path
  return tmp_path


def test_run_is_evaluated_to_the_same_loss(older):
  found = loop.evaluate_run("lm")
  assert found["checkpoint_step"] == 6
  assert found["loss"] == pytest.approx(5.466450655370727, rel=1e-6)


def test_run_is_loaded_with_the_shape_of_its_checkpoint(older, caplog):
  model = folding.load("lm")
  widths = [b["mlp"]["down"]["kernel"].shape[0] for b in _blocks(model.params)]
  assert max(widths) < 16  # before FPP
  assert caplog.records == []
  assert cli.main(["resume", "lm"]) == 0  # finished: writes a report


def test_export_predicts_the_same(older):
  found = folding.load("export").predict(["fine film", "dull grey"])
  np.testing.assert_allclose(
    [one.probabilities for one in found],
    [[0.21406710, 0.78593296], [0.10287511, 0.89712495]],
    rtol=1e-5,
  )


def _blocks(params):
  return [w for name, w in params.items() if name.startswith("blocks_")]
