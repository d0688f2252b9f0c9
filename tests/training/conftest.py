"""A run small enough to train in seconds, on text that the test writes."""

import pathlib

import pytest

from folding import config as c

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
  """Returns a language model of two layers over a file of bytes."""
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
    model=c.ModelConfig(num_layers=2, width=16, num_heads=4, mlp_width=32),
    fpp=c.FPPConfig(linear=0.7, embedding=0.7, begin=0.2, end=0.7, checks=3),
    train=c.TrainConfig(**(options | train)),
  )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
  """Returns a file of text."""
  return write_text(tmp_path_factory.mktemp("text") / "text.txt")
