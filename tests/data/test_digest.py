"""What tells one text from another: `Data.digest`."""

import pytest

from folding import config as c
from folding.data import batches
from tests.data import text_files

ROWS = {
  "train__tsv": "0\ta b\n1\tc\n",
  "valid__tsv": "0\td\n1\te\n",
  "test__tsv": "1\tf\n0\tg\n",
}


def digest(folder, **rows):
  folder.mkdir()
  data = text_files.write(folder, **(ROWS | rows))
  data.tokenizer, data.batch_size = "bytes", 2
  config = c.Config(task="classify", data=data)
  return batches.make_data(c.resolve(config)).digest


def test_it_is_of_the_text_wherever_it_lies(tmp_path):
  assert digest(tmp_path / "here") == digest(tmp_path / "there")


@pytest.mark.parametrize(
  "rows",
  [
    {"train__tsv": "0\ta b\n1\tC\n"},
    {"test__tsv": "1\tg\n0\tg\n"},
    {"train__tsv": "1\ta b\n0\tc\n"},
    {"valid__tsv": "1\td\n0\te\n"},
    {"valid__tsv": "1\tf\n0\tg\n", "test__tsv": "0\td\n1\te\n"},
    {"train__tsv": "0\ta \n1\tbc\n"},
  ],
  ids=["train", "test", "labels", "valid-labels", "splits", "borders"],
)
def test_it_changes_with(rows, tmp_path):
  assert digest(tmp_path / "a") != digest(tmp_path / "b", **rows)
