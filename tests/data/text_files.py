"""Small files of text, and the rows that were read from them."""

import dataclasses

from folding.config import DataConfig
from folding.data import corpus, sources


def write(folder, **files) -> DataConfig:
  """Writes files given as name__extension=content; returns their config."""
  for name, content in files.items():
    path = folder / name.replace("__", ".")
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode("utf-8")
    )
  return DataConfig(path=str(folder))


def read(data, task) -> sources.Texts:
  """Returns the texts of a task; those of a language model are its documents."""
  if task == "lm":
    return sources.Texts(corpus.load_documents(data), None, ())
  return sources.load_texts(data, task)


def load(folder, task="classify", fields=None, **files) -> sources.Texts:
  """Returns the texts of files, with no split set aside."""
  whole = {"valid_fraction": 0.0, "test_fraction": 0.0}
  data = dataclasses.replace(write(folder, **files), **(whole | (fields or {})))
  return read(data, task)


def pairs(texts, split="train"):
  """Returns (label name, text) of each row of a split."""
  labels = [texts.label_names[i] for i in texts.labels[split]]
  return list(zip(labels, texts.texts[split], strict=True))
