"""What other libraries prune starts from the same model and is as small."""

import pytest

from benchmarks import peers
from folding.training import loop
from tests.training.conftest import recovery_config


@pytest.fixture(scope="module")
def row(dense_run, topics, tmp_path_factory):
  """Returns the figures of a folded run and of its peers."""
  pytest.importorskip("torch_pruning", reason="it is in the extra parity")
  workdir = tmp_path_factory.mktemp("runs") / "folded"
  config = recovery_config(dense_run, topics, train__steps=20)
  loop.run(config, str(workdir))
  return peers.measure(str(workdir), [5e-4])


@pytest.mark.slow
def test_the_dense_model_is_that_of_the_run(row, dense_run):
  expected = loop.evaluate_run(str(dense_run), "test")["accuracy"]
  assert row["found"]["dense"]["test"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch.nn.utils.prune", "Torch-Pruning"])
def test_a_peer_stores_no_more_and_not_much_less(row, name):
  ours, theirs = row["found"]["folding"], row["found"][name]
  assert 0.9 * ours["stored"] <= theirs["stored"] <= ours["stored"]
  assert theirs["test"] > 0.4  # of three classes, after 20 steps
