"""What ends a text, and what fills up, as the files beside a tokenizer say."""

import json

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models

from folding.data import special_tokens, trimming
from folding.data.tokenizers import MappedTokenizer, Tokenizer, load_tokenizer
from folding.schema import ConfigError

WORDS = ["!", "a", "<unk>", "</s>", "<|eot|>", "<|eom|>", "<|fill|>", "<pad>"]


def _inner(added=(2, 3, 4, 5, 6)):
  ids = {word: i for i, word in enumerate(WORDS)}
  inner = hf.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  inner.add_special_tokens([WORDS[i] for i in added])
  return inner


def _load(folder, config=None, generation=None, inner=None):
  """Returns the tokenizer of a folder with these configs."""
  (inner or _inner()).save(str(folder / "tokenizer.json"))
  for name, values in (
    ("config.json", config),
    ("generation_config.json", generation),
  ):
    if values is not None:
      (folder / name).write_text(json.dumps(values))
  return load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize(
  ("config", "generation", "ends", "pad"),
  [
    (None, None, [3], 7),  # the usual names
    ({"eos_token_id": 4, "pad_token_id": 6}, None, [4], 6),
    ({"eos_token_id": [5, 4]}, None, [5, 4], 7),
    ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, [4, 5], 7),
    ({"eos_token_id": 4}, {"eos_token_id": None, "pad_token_id": 6}, [4], 6),
    # Ordinary words, ids beyond the vocabulary, and values of no sense.
    ({"eos_token_id": 0, "pad_token_id": 1}, None, [3], 7),
    ({"eos_token_id": [1, 5, 99], "pad_token_id": -1}, None, [5], 7),
    ({"eos_token_id": "</s>", "pad_token_id": True}, None, [3], 7),
    ({"task": "lm"}, None, [3], 7),  # a config of ours
  ],
)
def test_a_checkpoint_says_what_ends_and_fills(
  tmp_path, config, generation, ends, pad
):
  found = _load(tmp_path, config, generation)
  assert (found.end_ids.tolist(), found.pad_id) == (ends, pad)
  assert found.end_id == ends[0]


@pytest.mark.parametrize(
  ("options", "config", "ends", "pad"),
  [
    ({"eos_token": "<|eot|>", "pad_token": "<|fill|>"}, None, [4], 6),
    ({"eos_token": {"content": "<|eot|>"}}, {"eos_token_id": 1}, [4], 7),
    ({"eos_token": "<|eot|>", "pad_token": "!"}, {"eos_token_id": 5}, [5], 0),
    ({"eos_token": "<|none|>", "pad_token": 3}, None, [3], 7),
  ],
)
def test_options_say_what_the_config_does_not(
  tmp_path, options, config, ends, pad
):
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  found = _load(tmp_path, config)
  assert (found.end_ids.tolist(), found.pad_id) == (ends, pad)


def test_what_nobody_names_ends_where_another_begins(tmp_path):
  words = {"!": 0, "a": 1, "<|begin|>": 2}
  inner = hf.Tokenizer(models.WordLevel(words, unk_token="!"))
  assert (Tokenizer(inner).end_id, Tokenizer(inner).pad_id) == (0, 0)
  inner.add_special_tokens(["<|begin|>"])
  inner.post_processor = hf.processors.TemplateProcessing(
    "<|begin|> $A", special_tokens=[("<|begin|>", 2)]
  )
  assert (Tokenizer(inner).end_id, Tokenizer(inner).pad_id) == (2, 2)
  inner.add_special_tokens(["</s>"])  # fills up as well: no word does
  assert (Tokenizer(inner).end_id, Tokenizer(inner).pad_id) == (3, 3)


def test_it_is_kept_where_the_tokenizer_goes_without_its_checkpoint(tmp_path):
  plain = _load(tmp_path, {"eos_token_id": [5, 4], "pad_token_id": 6})
  (tmp_path / "run").mkdir()
  plain.save(str(tmp_path / "run" / "tokenizer.json"))
  again = load_tokenizer(tmp_path / "run" / "tokenizer.json")
  assert (again.end_ids.tolist(), again.pad_id) == ([5, 4], 6)
  # Ids change with those that go, and are mapped; names stay.
  for one in (plain, again):
    keep = np.isin(np.arange(8), [1, 3, 7], invert=True)
    found = trimming.trimmed(one, keep)  # "</s>" was added, and so stays
    assert found.vocab_size == 6
    for tokenizer in (found, MappedTokenizer(found, np.arange(6)[::-1])):
      ids = [*tokenizer.end_ids.tolist(), tokenizer.pad_id]
      names = [found.token_map.tolist().index(i) for i in (3, 4, 5)]
      assert names == [4, 5, 6]
      expected = [4, 3, 5] if tokenizer is found else [1, 2, 0]
      assert ids == expected
      tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
      loaded = load_tokenizer(tmp_path / "run" / "tokenizer.json")
      assert [*loaded.end_ids.tolist(), loaded.pad_id] == ids


def test_a_tokenizer_of_which_nothing_is_known_leaves_no_file(tmp_path):
  _load(tmp_path, {"eos_token_id": 4}).save(str(tmp_path / "tokenizer.json"))
  assert (tmp_path / special_tokens.FILE).exists()
  Tokenizer(_inner()).save(str(tmp_path / "tokenizer.json"))
  assert not (tmp_path / special_tokens.FILE).exists()


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("special_tokens.json", "[]", "special_tokens.json is damaged"),
    ("special_tokens.json", '{"ends": 3}', "special_tokens.json.ends"),
    ("special_tokens.json", '{"end": []}', "special_tokens.json has no.*'end'"),
    ("special_tokens.json", '{"ends": [3]}', "special_tokens.json.ends"),
  ],
)
def test_our_own_damaged_file_is_named(tmp_path, name, text, message):
  _load(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "3"])
def test_files_of_others_that_say_nothing_are_passed_over(tmp_path, text):
  _load(tmp_path, generation={"eos_token_id": 4})
  (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
  found = load_tokenizer(tmp_path / "tokenizer.json")
  assert found.end_ids.tolist() == [4]
