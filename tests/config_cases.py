"""Configs from dotted names, for the tests of configs."""

import dataclasses

from folding import config as c


def make_config(**fields):
  """Returns a config from dotted names: `make_config(model__width=32)`.

  Values are put in as they are, so that `resolve` can be shown wrong ones.
  """
  config = c.Config()
  for dotted, value in fields.items():
    section, _, name = dotted.rpartition("__")
    if section:
      value = dataclasses.replace(getattr(config, section), **{name: value})
    config = dataclasses.replace(config, **{section or name: value})
  return config
