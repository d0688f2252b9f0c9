import json
from concurrent import futures

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from folding.config import DataConfig
from folding.data import pieces, special_tokens, tokenizers, trim
from folding.data.tokenizers import MappedTokenizer, Tokenizer, load_tokenizer
from folding.errors import ConfigError

CODE = (
  "def add(a, b):\n    # sums two numbers\n    return a + b\n\n\n"
  "class Pair:\n    def __init__(self, x, y):\n        self.x = x\n"
) * 20
BYTES = tokenizers.train_tokenizer(DataConfig(tokenizer="bytes"), [])
BPE = tokenizers.train_tokenizer(DataConfig(vocab_size=300), [CODE])
OURS = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@OURS
@settings(max_examples=100, derandomize=True)
@given(text=st.text())
def test_decode_of_encode_is_the_text(tokenizer, text):
  [ids] = tokenizer.encode_batch([text])
  assert tokenizer.decode(ids) == text


@OURS
def test_special_tokens_in_a_text_are_text(tokenizer):
  text = "a <end> b <pad> c"
  [ids] = tokenizer.encode_batch([text])
  assert tokenizer.decode(ids) == text
  assert tokenizer.end_id not in ids
  assert tokenizer.pad_id not in ids


@OURS
def test_decode_skips_special_tokens(tokenizer):
  [ids] = tokenizer.encode_batch(["text"])
  padded = [tokenizer.end_id, *ids.tolist(), tokenizer.end_id, tokenizer.pad_id]
  assert tokenizer.decode(padded) == "text"


@settings(max_examples=50, derandomize=True)
@given(text=st.text())
def test_bytes_has_one_token_per_byte(text):
  raw = text.encode("utf-8")
  [ids] = BYTES.encode_batch([text])
  assert len(ids) == len(raw)
  # The same byte is always the same token, and different bytes differ.
  assert len(set(zip(raw, ids.tolist(), strict=True))) == len(set(raw))
  assert len(set(ids.tolist())) == len(set(raw))


def test_bpe_merges_to_the_configured_size(tmp_path):
  assert (BYTES.vocab_size, BPE.vocab_size) == (258, 300)
  [ids] = BPE.encode_batch([CODE])
  assert ids.dtype == np.int32
  assert ids.max() < 300
  assert len(ids) < len(CODE) / 2
  [ids] = BPE.encode_batch([":\n    "])  # a line break with its indent
  assert len(ids) == 1
  again = tokenizers.train_tokenizer(DataConfig(vocab_size=300), [CODE])
  assert again.to_json() == BPE.to_json()


def test_bpe_of_long_words_merges_at_most_256_bytes():
  texts = ["x" * 2000, "é" * 2000 + "y"]
  found = tokenizers.train_tokenizer(DataConfig(vocab_size=300), texts)
  values = json.loads(found.to_json())
  assert max(map(len, values["model"]["vocab"])) == 256
  assert len(values["pre_tokenizer"]["pretokenizers"]) == 2  # no cut
  ids = found.encode_batch(texts)
  assert [found.decode(row) for row in ids] == texts


def test_a_saved_tokenizer_encodes_the_same(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  BPE.save(path)
  loaded = tokenizers.train_tokenizer(DataConfig(tokenizer=path), [])
  assert (loaded.vocab_size, loaded.pad_id, loaded.end_id) == (300, 0, 1)
  text = CODE + "<end> é\u2028\x1c\n"
  [ids] = loaded.encode_batch([text])
  np.testing.assert_array_equal(ids, BPE.encode_batch([text])[0])
  assert loaded.decode(ids) == text


def test_threads_that_share_a_tokenizer_encode_as_one_does():
  texts, lengths = [CODE] * 20, [2, 3, None] * 30

  def sizes(length):
    return {row.size for row in BPE.encode_batch(texts, length)}

  with futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(sizes, lengths))
  [whole] = sizes(None)
  assert found == [{length or whole} for length in lengths]


def test_encode_batch_is_each_text_by_itself():
  texts = ["one\n", "", CODE, "two"] * 40
  together = BPE.encode_batch(texts)
  for text, ids in zip(texts, together, strict=True):
    np.testing.assert_array_equal(ids, BPE.encode_batch([text])[0])


def _foreign(path, tokens, framed=False):
  """Writes a word-level tokenizer as another library would."""
  inner = hf.Tokenizer(
    models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
  )
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  if framed:
    inner.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]",
      special_tokens=[(t, tokens.index(t)) for t in ("[CLS]", "[SEP]")],
    )
  inner.enable_truncation(3)
  inner.enable_padding(length=9)
  inner.save(str(path))
  return tokenizers.load_tokenizer(str(path))


def test_a_foreign_tokenizer_keeps_its_special_ids_and_frame(tmp_path):
  tokens = ["[UNK]", "a", "[PAD]", "[CLS]", "[SEP]"]
  foreign = _foreign(tmp_path / "t.json", tokens, framed=True)
  assert (foreign.pad_id, foreign.end_id) == (2, 4)
  # A stream has no frames, and the file's cutting and padding are off.
  assert foreign.encode_batch(["a a a a a"])[0].tolist() == [1] * 5
  framed = foreign.encode_batch(["a a a a", "a"], max_length=4)
  assert [ids.tolist() for ids in framed] == [[3, 1, 1, 4], [3, 1, 4]]
  assert foreign.encode_batch(["a a a a a"])[0].tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["BPE", "WordLevel"])
def test_begin_ids_are_found_without_the_letter_a(tmp_path, kind):
  words = {"<s>": 0, "</s>": 1, "C": 2, "G": 3}
  model = models.BPE(words, [])
  if kind == "WordLevel":  # which raises where it has nothing for a word
    model = models.WordLevel(words, "<unk>")
  inner = hf.Tokenizer(model)
  inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  inner.add_special_tokens(["<s>", "</s>"])
  inner.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  inner.save(str(tmp_path / "t.json"))
  genes = tokenizers.load_tokenizer(str(tmp_path / "t.json"))
  assert genes.encode_batch(["CG"], max_length=9)[0].tolist() == [0, 2, 3, 1]
  assert genes.prompt(genes.encode_batch(["CG"])[0]).tolist() == [0, 2, 3]


def test_encode_refuses_what_it_cannot_encode(tmp_path):
  tokens = ["[UNK]", "a", "[CLS]", "[SEP]"]
  foreign = _foreign(tmp_path / "t.json", tokens, framed=True)
  assert len(foreign.encode_batch(["a a"], max_length=3)[0]) == 3
  with pytest.raises(ConfigError, match="length 2 has no room"):
    foreign.encode_batch(["a"], max_length=2)
  inner = hf.Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # none is unknown
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  foreign = Tokenizer(inner)
  for max_length in (None, 1):
    with pytest.raises(ConfigError, match="cannot read a text"):
      foreign.encode_batch(["a c"], max_length)
  assert foreign.encode_batch(["a b"])[0].tolist() == [0, 1]  # not truncated


def test_stories260k_tokenizer_loads(shared_data):
  path = shared_data / "stories260K" / "hf" / "tokenizer.json"
  stories = tokenizers.load_tokenizer(path)
  assert (stories.vocab_size, stories.end_id) == (512, 2)
  assert stories.begin_ids.tolist() == [1]
  [ids] = stories.encode_batch(["Once upon a time"])
  assert ids.min() >= 3  # no special tokens in a stream
  assert stories.decode(ids).strip() == "Once upon a time"


def _ids(parts):
  return np.concatenate(list(parts)).tolist()


def test_stream_begins_documents_as_the_tokenizer_does(tmp_path):
  tokens = ["[UNK]", "a", "[PAD]", "[CLS]", "[SEP]"]
  foreign = _foreign(tmp_path / "t.json", tokens, framed=True)
  theirs = hf.Tokenizer.from_file(str(tmp_path / "t.json"))
  theirs.no_padding()
  alone = [theirs.encode(text).ids for text in ("a", "", "a")]
  assert _ids(foreign.stream(["a", "", "a"])) == sum(alone, [])
  empty = foreign.prompt(np.zeros(0, np.int32)).tolist()
  assert _ids(foreign.stream([])) == empty == [3]
  assert foreign.prompt(np.array([1])).tolist() == alone[0][:2]
  mapped = tokenizers.MappedTokenizer(foreign, np.array([4, 3, 2, 1, 0]))
  assert _ids(mapped.stream(["a"])) == [1, 3, 0]


@OURS
def test_stream_without_begin_ids_starts_after_an_end(tokenizer):
  [ids] = tokenizer.encode_batch(["a"])
  end = [tokenizer.end_id]
  assert _ids(tokenizer.stream(["a", "a"])) == [*end, *ids, *end, *ids, *end]
  assert tokenizer.prompt(ids).tolist() == ids.tolist()
  assert tokenizer.prompt(ids[:0]).tolist() == end


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (DataConfig(vocab_size=257), "258 or more"),
    (DataConfig(tokenizer="none.json"), "no tokenizer file"),
    (DataConfig(tokenizer="broken.json"), "is not a tokenizer.json"),
    (DataConfig(tokenizer="empty.json"), "has no tokens"),
  ],
)
def test_train_tokenizer_refuses_bad_options(
  tmp_path, monkeypatch, data, match
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.json").write_text('{"version": "1.0"')
  hf.Tokenizer(models.BPE()).save("empty.json")
  with pytest.raises(ConfigError, match=match):
    tokenizers.train_tokenizer(data, [CODE])


TOKENS = ["[PAD]", "a", "b", "c", "[UNK]", "[SEP]"]


def test_a_mapped_tokenizer_encodes_and_decodes_new_ids(tmp_path):
  plain = _foreign(tmp_path / "tokenizer.json", TOKENS)
  token_map = np.array([0, 1, 0, 2, 3, 4], np.int32)  # "b" is read as padding
  mapped = tokenizers.MappedTokenizer(plain, token_map)
  assert (mapped.vocab_size, mapped.plain_size) == (5, 6)
  assert (mapped.pad_id, mapped.end_id) == (0, 4)
  for length in (None, 3):
    [ids] = mapped.encode_batch(["a b c"], length)
    assert (ids.tolist(), ids.dtype) == ([1, 0, 2], np.int32)
  assert mapped.decode(ids).split() == ["a", "c"]
  twice = tokenizers.MappedTokenizer(mapped, np.array([0, 1, 0, 2, 3]))
  assert twice.token_map.tolist() == [0, 1, 0, 0, 2, 3]
  assert (twice.vocab_size, twice.plain_size, twice.end_id) == (4, 6, 3)
  with pytest.raises(ConfigError, match="of 4 tokens does not fit"):
    tokenizers.MappedTokenizer(mapped, np.arange(4))


def test_a_mapped_tokenizer_is_loaded_with_its_map(tmp_path):
  plain = _foreign(tmp_path / "plain.json", TOKENS)
  token_map = np.array([0, 1, 0, 2, 3, 4])
  folder = tmp_path / "run"
  folder.mkdir()
  path = str(folder / "tokenizer.json")
  tokenizers.MappedTokenizer(plain, token_map).save(path)
  loaded = tokenizers.load_tokenizer(path)
  assert isinstance(loaded, tokenizers.MappedTokenizer)
  np.testing.assert_array_equal(loaded.token_map, token_map)
  assert loaded.encode_batch(["c b"])[0].tolist() == [2, 0]
  assert loaded.plain_size == 6
  plain.save(path)  # what was left there is no map of this one
  assert type(tokenizers.load_tokenizer(path)) is tokenizers.Tokenizer


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[0, 1", "damaged"),
    ("[0, 1.0, 0, 2, 3, 4]", "not a list"),
    ("[[0], [1]]", "not a list"),
    ("[]", "not a list"),
    ('["a"]', "not a list"),
    ("[0, -2, 0, 2, 3, 4]", "not a list"),
    ("[0, -1, 0, 2, 3, 4]", "no id for one"),
    ("[0, 1]", "2 tokens does not fit"),
  ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, text, message):
  _foreign(tmp_path / "tokenizer.json", TOKENS)
  (tmp_path / "token_map.json").write_text(text)
  with pytest.raises(ConfigError, match=message):
    tokenizers.load_tokenizer(tmp_path / "tokenizer.json")


# Special tokens by name.

WORDS = ["!", "a", "<unk>", "</s>", "<|eot|>", "<|eom|>", "<|fill|>", "<pad>"]


def _words(added=(2, 3, 4, 5, 6)):
  ids = {word: i for i, word in enumerate(WORDS)}
  inner = hf.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  inner.add_special_tokens([WORDS[i] for i in added])
  return inner


def _load(folder, config=None, generation=None, inner=None):
  """Returns the tokenizer of a folder with these configs."""
  (inner or _words()).save(str(folder / "tokenizer.json"))
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
def test_special_ids_are_those_of_a_checkpoints_config(
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
def test_special_ids_of_options_complete_the_config(
  tmp_path, options, config, ends, pad
):
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  found = _load(tmp_path, config)
  assert (found.end_ids.tolist(), found.pad_id) == (ends, pad)


def test_special_ids_without_names_are_the_begin_id(tmp_path):
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


def test_special_tokens_are_saved_with_the_tokenizer(tmp_path):
  plain = _load(tmp_path, {"eos_token_id": [5, 4], "pad_token_id": 6})
  (tmp_path / "run").mkdir()
  plain.save(str(tmp_path / "run" / "tokenizer.json"))
  again = load_tokenizer(tmp_path / "run" / "tokenizer.json")
  assert (again.end_ids.tolist(), again.pad_id) == ([5, 4], 6)
  # Ids change with those that go, and are mapped; names stay.
  for one in (plain, again):
    keep = np.isin(np.arange(8), [1, 3, 7], invert=True)
    found = trim.trimmed(one, keep)  # "</s>" was added, and so stays
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


def test_unknown_special_tokens_leave_no_file(tmp_path):
  _load(tmp_path, {"eos_token_id": 4}).save(str(tmp_path / "tokenizer.json"))
  assert (tmp_path / special_tokens.SPECIAL_TOKENS).exists()
  Tokenizer(_words()).save(str(tmp_path / "tokenizer.json"))
  assert not (tmp_path / special_tokens.SPECIAL_TOKENS).exists()


@pytest.mark.parametrize(
  "text", ["[]", '{"ends": 3}', '{"end": []}', '{"ends": [3]}']
)
def test_a_damaged_special_tokens_file_is_refused(tmp_path, text):
  _load(tmp_path)
  (tmp_path / "special_tokens.json").write_text(text)
  with pytest.raises(ConfigError, match="special_tokens.json"):
    load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("id", [2**24, 4_000_000_000])
def test_an_id_beyond_any_vocabulary_is_refused(tmp_path, id):
  # The library would count up to the id to write it.
  text = hf.Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str()
  text = text.replace('"b":1', f'"b":{id}')
  (tmp_path / "tokenizer.json").write_text(text)
  with pytest.raises(ConfigError, match=f"id {id:,}"):
    load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "3", "[" * 100_000])
def test_damaged_configs_of_checkpoints_are_refused(tmp_path, text):
  _load(tmp_path, generation={"eos_token_id": 4})
  (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ConfigError, match="config.json is damaged"):
    load_tokenizer(tmp_path / "tokenizer.json")


# Long texts.


def test_a_long_text_encodes_in_pieces_as_the_whole(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  BPE.save(path)
  whole = hf.Tokenizer.from_file(path)
  text = ("x = [\n\n\n  1,\n] \n\r\n" + CODE + "\x1c\n\x85\nüber\n") * 60
  assert len(text) > 1e5
  [ids] = BPE.encode_batch([text])
  assert ids.tolist() == whole.encode(text).ids


_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama3"])
@pytest.mark.parametrize("text", ["one line\r\n", "a paragraph\n\n", "a.\n"])
def test_pieces_of_lines_encode_as_the_whole(tmp_path, kind, text):
  values = json.loads(BPE.to_json())
  values["model"]["vocab"]["ĊĊ"] = BPE.vocab_size
  values["model"]["merges"].append(["Ċ", "Ċ"])
  inner = hf.Tokenizer.from_str(json.dumps(values))
  to_bytes = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=kind == "gpt2"
  )
  if kind == "gpt2":
    inner.pre_tokenizer = to_bytes
  elif kind == "llama3":
    split = pre_tokenizers.Split(hf.Regex(_LLAMA_3), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
  end = pieces.find_end(inner)
  groups = list(pieces.groups([text * (100_000 // len(text)) + "end"], end))
  cut = [piece for group in groups for _, piece in group]
  is_cut = kind != "llama3" or text == "a.\n"
  assert (len(cut) > 1) == is_cut
  found = inner.encode_batch(cut, add_special_tokens=False)
  whole = inner.encode("".join(cut), add_special_tokens=False)
  assert [i for part in found for i in part.ids] == whole.ids


def test_training_on_pieces_of_a_text_equals_training_on_the_whole(monkeypatch):
  rng = np.random.default_rng(0)
  parts = ["a", "b", "word", " ", "  ", "\n", " \n ", ". ", "7", "é", "'s"]
  text = "".join(rng.choice(parts, 4000))

  def trained(size):
    monkeypatch.setattr(pieces, "_TRAINING_PIECE", size)
    return tokenizers.train_tokenizer(
      DataConfig(vocab_size=400), [text]
    ).to_json()

  assert trained(5) == trained(len(text))


def test_training_pieces_of_a_text_without_spaces_end_with_its_lines():
  found = list(pieces.for_training(["漢字。\n" * 9000]))
  assert max(map(len, found)) < 9000


def test_a_space_before_a_text_is_not_put_before_pieces(tmp_path):
  inner = hf.Tokenizer(models.WordLevel({"a": 0, "\u2581a": 1, "\n": 2}, "a"))
  space = pre_tokenizers.Metaspace(prepend_scheme="first")
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split("\n", "isolated"), space]
  )
  inner.save(str(tmp_path / "t.json"))
  [ids] = tokenizers.load_tokenizer(str(tmp_path / "t.json")).encode_batch(
    ["a\n" * 50_000]
  )
  assert ids.tolist() == inner.encode("a\n" * 50_000).ids
  assert ids.tolist().count(1) == 1
