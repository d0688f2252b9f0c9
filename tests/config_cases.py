"""Configs from dotted names, for the tests of configs."""

from folding import config as c


def make_config(**fields):
  """Returns a config from dotted names: `make_config(model__width=32)`."""
  config = c.Config()
  for dotted, value in fields.items():
    *sections, name = dotted.split("__")
    holder = config
    for section in sections:
      holder = getattr(holder, section)
    assert hasattr(holder, name), dotted
    setattr(holder, name, value)
  return config
