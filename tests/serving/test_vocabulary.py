import numpy as np
import pytest
import tokenizers

from folding.config import DataConfig
from folding.data import trimming
from folding.data.tokenizers import Tokenizer, train_tokenizer
from folding.schema import ConfigError
from folding.serving import vocabulary
from tests.serving import models


def _inner(text):
  return tokenizers.Tokenizer.from_str(text)


def _params(rows, zeros):
  w = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
  w[zeros] = 0
  return {"embed": {"embedding": w}, "head": {"bias": np.ones(2)}}


def test_removed_tokens_become_the_unknown_one():
  plain = Tokenizer(_inner(models.word_pieces()))
  params = _params(24, [4, 9, 22])  # some rows more than the tokenizer has ids
  small, mapped = vocabulary.read_as_unknown(params, plain)
  rows, new_rows = params["embed"]["embedding"], small["embed"]["embedding"]
  assert new_rows.shape == (21, 3)
  assert small["head"] is params["head"]
  [ids], [new_ids] = (
    t.encode_batch(["the cat on a mat"]) for t in (plain, mapped)
  )
  as_unknown = np.where(np.isin(ids, [4, 9]), 1, ids)
  np.testing.assert_array_equal(new_rows[new_ids], rows[as_unknown])
  again, twice = vocabulary.read_as_unknown(small, mapped)
  np.testing.assert_array_equal(again["embed"]["embedding"], new_rows)
  [same] = twice.encode_batch(["the cat on a mat"])
  np.testing.assert_array_equal(same, new_ids)


def test_an_unknown_token_may_be_zero_itself():
  plain = Tokenizer(_inner(models.word_pieces()))
  small, mapped = vocabulary.read_as_unknown(_params(21, [1, 4]), plain)
  assert small["embed"]["embedding"].shape == (20, 3)
  [ids] = mapped.encode_batch(["the zzz"])
  np.testing.assert_array_equal(ids, [1, 1])


def test_a_tokenizer_without_an_unknown_token_is_refused():
  plain = train_tokenizer(DataConfig(tokenizer="bytes"), [])
  with pytest.raises(ConfigError, match="has no unknown token"):
    vocabulary.read_as_unknown(_params(258, [5]), plain)


def test_shared_rows_are_not_trimmed():
  plain = Tokenizer(_inner(models.word_pieces()))
  small, mapped = vocabulary.read_as_unknown(_params(21, [4]), plain)
  with pytest.raises(ConfigError, match="export the run itself"):
    vocabulary.trim(small, mapped)


def test_a_trimmed_tokenizer_is_trimmed_further():
  plain = Tokenizer(_inner(models.word_pieces()))
  params = _params(21, [4, 9])
  keep = np.arange(21) != 5  # without "cat"
  first = trimming.trimmed(plain, keep)
  rows = {"embed": {"embedding": params["embed"]["embedding"][keep]}}
  found, tokenizer = vocabulary.trim(rows, first)
  params["embed"]["embedding"][5] = 0
  expected, of_plain = vocabulary.trim(params, plain)
  assert tokenizer.to_json() == of_plain.to_json()
  np.testing.assert_array_equal(
    found["embed"]["embedding"], expected["embed"]["embedding"]
  )
