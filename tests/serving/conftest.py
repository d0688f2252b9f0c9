"""A classifier that was trained for a few steps, in its run directory."""

import pathlib
import warnings

import numpy as np
import pytest

from folding import config as c
from folding.training import loop

_WORDS = {
  "animal": "cat dog owl hen cow".split(),
  "tool, sharp": "saw axe file plane knife".split(),
}


def _write(path: pathlib.Path, rows: int) -> None:
  rng = np.random.default_rng(rows)
  lines = []
  for i in range(rows):
    label = list(_WORDS)[i % 2]
    words = rng.choice(_WORDS[label], size=1 + i % 20)
    lines.append(f"{label}\tthe {' '.join(words)}")
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> pathlib.Path:
  """Returns a run whose neurons and tokens are zero by rows."""
  folder = tmp_path_factory.mktemp("classify")
  (folder / "data").mkdir()
  for split, rows in (("train", 64), ("valid", 16), ("test", 16)):
    _write(folder / "data" / f"{split}.tsv", rows)
  config = c.Config(
    task="classify",
    data=c.DataConfig(
      path=str(folder / "data"),
      vocab_size=300,
      length=16,
      batch_size=8,
      eval_batch_size=8,
    ),
    model=c.ModelConfig(
      num_layers=1, width=16, num_heads=4, mlp_width=32, causal=False
    ),
    fpp=c.FPPConfig(
      begin=0.0,
      end=0.6,
      checks=2,
      granularity="neuron",
      embedding_granularity="row",
    ),
    train=c.TrainConfig(
      steps=10, eval_every=10, learning_rate=1e-2, tensorboard=False
    ),
  )
  loop.run(config, str(folder / "run"))
  return folder / "run"


@pytest.fixture(scope="session")
def transformers():
  """Returns the package, which says nothing; skips without it."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reason = "needs the extra `parity` (PyTorch and transformers)"
    pytest.importorskip("torch", reason=reason)
    found = pytest.importorskip("transformers", reason=reason)
  found.logging.set_verbosity_error()
  found.logging.disable_progress_bar()
  return found
