"""Small files of text, and what was read from them, for tests of the room."""

from folding import config


def write(folder, **files):
  """Writes files given as name__extension=content; returns their config."""
  for name, content in files.items():
    path = folder / name.replace("__", ".")
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode("utf-8")
    )
  return config.DataConfig(path=str(folder))


def pairs(texts, split):
  """Returns (label name, text) of each row of a split."""
  labels = [texts.label_names[i] for i in texts.labels[split]]
  return list(zip(labels, texts.texts[split], strict=True))
