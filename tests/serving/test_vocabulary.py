import json

import numpy as np
import pytest
import tokenizers

from folding.config import DataConfig
from folding.data.tokenizers import Tokenizer, train_tokenizer
from folding.schema import ConfigError
from folding.serving import vocabulary
from tests.serving import models


def _inner(text):
  return tokenizers.Tokenizer.from_str(text)


def _pieces(text, sentence):
  return _inner(text).encode(sentence).tokens


def _keep(text, *removed):
  ids = models.vocabulary(text)
  keep = np.ones(max(ids.values()) + 1, bool)
  keep[[ids[token] for token in removed]] = False
  return keep


def test_words_are_cut_otherwise_or_unknown():
  plain = models.word_pieces()
  text, old_ids = vocabulary.trim_tokenizer(plain, _keep(plain, "cat", "mat"))
  assert _pieces(plain, "the cat sat on a mat") == [
    *("[CLS]", "the", "cat", "sat", "on", "a", "mat", "[SEP]")
  ]
  assert _pieces(text, "the cat sat on a mat") == [
    *("[CLS]", "the", "c", "##a", "##t", "sat", "on", "a", "[UNK]", "[SEP]")
  ]
  assert old_ids == [i for i in range(21) if i not in (5, 9)]


def test_new_ids_are_places_among_the_old_ones():
  plain = models.word_pieces()
  text, old_ids = vocabulary.trim_tokenizer(plain, _keep(plain, "the", "dog"))
  names = {i: token for token, i in models.vocabulary(plain).items()}
  found = _inner(text)
  assert found.get_vocab_size() == len(old_ids) == 19
  for new, old in enumerate(old_ids):
    assert found.id_to_token(new) == names[old]
  sentence = "a red barn zzz"  # of tokens that stay, and unknown
  expected = _inner(plain).encode(sentence).ids
  assert [old_ids[i] for i in found.encode(sentence).ids] == expected


@pytest.mark.parametrize(
  "processor",
  [
    None,
    tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    tokenizers.processors.Sequence(
      [
        tokenizers.processors.ByteLevel(),
        tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
      ]
    ),
  ],
  ids=["template", "bert", "roberta", "sequence"],
)
def test_framing_tokens_stay_whatever_is_removed(processor):
  inner = _inner(models.word_pieces())
  if processor is not None:
    inner.post_processor = processor
  none = np.zeros(21, bool)
  none[16] = True
  text, old_ids = vocabulary.trim_tokenizer(inner.to_str(), none)
  assert old_ids == [0, 1, 2, 3, 16]
  found = _inner(text).encode("barn red")
  assert found.tokens == ["[CLS]", "barn", "[UNK]", "[SEP]"]
  assert found.ids == [2, 4, 1, 3]


def test_an_id_moves_where_a_framing_token_has_a_high_one():
  values = json.loads(models.word_pieces())
  swap = {3: 20, 20: 3}
  vocab = values["model"]["vocab"]
  for token, i in vocab.items():
    vocab[token] = swap.get(i, i)
  for added in values["added_tokens"]:
    added["id"] = swap.get(added["id"], added["id"])
  values["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [20]
  keep = np.arange(21) < 6
  text, old_ids = vocabulary.trim_tokenizer(json.dumps(values), keep)
  assert old_ids == [0, 1, 2, 3, 4, 5, 20]
  assert _inner(text).encode("the cat").ids == [2, 4, 5, 6]


_TEXTS = ["the cat sat on the mat. the cats sat, then the hat"] * 20


def test_bytes_and_the_parts_of_what_stays_remain():
  plain = train_tokenizer(
    DataConfig(tokenizer="bpe", vocab_size=280), _TEXTS
  ).to_json()
  ids = models.vocabulary(plain)
  merged = [token for token, i in ids.items() if i >= 258]
  the, cat = "Ġthe", "Ġcat"
  assert {the, cat} <= set(merged)
  keep = np.zeros(len(ids), bool)
  keep[ids[cat]] = True
  text, old_ids = vocabulary.trim_tokenizer(plain, keep)
  found = models.vocabulary(text)
  assert set(ids) - set(merged) <= set(found)
  assert cat in found and the not in found
  assert len(found) == len(old_ids) < len(ids)
  assert cat in _pieces(text, "on the cat")
  # What is left is still a tokenizer of any text.
  sentence = "on the cat é\n\tzzz"
  for one in (plain, text):
    again = Tokenizer(_inner(one))
    [encoded] = again.encode_batch([sentence])
    assert again.decode(encoded) == sentence


def test_merges_with_a_prefix_and_as_text_are_understood():
  vocab = {"a": 0, "##b": 1, "##c": 2, "ab": 3, "abc": 4, "##bc": 5}
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab,
      merges=[("a", "##b"), ("ab", "##c"), ("##b", "##c")],
      continuing_subword_prefix="##",
    )
  )
  values = json.loads(inner.to_str())
  values["model"]["merges"] = [
    m if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]
  ]
  keep = np.arange(6) == 4
  text, old_ids = vocabulary.trim_tokenizer(json.dumps(values), keep)
  assert old_ids == [0, 1, 2, 3, 4]  # ##bc is no part of abc
  assert _pieces(text, "abc") == ["abc"]


def test_what_is_left_of_a_unigram_is_not_guessed():
  inner = tokenizers.Tokenizer(
    tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
  )
  with pytest.raises(ConfigError, match="tokens of a Unigram tokenizer cannot"):
    vocabulary.trim_tokenizer(inner.to_str(), np.ones(2, bool))


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


def test_mapped_ids_are_not_trimmed():
  plain = Tokenizer(_inner(models.word_pieces()))
  small, mapped = vocabulary.read_as_unknown(_params(21, [4]), plain)
  with pytest.raises(ConfigError, match="export the run itself"):
    vocabulary.trim(small, mapped)
