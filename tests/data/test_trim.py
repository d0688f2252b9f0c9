import json

import numpy as np
import pytest
import tokenizers

from folding.config import DataConfig
from folding.data import trim
from folding.data.tokenizers import (
  MappedTokenizer,
  Tokenizer,
  load_tokenizer,
  train_tokenizer,
)
from folding.errors import ConfigError
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


def test_trim_splits_words_into_other_tokens_or_unknown():
  plain = models.word_pieces()
  text, old_ids = trim.trim_tokenizer(plain, _keep(plain, "cat", "mat"))
  assert _pieces(text, "the cat sat on a mat") == [
    *("[CLS]", "the", "c", "##a", "##t", "sat", "on", "a", "[UNK]", "[SEP]")
  ]
  assert old_ids == [i for i in range(21) if i not in (5, 9)]
  names = {i: token for token, i in models.vocabulary(plain).items()}
  found = _inner(text)
  assert found.get_vocab_size() == len(old_ids)
  for new, old in enumerate(old_ids):
    assert found.id_to_token(new) == names[old]
  sentence = "a red barn zzz"  # of remaining tokens, and unknown
  expected = _inner(plain).encode(sentence).ids
  assert [old_ids[i] for i in found.encode(sentence).ids] == expected


_BERT = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
_BYTES = tokenizers.processors.ByteLevel()


@pytest.mark.parametrize(
  "processor",
  [
    None,
    _BERT,
    tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    tokenizers.processors.Sequence([_BYTES, _BERT]),
  ],
  ids=["template", "bert", "roberta", "sequence"],
)
def test_trim_keeps_framing_tokens(processor):
  inner = _inner(models.word_pieces())
  if processor is not None:
    inner.post_processor = processor
  keep = np.arange(21) == 16
  text, old_ids = trim.trim_tokenizer(inner.to_str(), keep)
  assert old_ids == [0, 1, 2, 3, 16]
  found = _inner(text).encode("barn red")
  assert found.tokens == ["[CLS]", "barn", "[UNK]", "[SEP]"]
  assert found.ids == [2, 4, 1, 3]


def test_trim_moves_the_high_id_of_a_framing_token():
  values = json.loads(models.word_pieces())
  swap = {3: 20, 20: 3}
  vocab = values["model"]["vocab"]
  for token, i in vocab.items():
    vocab[token] = swap.get(i, i)
  for added in values["added_tokens"]:
    added["id"] = swap.get(added["id"], added["id"])
  values["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [20]
  keep = np.arange(21) < 6
  text, old_ids = trim.trim_tokenizer(json.dumps(values), keep)
  assert old_ids == [0, 1, 2, 3, 4, 5, 20]
  assert _inner(text).encode("the cat").ids == [2, 4, 5, 6]


def test_trim_of_a_bpe_keeps_bytes_and_parts():
  texts = ["the cat sat on the mat. the cats sat, then the hat"] * 20
  data = DataConfig(tokenizer="bpe", vocab_size=280)
  plain = train_tokenizer(data, texts).to_json()
  ids = models.vocabulary(plain)
  merged = [token for token, i in ids.items() if i >= 258]
  the, cat = "Ġthe", "Ġcat"
  assert {the, cat} <= set(merged)
  text, old_ids = trim.trim_tokenizer(plain, np.arange(280) == ids[cat])
  found = models.vocabulary(text)
  assert set(ids) - set(merged) <= set(found)
  assert cat in found and the not in found
  assert len(found) == len(old_ids) < len(ids)
  assert cat in _pieces(text, "on the cat")
  sentence = "on the cat é\n\tzzz"
  for one in (plain, text):
    again = Tokenizer(_inner(one))
    [encoded] = again.encode_batch([sentence])
    assert again.decode(encoded) == sentence


def test_as_many_tokens_of_a_bpe_are_kept_as_asked_with_their_parts():
  texts = ["the cat sat on the mat. the cats sat, then the hat"] * 20
  data = DataConfig(tokenizer="bpe", vocab_size=280)
  plain = train_tokenizer(data, texts)
  ids = models.vocabulary(plain.to_json())
  count_V = np.zeros(plain.vocab_size, np.int64)
  count_V[ids["Ġcat"]] = 9  # its parts are not used alone
  count_V[ids["Ġthe"]] = 5
  has_the = []
  for number in range(262, plain.vocab_size):
    found = trim.most_used(plain, count_V, number)
    assert found.vocab_size == number
    has_cat = found.token_map[ids["Ġcat"]] >= 0
    has_the.append(found.token_map[ids["Ġthe"]] >= 0)
    assert has_cat >= has_the[-1]
    [encoded] = found.encode_batch([" the cats"])
    assert found.decode(encoded) == " the cats"
  assert sorted(set(has_the)) == [False, True]


@pytest.mark.parametrize("form", [str, list])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_trim_of_a_bpe_keeps_parts_of_parts(form, order):
  # Merges may come before those of their parts.
  vocab = {"a": 0, "##b": 1, "##c": 2, "ab": 3, "abc": 4, "##bc": 5, "abcc": 6}
  merges = ["a ##b", "ab ##c", "##b ##c", "abc ##c"]
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocab,
      merges=[tuple(merges[i].split()) for i in order],
      continuing_subword_prefix="##",
    )
  )
  values = json.loads(inner.to_str())
  merges = [merges[i] for i in order]
  values["model"]["merges"] = [
    merge if form is str else merge.split() for merge in merges
  ]
  text, old_ids = trim.trim_tokenizer(json.dumps(values), np.arange(7) == 6)
  assert old_ids == [0, 1, 2, 3, 4, 6]  # ##bc is not a part
  kept = [merge for merge in merges if merge != "##b ##c"]
  found = json.loads(text)["model"]["merges"]
  assert [m if isinstance(m, str) else " ".join(m) for m in found] == kept


def test_trim_refuses_what_it_cannot_trim():
  unigram = tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
  words = tokenizers.models.WordLevel({"a": 0, "b": 1}, "<unk>")
  for model, match in ((unigram, "Unigram"), (words, "unknown token")):
    inner = tokenizers.Tokenizer(model)
    with pytest.raises(ConfigError, match=match):
      trim.trim_tokenizer(inner.to_str(), np.ones(2, bool))
  plain = Tokenizer(_inner(models.word_pieces()))
  trimmed = trim.trimmed(plain, np.ones(21, bool))
  with pytest.raises(ConfigError, match="trimmed already"):
    trim.trimmed(trimmed, np.ones(21, bool))


def test_trimmed_encodes_as_the_trimmed_json_and_maps_old_ids(tmp_path):
  plain = Tokenizer(_inner(models.word_pieces()))
  keep = _keep(plain.to_json(), "[PAD]", "cat", "mat", "##s")
  found = trim.trimmed(plain, keep)
  text, old_ids = trim.trim_tokenizer(plain.to_json(), keep)
  assert found.plain_ids.tolist() == old_ids
  assert found.plain_size == plain.vocab_size == 21
  assert found.vocab_size == len(old_ids) == 18
  assert np.flatnonzero(found.token_map < 0).tolist() == [5, 9, 17]
  found.save(str(tmp_path / "tokenizer.json"))
  sentences = ["the cat sat on a mat", "old dogs ran", "a barn!"]
  reference = Tokenizer(_inner(text))
  for one in (found, load_tokenizer(tmp_path / "tokenizer.json")):
    for length in (None, 6):
      expected = reference.encode_batch(sentences, length)
      encoded = one.encode_batch(sentences, length)
      assert [ids.tolist() for ids in encoded] == [
        ids.tolist() for ids in expected
      ]
    assert one.decode(expected[1]) == reference.decode(expected[1])
    assert one.pad_id == 0


def test_a_map_of_a_trimmed_tokenizer_is_composed():
  plain = Tokenizer(_inner(models.word_pieces()))
  found = trim.trimmed(plain, _keep(plain.to_json(), "cat"))
  rows = np.r_[0, 0, np.arange(1, 19)]  # "[PAD]" and "[UNK]" share one
  twice = MappedTokenizer(found, rows)
  assert twice.token_map[5] == -1
  assert (twice.vocab_size, twice.plain_size) == (19, 21)
  [before], [after] = (t.encode_batch(["the dog zzz"]) for t in (found, twice))
  np.testing.assert_array_equal(after, rows[before])


def test_trimmed_keeps_pad_and_end_that_are_not_special():
  vocab = {"</s>": 0, "<pad>": 1, "a": 2, "<unk>": 3}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
  found = trim.trimmed(Tokenizer(inner), [False, False, True])
  assert (found.vocab_size, found.pad_id, found.end_id) == (4, 1, 0)


def test_trimmed_keeps_added_tokens():
  inner = _inner(models.word_pieces())
  inner.add_special_tokens(["[ENT]"])
  inner.add_tokens(["foo"])  # not in the model's own vocabulary
  plain = Tokenizer(inner)
  assert plain.encode_batch(["foo [ENT]"], 9)[0].tolist()[1] == 22
  keep = np.isin(np.arange(23), [5, 9, 17], invert=True)
  found = trim.trimmed(plain, keep)
  for sentence in ("the dog foo", "foo foo c"):
    [before], [after] = (t.encode_batch([sentence], 9) for t in (plain, found))
    np.testing.assert_array_equal(found.plain_ids[after], before)
