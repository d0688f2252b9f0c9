"""A study whose CSV was written by hand."""

import pathlib

import pytest

from folding.studies import gather, tables

CSV = pathlib.Path(__file__).with_name("pages.csv")


@pytest.fixture(scope="package")
def rows():
  """Returns the rows of two data sets, one with two seeds."""
  return gather.read_csv(str(CSV))


@pytest.fixture(scope="package")
def results(rows):
  """Returns them grouped."""
  return tables.Results(rows)
