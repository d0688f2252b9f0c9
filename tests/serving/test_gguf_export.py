"""GGUF files: the same tokens and logits in llama.cpp as here."""

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

import folding
from folding import config as c
from folding.data import trim
from folding.data.special_tokens import SpecialTokens
from folding.data.tokenizers import MappedTokenizer, Tokenizer
from folding.errors import ConfigError
from folding.models.attention import rope_frequencies
from folding.serving import export as export_lib
from folding.serving import gguf_tokenizer
from folding.serving.generate import Generator
from folding.serving.gguf_export import export_gguf
from folding.serving.sampling import Sampling
from tests.serving import models

_TEXTS = [
  "Once upon a time, there was a little girl named Lily.",
  "  It's 12345.67% of Ünïcödé… 東京で、\t\n\n  they'LL  see   ",
  'def f(x_1):\n    """Doc."""\n    return {x: [1, 2]}\n',
  "<|im_start|>no special token</s> 🙂👍🏽 e\u0301 \u00bd ²",
  "a zebra in the bath, 2024",
  " ",
  "a",
]
_SHAPE = models.SHAPE | {"width": 32}


# Serves the model whose path is its argument, and prints the address.
_SERVER = """
import sys
import xllamacpp

options = xllamacpp.CommonParams()
options.model.path = sys.argv[1]
options.n_ctx, options.n_parallel, options.warmup = 512, 1, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.verbosity = 0
# By default, keys and values are float16, and so are parts of attention.
flash = xllamacpp.llama_flash_attn_type
options.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
options.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(options)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class _LlamaCpp:
  """A model in llama.cpp, behind its own HTTP server."""

  def __init__(self, path):
    # In a process that is killed: the destructor of a server can wait for ever.
    self._process = subprocess.Popen(
      [sys.executable, "-c", _SERVER, str(path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    address = self._process.stdout.readline().strip()
    self._address = urllib.parse.urlsplit(address).netloc

  def close(self):
    self._process.kill()
    self._process.communicate()

  def post(self, where, **values):
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection(self._address, timeout=60)
    with contextlib.closing(connection):
      connection.request("POST", where, json.dumps(values), headers)
      return json.loads(connection.getresponse().read())

  def encode(self, text, *, begin=False):
    # "<s>" in a text is text.
    options = {"add_special": begin, "parse_special": False}
    return self.post("/tokenize", content=text, **options)["tokens"]

  def complete(self, ids, count):
    """Returns the likeliest tokens, to the first that ends a text."""
    prompt = {"prompt": [int(i) for i in ids], "n_predict": count}
    options = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
    return self.post("/completion", **prompt, **options)["tokens"]

  def log_probabilities(self, ids, size):
    """Returns the log-probability of each next token."""
    prompt = {"prompt": [int(i) for i in ids], "n_predict": 1}
    # llama.cpp says nothing of a token that is the beginning of a character, so
    # it has to choose an entire one. The probabilities are those before the bias.
    bias = [[int(ids[-1]), 1e4]]
    options = {"n_probs": size, "logit_bias": bias, "cache_prompt": False}
    found = self.post("/completion", **prompt, **options)
    [position] = found["completion_probabilities"]
    out = np.full(size, np.nan)
    for one in position["top_logprobs"]:
      out[one["id"]] = one["logprob"]
    return out


@pytest.fixture
def llama_cpp():
  """Returns a function from a path to a server of that model."""
  if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs llama.cpp (pip install xllamacpp)")
  with contextlib.ExitStack() as servers:
    yield lambda path: servers.enter_context(
      contextlib.closing(_LlamaCpp(path))
    )


@pytest.fixture(autouse=True)
def gguf():
  return pytest.importorskip("gguf", reason="needs the extra `gguf`")


def _tokenizer(pre_tokenizer, **options):
  """Returns a BPE of bytes.

  Its merges know no words, so that where a text is split decides what it becomes,
  and it has a word that no merge makes.
  """
  inner = tokenizers.Tokenizer(kinds.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  inner.train_from_iterator(_TEXTS * 3 + models.random_texts(20), trainer)
  inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
  values = json.loads(inner.to_str())
  values["model"] |= options
  values["model"]["vocab"]["Ġzebra"] = len(values["model"]["vocab"])
  return tokenizers.Tokenizer.from_str(json.dumps(values))


def _words():
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(pattern):
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
  as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, as_bytes])


_PRE_TOKENIZERS = {
  "gpt-2": (_words, False),
  "smollm": (
    lambda: pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), _words()]
    ),
    False,
  ),
  "llama-bpe": (lambda: _split(gguf_tokenizer._LLAMA_3), True),
  "smaug-bpe": (lambda: _split(gguf_tokenizer._LLAMA_3), False),
  "qwen2": (lambda: _split(gguf_tokenizer._QWEN_2), False),
}


def _sentence_pieces(has_prefix):
  """Returns a BPE of characters with bytes for those that it does not know."""
  vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
  for token in [*gguf_tokenizer._BYTES, "▁", *"aehinorstuw.,", "th", "the"]:
    vocabulary.setdefault(token, len(vocabulary))
  merges = [("t", "h"), ("th", "e")]
  for start, end in [("h", "e"), ("▁", "the"), ("▁", "a"), ("a", "t")]:
    vocabulary.setdefault(start + end, len(vocabulary))
    merges.append((start, end))
  # Another way to the second token, ranked beside the first.
  merges.insert(2, ("t", "he"))
  inner = tokenizers.Tokenizer(
    kinds.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
  )
  replaced = normalizers.Replace(" ", "▁")
  inner.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁")] * has_prefix + [replaced]
  )
  inner.add_special_tokens(["<unk>", "<s>", "</s>"])
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return inner


def _model(shape=None, fold=None, inner=None):
  """Returns a random language model with a tokenizer of bytes."""
  inner = inner or _tokenizer(_words())
  return models.make(
    "lm",
    shape or c.llama(**_SHAPE, num_kv_heads=2),
    c.FoldConfig(**{"groups": 0, "values": "dense"} | (fold or {})),
    tokenizer_json=inner.to_str(),
  )


def _export(tmp_path, model, dtype="float32"):
  path = tmp_path / "model.gguf"
  export_gguf(path, model, dtype)
  return path


def _assert_same_logits(llama_cpp, path, model, atol=1e-4):
  text = "the cat sat on a mat and a dog"
  logits = models.logits(model, text)[-1].astype(np.float64)
  logits -= np.log(np.exp(logits - logits.max()).sum()) + logits.max()
  [ids] = model.tokenizer.encode_batch([text], 40)
  found = llama_cpp(path).log_probabilities(ids, len(logits))
  np.testing.assert_allclose(found, logits, atol=atol)


def _fields(gguf, path):
  return {
    name: field.contents()
    for name, field in gguf.GGUFReader(path).fields.items()
  }


@pytest.mark.parametrize("name", _PRE_TOKENIZERS)
def test_llama_cpp_reads_texts_as_the_same_bytes(llama_cpp, name, tmp_path):
  make, ignores_merges = _PRE_TOKENIZERS[name]
  inner = _tokenizer(make(), ignore_merges=ignores_merges)
  model = _model(inner=inner)
  server = llama_cpp(_export(tmp_path, model))
  expected = model.tokenizer.encode_batch(_TEXTS)
  assert [server.encode(x) for x in _TEXTS] == [x.tolist() for x in expected]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_llama_cpp_reads_texts_as_the_same_characters(
  llama_cpp, has_prefix, tmp_path
):
  model = _model(inner=_sentence_pieces(has_prefix))
  server = llama_cpp(_export(tmp_path, model))
  for text in [*_TEXTS, "the other"]:
    [ids] = model.tokenizer.encode_batch([text])
    assert server.encode(text) == ids.tolist()
    assert server.encode(text, begin=True) == [1, *ids]
    [found] = server.post("/detokenize", tokens=ids.tolist()).values()
    assert found.strip(" ") == text.strip(" ")


_SHAPES = {
  "untied": (c.llama(**_SHAPE, num_kv_heads=2, tie_embeddings=False), {}),
  "head-size": (c.llama(**_SHAPE, head_dim=16), {}),
  "biases": (c.llama(**_SHAPE, use_bias=True), {}),
  "qwen2": (c.llama(**_SHAPE, num_kv_heads=2, qkv_bias=True), {}),
  "qwen3": (c.llama(**_SHAPE, num_kv_heads=2, qk_norm=True), {}),
  "unreached-window": (c.llama(**_SHAPE, window=40), {}),
  "rope-base": (c.llama(**_SHAPE, rope_base=500.0), {}),
  "linear-rope": (c.llama(**_SHAPE, rope_scaling=(4.0,)), {}),
  "llama3-rope": (
    c.llama(**_SHAPE, rope_scaling=(8.0, 1.0, 4.0, 16.0), rope_base=100.0),
    {},
  ),
  "copies": (c.llama(**_SHAPE), {"groups": 2}),
  "low-rank": (c.llama(**_SHAPE), {"value_rank": (3, 8), "embedding_rank": 7}),
  "own-values": (
    c.llama(**_SHAPE, num_kv_heads=2),
    {"values": ("dense", "diagonal")},
  ),
}


@pytest.mark.parametrize("name", _SHAPES)
def test_llama_cpp_computes_the_same(llama_cpp, name, tmp_path):
  model = _model(*_SHAPES[name])
  _assert_same_logits(llama_cpp, _export(tmp_path, model), model)


def _shrunk():
  """Returns a model of layers that differ in heads, pairs and neurons."""
  model = _model(fold={"groups": 4, "rope": "pairs"})
  for n in range(2):  # 2 of the 4 pairs of K = 8 channels
    own = rope_frequencies(8, 10000.0)[np.array([[0, 2], [3, 1]])]
    model.params[f"blocks_{n}"]["attn"]["frequency"] = own
  model = models.with_zeros(model, [])
  model.params["blocks_1"]["attn"]["o"]["kernel"][:2] = 0
  model = export_lib.shrunk(model)
  assert model.config.model.mlp_width == (14, 13)
  assert model.config.model.heads == ((0, 1, 2, 3), (2, 3))
  return model


def test_layers_keep_their_sizes(gguf, llama_cpp, tmp_path):
  model = _shrunk()
  path = _export(tmp_path, model)
  _assert_same_logits(llama_cpp, path, model)
  fields = _fields(gguf, path)
  assert fields["general.architecture"] == "deci"
  assert fields["deci.attention.head_count"] == [4, 2]
  assert fields["deci.attention.head_count_kv"] == [2, 1]
  assert fields["deci.feed_forward_length"] == [14, 13]


def test_layers_that_lost_as_many_heads_are_a_llama(gguf, llama_cpp, tmp_path):
  model = _model()
  for n, heads in enumerate([slice(0, 2), slice(2, 4)]):
    model.params[f"blocks_{n}"]["attn"]["o"]["kernel"][heads] = 0
  model = export_lib.shrunk(model)
  assert model.config.model.heads == ((2, 3), (0, 1))
  path = _export(tmp_path, model)
  _assert_same_logits(llama_cpp, path, model)
  fields = _fields(gguf, path)
  assert fields["general.architecture"] == "llama"
  assert fields["llama.attention.head_count"] == 2


def test_quantised_rows_have_whole_blocks(gguf, llama_cpp, tmp_path):
  model = _shrunk()
  path = _export(tmp_path, model, "q8_0")
  tensors = {x.name: x for x in gguf.GGUFReader(path).tensors}
  assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "Q8_0"
  assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [32, 32]
  assert tensors["blk.1.attn_output.weight"].tensor_type.name == "F16"  # of 16
  assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
  _assert_same_logits(llama_cpp, path, model, atol=0.5)
  path.unlink()
  path = _export(tmp_path, model, "q4_0")
  tensors = {x.name: x.tensor_type.name for x in gguf.GGUFReader(path).tensors}
  assert tensors["blk.0.attn_q.weight"] == "Q4_0"
  assert tensors["token_embd.weight"] == "Q8_0"
  assert tensors["output.weight"] == "Q8_0"


def test_trimmed_tokens_are_left_out(llama_cpp, tmp_path):
  dense = _model(c.llama(**_SHAPE, tie_embeddings=False))
  keep = np.arange(dense.num_rows) % 3 > 0
  tokenizer = trim.trimmed(dense.tokenizer, keep)
  rows = tokenizer.plain_ids
  params = dict(dense.params)
  params["embed"] = {"embedding": params["embed"]["embedding"][rows]}
  params["head"] = {"kernel": params["head"]["kernel"][:, rows]}
  model = dataclasses.replace(dense, params=params, tokenizer=tokenizer)
  assert model.num_rows < dense.num_rows
  path = _export(tmp_path, model)
  _assert_same_logits(llama_cpp, path, model)
  server = llama_cpp(path)
  for text in _TEXTS:
    [ids] = model.tokenizer.encode_batch([text])
    assert server.encode(text) == ids.tolist()


def test_chat_is_written_as_by_the_template(llama_cpp, tmp_path):
  model = _model()
  template = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
  )
  special = SpecialTokens(("<|im_end|>", "<|endoftext|>"), None, template)
  inner = tokenizers.Tokenizer.from_str(model.tokenizer.to_json())
  model = dataclasses.replace(model, tokenizer=Tokenizer(inner, special))
  server = llama_cpp(_export(tmp_path, model))
  messages = [{"role": "user", "content": "the cat"}]
  found = server.post("/apply-template", messages=messages)
  assert found["prompt"] == "<|im_start|>the cat<|im_end|>"


def test_special_tokens_are_those_of_the_model(gguf, tmp_path):
  special = SpecialTokens(("<|im_end|>", "<|endoftext|>"), "<|im_start|>")
  model = _model()
  inner = tokenizers.Tokenizer.from_str(model.tokenizer.to_json())
  model = dataclasses.replace(model, tokenizer=Tokenizer(inner, special))
  fields = _fields(gguf, _export(tmp_path, model))
  names = ("bos", "eos", "eot", "padding")
  found = [fields[f"tokenizer.ggml.{name}_token_id"] for name in names]
  assert found == [2, 2, 0, 1]
  assert fields["tokenizer.ggml.add_bos_token"] is False
  assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_llama_cpp_continues_stories_alike(llama_cpp, shared_data, tmp_path):
  loaded = folding.load(shared_data / "stories260K" / "hf")
  server = llama_cpp(_export(tmp_path, loaded))
  path = shared_data / "tinystories_sample" / "test.txt"
  lines = [x for x in path.read_text("utf-8").splitlines() if len(x) > 40]
  prompts = [" ".join(x.split()[: 3 + n]) for n, x in enumerate(lines[:20])]
  ids = [
    loaded.tokenizer.prompt(row)
    for row in loaded.tokenizer.encode_batch(prompts)
  ]
  assert [server.encode(x, begin=True) for x in prompts] == [
    row.tolist() for row in ids
  ]
  generator = Generator(loaded.module)
  expected = generator(
    loaded.params,
    ids,
    max_new_tokens=64,
    sampling=Sampling(temperature=0.0),
    end_id=loaded.tokenizer.end_ids.tolist(),
  )
  for prompt, new in zip(ids, expected, strict=True):
    assert server.complete(prompt, 64) == new.tolist()


def _shared(model):
  """Returns a model in which two tokens have one row."""
  ids = np.minimum(np.arange(model.num_rows), model.num_rows - 2)
  params = dict(model.params)
  params["embed"] = {"embedding": params["embed"]["embedding"][:-1]}
  tokenizer = MappedTokenizer(model.tokenizer, ids)
  return dataclasses.replace(model, params=params, tokenizer=tokenizer)


def _words_alone():
  return _tokenizer(pre_tokenizers.WhitespaceSplit())


def _merging(change):
  """Returns SentencePiece's form of a BPE with other merges."""
  values = json.loads(_sentence_pieces(True).to_str())
  change(values["model"]["merges"])
  return tokenizers.Tokenizer.from_str(json.dumps(values))


# fmt: off
@pytest.mark.parametrize(("make", "message"), [
  (lambda: models.make(), "writes language models; .* task 'classify'"),
  (lambda: models.make("lm"), "llama needs model.*it is"),
  (lambda: models.make("lm", c.llama(**_SHAPE)), "kind BPE; .* WordPiece"),
  (lambda: _model(c.llama(**_SHAPE, window=5)), "no sliding window.* 5 of 40"),
  (lambda: _model(c.llama(**_SHAPE, activation="relu")), "activation='silu'"),
  (lambda: _model(c.llama(**_SHAPE, qk_norm=True, rope_scaling=(2.0,))),
   "rope_scaling of qwen3"),
  (lambda: _model(inner=_words_alone()), "no name for the pre-tokenizer"),
  # One way to make "the" is missing, or comes after another token.
  (lambda: _model(inner=_merging(lambda x: x.remove(["t", "he"]))),
   "no order by tokens"),
  (lambda: _model(inner=_merging(lambda x: x.append(x.pop(2)))),
   "no order by tokens"),
  (lambda: _shared(_model()), "share"),
])
# fmt: on
def test_export_gguf_refuses_what_llama_cpp_lacks(make, message, tmp_path):
  with pytest.raises(ConfigError, match=message) as error:
    _export(tmp_path, make())
  assert "\n" not in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_export_gguf_refuses_layers_of_several_sizes_for_qwen3(tmp_path):
  model = models.with_zeros(_model(*_SHAPES["qwen3"]), [])
  with pytest.raises(ConfigError, match="one number of heads and neurons"):
    _export(tmp_path, export_lib.shrunk(model))


def test_export_gguf_refuses_its_arguments(tmp_path, monkeypatch):
  model = _model()
  with pytest.raises(ConfigError, match="q8_0.*'int8'"):
    _export(tmp_path, model, "int8")
  with pytest.raises(ConfigError, match="not the name of a .gguf file"):
    export_gguf(tmp_path / "model", model)
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ConfigError, match=r"pip install 'folding-jax\[gguf\]'"):
    _export(tmp_path, model)


@pytest.mark.parametrize(
  ("dtype", "value"), [("float16", 1e5), ("q8_0", 1e8)]
)
def test_numbers_too_large_for_a_type_are_refused(gguf, tmp_path, dtype, value):
  model = _model()
  model.params["blocks_0"]["mlp"]["down"]["kernel"][0, 0] = value
  with pytest.raises(ConfigError, match="too large for .*; write float32"):
    _export(tmp_path, model, dtype)
  assert list(tmp_path.iterdir()) == []


def test_export_gguf_tells_the_size_before_it_writes(gguf, tmp_path):
  path, told = tmp_path / "model.gguf", []

  def report(message):
    assert not path.exists()
    told.append(message)

  size = export_gguf(path, _shrunk(), "float16", report=report)
  tensors = gguf.GGUFReader(path).tensors
  assert size["parameters"] == sum(x.data.nbytes for x in tensors)
  assert size["file"] == path.stat().st_size
  assert told[0].startswith(f"About {size['parameters']:,} bytes")
