"""Runs that train in seconds, on text that the tests write."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from configs import pretrained as pretrained_config
from folding import config as c
from folding import files
from folding.model import Model
from folding.models.shape import shape_of
from folding.training import loop, run_dir
from folding.typed import edited
from tests.models import checkpoints

CLASS_WORDS = "a b c d e f".split()
WORDS = "the cat sat on a mat and a dog ran to the old red barn".split()


def write_text(path: pathlib.Path, lines: int = 400) -> pathlib.Path:
  """Writes sentences with a pattern that can be learned."""
  sentences = [
    " ".join(WORDS[(i * i + 3 * j) % len(WORDS)] for j in range(9))
    for i in range(lines)
  ]
  path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
  return path


def tiny_config(path: pathlib.Path, **train) -> c.Config:
  """Returns a language model of one layer over a file of bytes."""
  options = {
    "steps": 10,
    "eval_every": 5,
    "log_every": 1,
    "tensorboard": False,
    "learning_rate": 1e-2,
  }
  return c.Config(
    data=c.DataConfig(
      path=str(path),
      tokenizer="bytes",
      length=16,
      batch_size=8,
      eval_batch_size=8,
    ),
    model=c.ModelConfig(num_layers=1, width=16, num_heads=4, mlp_width=32),
    fpp=c.FPPConfig(linear=0.7, embedding=0.7, begin=0.2, end=0.7, checks=3),
    train=c.TrainConfig(**(options | train)),
  )


def save_run(workdir, config, tokenizer, *, digest="a1", **fields):
  """Writes the files that a run begins with; `fields` are those of its model."""
  model = Model(shape_of(config), config.task, {}, tokenizer)
  model = dataclasses.replace(model, **fields)
  run_dir.save(str(workdir), config, model, digest)


def set_loss(workdir: pathlib.Path, step: int, text: str) -> None:
  """Replaces the metrics of a checkpoint, with their checksum."""
  folder = pathlib.Path(workdir) / "checkpoints" / str(step)
  (folder / "metrics" / "metrics").write_text(text)
  names = json.loads((folder / files.CHECKSUMS).read_text())
  files.write_checksums(str(folder), names)


def warnings_of(caplog) -> list[str]:
  """Returns the warnings of our loggers; other libraries log as well."""
  return [
    record.getMessage()
    for record in caplog.records
    if record.name.startswith("folding.")
  ]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
  """Returns a file of text."""
  return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def labelled(text_file, tmp_path_factory) -> pathlib.Path:
  """Returns a file of texts of two classes."""
  path = tmp_path_factory.mktemp("labelled") / "labelled.tsv"
  lines = text_file.read_text().splitlines()
  rows = [f"{'odd' if i % 2 else 'even'}\t{x}\n" for i, x in enumerate(lines)]
  path.write_text("".join(rows))
  return path


@pytest.fixture(scope="session")
def tiny_run(text_file, tmp_path_factory):
  """Returns (config, run directory, result) of an uninterrupted run.

  Ten steps; mask updates at steps 2, 4 and 7, checkpoints at steps 5 and 10.
  Tests that change it take a copy.
  """
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  config = tiny_config(text_file)
  return config, workdir, loop.run(config, str(workdir))


@pytest.fixture(scope="session")
def topics(tmp_path_factory) -> pathlib.Path:
  """Returns a folder of texts whose class is their most frequent word."""
  folder = tmp_path_factory.mktemp("topics")
  rng = np.random.default_rng(0)
  for split, rows in (("train", 96), ("valid", 32), ("test", 32)):
    lines = []
    for _ in range(rows):
      label = int(rng.integers(3))
      words = [CLASS_WORDS[label]] * 4 + list(rng.choice(CLASS_WORDS[3:], 3))
      lines.append(f"topic {label}\t{' '.join(rng.permutation(words))}")
    text = "\n".join(["other\ta text", *lines]) + "\n"  # a rare class
    (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
  return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> tuple[pathlib.Path, dict]:
  """Returns the folder of a tiny BERT without a head, and its parameters."""
  folder = tmp_path_factory.mktemp("hf") / "bert"
  return folder, checkpoints.write(folder, "bert")


def recovery_config(source, topics, **fields) -> c.Config:
  """Returns the config of a short training from a checkpoint or a run."""
  return edited(
    pretrained_config.get_config(str(source)),
    {
      "data.path": str(topics),
      "data.batch_size": 8,
      "compress.calibration": 96,
      "compress.fit_steps": 50,
      "train.steps": 6,
      "train.eval_every": 3,
      "train.tensorboard": False,
      # Single weights by FPP and a diagonal W_V, which need no plan.
      "compress.plan": "same",
      "compress.prune": "none",
      "fpp.granularity": "weight",
      "fpp.attention": "output",
      "fold.values": "diagonal",
      "fpp.embedding_granularity": "trim",
      "fpp.checks": 2,
      "fpp.saving": 0.5,
    }
    | {name.replace("__", "."): x for name, x in fields.items()},
  )


@pytest.fixture(scope="session")
def dense_run(checkpoint, topics, tmp_path_factory) -> pathlib.Path:
  """Returns the directory of a dense run that fine-tuned the checkpoint."""
  workdir = tmp_path_factory.mktemp("runs") / "dense"
  config = recovery_config(
    checkpoint[0], topics, dense=True, train__steps=120, train__eval_every=60
  )
  config = edited(config, {"train.learning_rate": 3e-3})
  result = loop.run(config, str(workdir))
  assert result["test"]["accuracy"] > 0.6  # it has something to teach
  return workdir
