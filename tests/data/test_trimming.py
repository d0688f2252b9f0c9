import json

import numpy as np
import pytest
import tokenizers

from folding.config import DataConfig
from folding.data import trimming
from folding.data.tokenizers import (
  MappedTokenizer,
  Tokenizer,
  load_tokenizer,
  train_tokenizer,
)
from folding.schema import ConfigError
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
  text, old_ids = trimming.trim_tokenizer(plain, _keep(plain, "cat", "mat"))
  assert _pieces(plain, "the cat sat on a mat") == [
    *("[CLS]", "the", "cat", "sat", "on", "a", "mat", "[SEP]")
  ]
  assert _pieces(text, "the cat sat on a mat") == [
    *("[CLS]", "the", "c", "##a", "##t", "sat", "on", "a", "[UNK]", "[SEP]")
  ]
  assert old_ids == [i for i in range(21) if i not in (5, 9)]


def test_new_ids_are_places_among_the_old_ones():
  plain = models.word_pieces()
  text, old_ids = trimming.trim_tokenizer(plain, _keep(plain, "the", "dog"))
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
  text, old_ids = trimming.trim_tokenizer(inner.to_str(), none)
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
  text, old_ids = trimming.trim_tokenizer(json.dumps(values), keep)
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
  text, old_ids = trimming.trim_tokenizer(plain, keep)
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
  text, old_ids = trimming.trim_tokenizer(json.dumps(values), keep)
  assert old_ids == [0, 1, 2, 3, 4]  # ##bc is no part of abc
  assert _pieces(text, "abc") == ["abc"]


def test_what_is_left_of_a_unigram_is_not_guessed():
  inner = tokenizers.Tokenizer(
    tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
  )
  with pytest.raises(
    ConfigError, match="a Unigram tokenizer cannot .* use fpp.emb"
  ):
    trimming.trim_tokenizer(inner.to_str(), np.ones(2, bool))


def _word_pieces():
  return Tokenizer(_inner(models.word_pieces()))


def test_a_trimmed_tokenizer_cuts_the_same_and_knows_the_old_ids(tmp_path):
  plain = _word_pieces()
  keep = _keep(plain.to_json(), "[PAD]", "cat", "mat", "##s")
  found = trimming.trimmed(plain, keep)
  text, old_ids = trimming.trim_tokenizer(plain.to_json(), keep)
  assert found.plain_ids.tolist() == old_ids
  assert found.plain_size == plain.vocab_size == 21
  assert found.vocab_size == len(old_ids) == 18
  assert np.flatnonzero(found.token_map < 0).tolist() == [5, 9, 17]
  found.save(str(tmp_path / "tokenizer.json"))
  sentences = ["the cat sat on a mat", "old dogs ran", "a barn!"]
  for one in (found, load_tokenizer(tmp_path / "tokenizer.json")):
    for length in (None, 6):
      expected = Tokenizer(_inner(text)).encode_batch(sentences, length)
      for a, b in zip(
        one.encode_batch(sentences, length), expected, strict=True
      ):
        np.testing.assert_array_equal(a, b)
    assert one.decode(expected[1]) == Tokenizer(_inner(text)).decode(
      expected[1]
    )
    assert one.pad_id == 0


def test_a_map_of_a_trimmed_tokenizer_leaves_out_what_went():
  plain = _word_pieces()
  found = trimming.trimmed(plain, _keep(plain.to_json(), "cat"))
  rows = np.r_[0, 0, np.arange(1, 19)]  # "[PAD]" and "[UNK]" share one
  twice = MappedTokenizer(found, rows)
  assert twice.token_map[5] == -1
  assert (twice.vocab_size, twice.plain_size) == (19, 21)
  [before], [after] = (t.encode_batch(["the dog zzz"]) for t in (found, twice))
  np.testing.assert_array_equal(after, rows[before])
  with pytest.raises(ConfigError, match="have left this tokenizer already"):
    trimming.trimmed(twice, np.ones(19, bool))


def test_what_pads_and_ends_stays_without_being_special():
  vocab = {"</s>": 0, "<pad>": 1, "a": 2, "<unk>": 3}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
  plain = Tokenizer(inner)
  found = trimming.trimmed(plain, [False, False, True])
  assert found.vocab_size == 4
  assert (found.pad_id, found.end_id) == (plain.pad_id, plain.end_id) == (1, 0)


def test_added_tokens_keep_their_rows():
  inner = _inner(models.word_pieces())
  inner.add_special_tokens(["[ENT]"])
  inner.add_tokens(["foo"])  # neither is in the model's own vocabulary
  plain = Tokenizer(inner)
  assert plain.encode_batch(["foo [ENT]"], 9)[0].tolist()[1] == 22
  keep = np.isin(np.arange(23), [5, 9, 17], invert=True)
  found = trimming.trimmed(plain, keep)
  for sentence in ("the dog foo", "foo foo c"):
    [before], [after] = (t.encode_batch([sentence], 9) for t in (plain, found))
    np.testing.assert_array_equal(found.plain_ids[after], before)


def test_a_tokenizer_with_nothing_for_unknown_words_stays_whole():
  model = tokenizers.models.WordLevel({"a": 0, "b": 1}, "<unk>")
  plain = Tokenizer(tokenizers.Tokenizer(model))
  with pytest.raises(ConfigError, match="has none for unknown words"):
    trimming.trimmed(plain, [True, False])


def test_which_tokenizers_can_be_trimmed():
  unigram = tokenizers.models.Unigram([("<unk>", 0.0)], unk_id=0)
  plain = _word_pieces()
  assert trimming.can_trim(plain)
  assert not trimming.can_trim(Tokenizer(tokenizers.Tokenizer(unigram)))
  assert not trimming.can_trim(trimming.trimmed(plain, np.ones(21, bool)))
