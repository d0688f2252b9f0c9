"""The rows of the benchmark come from one dense model, at equal stored size."""

import pytest

from folding.training import loop
from tests.training.conftest import recovery_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(dense_run, topics, tmp_path_factory):
  """Returns {name: row} of a folded run and of its peers."""
  pytest.importorskip("torch_pruning", reason="it is in the extra parity")
  from benchmarks import one_model

  workdir = tmp_path_factory.mktemp("runs") / "folded"
  config = recovery_config(dense_run, topics, train__steps=20)
  loop.run(config, str(workdir))
  measured = one_model.measure([str(workdir)], rounds=1, rates=[5e-4])
  return {row["name"]: row for row in measured["rows"]}


def test_dense_row_has_the_accuracy_of_the_run_in_every_runtime(
  rows, dense_run
):
  expected = loop.evaluate_run(str(dense_run), "test")["accuracy"]
  found = dict(rows["dense"]["accuracy"])
  assert found.pop("ONNX int8") == pytest.approx(expected, abs=0.1)
  assert found == pytest.approx(
    dict.fromkeys(["JAX", "ONNX", "PyTorch"], expected), abs=1e-6
  )
  # The tokens that were removed from its embedding are missing.
  folded = rows["folded"]["accuracy"]
  assert folded["ONNX"] == pytest.approx(folded["JAX"], abs=1e-6)


@pytest.mark.parametrize("name", ["torch.nn.utils.prune", "Torch-Pruning"])
def test_peer_stores_at_most_as_much_and_not_much_less(rows, name):
  ours, theirs = rows["folded"]["allocated"], rows[name]["stored"]
  assert 0.9 * ours <= theirs <= ours
  assert rows[name]["accuracy"]["PyTorch"] > 0.4  # of three classes, 20 steps
