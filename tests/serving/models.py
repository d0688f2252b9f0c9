"""Small models ready for use, with random parameters and no training."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from folding import config as c
from folding.data.tokenizers import Tokenizer
from folding.model import Model
from folding.models.shape import shape_of
from folding.models.transformer import make_model

WORDS = "the cat sat on a mat and dog ran to old red barn".split()
LABELS = ("bad", "so so", "gut äh")
OUTPUTS = {"classify": LABELS, "multilabel": LABELS, "regress": ("score",)}
_JITTED: dict[str, Callable[..., Any]] = {}
SHAPE = {"num_layers": 2, "width": 16, "num_heads": 4, "mlp_width": 24}


def word_pieces() -> str:
  """Returns a tokenizer.json of words, two endings and framing tokens."""
  vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s", "##t", "c", "##a"]
  ids = {token: i for i, token in enumerate(vocab)}
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(ids, unk_token="[UNK]")
  )
  inner.add_special_tokens(vocab[:4])
  inner.normalizer = tokenizers.normalizers.Lowercase()
  inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
  )
  return inner.to_str()


def make(
  task: str = "classify",
  model: c.ModelConfig | None = None,
  fold: c.FoldConfig | None = None,
  seed: int = 0,
  length: int = 40,
  tokenizer_json: str | None = None,
) -> Model:
  """Returns a model with random values everywhere."""
  config = c.resolve(
    c.Config(
      task=task,
      data=c.DataConfig(length=length),
      model=model or c.ModelConfig(**SHAPE, causal=task == "lm"),
      fold=fold or c.FoldConfig(),
    )
  )
  tokenizer = Tokenizer(
    tokenizers.Tokenizer.from_str(tokenizer_json or word_pieces())
  )
  labels = OUTPUTS.get(task, ())
  rows = tokenizer.vocab_size
  net = make_model(shape_of(config), rows, len(labels))
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(net.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: rng.normal(scale=0.5, size=x.shape).astype(x.dtype), shapes
  )
  return Model.of(config, params, tokenizer, labels)


def with_tokenizer(loaded: Model, tokenizer_json: str) -> Model:
  """Returns the model with another tokenizer."""
  tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json))
  return dataclasses.replace(loaded, tokenizer=tokenizer)


def with_zeros(loaded: Model, tokens: list[int], seed: int = 1) -> Model:
  """Returns a copy with some tokens, neurons and weights at zero."""
  rng = np.random.default_rng(seed)
  params: Any = jax.tree.map(np.array, loaded.params)
  params["embed"]["embedding"][tokens] = 0
  for n in range(loaded.config.model.num_layers):
    block = params[f"blocks_{n}"]
    o = block["attn"]["o"]["kernel"]
    o[rng.uniform(size=o.shape) < 0.7] = 0
    block["mlp"]["down"]["kernel"][5 : 15 + n] = 0
  return dataclasses.replace(loaded, params=params)


def logits(loaded: Model, text: str) -> np.ndarray:
  """Returns the logits of one text by itself, without padding."""
  [ids] = loaded.tokenizer.encode_batch([text], loaded.config.data.length)
  if not ids.size:
    ids = np.array([loaded.tokenizer.end_id])
  variables, tokens = {"params": loaded.params}, jnp.asarray(ids[None])
  return np.asarray(jitted(loaded.module)(variables, tokens))[0]


def jitted(module: nn.Module) -> Callable[..., Any]:
  """Returns `module.apply` as one jitted function for all equal modules."""
  return _JITTED.setdefault(repr(module), jax.jit(module.apply))


def random_texts(count: int, seed: int = 0) -> list[str]:
  """Returns texts of 0, 3, 20 or 50 words."""
  rng = np.random.default_rng(seed)
  sizes = rng.choice([0, 3, 20, 50], size=count)
  return [" ".join(rng.choice(WORDS, size=size)) for size in sizes]


def vocabulary(tokenizer_json: str) -> dict[str, int]:
  """Returns the tokens of a tokenizer.json."""
  return json.loads(tokenizer_json)["model"]["vocab"]
