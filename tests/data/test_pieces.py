"""Long texts, encoded in pieces, against the whole at once."""

import json

import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from folding.data import pieces, tokenizers
from tests.data.test_tokenizers import BPE, CODE


def test_a_long_text_encodes_in_pieces_as_the_whole(tmp_path):
  path = str(tmp_path / "tokenizer.json")
  BPE.save(path)
  whole = hf.Tokenizer.from_file(path)
  text = ("x = [\n\n\n  1,\n] \n\r\n" + CODE + "\x1c\n\x85\nüber\n") * 300
  assert len(text) > 5e5
  [ids] = BPE.encode_batch([text])
  assert ids.tolist() == whole.encode(text).ids


_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama3"])
@pytest.mark.parametrize("text", ["one line\r\n", "a paragraph\n\n", "a.\n"])
def test_lines_of_windows_and_paragraphs_are_cut_where_nothing_changes(
  tmp_path, kind, text
):
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
  end = pieces.piece_end(inner)
  groups = list(pieces.groups([text * 40_000 + "end"], end))
  cut = [piece for group in groups for _, piece in group]
  is_cut = kind != "llama3" or text == "a.\n"
  assert (len(cut) > 1) == is_cut
  found = inner.encode_batch(cut, add_special_tokens=False)
  whole = inner.encode("".join(cut), add_special_tokens=False)
  assert [i for part in found for i in part.ids] == whole.ids


def test_a_tokenizer_that_puts_a_space_first_does_so_once(tmp_path):
  inner = hf.Tokenizer(models.WordLevel({"a": 0, "\u2581a": 1, "\n": 2}, "a"))
  space = pre_tokenizers.Metaspace(prepend_scheme="first")
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split("\n", "isolated"), space]
  )
  inner.save(str(tmp_path / "t.json"))
  [ids] = tokenizers.load_tokenizer(str(tmp_path / "t.json")).encode_batch(
    ["a\n" * 100_000]
  )
  assert ids.tolist() == inner.encode("a\n" * 100_000).ids
  assert ids.tolist().count(1) == 1
