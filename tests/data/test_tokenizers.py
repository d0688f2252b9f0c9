import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from folding import schema
from folding.config import DataConfig
from folding.data import tokenizers

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
def test_any_text_comes_back_exactly(tokenizer, text):
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
def test_decoding_leaves_special_tokens_out(tokenizer):
  [ids] = tokenizer.encode_batch(["text"])
  padded = [tokenizer.end_id, *ids.tolist(), tokenizer.end_id, tokenizer.pad_id]
  assert tokenizer.decode(padded) == "text"


@settings(max_examples=50, derandomize=True)
@given(text=st.text())
def test_bytes_gives_one_token_a_byte(text):
  raw = text.encode("utf-8")
  [ids] = BYTES.encode_batch([text])
  assert len(ids) == len(raw)
  # The same byte is always the same token, and different bytes differ.
  assert len(set(zip(raw, ids.tolist(), strict=True))) == len(set(raw))
  assert len(set(ids.tolist())) == len(set(raw))


def test_bytes_has_256_bytes_and_two_special_tokens():
  assert BYTES.vocab_size == 258
  assert sorted({BYTES.pad_id, BYTES.end_id}) == [0, 1]


def test_bpe_has_the_size_asked_for_and_merges():
  assert BPE.vocab_size == 300
  [ids] = BPE.encode_batch([CODE])
  assert ids.dtype == np.int32
  assert ids.max() < 300
  assert len(ids) < len(CODE) / 2


def test_bpe_keeps_a_line_break_with_its_indent():
  [ids] = BPE.encode_batch([":\n    "])
  assert len(ids) == 1


def test_bpe_training_is_deterministic(tmp_path):
  again = tokenizers.train_tokenizer(DataConfig(vocab_size=300), [CODE])
  BPE.save(str(tmp_path / "a.json"))
  again.save(str(tmp_path / "b.json"))
  first, second = (tmp_path / name for name in ("a.json", "b.json"))
  assert first.read_bytes() == second.read_bytes()


def test_saved_tokenizer_loads_as_it_was(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  BPE.save(path)
  loaded = tokenizers.train_tokenizer(DataConfig(tokenizer=path), [])
  assert (loaded.vocab_size, loaded.pad_id, loaded.end_id) == (300, 0, 1)
  text = CODE + "<end> é\u2028\x1c\n"
  [ids] = loaded.encode_batch([text])
  np.testing.assert_array_equal(ids, BPE.encode_batch([text])[0])
  assert loaded.decode(ids) == text


def test_a_batch_is_its_texts_one_by_one():
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


def test_foreign_tokenizer_keeps_its_special_ids_and_frame(tmp_path):
  tokens = ["[UNK]", "a", "[PAD]", "[CLS]", "[SEP]"]
  foreign = _foreign(tmp_path / "t.json", tokens, framed=True)
  assert (foreign.pad_id, foreign.end_id) == (2, 4)
  # A stream has no frames, and the file's cutting and padding are off.
  assert foreign.encode_batch(["a a a a a"])[0].tolist() == [1] * 5
  framed = foreign.encode_batch(["a a a a", "a"], max_length=4)
  assert [ids.tolist() for ids in framed] == [[3, 1, 1, 4], [3, 1, 4]]
  assert foreign.encode_batch(["a a a a a"])[0].tolist() == [1] * 5


@pytest.mark.parametrize("kind", ["BPE", "WordLevel"])
def test_what_begins_a_text_is_found_without_the_letter_a(tmp_path, kind):
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


def test_a_length_without_room_for_text_is_an_error(tmp_path):
  tokens = ["[UNK]", "a", "[CLS]", "[SEP]"]
  foreign = _foreign(tmp_path / "t.json", tokens, framed=True)
  assert len(foreign.encode_batch(["a a"], max_length=3)[0]) == 3
  for length in (1, 2):
    with pytest.raises(
      schema.ConfigError, match=f"length {length} has no room"
    ):
      foreign.encode_batch(["a"], max_length=length)


def test_a_word_that_a_tokenizer_cannot_read_is_an_error(tmp_path):
  inner = hf.Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # none is unknown
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  inner.save(str(tmp_path / "t.json"))
  foreign = tokenizers.load_tokenizer(str(tmp_path / "t.json"))
  for max_length in (None, 1):
    with pytest.raises(schema.ConfigError, match="cannot read a text: Word"):
      foreign.encode_batch(["a c"], max_length)
  assert foreign.encode_batch(["a b"])[0].tolist() == [0, 1]  # and cuts none


def test_a_tokenizer_without_tokens_is_an_error(tmp_path):
  path = tmp_path / "t.json"
  hf.Tokenizer(models.BPE()).save(str(path))
  with pytest.raises(schema.ConfigError, match="has no tokens"):
    tokenizers.load_tokenizer(str(path))


def test_a_tokenizer_that_cannot_be_written_is_an_os_error(tmp_path):
  with pytest.raises(OSError, match="No such file"):
    BPE.save(str(tmp_path / "none" / "t.json"))


def test_foreign_tokenizer_without_special_tokens_gets_id_0(tmp_path):
  foreign = _foreign(tmp_path / "t.json", ["[UNK]", "a"])
  assert (foreign.pad_id, foreign.end_id) == (0, 0)


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


def test_documents_begin_as_the_tokenizer_begins_one(tmp_path):
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
def test_where_nothing_begins_a_document_an_end_comes_before(tokenizer):
  [ids] = tokenizer.encode_batch(["a"])
  end = [tokenizer.end_id]
  assert _ids(tokenizer.stream(["a", "a"])) == [*end, *ids, *end, *ids, *end]
  assert tokenizer.prompt(ids).tolist() == ids.tolist()
  assert tokenizer.prompt(ids[:0]).tolist() == end


def test_vocabulary_that_cannot_hold_the_bytes_is_an_error():
  with pytest.raises(schema.ConfigError, match="use 258 or more"):
    tokenizers.train_tokenizer(DataConfig(vocab_size=257), [CODE])


def test_missing_tokenizer_file_is_an_error(tmp_path):
  path = str(tmp_path / "none.json")
  with pytest.raises(schema.ConfigError, match="no tokenizer file.*'bpe'"):
    tokenizers.train_tokenizer(DataConfig(tokenizer=path), [])


def test_broken_tokenizer_file_is_an_error(tmp_path):
  path = tmp_path / "broken.json"
  path.write_text('{"version": "1.0"')
  with pytest.raises(schema.ConfigError, match="is not a tokenizer.json"):
    tokenizers.load_tokenizer(path)


TOKENS = ["[PAD]", "a", "b", "c", "[UNK]", "[SEP]"]


def test_a_mapped_tokenizer_gives_and_reads_new_ids(tmp_path):
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
  with pytest.raises(schema.ConfigError, match="of 4 tokens does not fit"):
    tokenizers.MappedTokenizer(mapped, np.arange(4))


def test_a_mapped_tokenizer_is_read_back_with_its_map(tmp_path):
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
    ("[0, 1", "is no list of token ids"),
    ("[[0], [1]]", "is no list of token ids"),
    ("[]", "is no list of token ids"),
    ('["a"]', "is no list of token ids"),
    ("[0, -2, 0, 2, 3, 4]", "is no list of token ids"),
    ("[0, -1, 0, 2, 3, 4]", "has no id for one that the tokenizer makes"),
    ("[0, 1]", "a map of 2 tokens does not fit a tokenizer of 6"),
  ],
)
def test_a_map_that_does_not_fit_is_an_error(tmp_path, text, message):
  _foreign(tmp_path / "tokenizer.json", TOKENS)
  (tmp_path / "token_map.json").write_text(text)
  with pytest.raises(schema.ConfigError, match=message):
    tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
