"""Tiny checkpoints of every family, as values of config.json and folders."""

import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import models, pre_tokenizers, processors

from folding import paths
from folding.config import Config, DataConfig
from folding.models import families, hf_config, hf_weights
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes

N, D, H, F, V, P, C = 2, 16, 4, 24, 30, 12, 3
WORDS = "<pad> <s> </s> <unk> a b c d e f".split()

# fmt: off
_BERT = {
  "vocab_size": V, "hidden_size": D, "num_hidden_layers": N,
  "num_attention_heads": H, "intermediate_size": F,
  "max_position_embeddings": P, "hidden_dropout_prob": 0.0,
}
_LLAMA = {
  "vocab_size": V, "hidden_size": D, "num_hidden_layers": N,
  "num_attention_heads": H, "num_key_value_heads": 2, "intermediate_size": F,
  "max_position_embeddings": P, "rms_norm_eps": 1e-5,
}
_SCALING = {
  "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
  "high_freq_factor": 2.0, "original_max_position_embeddings": 8,
}
# Each is a config.json, without its architecture.
FAMILIES = {
  "bert": _BERT | {"model_type": "bert", "hidden_act": "relu"},
  "roberta": _BERT | {
    "model_type": "roberta", "max_position_embeddings": P + 2,
    "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
  },
  "distilbert": {
    "model_type": "distilbert", "vocab_size": V, "dim": D, "n_layers": N,
    "n_heads": H, "hidden_dim": F, "max_position_embeddings": P,
    "dropout": 0.0,
  },
  "mpnet": _BERT | {
    "model_type": "mpnet", "pad_token_id": 1, "max_position_embeddings": P + 2,
  },
  "electra": _BERT | {"model_type": "electra", "embedding_size": 10},
  "deberta-v2": _BERT | {"model_type": "deberta-v2", "embedding_size": 10},
  # Only the second layer has a window.
  "modernbert": {
    "model_type": "modernbert", "vocab_size": V, "hidden_size": D,
    "num_hidden_layers": N, "num_attention_heads": H, "intermediate_size": F,
    "max_position_embeddings": P, "pad_token_id": 0, "local_attention": 4,
    "global_rope_theta": 100.0, "local_rope_theta": 10.0,
    "classifier_pooling": "mean",
  },
  "gpt2": {
    "model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": N,
    "n_head": H, "n_positions": P, "resid_pdrop": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "n_inner": F,
  },
  "opt": {
    "model_type": "opt", "vocab_size": V, "hidden_size": D, "ffn_dim": F,
    "num_hidden_layers": N, "num_attention_heads": H, "dropout": 0.0,
    "max_position_embeddings": P,
  },
  "gpt_neox": {
    "model_type": "gpt_neox", "vocab_size": V, "hidden_size": 2 * D,
    "num_hidden_layers": N, "num_attention_heads": H, "intermediate_size": F,
    "max_position_embeddings": P, "rotary_pct": 0.5, "rotary_emb_base": 100,
  },
  "gpt_neox_in_turn": {
    "model_type": "gpt_neox", "vocab_size": V, "hidden_size": D,
    "num_hidden_layers": N, "num_attention_heads": H, "intermediate_size": F,
    "max_position_embeddings": P, "use_parallel_residual": False,
    "rotary_pct": 1.0, "tie_word_embeddings": True,
  },
  "llama": _LLAMA | {"model_type": "llama", "rope_theta": 100.0},
  "llama_biases_scaled": _LLAMA | {
    "model_type": "llama", "attention_bias": True, "mlp_bias": True,
    "tie_word_embeddings": True, "rope_scaling": _SCALING,
  },
  "llama_linear": _LLAMA | {
    "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0},
  },
  "mistral": _LLAMA | {
    "model_type": "mistral", "head_dim": 6, "sliding_window": 3,
  },
  "qwen2": _LLAMA | {"model_type": "qwen2"},
  "qwen2_windows": _LLAMA | {
    "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 2,
    "max_window_layers": 1,
  },
  # The first layer has a window. Caps that the logits exceed.
  "gemma2": _LLAMA | {
    "model_type": "gemma2", "head_dim": 6, "query_pre_attn_scalar": 6,
    "sliding_window": 3, "rope_theta": 100.0, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
  },
  # The first layer has a window.
  "gemma3_text": _LLAMA | {
    "model_type": "gemma3_text", "head_dim": 6, "query_pre_attn_scalar": 6,
    "sliding_window": 3, "sliding_window_pattern": 2, "rope_theta": 100.0,
    "rope_local_base_freq": 10.0,
  },
  "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 6},
}
# fmt: on


def _head(model_type):
  """Returns the head that a family has without classes."""
  is_causal = families.FAMILIES[model_type].computes.get("causal", True)
  return "lm" if is_causal else "none"


# One case per risk: each entry with the head that it has without classes, and
# one classifier per kind of tensor names.
CASES = [
  (name, _head(values["model_type"])) for name, values in FAMILIES.items()
] + [
  (name, "classify")
  for name in (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "mpnet",
    "modernbert",
    "gpt2",
    "gpt_neox",
    "llama",
  )
]


def description(name, head, **fields):
  """Returns the description of a tiny checkpoint with this head."""
  values = FAMILIES[name] | fields
  if head == "classify":
    values["architectures"] = ["AnyForSequenceClassification"]
    values["id2label"] = {str(i): f"class {i}" for i in range(C)}
  return hf_config.describe(values)


def model_of(described):
  """Returns our model of a description, unfolded."""
  config = Config(
    task="embed" if described.head == "none" else described.task,
    preset="none",
    model=described.config,
    data=DataConfig(length=described.max_length),
  )
  return make_model(
    shape_of(config), described.vocab_size, described.num_classes
  )


def shapes_of(described):
  """Returns {path: shape} of our model's parameters."""
  tree = param_shapes(model_of(described))
  return {path: x.shape for path, x in paths.flatten(tree).items()}


def random_params(described, seed=0):
  """Returns parameters without zeros.

  The exception is the head's bias in GPT-2 and Llama, which transformers lacks.
  """
  rng = np.random.default_rng(seed)
  flat = {
    path: (0.4 * rng.normal(size=shape)).astype(np.float32)
    for path, shape in shapes_of(described).items()
  }
  for path in flat:
    if path.endswith("relative_bias"):  # the layers share it
      flat[path] = flat["blocks_0/attn/relative_bias"]
    if path.endswith("scale"):  # 1 may be taken off without rounding
      flat[path] = np.round(flat[path] * 4096) / np.float32(4096)
  if described.config.causal and "head/bias" in flat:
    flat["head/bias"][:] = 0
  return traverse_util.unflatten_dict(flat, sep="/")


def write(folder, name, head="none", **fields):
  """Writes a checkpoint by our own export, and returns its parameters.

  Args:
    folder: A new folder.
    name: Key of `FAMILIES`.
    head: As for `description`.
    **fields: Other values of config.json.
  """
  described = description(name, head, **fields)
  params = random_params(described)
  hf_weights.save_pretrained(
    folder, params, described, bos_token_id=1, eos_token_id=2
  )
  write_tokenizer(folder / "tokenizer.json")
  return params


def write_tokenizer(path, words=WORDS):
  """Writes a tokenizer.json of words that frames a text by <s> and </s>."""
  ids = {word: i for i, word in enumerate(words)}
  inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  inner.post_processor = processors.TemplateProcessing(
    "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 1), ("</s>", 2)]
  )
  inner.add_special_tokens(words[:4])
  inner.save(str(path))
  return path


def assert_same(a, b):
  """Asserts that two trees have the same float32 arrays, bit for bit."""
  a, b = paths.flatten(a), paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert a[path].dtype == b[path].dtype == np.float32
